"""A Ray of a run's own on machines that lack something: a free port, a short path, a home; Ray's words in errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from gatewayed import settings_of

from zoray.pool.on_ray import local as local_ray
from zoray.pool.on_ray.local import own_words, temp_folder
from zoray.records import ConfigError
from zoray.run.journal import read
from zoray.serving.deployments import start
from zoray.serving.deployments.start import _listen


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def no_folder_named(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_ray_keeps_its_files_where_it_is_told_to(monkeypatch, tmp_path, told):
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert temp_folder(told.append) is None and not told


@pytest.mark.parametrize(
    ("name", "folder", "why"),
    [
        ("TMPDIR", "/" + 99 * "x", "is too long for its sockets, by 61 characters"),
        ("RAY_TMPDIR", "/" + 38 * "ü", "is too long for its sockets, by 38 characters"),
        ("TMPDIR", "/proc", "can't be written to (No such file or directory)"),
        ("TMPDIR", "/nowhere", "is no folder"),
    ],
)
def test_a_folder_that_does_not_do_is_replaced(monkeypatch, told, name, folder, why):
    monkeypatch.setenv(name, folder)
    assert temp_folder(told.append) == "/tmp/ray"
    assert told == [f"Ray's files are in /tmp/ray: {folder} ({name}) {why}"]


def test_the_longest_folder_that_does(monkeypatch, told):
    monkeypatch.setattr(local_ray, "OTHERS", ())
    monkeypatch.setenv("TMPDIR", "/tmp" + "/." * 17)
    assert temp_folder(told.append) is None
    monkeypatch.setenv("TMPDIR", "/tmp" + "/." * 18)
    with pytest.raises(
        ConfigError, match=r"too long for its sockets, by 1 char.* RAY_TMPDIR .* of at most 39 characters"
    ):
        temp_folder(told.append)


def test_a_full_folder_is_none(monkeypatch, told):
    monkeypatch.setattr(local_ray, "LEAST_FREE", 1 << 62)
    with pytest.raises(ConfigError, match="expected a folder for Ray's files; /tmp is full"):
        temp_folder(told.append)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Failed to connect to Ray cluster at 1:2", "Failed to connect to Ray cluster at 1:2"),
        ("Version mismatch: it has\n    3.10\nThis has\n  3.11\n", "Version mismatch: it has 3.10 This has 3.11"),
        ("Traceback\n  File x\nray.exceptions.AuthenticationError: RPC error: no.\n", "RPC error: no"),
        ("[1 C] loader.cc:115: A bug. Check failed: has_x || y Token x.\n*** Stack\n", "Token x"),
        (
            "The last lines:\nException: Failed to find a valid port: [Errno 98]\n",
            "Failed to find a valid port: [Errno 98]",
        ),
        ("\n".join(f"line {k}" for k in range(20)), "line 19"),
        ("", ""),
    ],
)
def test_what_ray_says_is_found_in_what_it_prints(said, words):
    assert own_words(said) == words


def test_a_home_that_is_not_there_needs_no_token_file(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/proc/none")
    assert local_ray._own_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not local_ray._own_token()  # which is there now


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/tmp/ray"), "No space left on device: '/tmp/ray'"),
        (Exception("The current node timed out during startup."), "The current node timed out during startup"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(monkeypatch, told, error, says):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(local_ray, "_start", fail)
    with pytest.raises(ConfigError, match=f"expected to start Ray on this machine; it says: .*{re.escape(says)}"):
        local_ray.start(True, 8265, told.append)


def test_a_dashboard_never_costs_a_run(monkeypatch, told):
    def start(_: object, dashboard: bool, __: int) -> str | None:
        if dashboard:
            raise Exception("Exception: Failed to find a valid port for dashboard after 50 retries")
        return None

    monkeypatch.setattr(local_ray, "_start", start)
    local_ray.start(True, 8265, told.append)
    assert told == ["Ray dashboard: off (Failed to find a valid port for dashboard after 50 retries)"]


def test_a_port_taken_while_a_server_starts(monkeypatch, tmp_path, tiny_models):
    def fail(**_: object) -> None:
        raise RuntimeError("ray::ProxyActor.ready() ... RuntimeError: Failed to bind to address '127.0.0.1:8000'.")

    monkeypatch.setattr("ray.serve.start", fail)
    with pytest.raises(ConfigError, match=r"listen on 127.0.0.1:8000; another program has taken it while the server"):
        _listen(settings_of(tiny_models["llama"], tmp_path))


def test_a_server_that_starts_stops_as_one_that_is_up(monkeypatch, tmp_path, tiny_models):
    """Ray puts its own handler of SIGTERM in the place of the server's, and that ends in an abort."""
    found = []

    def connect(*_: object) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return False

    def look() -> None:
        found.append(signal.getsignal(signal.SIGTERM))
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "connect", connect)
    monkeypatch.setattr(start, "_check_free", look)
    before = signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt), start.started(settings_of(tiny_models["llama"], tmp_path)):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [own]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_started_at_once(tmp_path, tiny_models, labelled_file):
    """Both want one port for their dashboard, a third program has the one behind it; one has no room for sockets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    long = tmp_path / ("x" * 100)
    long.mkdir()
    command = [sys.executable, "-m", "zoray.launch", f"model.path={tiny_models['llama']}", "task=file", "engine=hf"]
    command += [f"task.path={labelled_file}", "task.words=[' terrible',' great']", "task.dev=8", "run.test=false"]
    command += ["estimator=two_point", "run.steps=2", "run.batch=2", f"run.folder={tmp_path}", "run.stratify=false"]
    command += [f"cluster.dashboard_port={port}"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with socket.create_server(("127.0.0.1", port + 1)):
        runs = [
            subprocess.Popen(
                [*command, f"run.name={name}"],
                env={**plain, "RAY_USAGE_STATS_ENABLED": "0", **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
            for name, more in (("one", {}), ("other", {"TMPDIR": str(long), "HOME": "/proc/none"}))
        ]
        said = [run.communicate(timeout=800)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    assert "Traceback" not in "".join(said)
    shown = re.findall(r"Ray dashboard: http://127.0.0.1:(\d+)", "".join(said))  # a busy machine may start none in time
    assert len(set(shown)) == len(shown) and set(shown) <= {str(port), str(port + 2)}, "\n".join(said)
    assert all("Ray dashboard: " in text for text in said)
    assert str(port + 2) not in shown or f"as port {port} is taken" in "".join(said)
    assert f"Ray's files are in /tmp/ray: {long} (TMPDIR) is too long" in said[1]
    assert [len(read(Path(tmp_path, name, "journal.jsonl")).steps) for name in ("one", "other")] == [2, 2]
