"""A replica without transformers, for tests of the pool: it is there in 3 s, of which one is Ray's, instead of in 10.

The state, its folds, digests and snapshots are the real ones, over the matrices of a real model; only what scores is a
formula: the loss of example j is the sum over all matrices of mean((W_eff x_j)^2), where x_j is drawn from j.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from zoray.methods.directions import direction_numpy
from zoray.methods.snapshots import pack, unpack
from zoray.pool.on_ray.actor import ReplicaActor
from zoray.pool.on_ray.cluster import bind_cores
from zoray.records import Commit, Probe, Scores, Tile
from zoray.records.tiles import Grid, losses_of, mean, summed
from zoray.scoring.replica import ReplicaInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.scoring.workload import ReplicaSpec


class ToyEngine:
    """The part of Engine (zoray/engines/base.py) that a replica asks for."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.reset()

    def reset(self) -> None:
        held = load_file(Path(self.spec.model.path, "model.safetensors"))
        linear = {name.removesuffix(".weight"): w for name, w in held.items() if ".layers." in name and w.dim() == 2}
        self.weights = {name: weight.float() for name, weight in linear.items()}
        shapes = {name: tuple(weight.shape) for name, weight in linear.items()}
        self.state = self.spec.space.open(shapes, self.spec.seed, weights=self.weights)

    def losses(self, probe: Probe, examples: Sequence[int]) -> list[float]:
        """The loss of each example; free of what is scored beside it."""
        import torch

        found, scaling = np.zeros(len(examples)), self.state.space.scaling
        for number, (name, a, b) in enumerate(self.state.factors(probe)):
            for k, example in enumerate(examples):
                x = torch.from_numpy(direction_numpy(5, example, number, "x", 0, a.shape[1], "gaussian")).double()
                y = self.weights[name].double() @ x + scaling * (b.double() @ (a.double() @ x))
                found[k] += float(y.square().mean())
        return found.tolist()

    def apply(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            self.state.apply(commit)

    def settle(self) -> None:
        self.state.settle()

    def step(self) -> int:
        return self.state.step

    def digest(self) -> str:
        return self.state.digest()

    def snapshot(self, limit: int) -> bytes | None:
        return pack(self.state, limit)

    def restore(self, data: bytes, step: int) -> None:
        unpack(self.state, data, step)


class ToyReplica:
    """As zoray/scoring/replica.py's, whose guarantees it keeps."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec, self.engine = spec, ToyEngine(spec)
        self.info = ReplicaInfo(self.engine.digest(), "toy", "ToyEngine", "float32", 0.0, ())

    def grid(self, step: int, split: str) -> Grid:
        return Grid.of(self.spec, step, split)

    def evaluate(
        self, commits: Sequence[Commit], tiles: Sequence[Tile], digest: bool = False, per_example: bool = False
    ) -> tuple[Scores, str | None]:
        self.apply(commits)
        losses: list[float] = []
        for tile in tiles:
            first = self.spec.batch * tile.probes[0].step
            for probe in tile.probes:
                losses += self.engine.losses(probe, range(first + tile.start, first + tile.stop))
        found = np.array(losses)
        return Scores(found if per_example else summed(tiles, found), 0.0, 0), self.engine.digest() if digest else None

    def canary(self) -> float:
        return mean(self.engine.losses(self.spec.estimator.ask(self.engine.step())[0], range(2)))

    def reset(self) -> None:
        self.engine.reset()

    def apply(self, commits: Sequence[Commit]) -> None:
        self.engine.apply([commit for commit in commits if commit.step >= self.engine.step()])

    def adapter(self) -> dict[str, np.ndarray]:
        return self.engine.state.arrays()


class Toy(ReplicaActor):
    """A replica's actor with such a replica in it."""

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        if self.replica is not None:
            self.replica.reset()
            return self.replica.info
        if cores is not None:
            os.environ["OMP_NUM_THREADS"] = str(len(bind_cores(*cores)))
        replica: Any = ToyReplica(spec)
        self.replica = replica
        return replica.info


def by_itself(spec: ReplicaSpec, steps: int) -> tuple[list[list[tuple[float, ...]]], list[str]]:
    """What a run without a pool gives, by commits of (0.01, -0.02): losses of each step, all digests."""
    replica, losses, digests = ToyReplica(spec), [], []
    for step in range(steps):
        grid = Grid.of(spec, step)
        losses.append(losses_of(spec.estimator.ask(step), grid.tiles, replica.evaluate((), grid.tiles)[0])[0])
        digests.append(replica.engine.digest())
        replica.apply((Commit(step, (0.01, -0.02)),))
    return losses, [*digests, replica.engine.digest()]
