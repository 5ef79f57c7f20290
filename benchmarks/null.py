"""Replicas that score nothing, in actors without torch or vLLM: what is left of a step is driver and messages."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from zoray.actor import ReplicaActor, connect_all
from zoray.channel import Listener
from zoray.cluster import own_host
from zoray.pool import Pool
from zoray.records import Scores
from zoray.replica import ReplicaInfo
from zoray.tiles import Grid, scored, summed

START_SECONDS = 300

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from zoray.records import Commit


class NullActor(ReplicaActor):
    """Answers as ReplicaActor does, with losses that are ready-made for each share of a grid."""

    def __init__(self, spec: SimpleNamespace, counts: dict[str, int]) -> None:
        super().__init__()
        self.spec, self.counts, self.step = spec, counts, 0
        self.ready: dict[tuple[str, tuple[tuple[int, int], ...]], Scores] = {}

    def evaluate(
        self, commits: tuple[Commit, ...], step: int, split: str, share: tuple[tuple[int, int], ...], digest: bool
    ) -> tuple[Scores, str | None]:
        """The losses differ between probes, as an estimator expects."""
        self.step += len(commits)
        if (split, share) not in self.ready:
            self.ready[split, share] = self.made_up(Grid.of(self.spec, step, split, self.counts.get(split, 0)), share)
        return self.ready[split, share], f"{self.step:016x}" if digest else None

    def made_up(self, grid: Grid, share: tuple[tuple[int, int], ...]) -> Scores:
        """Scores of tiles that nobody has scored."""
        tiles = [grid[i] for first, end in share for i in range(first, end)]
        losses = 0.5 + 0.001 * (np.arange(scored(tiles)) % 17)
        return Scores(losses if grid.per_example else summed(tiles, losses), 0.0, 26 * scored(tiles))


def start(replicas: int, counts: dict[str, int], weights: str = "") -> Callable[..., Pool]:
    """What driver.tune takes in place of Pool.start: a pool of null replicas.

    `counts` of examples in dev and test; `weights` is the hash of the model's.
    """
    from types import SimpleNamespace

    def begin(spec: Any, *_: Any) -> Pool:
        light = SimpleNamespace(estimator=spec.estimator, batch=spec.batch, tile_examples=spec.tile_examples)
        actor = ray.remote(NullActor).options(num_cpus=0)
        actors = [(f"null-{i}", actor.remote(light, counts)) for i in range(replicas)]
        with closing(Listener(own_host(), 0)) as listener:
            members = connect_all(actors, listener, START_SECONDS)
        info = ReplicaInfo("0" * 16, weights, "null", "float32", 0.0, ())
        return Pool(members, spec, info, None, False)

    return begin
