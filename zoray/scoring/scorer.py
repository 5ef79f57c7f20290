"""Examples under probes -> losses and scores: through token sequences, or through completions that the model writes.

The examples of a call may belong to several parts of a mixture; each part's objective scores its own. Scores have
noise: two scores of the same thing differ with the other sequences in the forward pass, and by rounding. A smaller
difference between probes, or replicas, means nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import Probe
from zoray.records.tiles import mean
from zoray.scoring.completions import Writer
from zoray.scoring.objectives.base import Outcomes, Sums
from zoray.scoring.tables import EncodedSplit
from zoray.scoring.workload import ScoredPart, encode_split
from zoray.tasks.batches import part_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.engines.base import Engine
    from zoray.scoring.objectives.base import Objective
    from zoray.scoring.workload import ReplicaSpec, Workload
NEAR = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a probe's scale


class Scorer:
    """Scores a replica's examples. Shapes: n examples, each under one of P probes."""

    def __init__(self, spec: ReplicaSpec, workload: Workload, engine: Engine) -> None:
        self.workload, self._engine, self._seed = workload, engine, spec.data_seed
        self.parts = workload.parts or (ScoredPart(spec.task, spec.objective, spec.objective),)
        self._part_of: dict[str, np.ndarray] = {}
        self._tables: dict[tuple[str, int | None], EncodedSplit] = {}
        self._writers: dict[int, Writer] = {}  # by the identity of their objective

    def outcomes(
        self,
        split: str,
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        examples: np.ndarray,
        step: int = 0,
        measured: bool = False,
    ) -> Outcomes:
        """Losses and scores of `examples` (n,) of a split under `probes[probe_of]`, probe_of (n,).

        Args:
            split: train, dev or test.
            probes: all of them.
            probe_of: the probe of each example.
            examples: their numbers in the split.
            step: seed of sampled completions.
            measured: take scores from the parts' evaluators, as on dev and test; else from their objectives.
        """
        if not len(examples):
            return Outcomes(np.zeros(0), np.zeros(0))
        if len(self.parts) == 1:
            return self._of_part(0, split, probes, probe_of, examples, step, measured)
        part_of = self.parts_of(split)[examples]
        found = {}
        for part in np.unique(part_of).tolist():
            own = part_of == part
            found[part] = self._of_part(part, split, probes, probe_of[own], examples[own], step, measured)
        return _merged(part_of, found)

    def writer(self, objective: Objective) -> Writer:
        """The writer of completions for an objective of this run."""
        if id(objective) not in self._writers:
            assert self.workload.encoder is not None
            self._writers[id(objective)] = Writer(objective, self._engine, self.workload.encoder, self._seed)
        return self._writers[id(objective)]

    def surprise(self, probes: tuple[Probe, ...], probe_of: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Mean negative log-probability of the scored tokens of training examples (n,): smooth, whatever the loss."""
        return self._surprise(self._sums("train", None, probes, probe_of, examples)[0])

    def smooth_losses(
        self, probes: tuple[Probe, ...], probe_of: np.ndarray, examples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses of training examples (n,), zeros unless the objective is smooth; and their surprises (n,)."""
        objective = self.parts[0].objective
        sums, _ = self._sums("train", None, probes, probe_of, examples, objective.reference)
        surprises = self._surprise(sums)
        if not all(part.objective.smooth for part in self.parts):
            return np.zeros(len(examples)), surprises
        if len(self.parts) > 1:
            return self.outcomes("train", probes, probe_of, examples).losses, surprises
        return objective.reduce(sums).losses, surprises

    def _of_part(
        self,
        number: int,
        split: str,
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        examples: np.ndarray,
        step: int,
        measured: bool,
    ) -> Outcomes:
        part = self.parts[number]
        own = self._by(part.objective, None, split, probes, probe_of, examples, step)
        if not measured or part.evaluator is part.objective:
            return own
        found = self._by(part.evaluator, number, split, probes, probe_of, examples, step)
        return replace(found, losses=own.losses, tokens=own.tokens + found.tokens)  # one that writes evaluates itself

    def _by(
        self,
        objective: Objective,
        evaluated: int | None,
        split: str,
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        examples: np.ndarray,
        step: int,
    ) -> Outcomes:
        if objective.sampling is not None:
            writer, drawn = self.writer(objective), step if split == "train" else 0  # dev is the same each time
            return writer.outcomes(self.workload.splits[split], probes, probe_of, examples, drawn)
        sums, tokens = self._sums(split, evaluated, probes, probe_of, examples, objective.reference)
        return replace(objective.reduce(sums), tokens=tokens)

    def _sums(
        self,
        split: str,
        evaluated: int | None,
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        examples: np.ndarray,
        reference: bool = False,
    ) -> tuple[Sums, int]:
        """Sums of log-probabilities of examples (n,), and the tokens of their sequences.

        `evaluated` is the part whose evaluator's sequences are scored; None for the objectives'. With a reference, the
        bare model scores each example once as well.
        """
        encoded, chosen = self.table(split, evaluated).take(examples)
        if not reference:
            values = self._engine.score_plan(encoded.plan(probes, probe_of, chosen))
            return encoded.sums(values, chosen), int(encoded.tokens[chosen].sum())
        once, of_once = np.unique(chosen, return_inverse=True)
        everything = np.concatenate([once, chosen])
        bare = np.full(len(once), -1, np.int64)
        values = self._engine.score_plan(encoded.plan(probes, np.concatenate([bare, probe_of]), everything))
        by_bare, values = np.split(values, [int(encoded.n_outputs[once].sum())])
        sums = encoded.sums(values, chosen, encoded.spread(by_bare, once, of_once))
        return sums, int(encoded.tokens[everything].sum())

    def table(self, split: str, evaluated: int | None = None) -> EncodedSplit:
        """The sequences of a split as the objectives encode them, or as the evaluator of a part does."""
        if (split, evaluated) not in self._tables:
            examples = self.workload.splits[split]
            if evaluated is None:
                sequences = self.workload.encoded[split]
            else:
                encoder, evaluator = self.workload.encoder, self.parts[evaluated].evaluator
                assert encoder is not None
                sequences = encode_split(
                    examples, lambda e: evaluator.encode(e, encoder) if e.part == evaluated else ()
                )
            self._tables[split, evaluated] = EncodedSplit(examples, sequences)
        return self._tables[split, evaluated]

    def parts_of(self, split: str) -> np.ndarray:
        """The part of a mixture that each example of a split belongs to."""
        if split not in self._part_of:
            self._part_of[split] = part_numbers(self.workload.splits[split])
        return self._part_of[split]

    @staticmethod
    def _surprise(sums: Sums) -> np.ndarray:
        return -np.add.reduceat(sums.sums, sums.first) / np.add.reduceat(sums.counts, sums.first)


def _merged(part_of: np.ndarray, found: dict[int, Outcomes]) -> Outcomes:
    """The outcomes of all parts in the order of the examples; a column that a part lacks is nan there."""
    names = dict.fromkeys(name for outcomes in found.values() for name in outcomes.columns)
    losses, scores = np.full(len(part_of), np.nan), np.full(len(part_of), np.nan)
    columns = {name: np.full(len(part_of), np.nan) for name in names}
    for part, outcomes in found.items():
        own = part_of == part
        losses[own], scores[own] = outcomes.losses, outcomes.scores
        for name, values in outcomes.columns.items():
            columns[name][own] = values
    counts = {
        name: sum(getattr(outcomes, name) for outcomes in found.values()) for name in ("tokens", "written", "failed")
    }
    failure = next((outcomes.failure for outcomes in found.values() if outcomes.failure), "")
    return Outcomes(losses, scores, columns, **counts, failure=failure)


def rounding(losses: np.ndarray) -> float:
    """Standard deviation of the errors in losses (5, n) of n smooth functions at five equidistant points.

    A fourth difference is zero for every cubic; that of independent errors has 1 + 16 + 36 + 16 + 1 times their
    variance.
    """
    fourth = np.array([1.0, -4.0, 6.0, -4.0, 1.0]) @ losses
    return math.sqrt(mean((fourth**2).tolist()) / 70)


def score_noise(scorer: Scorer, probes: Sequence[Probe], examples: int = 8) -> tuple[float, float]:
    """Score noise: how far two scores of one training example differ, as standard deviations of loss and surprise.

    0 for an objective that is not smooth, whose noise can't be told from its steps.

    Args:
        scorer: at the state before a step.
        probes: of that step.
        examples: training examples to try, at most.
    """
    chosen = np.arange(min(examples, len(scorer.workload.splits.train)))
    centre = Probe(probes[0].step, 0, 0.0)
    together = _values(scorer, (centre,), chosen)
    alone = [_values(scorer, (centre,), chosen[i : i + 1]) for i in chosen]
    squares = (together - np.concatenate(alone, axis=1)) ** 2
    packing = [math.sqrt(mean(row.tolist()) / 2) for row in squares]  # a difference of two has twice one's variance
    probe = next((probe for probe in probes if probe.scale), None)
    if probe is None:
        return packing[0], packing[1]
    near = _values(scorer, tuple(probe._replace(scale=probe.scale * factor) for factor in NEAR), chosen)
    loss, surprise = (math.hypot(a, rounding(row.reshape(len(NEAR), -1))) for a, row in zip(packing, near, strict=True))
    return loss, surprise


def _values(scorer: Scorer, probes: tuple[Probe, ...], examples: np.ndarray) -> np.ndarray:
    """Losses (0 where they are not smooth) and surprises of examples under each of the probes, (2, P * n)."""
    probe_of, tiled = np.repeat(np.arange(len(probes)), len(examples)), np.tile(examples, len(probes))
    return np.stack(scorer.smooth_losses(probes, probe_of, tiled))
