"""Cross-entropy over an example's options, one of which is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.objectives.base import Objective, Outcomes, Sums, need_options
from zoray.records import ConfigError, Example, TokenSequence, require

if TYPE_CHECKING:
    from zoray.prompts import Encoder

CALIBRATIONS = ("none", "sfc")


@dataclass(frozen=True)
class ChoiceNLL(Objective):
    """Cross-entropy over an example's options, as MeZO trains classification (arXiv 2305.17333, appendix E).

    logit(option) = mean log-probability of the option's tokens after the prompt
    loss = -log softmax(logits)[label];  correct = argmax(logits) is right

    With calibration "sfc" (surface form competition, Holtzman et al., arXiv 2104.08315), as in MeZO's code:

    logit(option) = log p(option | prompt) - log p(option | the prompt without its input), sums over tokens

    Options of one token all come from one pass over the prompt; others are a sequence each.

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
        """Itself, for tasks of options; with a calibration, for those that have a prompt for it."""
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
                raise ConfigError(
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
        if self.calibration == "none":
            logits, options, right = batch.sums / batch.counts, batch.outputs, batch.right
        else:  # of each example's outputs, the second half is the calibration's
            options = batch.outputs // 2
            at = np.arange(len(batch.sums)) - np.repeat(batch.first, batch.outputs) < np.repeat(options, batch.outputs)
            logits, right = batch.sums[at] - batch.sums[~at], batch.right[at]
        first = np.cumsum(options) - options
        top = np.maximum.reduceat(logits, first)
        of_example = np.repeat(top, options)
        losses = top + np.log(np.add.reduceat(np.exp(logits - of_example), first)) - logits[first + batch.labels]
        position = np.where(logits == of_example, np.arange(len(logits)), len(logits))
        predicted = np.minimum.reduceat(position, first)
        found = np.where(predicted < len(logits), predicted, first)  # a loss that is not finite has no likeliest option
        correct = right[found] & (predicted < len(logits))
        return Outcomes(losses, correct.astype(np.float64), {"predicted": (found - first).astype(np.float64)})


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over all classes in `labels` or `predicted` of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.union1d(predicted, labels):
        hits = np.sum((predicted == label) & (labels == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    return float(np.mean(scores)) if scores else float("nan")
