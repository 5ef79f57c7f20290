"""For tests: the driver's loop over replicas in this process, and a replica whose model is a quadratic.

The loop is that of driver.tune without Ray, files and plots; replicas share a step's tiles as the pool shares them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.methods.directions import direction_numpy
from zoray.methods.estimators.feedback import gains, quantised
from zoray.methods.spaces.signs import packed
from zoray.records import Probe, Scores, Tile
from zoray.records.tiles import Grid, contiguous, gives_feedback, join_scores, losses_of, mean, summed
from zoray.run import journal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zoray.run.journal import StepRecord

MATRICES = {"model.layers.0.q_proj": (6, 5), "model.layers.1.up_proj": (4, 7)}  # (out, in)
SEED, EXAMPLES = 11, 64


def base_weights(scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Small base weights, the same at every call."""
    return {
        name: scale * torch.from_numpy(direction_numpy(3, 0, 0, name, 0, out * into, "gaussian")).view(out, into)
        for name, (out, into) in MATRICES.items()
    }


class Quadratic:
    """A replica without a language model: the loss of example j is |W_eff - T_j|^2 / 2, per element.

    The targets T_j differ from the base weights by a common matrix of low rank and a little noise of their own.
    """

    def __init__(self, space: Any, seed: int = SEED) -> None:
        self.space, self.weights = space, base_weights()
        self.state = space.open(MATRICES, seed, weights=self.weights)
        self.common, self.own = {}, {}
        for name, (out, into) in MATRICES.items():
            u = torch.from_numpy(direction_numpy(4, 0, 0, name, 0, out, "gaussian")).view(out, 1)
            v = torch.from_numpy(direction_numpy(4, 1, 0, name, 0, into, "gaussian")).view(1, into)
            self.common[name] = (base_weights()[name] + 0.5 * u @ v).double().numpy()
            noise = direction_numpy(4, 2, 0, name, 0, EXAMPLES * out * into, "gaussian")
            self.own[name] = 0.05 * noise.reshape(EXAMPLES, out, into).astype(np.float64)

    def missing(self, probe: Probe) -> dict[str, np.ndarray]:
        """W + scaling B A - (the common target), under a probe, float64."""
        return {
            name: self.weights[name].double().numpy()
            + self.space.scaling * (b.double().numpy() @ a.double().numpy())
            - self.common[name]
            for name, a, b in self.state.factors(probe)
        }

    def losses(self, probe: Probe, examples: range) -> tuple[float, ...]:
        """The loss of each example; free of what is scored beside it."""
        missing = self.missing(probe)
        return tuple(
            sum(float(((m - self.own[name][i % EXAMPLES]) ** 2).mean()) / 2 for name, m in missing.items())
            for i in examples
        )

    def feedback(self, probe: Probe, examples: range) -> dict[str, np.ndarray]:
        """The gradient of the sum of their losses, exactly."""
        found, missing, scaling = {}, self.missing(probe), self.space.scaling
        for name, a, b in self.state.factors(probe):
            whole = sum((missing[name] - self.own[name][i % EXAMPLES]) / missing[name].size for i in examples)
            found[f"{name}.lora_A"] = scaling * b.double().numpy().T @ whole
            found[f"{name}.lora_B"] = scaling * whole @ a.double().numpy().T
        return {name: found[name] for name in self.state.layout.shapes}

    def evaluate(
        self,
        commits: Sequence[Any],
        tiles: Sequence[Tile],
        digest: bool,
        per_example: bool = False,
        levels: int = 0,
    ) -> tuple[Scores, str]:
        """As Replica.evaluate; the step's examples are `batch`-sized runs, one after another.

        `levels`: of the feedback of tiles of the centre; 0 for a step without.
        """
        for commit in commits:
            if commit.step >= self.state.step:
                self.state.apply(commit)
        rows: list[tuple[float, ...]] = []
        fed: list[np.ndarray] = []
        for tile in tiles:
            first = 16 * tile.probes[0].step
            examples = range(first + tile.start, first + tile.stop)
            rows += [self.losses(p, examples) for p in tile.probes]
            if levels and gives_feedback(tile):
                fed.append(quantised(self.feedback(tile.probes[0], examples), levels, 1.0))
        losses = np.array([loss for row in rows for loss in row])
        if not per_example:
            losses = summed(tiles, losses)
        feedback = np.sum(fed, axis=0, dtype=np.int32) if fed else None
        return Scores(losses, 0.0, 0, feedback=feedback), self.state.digest()


def by_direction(probes: Sequence[Probe]) -> dict[int, tuple[Probe, ...]]:
    """Probes by the direction that they lie on; the centre (scale 0) lies on none and has the key -1."""
    groups: dict[int, tuple[Probe, ...]] = {}
    for probe in probes:
        key = probe.index if probe.scale else -1
        groups[key] = (*groups.get(key, ()), probe)
    return groups


def tile_grid(probes: Sequence[Probe], examples: int, tile_examples: int, shared: bool = True) -> tuple[Tile, ...]:
    """The tiles of any probes of a step."""
    groups = list(by_direction(probes).values())
    return Grid(probes[0].step, "train", len(groups), groups.__getitem__, examples, tile_examples, shared).tiles


def drive(
    replicas: Sequence[Any],
    estimator: Any,
    optimizer: Any,
    steps: int,
    batch: int = 8,
    tile: int = 8,
    done: Sequence[StepRecord] = (),
    stop: int | None = None,
    matrices: int = len(MATRICES),
) -> list[StepRecord]:
    """Steps [len(done), stop) of a run of `steps`; all records, `done` included. Every record has a digest.

    `matrices`: how many are moved.
    """
    records = list(done)
    memory = records[-1].optimizer if records else optimizer.init()
    for step in range(len(records), steps if stop is None else stop):
        probes, trust = estimator.ask(step), records[-1].trust if records else ()
        tiles, levels = tile_grid(probes, batch, tile, shared=estimator.shared), ()
        if estimator.guided:
            grid = Grid(step, "train", estimator.groups, partial(estimator.group, step), batch, tile, guided=True)
            tiles, levels = grid.tiles, (grid.levels,)
        commits, answers, digests = [r.commit for r in records], [], set()
        for replica, share in zip(replicas, contiguous(list(range(len(tiles))), len(replicas)), strict=True):
            answer, digest = replica.evaluate(commits, [tiles[i] for i in share], True, estimator.per_example, *levels)
            answers += [(share, answer)] if share else []
            digests.add(digest)
        assert len(digests) == 1, f"replicas disagree at step {step}"
        scores = join_scores(tiles, answers, estimator.per_example)
        losses, _ = losses_of(probes, tiles, scores, estimator.per_example)
        estimate = estimator.tell(probes, losses)
        guide: tuple[Any, ...] = ()
        if scores.feedback is not None:
            trust = estimator.judge(trust, probes, losses)
            guide = (gains(trust, matrices), packed(scores.feedback, step))
        memory, commit = optimizer.update(memory, step, steps, estimate.weights, *guide)
        records.append(journal.StepRecord(commit, tuple(map(mean, losses)), digests.pop(), memory, trust))
    return records


def final_digest(replica: Any, records: Sequence[StepRecord]) -> str:
    """The digest after all records."""
    return replica.evaluate([r.commit for r in records], (), True)[1]


def through_a_file(path: Path, header: dict[str, Any], records: Sequence[StepRecord]) -> journal.Contents:
    """Write a journal and read it back."""
    with journal.Journal.create(path, header) as log:
        for record in records:
            log.append(record)
    return journal.read(path)
