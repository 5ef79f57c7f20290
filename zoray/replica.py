"""A replica: one engine with its adapter state at a journal index, and the data to score. Ray wraps it in pool.py.

Guarantees: `evaluate` is a pure function of the commits seen so far and the tiles asked for, so a tile may be scored by
anyone, and twice. Commits are applied in step order before anything is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoray.data import ReplicaSpec, Workload, batch_indices, load_workload, stratified_indices
from zoray.records import Example, Probe, Tile, TileScore, TokenSequence
from zoray.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from zoray.records import Commit


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica says of itself once it can score."""

    digest: str
    weights: str  # hash of the base weights
    engine: str
    dtype: str  # of the base weights as the engine holds them
    noise: float  # standard deviation of an example's score between two packings of the same state, see score_noise
    self_test: tuple[tuple[str, float], ...]


class Replica:
    """Scores tiles for the driver; see `evaluate`."""

    def __init__(self, spec: ReplicaSpec, workload: Workload | None = None) -> None:
        """Load data and model, and prove that the engine's adapters are live."""
        from zoray.models import weights_hash

        self.spec = spec
        self.workload = workload or load_workload(spec)
        self._labels = tuple(example.label for example in self.workload.splits.train)
        self.engine = spec.engine.start(
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

    def evaluate(
        self, commits: Sequence[Commit], tiles: Sequence[Tile], digest: bool = False
    ) -> tuple[tuple[TileScore, ...], str | None]:
        """Apply the commits not seen yet, then score the tiles. The digest is of the state that was scored.

        All tiles go to the engine together and share its forward passes, unless the engine is deterministic: then each
        tile is scored alone, and its bits do not depend on the others.
        """
        self.apply(commits)
        groups = [[tile] for tile in tiles] if self.spec.engine.deterministic else [list(tiles)]
        scores = tuple(score for group in groups if group for score in self._score(group))
        return scores, self.engine.digest() if digest else None

    def score_noise(self, examples: int = 8) -> float:
        """How much an example's loss depends on what it is scored with: its standard deviation.

        The same state scores a few training examples alone and together; losses would be equal in exact arithmetic.
        """
        centre, count = Probe(self.engine.step(), 0, 0.0), min(examples, len(self.workload.splits.train))
        work = [(centre, *self.workload.example("train", i)) for i in range(count)]
        together = self._outcomes(work)
        alone = [self._outcomes([item])[0] for item in work]
        squares = [(a[0] - b[0]) ** 2 for a, b in zip(together, alone, strict=True)]
        return math.sqrt(mean(squares) / 2)  # the difference of two scores has twice the variance of one

    def reset(self) -> None:
        """Back to journal index 0."""
        self.engine.reset()

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply the commits of the steps not seen yet; others are ignored, so that sending one twice is harmless."""
        seen = self.engine.step()
        self.engine.apply([commit for commit in commits if commit.step >= seen])

    def outcomes(self, split: str, probe: Probe) -> list[tuple[float, float]]:
        """(loss, correct) of every example of a split under a probe, in order."""
        examples = [self.workload.example(split, i) for i in range(len(self.workload.splits[split]))]
        return self._outcomes([(probe, *example) for example in examples])

    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter state as float32 arrays, see engines/base.py."""
        return self.engine.adapter()

    def _score(self, tiles: list[Tile]) -> list[TileScore]:
        covered = [(tile, self._indices(tile)) for tile in tiles]
        work = [
            (probe, *self.workload.example(tile.split, index))
            for tile, indices in covered
            for probe in tile.probes
            for index in indices
        ]
        outcomes = iter(self._outcomes(work))
        scores = []
        for tile, indices in covered:
            per_probe = [[next(outcomes) for _ in indices] for _ in tile.probes]
            tokens = sum(len(s.tokens) for i in indices for s in self.workload.encoded[tile.split][i])
            scores.append(
                TileScore(
                    losses=tuple(tuple(loss for loss, _ in rows) for rows in per_probe),
                    correct=tuple(tuple(correct for _, correct in rows) for rows in per_probe),
                    tokens=tokens * len(tile.probes),
                )
            )
        return scores

    def _outcomes(self, work: list[tuple[Probe, Example, tuple[TokenSequence, ...]]]) -> list[tuple[float, float]]:
        sums = iter(self.engine.score([(probe, sequence) for probe, _, sequences in work for sequence in sequences]))
        return [
            self.spec.objective.reduce(example, sequences, [next(sums) for _ in sequences])
            for _, example, sequences in work
        ]

    def _indices(self, tile: Tile) -> list[int]:
        """Which examples of the split a tile covers: a slice of the step's batch, or of an evaluation split itself."""
        if tile.split != "train":
            return list(range(tile.start, tile.stop))
        address, train = (self.spec.data_seed, tile.probes[0].step, self.spec.batch), self.workload.splits.train
        if self.spec.stratify:
            chosen = stratified_indices(*address, self._labels)
        else:
            chosen = batch_indices(*address, len(train))
        return chosen[tile.start : tile.stop].tolist()
