"""Replicas that score nothing, in actors without torch or vLLM: what is left of a step is driver and messages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.actor import ReplicaActor
from zoray.channel import Listener
from zoray.cluster import Cluster, own_host
from zoray.members import Members
from zoray.placement import Placement
from zoray.pool import Pool
from zoray.records import Scores
from zoray.replica import ReplicaInfo
from zoray.tiles import Grid, scored, summed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from zoray.records import Commit


class NullActor(ReplicaActor):
    """Answers as ReplicaActor does, with losses that are ready-made for each share of a grid.

    A tile takes `seconds`, which it sleeps.
    """

    def __init__(self, spec: SimpleNamespace, counts: dict[str, int], weights: str, seconds: float) -> None:
        super().__init__()
        self.spec, self.counts, self.step, self.seconds = spec, counts, 0, seconds
        self.info = ReplicaInfo("0" * 16, weights, "null", "float32", 0.0, ())
        self.ready: dict[tuple[str, tuple[tuple[int, int], ...]], Scores] = {}

    def load(self, spec: SimpleNamespace, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Nothing to load."""
        return self.info

    def evaluate(
        self,
        commits: tuple[Commit, ...],
        step: int,
        split: str,
        share: tuple[tuple[int, int], ...],
        digest: bool,
        canary: bool = False,
    ) -> tuple[Scores, str | None, float | None]:
        """The losses differ between probes, as an estimator expects."""
        self.step += len(commits)
        if (split, share) not in self.ready:
            self.ready[split, share] = self.made_up(Grid.of(self.spec, step, split, self.counts.get(split, 0)), share)
        if self.seconds:
            time.sleep(self.seconds * sum(end - first for first, end in share))
        return self.ready[split, share], f"{self.step:016x}" if digest else None, 0.5 if canary else None

    def made_up(self, grid: Grid, share: tuple[tuple[int, int], ...]) -> Scores:
        """Scores of tiles that nobody has scored."""
        tiles = [grid[i] for first, end in share for i in range(first, end)]
        losses = 0.5 + 0.001 * (np.arange(scored(tiles)) % 17)
        return Scores(losses if grid.per_example else summed(tiles, losses), 0.0, 26 * scored(tiles))


class Alike(Pool):
    """Replicas of equal speed: by measured ones, tiles that cost nothing would all go to whoever was fastest once."""

    def evaluate(self, grid: Grid, digest: bool = False) -> tuple[Scores, str | None]:
        """As it is, with nothing learnt."""
        for member in self.members.connected.values():
            member.speed = 0.0
        return super().evaluate(grid, digest)


def start(
    replicas: int, counts: dict[str, int], weights: str = "", seconds: float = 0.0, cluster: Cluster | None = None
) -> Callable[..., Pool]:
    """What driver.tune takes in place of Pool.start: a pool of null replicas.

    `counts` of examples in dev and test; `weights` is the hash of the model's; a tile takes `seconds`.
    """
    from types import SimpleNamespace

    def begin(spec: Any, *_: Any) -> Pool:
        light = SimpleNamespace(estimator=spec.estimator, batch=spec.batch, tile_examples=spec.tile_examples)
        names = [f"null-{i}" for i in range(replicas)]
        placement = Placement(Listener(own_host(), 0))
        placement.start(names, NullActor, (light, counts, weights, seconds), {})
        pool = (Pool if seconds else Alike)(
            Members(names, placement, light, cluster or Cluster(replicas=replicas)), False
        )
        pool.gather()
        pool.spec = spec
        return pool

    return begin
