"""A replica: one engine with its adapter state at a journal index, and the data to score. Ray wraps it in actor.py.

Guarantees: `evaluate` is a pure function of the commits seen so far and the tiles asked for, so a tile may be scored by
anyone, and twice. Commits are applied in step order before anything is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.data import ReplicaSpec, Workload, load_workload, step_indices
from zoray.engines.packing import Plan, SequenceTable, ranges, starts_of
from zoray.records import Probe, Scores, Tile, TokenSequence
from zoray.tiles import LARGEST, Grid, join_scores, mean, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.engines.base import Engine
    from zoray.records import Commit


NEAR = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a probe's scale


def rounding(losses: np.ndarray) -> float:
    """Standard deviation of the error of losses (5, n) that n smooth functions take at five equidistant points.

    A fourth difference is zero for every cubic; that of independent errors has 1 + 16 + 36 + 16 + 1 times their
    variance.
    """
    fourth = np.array([1.0, -4.0, 6.0, -4.0, 1.0]) @ losses
    return math.sqrt(mean((fourth**2).tolist()) / 70)


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica says of itself once it can score."""

    digest: str
    weights: str  # hash of the base weights
    engine: str
    dtype: str  # of the base weights as the engine holds them
    noise: float  # standard deviation of an example's loss for no reason of its own, see Replica.score_noise
    self_test: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A split's sequences as one table, and which of them, and which of their outputs, are an example's. E examples."""

    table: SequenceTable
    n_sequences: np.ndarray  # (E,)
    first_sequence: np.ndarray  # (E + 1,)
    n_outputs: np.ndarray  # (E,)
    first_output: np.ndarray  # (E + 1,)
    counts: np.ndarray  # (outputs of the split,) tokens that each sums over
    labels: np.ndarray  # (E,)
    tokens: np.ndarray  # (E,) of its sequences; an engine may compute what some begin with once

    @classmethod
    def of(cls, examples: Sequence[Sequence[TokenSequence]], labels: Sequence[int]) -> EncodedSplit:
        """From the sequences of each example and its label."""
        table = SequenceTable.of([sequence for sequences in examples for sequence in sequences])
        n_sequences = np.array([len(sequences) for sequences in examples], np.int64)
        first_sequence, of_sequence = starts_of(n_sequences), starts_of(table.n_outputs)
        first_output = of_sequence[first_sequence]
        summed = table.outputs + np.repeat(of_sequence[:-1], table.n_targets)
        return cls(
            table,
            n_sequences,
            first_sequence,
            np.diff(first_output),
            first_output,
            np.bincount(summed, minlength=int(of_sequence[-1])),
            np.array(labels, np.int64),
            np.diff(table.first_token[first_sequence]),
        )


class Replica:
    """Scores tiles for the driver; see `evaluate`."""

    def __init__(self, spec: ReplicaSpec, workload: Workload | None = None, engine: Engine | None = None) -> None:
        """Load data and model, unless they are given, and prove that the engine's adapters are live."""
        from zoray.models import weights_hash

        self.spec = spec
        self.workload = workload or load_workload(spec)
        self._splits: dict[str, EncodedSplit] = {}
        self._labels = tuple(example.label for example in self.workload.splits.train)
        self.engine = engine or spec.engine.start(
            self.workload.folder, spec.model.dtype, self.workload.matrices, spec.space, spec.seed
        )
        self.info = ReplicaInfo(
            digest=self.engine.digest(),
            weights=weights_hash(self.workload.folder),
            engine=type(self.engine).__name__,
            dtype=self.engine.dtype,
            noise=self.score_noise(),
            self_test=tuple(self.engine.self_test.items()),
        )

    def grid(self, step: int, split: str) -> Grid:
        """All tiles of a step, or of a split at the state before it; equal on every replica and on the driver."""
        return Grid.of(self.spec, step, split, len(self.workload.splits[split]))

    def evaluate(
        self, commits: Sequence[Commit], tiles: Sequence[Tile], digest: bool = False, per_example: bool = False
    ) -> tuple[Scores, str | None]:
        """Apply the commits not seen yet, then score the tiles. The digest is of the state that was scored.

        All tiles go to the engine together and share its forward passes, unless the engine is deterministic: then each
        tile is scored alone, and its bits do not depend on the others.
        """
        self.apply(commits)
        groups = [[i] for i in range(len(tiles))] if self.spec.engine.deterministic else [range(len(tiles))]
        answers = [(group, self._score([tiles[i] for i in group], per_example)) for group in groups if group]
        if len(groups) == 1 and answers:
            scores = answers[0][1]
        else:
            scores = join_scores(tiles, answers, per_example) if answers else Scores(np.zeros(0, np.int64), 0.0, 0)
        return scores, self.engine.digest() if digest else None

    def score_noise(self, examples: int = 8) -> float:
        """How much an example's loss differs where exact arithmetic has nothing to tell: its standard deviation.

        By what it is scored with, and by rounding. A difference of probes that is smaller is chance.
        """
        return math.hypot(self._packing_noise(examples), self._rounding_noise(examples))

    def _packing_noise(self, examples: int) -> float:
        """The same state scores a few training examples alone and together."""
        centre, count = Probe(self.engine.step(), 0, 0.0), min(examples, len(self.workload.splits.train))
        (together, _), *alone = [
            self._outcomes("train", (centre,), np.zeros(len(chosen), np.int64), chosen)
            for chosen in (np.arange(count), *np.arange(count)[:, None])
        ]
        squares = (together - np.concatenate([losses for losses, _ in alone])) ** 2
        return math.sqrt(mean(squares.tolist()) / 2)  # the difference of two scores has twice the variance of one

    def _rounding_noise(self, examples: int) -> float:
        """Losses of a few training examples near a probe, at which a smooth loss is nearly a straight line."""
        probe = next((probe for probe in self.spec.estimator.ask(self.engine.step()) if probe.scale), None)
        if probe is None:
            return 0.0
        line = tuple(probe._replace(scale=probe.scale * near) for near in NEAR)
        chosen = np.arange(min(examples, len(self.workload.splits.train)))
        return rounding(self.losses(line, chosen))

    def canary(self, examples: int = 2) -> float:
        """Mean loss of the first few training examples under the step's first probe: what all replicas can compare.

        It takes the way of every score: the state, a slot, the model, the head.
        """
        probe = self.spec.estimator.ask(self.engine.step())[0]
        chosen = np.arange(min(examples, len(self.workload.splits.train)))
        return mean(self.losses((probe,), chosen)[0].tolist())

    def losses(self, probes: tuple[Probe, ...], examples: np.ndarray) -> np.ndarray:
        """Losses (P, n) of n training examples under P probes, scored together."""
        probe_of, tiled = np.repeat(np.arange(len(probes)), len(examples)), np.tile(examples, len(probes))
        return self._outcomes("train", probes, probe_of, tiled)[0].reshape(len(probes), -1)

    def reset(self) -> None:
        """Back to journal index 0."""
        self.engine.reset()

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply the commits of the steps not seen yet; others are ignored, so that sending one twice is harmless."""
        seen = self.engine.step()
        self.engine.apply([commit for commit in commits if commit.step >= seen])

    def outcomes(self, split: str, probe: Probe) -> list[tuple[float, float]]:
        """(loss, correct) of every example of a split under a probe, in order."""
        examples = np.arange(len(self.workload.splits[split]))
        losses, correct = self._outcomes(split, (probe,), np.zeros(len(examples), np.int64), examples)
        return list(zip(losses.tolist(), correct.tolist(), strict=True))

    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter state as float32 arrays, see engines/base.py."""
        return self.engine.adapter()

    def _score(self, tiles: Sequence[Tile], per_example: bool) -> Scores:
        """Tiles of one split, in one call of the engine."""
        split = tiles[0].split
        number: dict[Probe, int] = {}
        probe_of, examples = [], []
        indices = [self._indices(tile) for tile in tiles]
        for tile, covered in zip(tiles, indices, strict=True):
            probe_of.append(np.repeat([number.setdefault(p, len(number)) for p in tile.probes], len(covered)))
            examples.append(np.tile(covered, len(tile.probes)))
        chosen = np.concatenate(examples)
        losses, correct = self._outcomes(split, tuple(number), np.concatenate(probe_of), chosen)
        if per_example:
            losses = np.where(np.abs(losses) < LARGEST, losses, np.nan)
        return Scores(
            losses if per_example else summed(tiles, losses),
            math.fsum(correct),
            int(self._encoded(split).tokens[chosen].sum()),
        )

    def _outcomes(
        self, split: str, probes: tuple[Probe, ...], probe_of: np.ndarray, examples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and correctness, each (n,), of `examples` (n,) under `probes[probe_of]` (n,)."""
        if not len(examples):
            return np.zeros(0), np.zeros(0)
        encoded = self._encoded(split)
        sequences = encoded.n_sequences[examples]
        chosen = ranges(encoded.first_sequence[examples], sequences)
        sums = self.engine.score_plan(Plan(encoded.table, probes, np.repeat(probe_of, sequences), chosen))
        options = encoded.n_outputs[examples]
        counts = encoded.counts[ranges(encoded.first_output[examples], options)]
        return self.spec.objective.reduce(sums, counts, options, encoded.labels[examples])

    def _encoded(self, split: str) -> EncodedSplit:
        if split not in self._splits:
            labels = [example.label for example in self.workload.splits[split]]
            self._splits[split] = EncodedSplit.of(self.workload.encoded[split], labels)
        return self._splits[split]

    def _indices(self, tile: Tile) -> np.ndarray:
        """Which examples of the split a tile covers: a slice of the step's batch, or of an evaluation split itself."""
        if tile.split != "train":
            return np.arange(tile.start, tile.stop)
        return step_indices(self.spec, tile.probes[0].step, self._labels)[tile.start : tile.stop]
