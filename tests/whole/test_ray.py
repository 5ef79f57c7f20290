"""A Ray cluster that is already there, as people run it: jobs, token, the driver's code on nodes that have another."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

import zoray
from zoray.pool.on_ray.cluster import _own_code
from zoray.pool.on_ray.reach import check_reachable
from zoray.records import ConfigError
from zoray.run import journal
from zoray.run.folder import check_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def environment(**more: str) -> dict[str, str]:
    """This one without what other tests have set for Ray; on loopback, with a token of the cluster's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"} | more


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Head:
    """A head node with a token, a folder and ports of its own, ended by the ids of its processes."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="zr")  # short: a path of a socket has at most 107 bytes
        self.environment = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
        gcs, dashboard, agent, client = free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        command = [RAY, "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}", f"--temp-dir={self.folder}", "--disable-usage-stats"]
        self.log = Path(self.folder) / "head.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )

    def ready(self) -> None:
        """Wait until jobs can be submitted."""
        deadline = time.monotonic() + 120
        while self.run(RAY, "job", "list", "--address", self.dashboard, check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(2)

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **more: str):
        done = subprocess.run(
            command, env=self.environment | more, cwd=cwd or self.folder, capture_output=True, text=True, timeout=200
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def end(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([*family, psutil.Process(self.process.pid)], timeout=20)
        for process in alive:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    found = Head()
    try:
        found.ready()
        yield found
    finally:
        found.end()


ASK = """
import sys
from zoray.pool.on_ray.cluster import connect, leave
from zoray.pool.settings import Cluster
leave(connect(Cluster(address=sys.argv[1]), print))
"""


@pytest.mark.ray
def test_a_token_that_is_there_is_used_for_an_address(head):
    """As `auto` does. Ray by itself would use it only where RAY_AUTH_MODE says so."""
    there = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_MODE"}
    command = [sys.executable, "-c", ASK, head.address]
    done = subprocess.run(command, env=there | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and f"joined the Ray cluster at {head.address}: 2 CPU" in done.stdout, done


@pytest.mark.ray
@pytest.mark.parametrize("token", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}])
def test_a_token_that_is_missing_or_wrong_is_said(head, monkeypatch, token):
    for name, value in (head.environment | token).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=f"at {head.address} .* Ray says: .*InvalidAuthToken.*`ray get-auth-token` prints it"
    ):
        check_reachable(head.address)


def submit(head: Head, *settings: str, check: bool = True) -> str:
    entry = ["python", "-m", "zoray.launch", *settings]
    done = head.run(
        *(RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entry), cwd=ROOT, check=check
    )
    assert check or done.returncode
    return done.stdout + done.stderr


@pytest.mark.ray
def test_a_job_runs_and_leaves_a_whole_run(head, tmp_path, tiny_models, labelled_file):
    settings = [f"model.path={tiny_models['llama']}", "task=file", f"task.path={labelled_file}", "task.dev=20"]
    settings += ["task.words=[' terrible',' great']", "task.test=20", "engine=hf", "estimator=two_point"]
    settings += ["run.steps=3", "run.batch=4", "run.name=job"]
    refused = submit(head, *settings, check=False)
    assert "expected run.folder outside the job's working directory, which Ray deletes after the job" in refused
    said = submit(head, *settings, f"run.folder={tmp_path}")
    assert f"joined the Ray cluster at {head.address}: 2 CPU" in said and "succeeded" in said
    folder = tmp_path / "job"
    files = {path.name for path in folder.iterdir()}
    assert files == {"adapter", "config.yaml", "curve.png", "journal.jsonl", "metrics.jsonl", "summary.json"}
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert len(journal.read(folder / "journal.jsonl").steps) == 3


@pytest.mark.ray
def test_nobody_submits_without_the_token(head):
    for more in ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": "0" * 32}):
        done = head.run(RAY, "job", "submit", "--address", head.dashboard, "--", "true", check=False, **more)
        assert done.returncode and "AuthenticationError" in done.stderr, done.stderr


WHERE = """
import sys
from pathlib import Path
import ray
from zoray.pool.on_ray.cluster import connect, leave
from zoray.pool.settings import Cluster
connect(Cluster(address=sys.argv[1], ship=sys.argv[2] == "true"), lambda text: None)
@ray.remote
def where():
    import zoray
    folder = Path(zoray.__file__).parent
    return str(folder), getattr(zoray, "MARK", None), len(list(folder.rglob("__pycache__/*.pyc")))
print(*ray.get(where.remote()))
leave(True)
"""


@pytest.mark.ray
def test_nodes_run_the_drivers_code_unless_told_otherwise(head, tmp_path):
    """The driver has a zoray of its own, and its caches; the head one that is installed."""
    shutil.copytree(ROOT / "zoray", tmp_path / "zoray")
    with open(tmp_path / "zoray" / "__init__.py", "a") as file:
        file.write("MARK = 'drivers'\n")
    (tmp_path / "zoray" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "zoray" / "__pycache__" / "old.pyc").write_bytes(b"not code")
    found = {}
    for ship in ("true", "false"):
        done = head.run(sys.executable, "-c", WHERE, head.address, ship, PYTHONPATH=str(tmp_path))
        found[ship] = done.stdout.strip().rsplit(" ", 2)
    folder, mark, _ = found["true"]
    assert folder.startswith(head.folder) and "/runtime_resources/py_modules_files/" in folder
    assert mark == "drivers"
    folder, mark, _ = found["false"]
    assert not folder.startswith((head.folder, str(tmp_path))) and mark == "None"
    assert not list(Path(head.folder).rglob("old.pyc"))


def test_what_a_job_ships_itself_is_left_to_it(monkeypatch):
    def shipped(**runtime_env: object) -> set[str]:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env}))
        return set(_own_code())

    assert shipped() == {"py_modules", "excludes"}
    assert shipped(working_dir="gcs://a.zip", env_vars={"A": "1"}) == {"py_modules", "excludes"}
    assert shipped(excludes=["data"]) == {"py_modules"}
    assert shipped(py_modules=["gcs://a.zip"]) == set()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert _own_code()["py_modules"] == [str(Path(zoray.__file__).parent)]


def test_a_run_folder_that_ray_would_delete_is_refused(tmp_path, monkeypatch):
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    job.mkdir(parents=True)
    check_kept(Path("runs/a"))
    monkeypatch.chdir(job)
    check_kept(tmp_path / "runs" / "a")
    with pytest.raises(ConfigError, match=r"Use a folder on the head node, .*: run.folder=/data/runs"):
        check_kept(Path("runs/a"))
