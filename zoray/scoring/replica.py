"""A replica: one engine with its adapter state at a journal index, and the data to score. Ray wraps it in actor.py.

Guarantees: `evaluate` is a pure function of the commits seen so far and the tiles asked for, so any replica may score
a tile, even twice. Commits are applied in step order before anything is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.methods.estimators import Feedback
from zoray.methods.estimators.feedback import quantised
from zoray.records import Probe, Scores, Tile
from zoray.records.tiles import LARGEST, Grid, gives_feedback, join_scores, mean, summed
from zoray.scoring.guidance import Guidance
from zoray.scoring.scorer import Scorer, score_noise
from zoray.scoring.workload import ReplicaSpec, Workload, load_workload, order_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.engines.base import Engine
    from zoray.records import Commit
    from zoray.scoring.objectives.base import Outcomes


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica reports once it can score."""

    digest: str
    weights: str  # hash of the base weights
    engine: str
    dtype: str  # of the base weights as the engine holds them
    noise: float  # standard deviation of an example's loss, see scorer.score_noise
    self_test: tuple[tuple[str, float], ...]
    canary_noise: float = 0.0  # the same of its surprise, which canaries compare


class Replica:
    """Scores tiles for the driver; see `evaluate`."""

    def __init__(self, spec: ReplicaSpec, workload: Workload | None = None, engine: Engine | None = None) -> None:
        """Load data and model, unless they are given, and prove that the engine applies adapters."""
        from zoray.models.folder import weights_hash

        self.spec = spec
        self.workload = workload or load_workload(spec)
        self._order = order_of(spec, self.workload)
        self.engine = engine or spec.engine.start(
            self.workload.folder, spec.model.dtype, self.workload.matrices, spec.space, spec.seed
        )
        self.scorer = Scorer(spec, self.workload, self.engine)
        if isinstance(spec.estimator, Feedback):
            self.guidance = Guidance(self.scorer, self.engine, spec.estimator.samples)
            self.guidance.fit_lens(spec.estimator.lens)
        noise, canary_noise = score_noise(self.scorer, spec.estimator.ask(self.engine.step()))
        self.info = ReplicaInfo(
            digest=self.engine.digest(),
            weights=weights_hash(self.workload.folder),
            engine=type(self.engine).__name__,
            dtype=self.engine.dtype,
            noise=noise,
            self_test=tuple(self.engine.self_test.items()),
            canary_noise=canary_noise,
        )

    def grid(self, step: int, split: str) -> Grid:
        """All tiles of a step, or of a split at the state before it; equal on every replica and on the driver."""
        return Grid.of(self.spec, step, split, len(self.workload.splits[split]), self.workload.pooled)

    def evaluate(
        self, commits: Sequence[Commit], tiles: Sequence[Tile], digest: bool = False, per_example: bool = False
    ) -> tuple[Scores, str | None]:
        """Apply the commits not seen yet, then score the tiles. The digest is of the state that was scored.

        All tiles go to the engine together and share its forward passes, unless the engine is deterministic: then each
        tile is scored alone, and its bits do not depend on the others. Tiles that give feedback are always alone.
        """
        self.apply(commits)
        guided = {i for i, tile in enumerate(tiles) if self.spec.estimator.guided and gives_feedback(tile)}
        others = [i for i in range(len(tiles)) if i not in guided]
        groups = [[i] for i in others] if self.spec.engine.deterministic else [others]
        answers = [(group, self._score([tiles[i] for i in group], per_example)) for group in groups if group]
        answers += [([i], self._guide(tiles[i], per_example)) for i in sorted(guided)]
        if len(answers) == 1:
            scores = answers[0][1]
        else:
            scores = join_scores(tiles, answers, per_example) if answers else Scores(np.zeros(0, np.int64), 0.0, 0)
        return scores, self.engine.digest() if digest else None

    def outcomes(self, split: str, probe: Probe, examples: np.ndarray | None = None) -> Outcomes:
        """Losses and scores of examples of a split under a probe, evaluated as dev and test are."""
        chosen = np.arange(len(self.workload.splits[split])) if examples is None else examples
        return self.scorer.outcomes(split, (probe,), np.zeros(len(chosen), np.int64), chosen, measured=True)

    def losses(self, probes: tuple[Probe, ...], examples: np.ndarray) -> np.ndarray:
        """Losses (P, n) of n training examples under P probes, scored together."""
        probe_of, tiled = np.repeat(np.arange(len(probes)), len(examples)), np.tile(examples, len(probes))
        return self.scorer.outcomes("train", probes, probe_of, tiled).losses.reshape(len(probes), -1)

    def canary(self, examples: int = 2) -> float:
        """Mean surprise of the first few training examples under the step's first probe, for replicas to compare.

        It takes the same path as every score: state, slot, model, head.
        """
        probe = self.spec.estimator.ask(self.engine.step())[0]
        chosen = np.arange(min(examples, len(self.workload.splits.train)))
        return mean(self.scorer.surprise((probe,), np.zeros(len(chosen), np.int64), chosen).tolist())

    def reset(self) -> None:
        """Go back to journal index 0."""
        self.engine.reset()

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply the commits of the steps not seen yet; others are ignored, so that sending one twice is harmless."""
        seen = self.engine.step()
        self.engine.apply([commit for commit in commits if commit.step >= seen])

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
        measured = split != "train"
        found = self.scorer.outcomes(
            split, tuple(number), np.concatenate(probe_of), np.concatenate(examples), tiles[0].probes[0].step, measured
        )
        losses = found.losses
        if per_example:
            losses = np.where(np.abs(losses) < LARGEST, losses, np.nan)
        return Scores(
            losses if per_example else summed(tiles, losses),
            math.fsum(found.scores),
            found.tokens,
            {"score": found.scores, **found.columns} if measured else None,
            found.written,
            found.failed,
            found.failure,
        )

    def _guide(self, tile: Tile, per_example: bool) -> Scores:
        """A tile of the centre: its losses, and its feedback in whole numbers."""
        found, feedback, doubt = self.guidance(tile.probes[0], self._indices(tile))
        levels = self.grid(tile.probes[0].step, "train").levels
        whole = quantised(feedback, levels, doubt)
        rest = (found.written, found.failed, found.failure, whole)
        losses = np.where(np.abs(found.losses) < LARGEST, found.losses, np.nan)
        return Scores(
            losses if per_example else summed([tile], losses), math.fsum(found.scores), found.tokens, None, *rest
        )

    def _indices(self, tile: Tile) -> np.ndarray:
        """Which examples of the split a tile covers: a slice of the step's batch, or of an evaluation split itself."""
        if tile.split != "train":
            return np.arange(tile.start, tile.stop)
        return self._order.step(tile.probes[0].step)[tile.start : tile.stop]
