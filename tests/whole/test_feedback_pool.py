"""Residual feedback with replicas: any number of them, dying or late, gives the digests of one; killed drivers too."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chatty import CHOICES, chat_llama
from guided import SPACE
from rows import write_rows
from test_chaos import Session as Job
from test_chaos import cluster, replicas, steps_in

from zoray.engines.hf import Hf
from zoray.methods.estimators.feedback import Feedback, gains
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces.signs import packed
from zoray.models.folder import Model
from zoray.pool.on_ray.start import start_pool
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.records.tiles import Grid, losses_of
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec, load_workload
from zoray.tasks.file.task import File

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cluster"]  # a fixture
pytestmark = pytest.mark.ray
STEPS = 8
OPTIMIZER = Sgd(lr=0.01, momentum=0.8, anchor=0.5)


def rows(folder: Path) -> str:
    """A file of 40 texts of two kinds."""
    texts = [f"{e.prompt} {k}" for k in range(5) for e in CHOICES]
    return write_rows(folder / "rows.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def spec(folder, tmp_path_factory) -> ReplicaSpec:
    """Four tiles of the centre and two along the guide."""
    task = File(rows(tmp_path_factory.mktemp("data")), [" terrible", " great"])
    estimator = Feedback(lens=8, pairs=2, eps=0.05)
    return ReplicaSpec(Model(str(folder)), task, ChoiceNLL(), SPACE, estimator, Hf(), 1, 2, batch=8, tile_examples=2)


class Alone:
    """A replica in this process as a pool."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec, self.replica, self.commits = spec, Replica(spec), list[Any]()

    def evaluate(self, grid: Grid, digest: bool = False) -> Any:
        return self.replica.evaluate(self.commits, grid.tiles, digest, grid.per_example)

    def commit(self, commit: Any) -> None:
        self.commits.append(commit)

    def digest(self) -> str:
        self.replica.apply(self.commits)
        return self.replica.engine.digest()


class Session:
    """The driver's loop over a pool, which can be left and gone on with."""

    def __init__(self) -> None:
        self.trust: tuple[float, ...] = ()
        self.commits: list[Any] = []
        self.digests: list[str] = []

    def run(self, pool: Any, until: int, disturb: Any = lambda step: None) -> Session:
        e, matrices = pool.spec.estimator, len(SPACE.select(load_workload(pool.spec).matrices))
        for step in range(len(self.commits), until):
            disturb(step)
            grid = Grid.of(pool.spec, step)
            scores, digest = pool.evaluate(grid, digest=True)
            rows, _ = losses_of(e.ask(step), grid.tiles, scores)
            self.trust = e.judge(self.trust, e.ask(step), rows)
            assert scores.feedback is not None and scores.feedback.dtype == np.int8
            guide = (gains(self.trust, matrices), packed(scores.feedback, step))
            commit = OPTIMIZER.update((), step, STEPS, (), *guide)[1]
            pool.commit(commit)
            self.commits.append(commit)
            self.digests.append(digest)
        return self

    def copy(self) -> Session:
        other = Session()
        other.trust, other.commits, other.digests = self.trust, list(self.commits), list(self.digests)
        return other

    def found(self, pool: Any) -> tuple[list[str], list[Any], tuple[float, ...]]:
        return [*self.digests, pool.digest()], self.commits, self.trust


@pytest.fixture(scope="module")
def undisturbed(spec):
    pool = Alone(spec)
    found = Session().run(pool, STEPS).found(pool)
    assert len(set(found[0])) == STEPS + 1
    return found


def wait_for(pool: Pool, size: int) -> None:
    deadline = time.monotonic() + 120
    while pool.size < size:
        assert time.monotonic() < deadline, pool.members.lost
        pool.members.pump(1.0)


def test_two_and_dying_replicas_give_the_digests_of_one(local_ray, spec, undisturbed):
    """One is killed in the middle of the run; who comes late fits its maps to the bare model as well."""
    cluster = Cluster(replicas=2, cpus_per_replica=1, late_floor_s=30.0)
    with start_pool(spec, cluster, "dying") as pool:
        session = Session().run(pool, 3)
        assert pool.size == 2 and not pool.lost
        pid = pool.members.ready[0].pid
        session.run(pool, 5, lambda step: os.kill(pid, signal.SIGKILL) if step == 4 else None)
        wait_for(pool, 2)
        assert f"process {pid}" in pool.lost[0] and pid not in {member.pid for member in pool.members.ready}
        assert session.run(pool, STEPS).found(pool) == undisturbed and pool.rebuilt == 0


def test_a_pool_that_begins_in_the_middle_goes_on_as_one_that_was_there(local_ray, spec, undisturbed):
    """As after a driver's death: new replicas replay commits whose feedback they have not given; and as at the end."""
    half = Session().run(Alone(spec), 4)
    with start_pool(spec, Cluster(replicas=2, cpus_per_replica=1), "middle", commits=half.commits) as pool:
        six = half.copy().run(pool, 6)
        rest = six.copy().run(pool, STEPS)
        assert rest.found(pool) == undisturbed
        pool.rewind(6)
        assert six.run(pool, STEPS).found(pool) == undisturbed and six.commits == rest.commits


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_and_three_replicas_of_killed_and_resumed_jobs_have_one_journal(cluster, folder, tmp_path):
    """The command line. Two replicas come late; a replica is killed, and the driver twice, with its replicas.

    Batches are large, so that there are steps left to join at.
    """
    cluster.add_node(num_cpus=1)
    settings = [
        *(f"model.path={folder}", "model=hf", "engine=hf", "task=file", f"task.path={rows(tmp_path)}"),
        *("task.words=[' terrible',' great']", "task.dev=4", "task.test=4", "run.batch=64", "run.tile_examples=2"),
        *("estimator=feedback", "estimator.lens=8", "estimator.pairs=1", "optimizer=feedback", "optimizer.anchor=1"),
        *("space.train=AB", "space.targets=residual", "space.rank=2", "run.steps=150", "run.digest_every=3"),
        *("logging.curve=false", "run.eval_every=30", f"run.folder={tmp_path}", "cluster.cpus_per_replica=1"),
        *("cluster.snapshot_every=6", "run.test=false", f"cluster.address={cluster.address}"),
    ]
    log, path = tmp_path / "log", tmp_path / "killed" / "journal.jsonl"
    whole = Job(log, *settings, "run.name=whole")
    assert whole.process.wait(300) == 0, log.read_text()[-3000:]
    undisturbed = (tmp_path / "whole" / "journal.jsonl").read_bytes()

    deadline, job = time.monotonic() + 500, Job(log, *settings, "cluster.replicas=3", "run.name=killed")

    def until(done: Any) -> None:
        while not done():
            assert job.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.005)

    try:
        until(lambda: steps_in(path) >= 5)
        cluster.add_node(num_cpus=2)
        until(lambda: "has joined at step" in log.read_text() or steps_in(path) >= 70)
        until(lambda: len(replicas(cluster)) >= 2)
        os.kill(replicas(cluster)[0].pid, signal.SIGKILL)
        for least in (75, 100):
            until(lambda least=least: steps_in(path) >= least)
            job.kill()
            data = path.read_bytes()
            assert undisturbed.startswith(data[: data.rfind(b"\n") + 1]) and steps_in(path) < 150
            job = Job(log, f"run.resume={tmp_path / 'killed'}")
        assert job.process.wait(300) == 0, log.read_text()[-3000:]
    finally:
        job.kill()
    assert path.read_bytes() == undisturbed
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["digest"] == summaries[1]["digest"] and summaries[1]["finished"]
    assert summaries[0]["final"]["loss"] < summaries[0]["initial"]["loss"]
    assert "has joined at step" in log.read_text()
