"""A run on a cluster where everything dies: replicas, a node, the driver; one replica is stopped for a while.

The journal of the run that survives it is, byte for byte, that of a run with one replica that nothing happens to.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray.cluster_utils import Cluster

STEPS, KILLS = 200, 10
LONGEST = 420.0  # seconds


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Ray with a head node that has room for nothing, in processes of this machine."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


class Session:
    """The command as a user gives it, in a process group of its own."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log.open("ab")
        command = [sys.executable, "-m", "zoray.launch", *arguments]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def job(model: Path, data: Path, folder: Path) -> list[str]:
    """The tiny model on the reference engine, which scores every sequence alone."""
    return [
        *(f"model.path={model}", "model=hf", "engine=hf", "task=file", f"task.path={data}", f"run.folder={folder}"),
        *("task.words=[' terrible',' great']", "task.dev=8", "task.test=8", "run.batch=8", "run.tile_examples=2"),
        *("run.digest_every=5", "space.rank=2", "estimator=two_point", "estimator.pairs=2", "optimizer.lr=0.01"),
        "logging.curve=false",
    ]


def steps_in(path: Path) -> int:
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def replicas(cluster: Cluster) -> list[psutil.Process]:
    """The processes of actors that serve the driver, below the cluster's raylets."""
    raylets = [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])]
    found = []
    for raylet in raylets:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(raylet).children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):
                    if child.cmdline()[0].startswith("ray::ReplicaActor"):
                        found.append(child)
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_everything_and_has_the_undisturbed_journal(cluster, tmp_path, tiny_models, labelled_file):
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    settings = [*job(tiny_models["llama"], labelled_file, tmp_path), f"run.steps={STEPS}", "run.eval_every=50"]
    wish = ["cluster.replicas=4", "cluster.cpus_per_replica=1", "cluster.late_floor_s=0.5", "cluster.late_factor=3"]
    wish += ["cluster.wait_timeout_s=120", "cluster.snapshot_every=20", f"cluster.address={cluster.address}"]
    log = tmp_path / "log"

    whole = Session(
        log, *settings, "run.name=whole", f"cluster.address={cluster.address}", "cluster.cpus_per_replica=1"
    )
    assert whole.process.wait(LONGEST) == 0, log.read_text()
    undisturbed = (tmp_path / "whole" / "journal.jsonl").read_bytes()

    path = tmp_path / "chaos" / "journal.jsonl"
    dice, deadline = random.Random(1), time.monotonic() + LONGEST
    session = Session(log, *settings, *wish, "run.name=chaos")

    def until(steps: int) -> None:
        while steps_in(path) < steps and session.process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.002)

    def somebody() -> psutil.Process:
        while not (there := replicas(cluster)):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        return dice.choice(there)

    events = ["kill"] * KILLS + ["stop", "driver", "driver", "node goes", "node comes"]
    dice.shuffle(events)
    events.remove("node comes")
    events.insert(dice.randint(events.index("node goes") + 1, len(events)), "node comes")
    moments = sorted(dice.sample(range(3, STEPS - 5), len(events)))
    stopped: psutil.Process | None = None
    killed = 0
    try:
        for moment, event in zip(moments, events, strict=True):
            until(moment)
            if stopped is not None:
                with suppress(psutil.NoSuchProcess):
                    stopped.send_signal(signal.SIGCONT)
                stopped = None
            if event == "kill":
                with suppress(psutil.NoSuchProcess):
                    somebody().kill()
                    killed += 1
            elif event == "stop":
                stopped = somebody()
                stopped.send_signal(signal.SIGSTOP)
                time.sleep(2.0)  # longer than its deadline
            elif event == "driver":
                session.kill()
                left = path.read_bytes()
                assert undisturbed.startswith(left[: left.rfind(b"\n") + 1])
                session = Session(log, f"run.resume={path.parent}", *wish)
            elif event == "node goes":
                cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0])
            else:
                cluster.add_node(num_cpus=2)
        assert session.process.wait(max(1.0, deadline - time.monotonic())) == 0, log.read_text()[-3000:]
    finally:
        session.kill()

    assert killed >= KILLS
    assert path.read_bytes() == undisturbed  # every step once, with the same losses, coefficients and digests
    summaries = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "chaos")}
    assert summaries["chaos"]["digest"] == summaries["whole"]["digest"] and summaries["chaos"]["finished"]
    assert "has joined at step" in log.read_text() and summaries["chaos"]["rebuilt_replicas"] == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_replica_without_room_joins_when_a_node_does(cluster, tmp_path, tiny_models, labelled_file):
    cluster.add_node(num_cpus=1)
    log, path, deadline = tmp_path / "log", tmp_path / "grows" / "journal.jsonl", time.monotonic() + 300
    wish = ["cluster.replicas=2", "cluster.cpus_per_replica=1", f"cluster.address={cluster.address}"]
    settings = [*job(tiny_models["llama"], labelled_file, tmp_path), *wish, "run.steps=100000", "run.eval_every=0"]
    session = Session(log, *settings, "run.name=grows")

    def until(true) -> None:
        while not true():
            assert time.monotonic() < deadline and session.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)

    try:
        until(lambda: steps_in(path) > 5)
        assert "room for 1 of 2 replicas now; the others join when the cluster has grown" in log.read_text()
        cluster.add_node(num_cpus=1)
        until(lambda: "replica-1 has joined at step" in log.read_text())
        joined = steps_in(path)
        until(lambda: steps_in(path) > joined + 20)  # digests compared on the way
        os.kill(session.process.pid, signal.SIGTERM)
        assert session.process.wait(60) == 3
    finally:
        session.kill()
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary["replicas"] == 2 and summary["rebuilt_replicas"] == 0 and len(summary["scored"]) == 2
