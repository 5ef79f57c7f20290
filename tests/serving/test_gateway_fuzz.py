"""Ten thousand odd requests to a server's HTTP side without engines; test_serving_fuzz.py has fewer to a real one."""

from functools import cache

import pytest
from odd import Odd, ask

import zoray.scoring.workload


@pytest.mark.slow
def test_ten_thousand_odd_requests_are_answered_or_refused(client, gateway, monkeypatch):
    monkeypatch.setattr(
        "zoray.scoring.workload.load_tokenizer", cache(zoray.scoring.workload.load_tokenizer)
    )  # else it takes most of the time
    folder = gateway.inner.store.folder
    statuses = client._loop.run_until_complete(ask(client.http, Odd(1), 10_000))
    print(dict(sorted(statuses.items())))
    assert statuses.total() == 10_000 and statuses[0] == 0
    assert statuses[200] > 2000 and statuses[400] > 1000 and not [status for status in statuses if status >= 500]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    kept = {"files", "jobs", "versions", "conversations", "learning.json", "live.json"}
    assert {path.name for path in folder.iterdir()} <= kept
    assert not [*folder.glob("*/.*"), *folder.glob("*/*/.*")]  # nothing is half done
    kinds = {kind for kind, _ in gateway.asked}
    assert kinds == {"chat", "completions"} and client.delete("/v1/data").json() == {"deleted": True}
    assert not [
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("learning.json", "live.json")
    ]
