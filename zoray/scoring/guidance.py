"""Training examples at the current state -> losses and residual feedback, through an engine.

The objective gives the gradient at the log-probabilities; for completions it is a policy gradient. As many sequences
as fit share a forward pass; the feedback of several passes is added up. Shapes: n examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.engines.feedback.residual import SKIPPED
from zoray.engines.packing import Plan, SequenceTable
from zoray.records import TokenSequence
from zoray.scoring.objectives.base import Outcomes, Sums

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zoray.engines.base import Engine
    from zoray.records import Probe
    from zoray.scoring.objectives.base import Objective
    from zoray.scoring.scorer import Scorer

LENS_ROWS, LENS_EXAMPLES = 2_500, 1_000  # to fit the maps of feedback to, at most


@dataclass(frozen=True, eq=False)
class Gradient:
    """All sums of a forward pass -> d loss / d sum of each; it travels to an engine in another process.

    Args:
        objective: has the loss.
        of: the examples' Sums, all but the sums themselves.
        bare: how many of the sums, at the beginning, are the bare model's, if the objective compares with it.
    """

    objective: Objective
    of: Sums
    bare: int

    def batch(self, values: np.ndarray) -> Sums:
        """The sums as the objective takes them."""
        return replace(self.of, sums=values[self.bare :], reference=values[: self.bare] if self.bare else None)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        slopes = self.objective.slopes(self.batch(values))
        return np.concatenate([np.zeros(self.bare), np.where(np.isfinite(slopes), slopes, 0.0)])


@dataclass(frozen=True, eq=False)
class Constant:
    """Slopes that are known before the forward pass."""

    slopes: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.slopes


class Total(dict[str, np.ndarray]):
    """Feedback of several forward passes."""

    def add(self, feedback: dict[str, np.ndarray]) -> None:
        """Add that of one more pass."""
        for name, values in feedback.items():
            self[name] = self[name] + values if name in self else values


class Guidance:
    """The feedback of a replica's examples.

    Args:
        scorer: the replica's examples.
        engine: its model.
        samples: completions of each prompt, if the objective scores completions.
    """

    def __init__(self, scorer: Scorer, engine: Engine, samples: int) -> None:
        self._scorer, self._engine, self._samples = scorer, engine, samples

    def fit_lens(self, rank: int) -> None:
        """Let the engine fit the maps of feedback (engines/feedback/lens.py) to the first training examples."""
        encoded = self._scorer.workload.encoded["train"]
        count = min(len(self._scorer.workload.splits.train), LENS_EXAMPLES)
        self._engine.fit_lens(lens_table(sequence for i in range(count) for sequence in encoded[i]), rank)

    def __call__(self, centre: Probe, examples: np.ndarray) -> tuple[Outcomes, dict[str, np.ndarray], float]:
        """Outcomes of training examples (n,), the feedback of the sum of their losses, and its weight, 0 to 1.

        The feedback is {`<matrix>.<part>`: float32 array}; the weight says how wrong the model is about the examples.
        """
        total, parts, places, doubts = Total(), list[Outcomes](), list[np.ndarray](), [np.zeros(0)]
        for number, own in self._by_part(examples):
            objective = self._scorer.parts[number].objective
            by = self._by_loss if objective.sampling is None else self._by_reward
            for some, outcomes, feedback, doubt in by(objective, centre, examples[own]):
                places.append(own[some])
                parts.append(outcomes)
                doubts.append(doubt)
                total.add(feedback)
        everyone = np.minimum(np.concatenate(doubts), 1.0)
        return _in_order(parts, np.concatenate(places)), total, float(np.sqrt(np.mean(everyone**2)))

    def _by_part(self, examples: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Each part of a mixture, and the positions of its examples."""
        if len(self._scorer.parts) == 1:
            return [(0, np.arange(len(examples)))]
        part_of = self._scorer.parts_of("train")[examples]
        return [(int(part), np.flatnonzero(part_of == part)) for part in np.unique(part_of)]

    def _by_loss(self, objective: Objective, centre: Probe, examples: np.ndarray) -> Iterable[tuple[Any, ...]]:
        """(places, outcomes, feedback, doubts), each time of as many examples as fit a forward pass."""
        encoded, chosen = self._scorer.table("train").take(examples)
        table, first = encoded.table, encoded.first_sequence
        each = [slice(first[number], first[number + 1]) for number in chosen]
        factor = 2 if objective.reference else 1
        sizes = [(factor * table.lengths[own], factor * table.n_targets[own]) for own in each]
        limits = self._engine.at_once()
        for some in _passes(sizes, limits):
            own = chosen[some]
            count = len(own) if objective.reference else 0
            everything, probe_of = np.concatenate([own[:count], own]), np.repeat([-1, 0], [count, len(own)])
            bare = int(encoded.n_outputs[everything[:count]].sum())
            gradient = Gradient(objective, encoded.sums(np.zeros(0), own), bare)
            plan = encoded.plan((centre,), probe_of, everything)
            values, feedback = (
                self._fed(plan, gradient, limits) if len(own) == 1 else self._engine.feedback(plan, gradient)
            )
            batch = gradient.batch(values)
            outcomes = replace(objective.reduce(batch), tokens=int(encoded.tokens[everything].sum()))
            yield some, outcomes, feedback, objective.doubts(batch, gradient(values)[bare:])

    def _fed(
        self, plan: Plan, gradient: Gradient, limits: tuple[int, int, int]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sums and feedback of one example. If it does not fit a forward pass (many options, long answers), its sums
        are computed first; they give the slopes, and feedback then takes as many sequences at a time as fit.
        """
        own = np.flatnonzero(plan.probe_of >= 0)
        lengths, asked = plan.table.lengths[plan.chosen], plan.table.n_targets[plan.chosen]
        if len(_passes([(lengths[i : i + 1], asked[i : i + 1]) for i in range(len(lengths))], limits)) == 1:
            return self._engine.feedback(plan, gradient)
        values, total = self._engine.score_plan(plan), Total()
        slopes, first = gradient(values), plan.first_output
        for some in _passes([(lengths[i : i + 1], asked[i : i + 1]) for i in own], limits):
            at = own[some]
            known = Constant(np.concatenate([slopes[first[i] : first[i + 1]] for i in at]))
            part = Plan(plan.table, plan.probes, plan.probe_of[at], plan.chosen[at])
            total.add(self._engine.feedback(part, known)[1])
        return values, total

    def _by_reward(self, objective: Any, centre: Probe, examples: np.ndarray) -> Iterable[tuple[Any, ...]]:
        """The policy gradient (REINFORCE) of completions; the mean of a prompt's others is the baseline (RLOO).

        Ahmadian et al., arXiv 2402.14740. If the objective takes the likeliest tokens, which never vary, feedback
        samples its own completions at a temperature of 1.
        """
        writer, samples = self._scorer.writer(objective), self._samples
        chosen, turns = np.repeat(examples, samples), np.tile(np.arange(samples), len(examples))
        sampling = objective.sampling
        sampling = sampling if sampling.temperature else replace(sampling, temperature=1.0)
        centres, split = np.zeros(len(chosen), np.int64), self._scorer.workload.splits["train"]
        found = writer.outcomes(split, (centre,), centres, chosen, centre.step, sampling, turns)
        losses = found.losses.reshape(-1, samples)
        slopes = ((losses - losses.mean(axis=1, keepdims=True)) * samples / (samples - 1)).flatten()
        written = [_completion(*tokens) for tokens in writer.tokens]
        telling = [i for i, sequence in enumerate(written) if sequence is not None and slopes[i]] or [0]
        sequences = [written[i] or SILENT for i in telling]
        total, tokens = Total(), 0
        sizes = [(np.array([len(s.tokens)]), np.array([len(s.rows)])) for s in sequences]
        for some in _passes(sizes, self._engine.at_once()):
            table = SequenceTable.of([sequences[i] for i in some])
            plan = Plan(table, (centre,), np.zeros(len(some), np.int64), np.arange(len(some)))
            total.add(self._engine.feedback(plan, Constant(slopes[[telling[i] for i in some]]))[1])
            tokens += int(table.lengths.sum())
        means = replace(
            found,
            losses=losses.mean(axis=1),
            scores=found.scores.reshape(-1, samples).mean(axis=1),
            columns={},
            tokens=found.tokens + tokens,
        )
        yield np.arange(len(examples)), means, total, np.ones(len(examples))


def lens_table(sequences: Iterable[TokenSequence]) -> SequenceTable:
    """Sequences to fit the maps to, until they have LENS_ROWS rows; the first few rows of each are left out."""
    found: list[TokenSequence] = []
    rows = 0
    for sequence in sequences:
        own = np.arange(SKIPPED, len(sequence.tokens), dtype=np.int32)
        if len(own):
            found.append(TokenSequence(sequence.tokens, own, np.zeros_like(own), np.zeros_like(own), 1))
            rows += len(own)
        if rows >= LENS_ROWS:
            break
    return SequenceTable.of(found)


NOTHING = np.zeros(0, np.int32)
SILENT = TokenSequence(np.zeros(1, np.int32), NOTHING, NOTHING, NOTHING, 1)  # asks for nothing


def _passes(sizes: Sequence[tuple[np.ndarray, np.ndarray]], limits: tuple[int, int, int]) -> list[np.ndarray]:
    """Runs of the positions in `sizes`, (tokens, asked rows) of some sequences each, that fit one forward pass.

    `limits`: see Engine.at_once.
    """
    most_tokens, most_rows, block = limits
    runs: list[list[int]] = [[]]
    tokens = rows = 0
    for number, (lengths, asked) in enumerate(sizes):
        more = int((-(-lengths // block) * block).sum()), int(asked.sum())
        if runs[-1] and (tokens + more[0] > most_tokens or rows + more[1] > most_rows):
            runs.append([])
            tokens = rows = 0
        runs[-1].append(number)
        tokens, rows = tokens + more[0], rows + more[1]
    return [np.array(run, np.int64) for run in runs]


def _completion(prompt: Sequence[int], written: Sequence[int]) -> TokenSequence | None:
    """A prompt with its completion, all tokens of the completion asked for; None if it is empty."""
    if not written:
        return None
    tokens = np.array([*prompt, *written], np.int32)
    rows = np.arange(len(prompt) - 1, len(tokens) - 1, dtype=np.int32)
    return TokenSequence(tokens[:-1], rows, tokens[rows + 1], np.zeros(len(rows), np.int32), 1)


def _in_order(parts: Sequence[Outcomes], places: np.ndarray) -> Outcomes:
    """The outcomes of several groups of examples as one, ordered by `places`."""
    losses, scores = np.zeros(len(places)), np.zeros(len(places))
    losses[places] = np.concatenate([part.losses for part in parts])
    scores[places] = np.concatenate([part.scores for part in parts])
    tokens, written, failed = (sum(getattr(part, name) for part in parts) for name in ("tokens", "written", "failed"))
    failure = next((part.failure for part in parts if part.failure), "")
    return Outcomes(losses, scores, {}, tokens, written, failed, failure)
