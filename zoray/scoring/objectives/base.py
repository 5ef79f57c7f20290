"""What objectives share: from an example to token sequences, and from log-probabilities or completions to numbers.

An objective never calls the model. One that scores given text encodes an example once, and later reduces the sums of
log-probabilities that an engine returns for it. One that has `sampling` scores completions that the model writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from zoray.records import ConfigError, Example, Sampling, TokenSequence
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.models.tokens import Encoder


@dataclass(frozen=True, eq=False)
class Sums:
    """Log-probabilities of E examples with O outputs in all, example after example."""

    sums: np.ndarray  # (O,) nats, float64
    counts: np.ndarray  # (O,) tokens that each sums over
    outputs: np.ndarray  # (E,) outputs of each example
    labels: np.ndarray  # (E,) which of an example's options is right
    right: np.ndarray  # (O,) bool: all outputs that are right
    reference: np.ndarray | None = None  # (O,) the same sums of the bare model, if the objective needs them

    @property
    def first(self) -> np.ndarray:
        """Where the outputs of each example begin, (E,)."""
        return np.cumsum(self.outputs) - self.outputs


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What an objective returns for E examples, float64."""

    losses: np.ndarray  # (E,)
    scores: np.ndarray  # (E,) the metric, example by example: higher is better; nan where there is none
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # further numbers, (E,) each
    tokens: int = 0  # processed
    written: int = 0  # completions
    failed: int = 0  # completions without a reward
    failure: str = ""  # the first one's traceback


class Objective(Protocol):
    """What to score, and how it becomes a scalar.

    metric: what `Outcomes.scores` is called; None where only the loss says how good a state is.
    columns: names of `Outcomes.columns`.
    sampling: how the completions it scores are written; None for an objective that scores given text.
    reference: whether it compares with the bare model.
    smooth: whether the loss is a smooth function of the weights, but for rounding.
    pooled: whether the loss of a batch is not the mean over its examples; `losses` are then what `pool` takes.
    max_failed: share of completions without a reward above which a run stops.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[bool] = False
    smooth: ClassVar[bool] = True
    max_failed: float = 1.0

    @property
    def metric(self) -> str | None:
        return "accuracy"

    @property
    def pooled(self) -> bool:
        return False

    @property
    def sampling(self) -> Sampling | None:
        return None

    def bind(self, task: Any, example: Example) -> Objective:
        """This objective for a task with such examples; raises ConfigError where it makes no sense."""
        return self

    def evaluator(self, task: Any, example: Example) -> Objective:
        """What measures the task's metric on dev and test: itself, or another objective."""
        return self

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        """The sequences to score for an example."""
        ...

    def reduce(self, batch: Sums) -> Outcomes:
        """Sums of log-probabilities -> losses and scores."""
        ...

    def slopes(self, batch: Sums) -> np.ndarray:
        """d loss / d sum of each output (O,), where feedback begins. A policy gradient if the loss has none.

        Raises:
            ConfigError: there is none; with `sampling`, rewards of completions take its place (guidance.py).
        """
        raise ConfigError(f"{type(self).__name__.lower()} has no gradient at the log-probabilities")

    def doubts(self, batch: Sums, slopes: np.ndarray) -> np.ndarray:
        """How wrong the model is about each example (E,), about 0 to 1; weighs the feedback of several examples."""
        return np.maximum.reduceat(np.abs(slopes) * batch.counts, batch.first)

    def pool(self, losses: Sequence[float], labels: np.ndarray) -> float:
        """The loss of a batch of examples with these labels."""
        return mean(losses)

    def metrics(self, scores: np.ndarray, columns: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
        """The metrics of a split besides its loss, by name; `scores` and columns (E,) each."""
        means = {name: mean(values.tolist()) for name, values in columns.items() if name != "predicted"}
        return {self.metric: mean(scores.tolist()), **means} if self.metric else means


class Unbound(Objective):
    """An objective that turns into another one when it is bound to a task."""

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        raise NotImplementedError("bound to a task first")

    def reduce(self, batch: Sums) -> Outcomes:
        raise NotImplementedError("bound to a task first")


def need_options(example: Example, name: str) -> None:
    """Raise ConfigError unless the example has options to choose from."""
    if len(example.options) < 2:
        raise ConfigError(
            f"expected examples with options to choose from for objective={name}; got one without, "
            f"{example.asked[:60]!r}. Take objective=answer_nll, metric or reward"
        )
