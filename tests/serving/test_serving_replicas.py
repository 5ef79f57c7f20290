"""A real server of two engines: requests are shared out among them, and so are a job's tiles."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from chatty import chat_llama
from served import Served, labelled

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A server with two engines."""
    root = tmp_path_factory.mktemp("pair")
    served = Served(chat_llama(root / "model"), root / "store", "serve.replicas=2").start()
    served.wait(lambda: len(served.processes("EngineCore")) == 2, 120)
    yield served
    served.stop()


def cores(served):
    """Seconds of CPU that each engine's core has taken."""
    return {process.pid: sum(process.cpu_times()[:2]) for process in served.processes("EngineCore")}


def shared_out(served, before):
    """Both have worked since, and neither much more than the other: a core that waits takes no time."""
    busy = {pid: seconds - before[pid] for pid, seconds in cores(served).items()}
    return len(busy) == 2 and min(busy.values()) > 0.25 * max(busy.values()) > 0.1


def ask_many(served, model, count=120):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda k: served.ask(model, f"the film number {k % 7}", 16), range(count)))


def test_both_engines_answer_and_both_score_a_jobs_tiles(pair):
    before = cores(pair)
    alone = ask_many(pair, "tiny")
    assert shared_out(pair, before)
    assert len({tuple(alone[k::7]) for k in range(7)}) > 1 and all(len(set(alone[k::7])) == 1 for k in range(7))

    before, number = cores(pair), pair.upload("mail.csv", labelled())
    pair.openai.fine_tuning.jobs.create(model="tiny", training_file=number, suffix="both")
    pair.wait(lambda: pair.job("both")["status"] not in ("queued", "running"), 240)
    summary = json.loads((pair.folder / "jobs" / "both" / "run" / "summary.json").read_text())
    assert summary["finished"] and summary["replicas"] == 2 and summary["lost_replicas"] == 0
    assert shared_out(pair, before)

    version = pair.http.get("/v1/versions").json()["live"]
    assert version is not None
    learnt = ask_many(pair, "live")
    assert learnt == ask_many(pair, version) and all(len(set(learnt[k::7])) == 1 for k in range(7))


def test_one_engine_that_is_killed_leaves_the_other_to_answer_and_to_tune(pair):
    pair.openai.fine_tuning.jobs.create(
        **{"model": "tiny", "training_file": pair.upload("mail.csv", labelled()), "suffix": "on"},
        extra_body={"hyperparameters": {"steps": 100_000}},
    )
    pair.wait(lambda: pair.job("on")["step"] > 5, 120)
    whole = ask_many(pair, "tiny", 7)
    engines = pair.processes("ServeReplica:zoray:Engine")
    assert len(engines) == 2
    engines[0].kill()
    step = pair.job("on")["step"]
    answers = [pair.ask("tiny", f"the film number {k % 7}", 16) for k in range(21)]  # none fails: it is asked again
    assert answers == whole * 3
    pair.wait(lambda: pair.job("on")["step"] > step + 5, 120)
    pair.wait(lambda: len(pair.processes("ServeReplica:zoray:Engine")) == 2, 120)
    pair.openai.fine_tuning.jobs.cancel("on")


def test_sigterm_ends_it_quietly(pair):
    assert pair.stop(signal.SIGTERM) == 0
    said = pair.log.read_text()
    assert said.splitlines()[-1] == "stopping; jobs continue when the server is restarted", said
    assert "SIGTERM" not in said
