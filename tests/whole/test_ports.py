"""What a local run listens on, seen from outside: every socket of every process that it starts."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.ray


def is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listening(process: psutil.Process) -> set[tuple[str, str, int]]:
    """(name, host, port) of the listening TCP sockets of a process and all below it."""
    found = set()
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for one in family:
        try:
            for socket in one.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add((one.name(), socket.laddr.ip, socket.laddr.port))
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
    return found


def test_loopback_is_told_from_the_rest():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.1.1", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2", "fd00::2")))


def test_every_port_of_a_local_run_is_on_loopback(tmp_path, tiny_models, labelled_file):
    """Ray's servers, dashboard, agents and metrics; driver and replica; what vLLM opens in it."""
    command = [sys.executable, "-m", "zoray.launch", f"model.path={tiny_models['llama']}", "task=file"]
    command += [f"task.path={labelled_file}", "task.words=[' terrible',' great']", "task.dev=20", "run.test=false"]
    command += ["engine=vllm", "engine.kv_cache_gib=0.25", "engine.max_tokens=1024", "estimator=two_point"]
    command += [f"run.folder={tmp_path}", "run.name=ports", "run.steps=3", "run.batch=4", "cluster.dashboard_port=8275"]
    with open(tmp_path / "log", "w+") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        found = set()
        try:
            while run.poll() is None:
                found |= listening(psutil.Process(run.pid))
                time.sleep(0.3)
        finally:
            run.kill()
        log.seek(0)
        assert run.returncode == 0, log.read()
    names = " ".join(name for name, _, _ in found)
    for part in ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "python", "ReplicaActor"):
        assert part in names, (part, names)
    assert sorted(found) == sorted(socket for socket in found if is_loopback(socket[1]))
