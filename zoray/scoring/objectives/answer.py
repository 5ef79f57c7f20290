"""The likelihood of an answer after its prompt: supervised fine-tuning on prompts and completions, and on chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.models.tokens import answered
from zoray.records import ConfigError, Example, TokenSequence, require
from zoray.scoring.objectives.base import Objective, Outcomes, Sums
from zoray.scoring.objectives.choice import ChoiceNLL
from zoray.scoring.objectives.reward import text_metric

if TYPE_CHECKING:
    from zoray.models.tokens import Encoder


@dataclass(frozen=True)
class AnswerNLL(Objective):
    """Mean negative log-probability of the answer's tokens, as MeZO trains question answering (arXiv 2305.17333).

    loss = -1/T sum_t log p(answer[t] | prompt, answer[:t])

    The answer is the first of an example's `answers`, or else its right option. In a chat it is every turn of the
    assistant, the end of turn included. On dev and test, an example with options is judged by the likeliest of them,
    one with answers by the task's metric on an answer that the model writes; without a metric the loss decides.

    Args:
        eos: whether a plain answer ends in the model's end of text; null: unless it goes on or ends in a line break.
    """

    eos: bool | None = None

    def __post_init__(self) -> None:
        require(self.eos in (True, False, None), "objective.eos to be true, false or null", self.eos)

    @property
    def metric(self) -> str | None:
        return None

    def bind(self, task: Any, example: Example) -> Objective:
        """Itself, for tasks with answers or options."""
        if not example.answers and not example.options:
            raise ConfigError(
                f"expected examples with an answer for objective=answer_nll; got {example.asked[:60]!r} without "
                "one. Take objective=reward, or a task with answers"
            )
        return self

    def evaluator(self, task: Any, example: Example) -> Objective:
        """The likeliest option, the metric of a written answer, or the loss alone."""
        if example.options and not example.answers:
            return ChoiceNLL()
        return self if task.metric is None else text_metric(task.metric, task, example)

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        """One sequence, the answer's tokens asked for."""
        answer = example.answers[0] if example.answers else example.options[example.label]
        if isinstance(example.prompt, str):
            eos = False if self.eos is None and example.goes_on else self.eos
            return (encoder.answer(example.prompt, answer, eos),)
        text, spans = encoder.assistant_spans(answered(example.prompt, answer), example.untrained)
        return (encoder.sequence(*encoder.tokens_in(text, spans)),)

    def reduce(self, batch: Sums) -> Outcomes:
        """Losses; there is no score."""
        losses = -batch.sums / batch.counts
        return Outcomes(losses, np.full(len(losses), np.nan))

    def slopes(self, batch: Sums) -> np.ndarray:
        """-1 / T."""
        return -1.0 / batch.counts
