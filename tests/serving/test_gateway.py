"""The HTTP side of a server, without engines: who gets in, what is refused, and how."""

from __future__ import annotations

import asyncio
import json
import re
import time
from itertools import product

import pytest
from gatewayed import JSON, KEY, Client, FakeGateway, error_of, routes, rows, settings_of
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from zoray.engines.shared.openai import EngineGone
from zoray.records import ConfigError
from zoray.serving.deployments.application import Calls
from zoray.serving.http.door import HEADERS, MOST_JSON, Rates
from zoray.serving.store import NotFound, write_json

OPEN = {"/", "/{asset}", "/health"}


@pytest.fixture
def locked(chat_model, tmp_path):
    return FakeGateway(settings_of(chat_model, tmp_path / "store"), KEY)


# The key.


def test_every_route_needs_the_key_but_the_page_and_health(locked):
    client = Client(locked)
    for method, path, pattern in routes(client):
        response = client.request(method, path)
        if pattern in OPEN and method in ("GET", "HEAD"):
            assert response.status_code in (200, 404), (method, path)  # the page may not be built yet
        else:
            assert response.status_code == 401, (method, path)
            assert method == "HEAD" or error_of(response)["type"] == "authentication_error"
    assert client.get("/nothing-here").status_code == client.get("/v1/nothing").status_code == 401
    assert client.post("/health").status_code == client.raw({"path": "//health"})[0] == 401
    assert locked.asked == []


def test_with_the_key_every_route_is_reached(locked):
    client = Client(locked, KEY)
    for method, path, _ in routes(client):
        assert client.request(method, path).status_code not in (401, 403, 500), (method, path)


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", KEY.encode(), b"Basic " + KEY.encode(), b"Bearer " + KEY[:-1].encode(),
     b"bearer\t" + b"x",
     b"Bearer " + KEY.encode() + b"x", b"Bearer " + KEY.upper().encode(), b"Bearer \xff\xfe", "Bearer ключ".encode(),
     b"Bearer " + KEY.encode() + b", Bearer x", b"Bearer None", b"B" * 10_000],
)  # fmt: skip
def test_what_is_not_the_key_does_not_open(locked, value):
    status, _, body = Client(locked).raw({"headers": [(b"host", b"127.0.0.1"), (b"authorization", value)]})
    assert status == 401 and KEY not in body.decode()


def test_a_key_may_be_of_any_characters(chat_model, tmp_path):
    key = "Schlüssel-ключ-0123"
    client = Client(FakeGateway(settings_of(chat_model, tmp_path / "s"), key))
    headers = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {key}".encode())]
    assert client.raw({"headers": headers})[0] == 200


def test_the_key_is_compared_in_constant_time(locked, monkeypatch):
    seen = []
    monkeypatch.setattr("zoray.serving.http.door.hmac.compare_digest", lambda *pair: bool(seen.append(pair)))
    assert Client(locked, "x").get("/v1/models").status_code == 401 and len(seen) == 1


# Other sites.


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Host": "127.0.0.1:8000/health?"},
        {"Host": "127.0.0.1@evil.example"},
        {"Host": "[::1]evil"},
    ],
)
def test_requests_for_pages_of_other_sites_are_refused(client, gateway, headers):
    body = {"messages": [{"role": "user", "content": "a"}]}
    for response in (client.get("/v1/files", headers=headers), client.delete("/v1/data", headers=headers)):
        assert response.status_code == 403, error_of(response)
    assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 403 and gateway.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost:1234", "Origin": "http://localhost:1234"},
        {"Host": "LOCALHOST"},
        {"Host": "[::1]"},
        {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
    ],
)
def test_requests_of_the_servers_own_page_pass(client, headers):
    assert client.get("/v1/files", headers=headers).status_code == 200


def test_all_of_this_machines_addresses_are_guarded_against_rebound_names(chat_model, tmp_path):
    for host in ("127.0.0.5", "::1", "localhost"):  # none of them needs a key
        client = Client(FakeGateway(settings_of(chat_model, tmp_path / host, host=host)))
        assert client.get("/v1/files", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/v1/files").status_code == 200
    public = Client(FakeGateway(settings_of(chat_model, tmp_path / "p", host="0.0.0.0"), KEY), KEY)
    assert public.get("/v1/files", headers={"Host": "gpu7.example:8000"}).status_code == 200
    headers = {"Host": "gpu7.example:8000", "Origin": "http://evil.example"}
    assert public.get("/v1/files", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Host": "llm.example.org"}, "Host to be of this .* got 'llm.example.org'.*names=\\[.llm.example.org.\\]"),
        ({"Host": "llm.example.org:8443"}, "got 'llm.example.org:8443'.*names=\\[.llm.example.org.\\]"),
        ({"Host": "evil.example/x"}, "expected Host to be a name or an address; got 'evil.example/x'$"),
        ({"Origin": "https://llm.example.org"}, "Origin to be that of 127.0.0.1:8000.*names=\\[.llm.example.org.\\]"),
        ({"Origin": "https://llm.example.org:8443"}, "names=\\[.llm.example.org:8443.\\]"),
        ({"Origin": "null"}, "expected Origin .* got 'null'$"),
        ({"Sec-Fetch-Site": "cross-site"}, "pages of other sites are not answered; got Sec-Fetch-Site: cross-site"),
    ],
)  # fmt: skip
def test_a_refusal_says_which_header_was_not_accepted_and_what_to_set(client, headers, said):
    error = error_of(client.get("/v1/files", headers=headers))
    assert error["code"] == 403 and re.search(said, error["message"]), error


NAMES = ("llm.example.org", "chat.example.org:8443")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "llm.example.org"}, 200),
        ({"Host": "LLM.example.org:443"}, 200),
        ({"Host": "llm.example.org", "Origin": "https://llm.example.org"}, 200),
        ({"Host": "llm.example.org:80", "Origin": "http://llm.example.org"}, 200),
        ({"Origin": "https://llm.example.org", "Sec-Fetch-Site": "same-origin"}, 200),  # the Host header not passed on
        ({"Origin": "https://llm.example.org:443"}, 200),
        ({"Host": "chat.example.org", "Origin": "https://chat.example.org:8443"}, 200),  # passed on as nginx's $host
        ({"Host": "localhost:8000"}, 200),
        ({"Origin": "https://llm.example.org:9999"}, 403),
        ({"Origin": "https://chat.example.org"}, 403),
        ({"Origin": "https://www.llm.example.org"}, 403),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "https://llm.example.org", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "example.org"}, 403),
        ({"Host": "llm.example.org.evil.example"}, 403),
    ],
)
def test_behind_a_proxy_the_servers_public_names_are_its_own(chat_model, tmp_path, headers, status):
    client = Client(FakeGateway(settings_of(chat_model, tmp_path / "s", names=NAMES), KEY), KEY)
    for response in (client.get("/v1/files", headers=headers), client.post("/v1/conversations/file", headers=headers)):
        assert (response.status_code == 403) == (status == 403), response.text


def test_behind_a_proxy_each_client_has_its_own_rate(chat_model, tmp_path):
    settings = settings_of(chat_model, tmp_path / "s", names=NAMES, requests_per_minute=2)
    client = Client(FakeGateway(settings, KEY), KEY)

    def statuses(address, client=client):
        headers = {"X-Forwarded-For": address}
        return [client.get("/v1/learning", headers=headers).status_code for _ in range(3)]

    assert statuses("203.0.113.5") == [200, 200, 429]
    assert statuses("10.9.9.9, 203.0.113.5") == [429] * 3  # what it has made up itself does not count
    assert statuses("203.0.113.6") == [200, 200, 429]
    other = Client(FakeGateway(settings, KEY), KEY, address="203.0.113.7")  # no proxy of this machine
    assert [status for k in range(2) for status in statuses(f"10.0.0.{k}", other)] == [200, 200, *[429] * 4]


def test_a_link_to_the_page_may_be_followed_and_no_other(client):
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code in (200, 404)
    assert client.get("/app.js", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_no_answer_lets_other_sites_read_it_and_all_forbid_sniffing(locked):
    for key in (None, KEY):
        client = Client(locked, key)
        for (method, path, _), headers in product(routes(client), ({}, {"Origin": "http://evil.example"})):
            response = client.request(method, path, headers=headers)
            assert not [name for name in response.headers if name.startswith("access-control")]
            assert all(response.headers[name] == value for name, value in HEADERS.items()), (method, path)
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
        response = client.request("OPTIONS", "/v1/data", headers=preflight)
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers


def test_there_are_no_websockets(client):
    sent = []

    async def main():
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await client.app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)

    asyncio.run(main())
    assert [message["type"] for message in sent] == ["websocket.close"]


# Methods and addresses.


def test_head_is_answered_on_every_route_that_has_get(client):
    number = client.upload(rows()).json()["id"]
    for path in ("/health", "/", "/app.js", "/v1/models", "/v1/models/tiny", "/v1/files", f"/v1/files/{number}/content",
                 "/v1/fine_tuning/jobs", "/v1/versions", "/v1/overview", "/openapi.json"):  # fmt: skip
        found, whole = client.request("HEAD", path), client.get(path)
        assert found.status_code == whole.status_code == 200 and found.content == b"" != whole.content, path
        assert found.headers == whole.headers
    assert client.request("HEAD", "/v1/models/none").status_code == 404
    assert client.request("HEAD", "/v1/chat/completions").status_code == 405
    assert all("head" not in methods for methods in client.get("/openapi.json").json()["paths"].values())


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/completions", "/v1/completions"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/tiny", "/v1/models/tiny"),
        ("POST", "/files", "/v1/files"),
        ("POST", "/fine_tuning/jobs", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/api/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "//v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/", "/v1/chat/completions"),
    ],
)
def test_a_base_url_without_v1_is_told_so(client, method, path, meant):
    status, _, body = client.raw({"method": method, "path": path})
    error = json.loads(body)["error"]
    assert status == 404 and "base_url=http://HOST:PORT/v1" in error["message"] and f"mean {meant}?" in error["message"]


def test_what_else_openais_api_has_is_told_apart_from_typing_errors(client):
    for path in ("/v1/responses", "/v1/embeddings", "/v1/images/generations"):
        assert "expected one of chat/completions, completions, models" in error_of(client.post(path))["message"]
    assert error_of(client.get("/v1/nothing"))["message"] == "there is nothing here"


# Rates and sizes.


def test_an_address_that_asks_too_often_waits_and_is_let_in_again(chat_model, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("zoray.serving.http.door.time.monotonic", lambda: now[0])
    gateway = FakeGateway(settings_of(chat_model, tmp_path / "s", requests_per_minute=3), KEY)
    client = Client(gateway, KEY)
    assert [client.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
    response = client.get("/")  # all requests count, also those without the key
    assert error_of(response)["type"] == "rate_limit_error" and response.headers["retry-after"] == "20"
    now[0] += 20
    assert client.get("/v1/models").status_code == 200 and client.get("/v1/models").status_code == 429
    now[0] += 3600
    assert [client.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_guesses_at_the_key_are_limited(chat_model, tmp_path):
    client = Client(FakeGateway(settings_of(chat_model, tmp_path / "s", requests_per_minute=5), KEY), "guess")
    assert [client.get("/v1/models").status_code for _ in range(7)] == [401] * 5 + [429] * 2


def test_rates_are_those_of_an_address_or_of_a_network_of_ipv6():
    rates = Rates(1)
    assert rates.take("10.0.0.1") == 0 and rates.take("10.0.0.2") == 0 and rates.take("10.0.0.1") > 0
    assert rates.take("::ffff:10.0.0.1") > 0
    assert rates.take("2001:db8:1:2::1") == 0 and rates.take("2001:db8:1:2:ffff::1%eth0") > 0
    assert rates.take("2001:db8:1:3::1") == 0 and rates.take("?") == 0 and rates.take("?") > 0


def test_rates_of_very_many_addresses_take_no_more_memory():
    rates = Rates(1)
    for number in range(70_000):
        rates.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(rates._left) == 65_536


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/fine_tuning/jobs", "/v1/conversations"]
)
def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(client, gateway, path):
    large = b'{"messages": "' + b"x" * MOST_JSON + b'"}'
    assert error_of(client.post(path, content=large, headers=JSON))["message"].startswith("expected at most 4,194,304")
    asked = []

    async def chunks():
        for _ in range(1000):
            asked.append(1)
            yield b"x" * 65_536

    assert client.post(path, content=chunks(), headers=JSON).status_code == 413
    scope = {"method": "POST", "path": path, "headers": [(b"host", b"127.0.0.1"), (b"content-length", b"9" * 30)]}
    assert client.raw(scope)[0] == 413 and gateway.asked == []


def test_uploads_are_limited_in_size(chat_model, tmp_path):
    gateway = FakeGateway(settings_of(chat_model, tmp_path / "s", max_upload_mb=0.5, max_storage_mb=1.2))
    client = Client(gateway)
    line = b"x" * 999 + b"\n"
    assert client.upload(line * 500).status_code == 200
    assert client.upload(line * 530).status_code == 413
    assert client.upload(line * 5000).status_code == 413
    assert client.upload(line * 500).status_code == 200
    assert "1.2 MB in all" in error_of(client.upload(line * 500))["message"]
    assert len(client.get("/v1/files").json()["data"]) == 2


def test_conversations_count_to_what_is_stored(chat_model, tmp_path):
    client = Client(FakeGateway(settings_of(chat_model, tmp_path / "s", max_storage_mb=0.5)))
    messages = [{"role": "user", "content": "q" * 90_000}, {"role": "assistant", "content": "a" * 90_000}]
    found = [client.post("/v1/conversations", json={"messages": messages, "up": True}).status_code for _ in range(4)]
    assert found == [200, 200, 400, 400]


def test_bodies_in_memory_are_bounded_all_together(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr("zoray.serving.http.door.MOST_HELD", 0)
    client = Client(FakeGateway(settings_of(chat_model, tmp_path / "s", max_upload_mb=0.01)))  # four of 76 kB

    async def main():
        hold = asyncio.Event()

        async def slow():
            yield b"x" * 60_000
            await hold.wait()

        waiting = [asyncio.create_task(client.http.post("/v1/completions", content=slow())) for _ in range(5)]
        await asyncio.sleep(0.2)
        refused = await client.http.post("/v1/completions", content=b"x" * 60_000, headers=JSON)
        hold.set()
        ended = [(await task).status_code for task in waiting]
        return refused, ended, await client.http.post("/v1/completions", json={"prompt": "a" * 60_000})

    refused, ended, after = client._loop.run_until_complete(main())
    assert refused.status_code == 503 and "retry-after" in refused.headers and ended == [400] * 5
    assert after.status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(client, monkeypatch):
    monkeypatch.setattr("zoray.serving.http.door.SECONDS", {"json": 0.1, "upload": 0.1})

    async def slow():
        yield b"{"
        await asyncio.sleep(30)

    begin = time.monotonic()
    for path in ("/v1/completions", "/v1/files"):
        assert error_of(client.post(path, content=slow()))["code"] == 408
    assert time.monotonic() - begin < 5


# Mistakes of the server's own.


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ActorDiedError(), 503),
        (BackPressureError(1, 1), 503),
        (RayTaskError("f", "a secret", EngineGone("a secret")), 503),
        (RayTaskError("f", "a secret", TimeoutError("a secret")), 503),
        (RayTaskError("f", "a secret", NotFound("there is none")), 404),
        (RayTaskError("f", "a secret", KeyError("a secret")), 500),
        (ZeroDivisionError("a secret"), 500),
    ],
)
def test_mistakes_are_told_apart_from_overload_and_say_nothing(client, gateway, monkeypatch, caplog, error, status):
    async def fails(*_):
        raise error
        yield

    monkeypatch.setattr(gateway, "answer", fails)
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response)["code"] == status == response.status_code and "secret" not in response.text + caplog.text
    assert ("retry-after" in response.headers) == (status == 503)
    assert all(name in response.headers for name in HEADERS)


def test_an_engine_that_ends_in_the_middle_of_a_stream_is_a_clean_end(client, gateway, monkeypatch):
    async def fails(*_):
        yield 200, True, b"data: {}\n\n"
        raise RayTaskError("f", "a secret", EngineGone("a secret"))

    monkeypatch.setattr(gateway, "answer", fails)
    response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert response.text.count("data: ") == 2 and '"code": 503' in response.text and "secret" not in response.text


def test_requests_lead_to_the_tuners_public_methods_and_to_nothing_else(gateway):
    assert asyncio.run(gateway.tuner.answering()) == {"live": None, "names": []}
    for name in ("start", "close", "where", "states", "plainly", "_turn", "__init__", "__class__", "nothing"):
        with pytest.raises(ConfigError, match=f"^there is no {name}$"):
            asyncio.run(Calls.__getattr__(gateway.tuner, name)())


def test_what_is_deleted_meanwhile_is_not_there(gateway, client):
    number = client.upload(rows()).json()["id"]
    client.post("/v1/fine_tuning/jobs", json={"training_file": number, "suffix": "mail"})
    folder = gateway.inner.store.folder
    (folder / "jobs" / "mail" / "state.json").unlink()
    (folder / "files" / number / "meta.json").unlink()
    assert client.get("/v1/fine_tuning/jobs/mail").status_code == 404 and client.get("/v1/files").status_code == 200
    assert client.get(f"/v1/files/{number}").status_code == 404


def test_learning_of_a_version_that_is_learnt_anew_has_another_mark(gateway):
    store = gateway.inner.store
    marks = []
    for number in range(2):
        folder = store.new_version("mail@10")
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        write_json(folder / "meta.json", {"id": "mail@10", "job": "mail", "created_at": number})
        marks.append(store.mark("mail@10"))
        store.delete_version("mail@10")
    assert marks[0] != marks[1]
    with pytest.raises(NotFound):
        store.mark("mail@10")


def test_the_page_is_sent_what_has_changed_only(client, gateway):
    found = client.get("/v1/overview").json()
    assert found["parts"].keys() == found["marks"].keys()
    assert found["parts"]["server"] == {"name": "tiny", "steps": 60} and found["parts"]["numbers"]["id"] is None
    have = ",".join(f"{name}:{mark}" for name, mark in found["marks"].items())
    again = client.get("/v1/overview", params={"have": have}).json()
    assert again == {"marks": found["marks"], "parts": {}}
    number = client.upload(rows()).json()["id"]
    body = {"training_file": number, "suffix": "mail"}
    client.post("/v1/fine_tuning/jobs", json=body)
    new = client.get("/v1/overview", params={"have": have, "job": "mail"}).json()["parts"]
    assert new.keys() == {"files", "jobs", "numbers"}
    assert [file["id"] for file in new["files"]] == [number] and [job["id"] for job in new["jobs"]] == ["mail"]
    assert new["numbers"]["id"] == "mail" and new["numbers"]["events"][0]["message"] == "learns from mail.csv"
    odd = client.get("/v1/overview", params={"have": "jobs:0,,:,x" * 50, "job": "../mail"})
    assert odd.status_code == 200 and odd.json()["parts"]["numbers"]["id"] is None


def test_lists_are_had_piece_by_piece_and_to_their_end(client, gateway):
    number = client.upload(rows()).json()["id"]
    client.post("/v1/fine_tuning/jobs", json={"training_file": number, "suffix": "mail"})
    for turn in range(7):
        client.post(f"/v1/fine_tuning/jobs/mail/{('pause', 'resume')[turn % 2]}")
    seen, after = [], None
    while True:
        asked = {"limit": 3, **({"after": after} if after else {})}
        found = client.get("/v1/fine_tuning/jobs/mail/events", params=asked).json()
        seen += [event["id"] for event in found["data"]]
        if not found["has_more"]:
            break
        after = found["last_id"]
    assert seen == [f"mail-{k}" for k in range(7, -1, -1)]
    assert error_of(client.get("/v1/fine_tuning/jobs/mail/events", params={"after": "x"}))["code"] == 404


def test_a_cluster_that_has_ray_serve_already_is_refused(monkeypatch):
    from zoray.serving.deployments import start

    def none(*_, **__):
        raise ValueError("there is no actor of that name")

    monkeypatch.setattr("ray.get_actor", none)
    start._check_free()
    monkeypatch.setattr("ray.get_actor", lambda *_, **__: object())
    with pytest.raises(ConfigError, match="expected no Ray Serve on the cluster that was joined"):
        start._check_free()
