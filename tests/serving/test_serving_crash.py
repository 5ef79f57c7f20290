"""Parts of a real server, and all of it, are killed while it chats and tunes: nothing that was accepted is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time

import openai
import psutil
import pytest
from chatty import chat_llama
from served import Served, labelled

from zoray.run import journal
from zoray.run.config import INTERRUPT_EXIT

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A server that only these tests use."""
    root = tmp_path_factory.mktemp("crash")
    served = Served(chat_llama(root / "model"), root / "store", "serve.eval_every=50").start()
    number = served.upload("mail.csv", labelled())
    served.openai.fine_tuning.jobs.create(
        model="tiny", training_file=number, suffix="long", extra_body={"hyperparameters": {"steps": 100_000}}
    )
    served.wait(lambda: served.http.get("/v1/versions").json()["data"], 300)
    yield served
    served.stop()


def steps(served):
    return served.job("long")["step"]


def goes_on(served, seconds=300):
    """The job takes further steps."""
    before = served.wait(lambda: steps(served), seconds)
    served.wait(lambda: steps(served) > before + 3, seconds)


class Talk(threading.Thread):
    """A client that streams answers on and on, and writes down how each of them ended."""

    def __init__(self, served):
        super().__init__(daemon=True)
        self.served, self.ended, self.ends = served, threading.Event(), []

    def run(self):
        while not self.ended.is_set():
            try:
                events = self.served.openai.chat.completions.create(
                    model="live", messages=[{"role": "user", "content": "It was"}], max_tokens=64, stream=True
                )
                last = [event.choices[0].finish_reason for event in events][-1]
                self.ends.append("whole" if last else "cut off")
            except (openai.APIStatusError, openai.APIConnectionError) as error:
                self.ends.append(f"{type(error).__name__} {getattr(error, 'status_code', '')}")
            except openai.APIError as error:  # an error in the middle of a stream
                self.ends.append(f"told: {error.message}")
            time.sleep(0.05)

    def finish(self):
        self.ended.set()
        self.join(120)
        return self.ends


@pytest.mark.parametrize(
    "part", ["EngineCore", "ServeReplica:zoray:Engine", "ServeReplica:zoray:Tuner", "ServeReplica:zoray:Gateway"]
)
def test_a_part_that_is_killed_comes_back_and_clients_are_told(own, part):
    talk = Talk(own)
    talk.start()
    goes_on(own)
    own.wait(lambda: list(talk.ends), 120)  # on a busy machine a job's steps may be quicker than an answer
    seen = len(talk.ends)
    (process, *_) = own.processes(part)
    process.kill()
    goes_on(own)
    own.wait(lambda: talk.ends[-5:] == ["whole"] * 5 and len(talk.ends) > seen + 5, 300)
    ends = talk.finish()
    assert set(ends[:seen]) == {"whole"}
    assert "cut off" not in ends, ends  # an end without a word would be taken for the answer
    assert all(end.startswith(("whole", "told: ", "InternalServerError 503")) for end in ends), ends
    if part.endswith("Tuner"):
        assert set(ends) == {"whole"}  # those who chat do not notice


def test_after_a_crash_of_all_of_it_the_server_has_what_it_had(own):
    kept = own.upload("more.csv", labelled(40))
    rated = own.http.post(
        "/v1/conversations",
        json={"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "up": True},
    ).json()["id"]
    live = own.http.get("/v1/versions").json()
    done = steps(own)
    own.kill()
    path = own.folder / "jobs" / "long" / "run" / "journal.jsonl"
    before = [step.commit for step in journal.read(path).steps]
    assert len(before) >= done > 0
    own.start()
    assert kept in [file["id"] for file in own.http.get("/v1/files").json()["data"]]
    assert rated in [one["id"] for one in own.http.get("/v1/conversations").json()["data"]]
    after = own.http.get("/v1/versions").json()
    assert {v["id"] for v in live["data"]} <= {v["id"] for v in after["data"]}
    goes_on(own)
    own.openai.fine_tuning.jobs.cancel("long")
    own.wait(lambda: own.http.get("/v1/fine_tuning/jobs/long").json()["status"] == "cancelled")
    whole = [step.commit for step in journal.read(path).steps]
    assert whole[: len(before)] == before and len(whole) > len(before) + 3
    if (version := after["live"]) is not None:
        assert own.ask("live") == own.ask(version)
    assert json.loads((own.folder / "live.json").read_text())["version"] == after["live"]


def test_ctrl_c_while_it_starts_ends_it_at_once(own):
    assert own.stop() == 0
    for pause in (6.0, 14.0):
        with own.log.open("ab") as log:
            own.process = subprocess.Popen(own.command, stdout=log, stderr=log)
        time.sleep(pause)
        everything = psutil.Process(own.process.pid).children(recursive=True)
        own.process.send_signal(signal.SIGINT)
        assert own.process.wait(30) == INTERRUPT_EXIT
        gone, alive = psutil.wait_procs(everything, 15)
        assert alive == [] and len(gone) == len(everything)
