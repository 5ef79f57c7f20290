"""Replicas that score nothing, in actors without torch or vLLM: what is left of a step is driver and messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from zoray.actor import Member, ReplicaActor
from zoray.cluster import Cluster, compiled
from zoray.pool import Pool
from zoray.records import Scores
from zoray.replica import ReplicaInfo
from zoray.tiles import Grid, scored, summed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from zoray.records import Commit


class NullActor(ReplicaActor):
    """Answers as ReplicaActor does, with losses of its own making; derives the grid as a replica does."""

    def __init__(self, spec: SimpleNamespace, counts: dict[str, int]) -> None:
        super().__init__()
        self.spec, self.counts, self.step = spec, counts, 0

    def evaluate(
        self, commits: tuple[Commit, ...], step: int, split: str, share: tuple[tuple[int, int], ...], digest: bool
    ) -> tuple[Scores, str | None]:
        """The losses differ between probes, as an estimator expects."""
        self.step += len(commits)
        grid = Grid.of(self.spec, step, split, self.counts.get(split, 0))
        tiles = [tile for first, end in share for tile in grid.tiles[first:end]]
        losses = 0.5 + 0.001 * (np.arange(scored(tiles)) % 17)
        sums = losses if grid.per_example else summed(tiles, losses)
        return Scores(sums, 0.0, 26 * scored(tiles)), f"{self.step:016x}" if digest else None


def start(replicas: int, counts: dict[str, int], weights: str = "") -> Callable[..., Pool]:
    """What driver.tune takes in place of Pool.start: a pool of null replicas.

    `counts` of examples in dev and test; `weights` is the hash of the model's.
    """
    from types import SimpleNamespace

    def begin(spec: Any, *_: Any) -> Pool:
        light = SimpleNamespace(estimator=spec.estimator, batch=spec.batch, tile_examples=spec.tile_examples)
        actors = [ray.remote(NullActor).options(num_cpus=0).remote(light, counts) for _ in range(replicas)]
        members = [Member(f"null-{i}", actor) for i, actor in enumerate(actors)]
        ray.get([actor.pid.remote() for actor in actors])
        if compiled(Cluster(), replicas):
            for member in members:
                member.compile()
        info = ReplicaInfo("0" * 16, weights, "null", "float32", 0.0, ())
        return Pool(members, spec, info, None, False)

    return begin
