"""Replicas that are damaged while they run: in a number of the state, in a weight of the model, or in all scores."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import toy
from ray import cloudpickle

import zoray.pool.on_ray.start
from zoray.engines.hf import Hf
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora
from zoray.models.folder import Model
from zoray.pool.on_ray.start import start_pool
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.records import Commit, JournalError
from zoray.records.tiles import Grid, losses_of
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS, INTERVAL = 9, 3


class Fragile(toy.Toy):
    """A replica that can be damaged: by the commits that `catch_up` gets, which are a word."""

    stays = False  # whether it is damaged anew whenever it has been rebuilt

    def catch_up(self, commits: Any, digest: bool) -> str | None:
        import torch

        found = None
        if not isinstance(commits, str):
            found = super().catch_up(commits, digest)
            if not self.stays:
                return found
            commits = "state"
        assert self.replica is not None
        engine: Any = self.replica.engine
        self.stays |= commits == "stays"
        with torch.no_grad():
            if commits in ("state", "stays"):
                engine.state.flat[17] += 2**-20
            else:
                weight = engine.weights["model.layers.0.mlp.down_proj"]
                weight[3] = float("nan") if commits == "nan" else weight[3] + 0.5
        return found


@pytest.fixture
def fragile(monkeypatch) -> Iterator[None]:
    """Pools of such replicas."""
    module = sys.modules[__name__]
    for each in (toy, module):
        cloudpickle.register_pickle_by_value(each)
    monkeypatch.setattr(zoray.pool.on_ray.start, "ReplicaActor", Fragile)
    yield
    for each in (toy, module):
        cloudpickle.unregister_pickle_by_value(each)


@pytest.fixture(scope="module")
def spec(tiny_models, labelled_file) -> ReplicaSpec:
    task = File(str(labelled_file), [" terrible", " great"])
    model, space, pairs = Model(str(tiny_models["llama"])), Lora(rank=2, alpha=4), TwoPoint(pairs=2, eps=0.1)
    return ReplicaSpec(model, task, ChoiceNLL(), space, pairs, Hf(), seed=1, data_seed=2, batch=8, tile_examples=2)


def steps(pool: Pool, disturb=lambda step: None) -> dict[int, tuple[list[tuple[float, ...]], str | None]]:
    """Losses and digest of each step, with a digest every INTERVAL steps."""
    found = {}
    for step in range(len(pool.commits), STEPS):
        disturb(step)
        grid = Grid.of(pool.spec, step)
        scores, digest = pool.evaluate(grid, digest=step % INTERVAL == 0)
        found[step] = losses_of(pool.spec.estimator.ask(step), grid.tiles, scores)[0], digest
        pool.commit(Commit(step, (0.01, -0.02)))
    return found


def damage(pool: Pool, index: int, kind: str) -> None:
    member = pool.members.ready[index]
    done: list[Any] = []
    pool.members.ask(member, "catch_up", kind, False, then=lambda *_: done.append(1))
    while not done:
        pool.members.pump(1.0)


def all_back(pool: Pool, replicas: int) -> None:
    deadline = time.monotonic() + 120
    while pool.size < replicas:
        pool.members.pump(1.0)
        assert time.monotonic() < deadline, pool.lost


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_damage_is_found_within_the_interval_and_mended(local_ray, spec, fragile):
    losses, digests = toy.by_itself(spec, STEPS)
    sound = {step: (losses[step], None if step % INTERVAL else digests[step]) for step in range(STEPS)}
    said: list[str] = []
    with start_pool(spec, Cluster(replicas=2), "damaged", said.append) as pool:
        damage_at = {1: "state"}
        found = steps(pool, lambda step: damage(pool, 1, damage_at[step]) if step in damage_at else None)
        assert {step: found[step][1] for step in found} == {step: sound[step][1] for step in sound}
        assert [step for step in found if found[step][0] != sound[step][0]] in ([1, 2], [1], [2])  # and no longer
        assert pool.rebuilt == 2 and not pool.lost  # of two that differ, either may be wrong
        assert sum("is not that of the others at step 3; it is rebuilt from the journal" in line for line in said) == 2

        all_back(pool, 2)
        pool.rewind(0)
        all_back(pool, 2)
        damage(pool, 0, "weight")  # the state is as it was: only scores tell
        found = steps(pool)
        assert found[0] == sound[0] and pool.rebuilt == 4 and len(pool.lost) == 2  # at once: step 0 has a digest
        assert "of a tile that all score is not that of the others" in pool.lost[0]
        assert found == sound

        all_back(pool, 2)
        pool.rewind(1)
        all_back(pool, 2)
        damage(pool, 0, "nan")  # a step without a digest: losses that are not finite are looked into at once
        assert steps(pool) == {step: sound[step] for step in range(1, STEPS)}
        assert len(pool.lost) == 3 and pool.rebuilt == 5  # the other one is above suspicion
        assert all(digest is None for step, (_, digest) in found.items() if step % INTERVAL)


@pytest.mark.ray
def test_disagreement_that_stays_ends_the_run_with_a_diagnosis(local_ray, spec, fragile):
    """One is damaged anew whenever it is rebuilt."""
    with start_pool(spec, Cluster(replicas=2, min_replicas=2), "stays") as pool:
        pool.commit(Commit(0, (0.01, -0.02)))
        pool.digest()
        damage(pool, 1, "stays")
        with pytest.raises(JournalError, match=r"replicas still disagree after they were rebuilt: .*replica-1 \(state"):
            pool.digest()
