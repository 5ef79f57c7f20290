"""The jobs of a server without engines: what the tuner's thread does when jobs end in odd ways or are taken away."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gatewayed import rows, settings_of

from zoray.models.folder import linear_matrices, max_length
from zoray.records import ConfigError, Evaluation, JournalError
from zoray.serving.gate import Measured
from zoray.serving.learning import jobs as module
from zoray.serving.learning.experiments import experiment_of
from zoray.serving.learning.job_requests import NewJob
from zoray.serving.learning.jobs import Jobs
from zoray.serving.learning.tuner import Tuner
from zoray.serving.store import Store

DONE = {"finished": True, "steps": 1, "initial": {}, "final": {}}


@pytest.fixture
def tuner(chat_model, tmp_path):
    found = Tuner(settings_of(chat_model, tmp_path / "store"), lambda *_: None)
    yield found
    found.close()


@pytest.fixture
def runs(monkeypatch, tuner):
    """What runs of jobs do: `runs[name]` is called with (stopping), the others succeed at once."""
    does = {}

    def tune(experiment, workload, config, start_pool, stopping, on_dev):
        name = experiment.run.path.parent.name
        return does.get(name, lambda stopping: DONE)(stopping)

    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module, "own_host", lambda elastic: "127.0.0.1")  # else Ray's
    monkeypatch.setattr(module, "ASK_SECONDS", 0.05)
    return does


def create(tuner, name):
    number = tuner.add_file("mail.csv", rows())["id"]
    return tuner.create(NewJob(training_file=number, suffix=name))


def await_status(tuner, name, status):
    deadline = time.monotonic() + 30
    while (found := tuner.states[name])["status"] != status or (status != "running" and tuner._jobs.current == name):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def until_stopped(error=None):
    def run(stopping):
        while not stopping():
            time.sleep(0.01)
        if error is not None:
            raise error
        return {**DONE, "finished": False}

    return run


def kinds(tuner, name):
    return [event["kind"] for event in tuner.events(name)]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("an engine has died")])
def test_a_job_that_is_paused_stays_so_however_its_run_ends(tuner, runs, error):
    runs["first"] = until_stopped(error)
    tuner.start()
    create(tuner, "first")
    await_status(tuner, "first", "running")
    tuner.turn("first", "pause")
    await_status(tuner, "first", "paused")
    create(tuner, "second")  # the thread goes on
    await_status(tuner, "second", "succeeded")
    runs.clear()
    tuner.turn("first", "resume")
    await_status(tuner, "first", "succeeded")
    assert kinds(tuner, "first").count("started") == 1


def test_a_job_that_waits_for_engines_is_queued_again_when_learning_is_switched_off(tuner, runs):
    runs["waits"] = until_stopped(KeyboardInterrupt())
    tuner.start()
    create(tuner, "waits")
    await_status(tuner, "waits", "running")
    tuner.set_learning(False)
    await_status(tuner, "waits", "queued")
    runs.clear()
    tuner.set_learning(True)
    await_status(tuner, "waits", "succeeded")


def test_what_is_wrong_with_a_job_is_said_and_the_next_one_runs(tuner, runs):
    def fails(stopping):
        raise JournalError("made with other settings")

    runs["wrong"] = fails
    tuner.start()
    create(tuner, "wrong")
    assert await_status(tuner, "wrong", "failed")["error"] == "JournalError: made with other settings"
    create(tuner, "right")
    await_status(tuner, "right", "succeeded")


def test_the_thread_survives_jobs_that_are_deleted_while_it_looks_for_one(tuner, runs):
    tuner.set_learning(False)
    tuner.start()
    template = create(tuner, "kept")["request"]
    for number in range(60):
        tuner.store.new_job(f"gone-{number}", template, {"status": "cancelled", "changed_at": 0.0})
    tuner.set_learning(True)
    threads = [threading.Thread(target=tuner.delete, args=(f"gone-{number}",)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await_status(tuner, "kept", "succeeded")
    assert tuner.store.jobs() == ["kept"]


def test_all_is_deleted_even_while_jobs_run_and_come(tuner, runs):
    runs["at-work"] = until_stopped()
    tuner.start()
    create(tuner, "at-work")
    await_status(tuner, "at-work", "running")
    folder = tuner.store.folder
    (folder / "versions" / "at-work@25").mkdir()  # its process was killed before all was known of it
    (folder / "versions" / ".at-work@50.partial").mkdir()
    (folder / "conversations" / ".talk-1.json.12345678").write_text("private")
    thread = threading.Thread(target=tuner.delete_all)
    thread.start()
    with pytest.raises(ConfigError):
        for _ in range(1000):  # jobs that come meanwhile are deleted as well, or are refused with their file
            create(tuner, "late")
            tuner.delete("late")
    thread.join(60)
    assert not thread.is_alive()
    tuner.delete_all()
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= {"live.json"}
    create(tuner, "at-work")  # its name is free
    runs.clear()
    tuner.turn("at-work", "cancel")


def test_nobody_is_kept_who_has_connected_to_a_run_that_failed_before_it_had_a_pool(tuner, runs):
    listeners = []

    def fails(stopping):
        listeners.append(tuner._jobs._listener)
        raise JournalError("damaged")

    runs["early"] = fails
    tuner.start()
    create(tuner, "early")
    await_status(tuner, "early", "failed")
    assert tuner.where() is None and listeners[0]._closed


def test_jobs_without_a_tuner_hand_on_what_has_passed(chat_model, tmp_path, monkeypatch):
    """They need a store, somebody who measures and somebody who promotes."""
    settings = settings_of(chat_model, tmp_path / "store")
    pool = SimpleNamespace(adapter=lambda: (settings.space.open(linear_matrices(chat_model), 0).arrays(), "digest"))
    promoted = []

    def tune(experiment, workload, config, start_pool, stopping, on_dev):
        on_dev(pool, Evaluation(10, "dev", 0.5, 1.0, 100, 1, 1.0), None)
        return {**DONE, "steps": 10}

    def measure(stopping, version, dev):
        assert not stopping()
        return Measured(float(bool(version)), 0.5, 10.0, "accuracy", (float(bool(version)),) * 100)

    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module, "own_host", lambda elastic: "127.0.0.1")
    store = Store(settings.folder)
    jobs = Jobs(settings, store, measure, lambda version, why: promoted.append((version, why.partition(":")[0])))
    number = store.add_file("mail.csv", rows())["id"]
    jobs.add("mail", {"training_file": number, "created_at": 1.0, "filename": "mail.csv"})
    jobs.start()
    deadline = time.monotonic() + 30
    while jobs.states["mail"]["status"] != "succeeded":
        assert time.monotonic() < deadline, jobs.states["mail"]
        time.sleep(0.01)
    jobs.close()
    assert promoted == [("mail@10", "passed the gate")] and store.live() is None
    assert [event["kind"] for event in jobs.states.events("mail")] == ["created", "started", "evaluated", "succeeded"]


def test_rows_leave_room_for_the_token_that_vllm_wants_to_write(tuner):
    """A sequence as long as the model's context is refused as a request, and so could not be scored beside chats."""
    number = tuner.add_file("mail.csv", rows())["id"]
    engine = experiment_of(tuner.settings, tuner.store, "x", NewJob(training_file=number)).engine
    limit = tuner.settings.engine.length_limit(max_length(tuner.settings.model.resolve()))
    assert engine.max_length == limit - 1
    assert replace(engine, max_length=None) == tuner.settings.engine


def test_what_a_killed_server_left_is_swept_but_for_what_its_job_will_need(tuner):
    create(tuner, "mail")
    folder = tuner.store.folder
    for name in ("mail@25", "gone@25", ".mail@50.partial"):
        (folder / "versions" / name).mkdir()
    (folder / "jobs" / "mail" / ".state.json.12345678").write_text("{")
    (folder / ".live.json.12345678").write_text("{")
    Store(folder)
    assert [path.name for path in (folder / "versions").iterdir()] == ["mail@25"]
    assert not list(folder.rglob(".*.json.*"))
    assert json.loads((folder / "jobs" / "mail" / "state.json").read_text())["status"] == "queued"
