"""A server whose disk fills up, and has room again: nothing half done, a clear answer, and no restart."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from disks import small_disk
from gatewayed import Client, FakeGateway, rows, settings_of
from test_tuner import DONE, await_status, create, kinds

from zoray.records import Evaluation
from zoray.records.disk import append
from zoray.serving.deployments.logs import keep_log
from zoray.serving.gate import Measured
from zoray.serving.learning import jobs as module
from zoray.serving.learning import versions
from zoray.serving.learning.promotion import Promotion
from zoray.serving.learning.tuner import Tuner
from zoray.serving.store import Store, append_json, public, read_lines

TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "up": True}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as found:
        yield found


@pytest.fixture
def tuner(chat_model, disk, monkeypatch):
    monkeypatch.setattr(module, "own_host", lambda elastic: "127.0.0.1")
    monkeypatch.setattr(module, "ASK_SECONDS", 0.05)
    found = Tuner(settings_of(chat_model, disk.path), lambda *_: None)
    yield found
    found.close()


@pytest.fixture
def client(chat_model, disk):
    return Client(FakeGateway(settings_of(chat_model, disk.path)))


def of_job(name, number):
    return {"training_file": number, "suffix": name}


def test_every_route_that_writes_says_so_leaves_nothing_and_works_again(client, disk):
    number = client.upload(rows()).json()["id"]
    assert client.post("/v1/fine_tuning/jobs", json=of_job("old", number)).status_code == 200
    asks = [
        ("POST", "/v1/files", {"files": {"file": ("mail.csv", rows())}, "data": {"purpose": "fine-tune"}}),
        ("POST", "/v1/fine_tuning/jobs", {"json": of_job("new", number)}),
        ("POST", "/v1/fine_tuning/jobs/old/pause", {}),
        ("POST", "/v1/versions/tiny/promote", {}),
        ("POST", "/v1/conversations", {"json": TALK}),
        ("PUT", "/v1/learning", {"json": {"on": True}}),
    ]
    before = disk.names()
    for leave in (0, 1):  # a job is two files
        disk.fill(leave)
        for method, path, body in asks[leave : None if leave == 0 else 2]:
            answer = client.request(method, path, **body)
            assert answer.status_code == 507, answer.text
            assert "no space left on device" in answer.text and "try again" in answer.text
    disk.free()
    with disk.locked():
        for method, path, body in asks:
            answer = client.request(method, path, **body)
            assert answer.status_code == 507 and "read-only file system" in answer.text
    assert disk.names() == before
    for method, path, body in asks:
        answer = client.request(method, path, **body)
        assert answer.status_code == 200, answer.text


def test_what_is_deleted_makes_room_on_a_full_disk(client, disk):
    number = client.upload(rows()).json()["id"]
    assert client.post("/v1/fine_tuning/jobs", json=of_job("mail", number)).status_code == 200
    disk.fill()
    assert client.delete(f"/v1/files/{number}").status_code == 200
    assert client.get("/v1/fine_tuning/jobs/mail").json()["status"] == "cancelled"
    assert client.delete("/v1/fine_tuning/jobs/mail").status_code == 200
    disk.fill()
    assert client.delete("/v1/data").status_code == 200
    assert not [name for name in disk.names() if name.count("/") > 0]


def test_a_job_on_a_full_disk_fails_and_the_thread_goes_on(tuner, disk, monkeypatch):
    does = {}

    def tune(experiment, workload, config, start_pool, stopping, on_dev):
        return does.get(experiment.run.path.parent.name, lambda path: DONE)(experiment.run.path)

    def fills(path):
        disk.fill()
        with (path / "journal.jsonl").open("wb", buffering=0) as file:
            append(file, b"x" * 10_000, path / "journal.jsonl")

    monkeypatch.setattr(module, "tune", tune)
    does["mail"] = fills
    tuner.start()
    create(tuner, "mail")
    found = await_status(tuner, "mail", "failed")
    assert found["error"].startswith("no space left on device (journal.jsonl). Make room")
    assert tuner._jobs._worker.is_alive()
    assert Tuner(tuner.settings, None).states["mail"]["status"] == "running"  # which the disk has not learnt yet
    disk.free()
    tuner._jobs.notify()
    create(tuner, "next")
    await_status(tuner, "next", "succeeded")
    assert Tuner(tuner.settings, None).states["mail"] == found
    does.clear()
    tuner.turn("mail", "resume")
    await_status(tuner, "mail", "succeeded")


def test_the_thread_survives_its_own_error_handlers(tuner, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("an error")

    handler = tuner._jobs._failed
    monkeypatch.setattr(module, "tune", fails)
    monkeypatch.setattr(tuner._jobs, "_failed", fails)
    tuner.start()
    create(tuner, "mail")
    assert "could not be noted" in await_status(tuner, "mail", "failed")["error"]
    monkeypatch.setattr(tuner._jobs, "_failed", handler)
    monkeypatch.setattr(module, "tune", lambda *_, **__: DONE)
    tuner.turn("mail", "resume")
    await_status(tuner, "mail", "succeeded")


def test_a_queued_job_waits_for_room(tuner, disk, monkeypatch):
    monkeypatch.setattr(module, "tune", lambda *_, **__: DONE)
    create(tuner, "mail")
    disk.fill()
    tuner.start()
    tuner._jobs.notify()
    assert tuner.states["mail"]["status"] == "queued"
    disk.free()
    await_status(tuner, "mail", "succeeded")
    assert kinds(tuner, "mail") == ["created", "started", "succeeded"]


def test_a_failed_append_takes_its_half_line_back(disk):
    store = Store(disk.path)
    path = store.folder / "events.jsonl"
    append_json(path, {"a": 1})
    disk.fill()
    with pytest.raises(OSError, match=r"No space left on device: '.*events.jsonl'"):
        append_json(path, {"b": "x" * 8000})
    disk.free()
    append_json(path, {"c": 1})
    assert read_lines(path) == [{"a": 1}, {"c": 1}]


def arrays():
    name = "model.layers.0.self_attn.q_proj"
    return {f"{name}.lora_A": np.ones((2, 64), np.float32), f"{name}.lora_B": np.ones((64, 2), np.float32)}


def judged(tuner, disk, at):
    """A promotion whose disk fills up at some moment; what it calls, and the events that it has noted."""
    events = []

    def measure(version, rows=True):
        if at == "measure":
            disk.fill()
        good = 1.0 if version else 0.0
        return Measured(good, 0.5, 10.0, "accuracy", (good,) * 100)

    def note(kind, message, **more):
        if at == "note":
            disk.fill()
            raise OSError(28, "No space left on device", "events.jsonl")
        events.append({"kind": kind, "message": message, "time": 0.0, **more})

    def promote(version, why):
        if at == "promote":
            disk.fill()
        tuner.promote(version, why)

    return Promotion(tuner.settings, tuner.store, measure, note, promote), events


@pytest.mark.parametrize("at", ["write", "measure", "note", "promote"])
def test_a_version_is_whole_or_not_there_and_is_promoted_when_there_is_room(tuner, disk, at):
    tuner.store.new_job("mail", {"created_at": 1}, {"status": "running"})
    pool = SimpleNamespace(adapter=lambda: (arrays(), "digest"))
    found = Evaluation(10, "dev", 0.5, 1.0, 100, 1, 1.0)
    promotion, events = judged(tuner, disk, at)
    if at == "write":
        disk.fill()
    with pytest.raises(OSError, match="No space left on device"):
        promotion.evaluated("mail", events, pool, found, None)
    names = [path.name for path in (disk.path / "versions").iterdir()]
    assert names == ([] if at in ("write", "measure") else ["mail@10"])
    assert all((disk.path / "versions" / name / "meta.json").exists() for name in names)
    disk.free()
    assert tuner.store.live() is None
    promotion, _ = judged(tuner, disk, "never")
    promotion._note = lambda kind, message, **more: None
    promotion.evaluated("mail", events, pool, found, None)
    assert tuner.store.live() == "mail@10"


def test_a_version_out_of_a_journal_is_whole_or_not_there(tuner, disk, monkeypatch):
    store = tuner.store
    folder = versions.write(store, "mail@5", arrays(), tuner.settings.space, "base")
    monkeypatch.setattr(versions, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space", "meta.json")))
    with pytest.raises(OSError, match="No space"):
        versions.describe(folder, "0", "0")
    assert not folder.exists()


def test_a_500_says_where_the_log_is(chat_model, tmp_path, monkeypatch, caplog):
    def fails():
        raise RuntimeError(" ".join(["private", "text"]))

    gateway = FakeGateway(settings_of(chat_model, tmp_path / "store"))
    monkeypatch.setattr(gateway.inner, "files", public(fails))
    answer = Client(gateway).get("/v1/files")
    assert answer.status_code == 500 and "the server's log says where: log/ in its folder" in answer.text
    assert "RuntimeError in GET" in caplog.text and "private text" not in caplog.text + answer.text


def test_logs_are_kept_in_the_servers_folder_and_a_full_disk_is_no_error(disk, capsys):
    before = list(logging.getLogger("zoray").handlers)
    try:
        keep_log(disk.path, "gateway")
        logging.getLogger("zoray.serving.http.door").error("RuntimeError in GET /v1/files")
        assert "RuntimeError in GET" in (disk.path / "log" / "gateway.log").read_text()
        disk.fill()
        logging.getLogger("zoray.serving.http.door").error("RuntimeError %s", "x" * 8000)
    finally:
        for handler in set(logging.getLogger("zoray").handlers) - set(before):
            logging.getLogger("zoray").removeHandler(handler)
            disk.free()
            handler.close()
