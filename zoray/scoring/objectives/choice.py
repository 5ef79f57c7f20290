"""Cross-entropy over an example's options, one of which is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.records import ConfigError, Example, SettingError, TokenSequence, require
from zoray.scoring.objectives.base import Objective, Outcomes, Sums, need_options

if TYPE_CHECKING:
    from zoray.models.tokens import Encoder

CALIBRATIONS = ("none", "sfc")


@dataclass(frozen=True)
class ChoiceNLL(Objective):
    """Cross-entropy over an example's options, as MeZO trains classification (arXiv 2305.17333, appendix E).

    logit(option) = mean log-probability of the option's tokens after the prompt
    loss = -log softmax(logits)[label];  correct = argmax(logits) is right

    With calibration "sfc" (surface form competition, Holtzman et al., arXiv 2104.08315), as in MeZO's code:

    logit(option) = log p(option | prompt) - log p(option | the prompt without its input), sums over tokens

    If all options are one token, one pass over the prompt scores them all; otherwise each is a sequence.

    Args:
        single_token: refuse options that are longer than one token, instead of scoring each in a sequence of its own.
        calibration: "none", or "sfc" for tasks whose examples have a calibration prompt.
    """

    columns: ClassVar[tuple[str, ...]] = ("predicted",)

    single_token: bool = False
    calibration: str = "none"

    def __post_init__(self) -> None:
        names = ", ".join(CALIBRATIONS)
        require(self.calibration in CALIBRATIONS, f"objective.calibration to be one of {names}", self.calibration)

    def bind(self, task: Any, example: Example) -> Objective:
        """Itself, for tasks of options; with a calibration, the task needs a prompt for it."""
        need_options(example, "choice_nll")
        if self.calibration == "sfc" and example.calibration is None:
            raise ConfigError(
                f"expected a task with a calibration prompt for objective.calibration=sfc; task="
                f"{type(task).__name__.lower()} has none. Set objective.calibration=none"
            )
        return self

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        """The sequences to score for an example: one for single-token options, else one per option.

        With a calibration the same follow for its prompt.

        Raises:
            ConfigError: an option adds no token, or more than one where `single_token` asks for one.
        """
        sequences = self._sequences(example.prompt, example.options, encoder)
        if self.calibration == "none":
            return sequences
        assert example.calibration is not None  # see bind
        return (*sequences, *self._sequences(example.calibration, example.options, encoder, start=True))

    def _sequences(
        self, prompt: Any, options: tuple[str, ...], encoder: Encoder, start: bool = False
    ) -> tuple[TokenSequence, ...]:
        shared, full = encoder.continued(prompt, options, start)
        for option, tokens in zip(options, full, strict=True):
            if self.single_token and len(tokens) != shared + 1:
                raise SettingError(
                    f"expected label words of one token (objective.single_token); got {option!r}, which is "
                    f"{len(tokens) - shared} tokens: {encoder.tokenizer.convert_ids_to_tokens(tokens[shared:])}. "
                    "Choose another word in task.words, or set objective.single_token=false"
                )
        if any(len(tokens) != shared + 1 for tokens in full):
            return tuple(encoder.sequence(tokens, range(shared, len(tokens))) for tokens in full)
        n, last = len(full), encoder.sequence(full[0], [shared])
        targets = np.array([tokens[shared] for tokens in full], np.int32)
        return (TokenSequence(last.tokens, np.repeat(last.rows, n), targets, np.arange(n, dtype=np.int32), n),)

    def reduce(self, batch: Sums) -> Outcomes:
        """Losses, whether the likeliest option is right, and which it is."""
        logits, options, right = self._logits(batch)
        first = np.cumsum(options) - options
        top = np.maximum.reduceat(logits, first)
        of_example = np.repeat(top, options)
        losses = top + np.log(np.add.reduceat(np.exp(logits - of_example), first)) - logits[first + batch.labels]
        position = np.where(logits == of_example, np.arange(len(logits)), len(logits))
        predicted = np.minimum.reduceat(position, first)
        found = np.where(predicted < len(logits), predicted, first)  # a loss that is not finite has no likeliest option
        correct = right[found] & (predicted < len(logits))
        return Outcomes(losses, correct.astype(np.float64), {"predicted": (found - first).astype(np.float64)})

    def slopes(self, batch: Sums) -> np.ndarray:
        """Slopes of the cross-entropy by an option's logit: softmax, minus 1 for the right option."""
        _, options, _ = self._logits(batch)
        chances = self._chances(batch)
        chances[np.cumsum(options) - options + batch.labels] -= 1.0
        return self._spread(batch, chances)

    def doubts(self, batch: Sums, slopes: np.ndarray) -> np.ndarray:
        """The largest slope by an option's logit, which is a mean over its tokens, or a sum with a calibration."""
        by_logit = slopes * batch.counts if self.calibration == "none" else slopes
        return np.maximum.reduceat(np.abs(by_logit), batch.first)

    def _chances(self, batch: Sums) -> np.ndarray:
        """The softmax over each example's options."""
        logits, options, _ = self._logits(batch)
        first = np.cumsum(options) - options
        weights = np.exp(logits - np.repeat(np.maximum.reduceat(logits, first), options))
        return weights / np.repeat(np.add.reduceat(weights, first), options)

    def _logits(self, batch: Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(logits of all options, options of each example, whether each option is right)."""
        if self.calibration == "none":
            return batch.sums / batch.counts, batch.outputs, batch.right
        options, at = batch.outputs // 2, self._asked(batch)
        return batch.sums[at] - batch.sums[~at], options, batch.right[at]

    def _asked(self, batch: Sums) -> np.ndarray:
        """With a calibration: which outputs are the options'. An example's second half is the calibration's."""
        place = np.arange(len(batch.sums)) - np.repeat(batch.first, batch.outputs)
        return place < np.repeat(batch.outputs // 2, batch.outputs)

    def _spread(self, batch: Sums, by_logit: np.ndarray) -> np.ndarray:
        """d loss / d logit of each option -> d loss / d sum of each output."""
        if self.calibration == "none":
            return by_logit / batch.counts
        slopes, at = np.zeros(len(batch.sums)), self._asked(batch)
        slopes[at], slopes[~at] = by_logit, -by_logit
        return slopes


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over all classes in `labels` or `predicted` of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.union1d(predicted, labels):
        hits = np.sum((predicted == label) & (labels == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    return float(np.mean(scores)) if scores else float("nan")
