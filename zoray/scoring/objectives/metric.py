"""A task's own metric as the objective: accuracy and F1 have no gradient, and need none here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.records import ConfigError, Example
from zoray.scoring.objectives.base import Objective, Outcomes, Sums, Unbound, need_options
from zoray.scoring.objectives.choice import ChoiceNLL, macro_f1
from zoray.scoring.objectives.reward import text_metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


OF_OPTIONS = ("accuracy", "f1")


@dataclass(frozen=True)
class Metric(Unbound):
    """Minimises 1 - metric, as MeZO does with F1 on SQuAD (arXiv 2305.17333, section 3.3).

    On a task of options the metric is "accuracy", or "f1": the mean over classes of F1 on the step's batch. On a task
    of answers the model writes one itself, and the metric is "f1" or "exact_match" (SQuAD's), "numeric" or any other
    built-in reward. If a perturbation changes no answer, plus and minus tie and the direction says nothing; ties are
    counted, and many of them cause a warning. Larger batches and perturbations have fewer.

    Args:
        name: the metric; null for the task's own.
        calibration: of a task of options, as in ChoiceNLL.
    """

    name: str | None = None
    calibration: str = "none"

    def bind(self, task: Any, example: Example) -> Objective:
        """The objective for this metric on a task."""
        name = self.name or task.metric or ("accuracy" if example.options else None)
        if name is None:
            raise ConfigError("expected a metric for a task without one of its own. Set objective.name")
        if example.answers:
            return text_metric(name, task, example)
        need_options(example, "metric")
        if name not in OF_OPTIONS:
            raise ConfigError(f"expected objective.name to be accuracy or f1 for a task of options; got {name!r}")
        return ChoiceMetric(calibration=self.calibration, name=name).bind(task, example)


@dataclass(frozen=True)
class ChoiceMetric(ChoiceNLL):
    """Accuracy or F1 of the likeliest options."""

    smooth: ClassVar[bool] = False

    name: str = "accuracy"

    @property
    def metric(self) -> str | None:
        return self.name

    @property
    def pooled(self) -> bool:
        """F1 is defined on a batch: what travels is the option predicted for each example."""
        return self.name == "f1"

    def reduce(self, batch: Sums) -> Outcomes:
        """1 - correct, or the predicted options."""
        outcomes = super().reduce(batch)
        finite = np.isfinite(outcomes.losses)
        losses = outcomes.columns["predicted"] if self.pooled else 1.0 - outcomes.scores
        return replace(outcomes, losses=np.where(finite, losses, np.nan))

    def slopes(self, batch: Sums) -> np.ndarray:
        """Slopes of 1 - P(an option drawn from the softmax is right): the policy gradient of accuracy.

        It guides F1 as well, which is defined on a batch and has no gradient of its own.
        """
        _, options, right = self._logits(batch)
        chances, first = self._chances(batch), np.cumsum(options) - options
        hit = np.add.reduceat(np.where(right, chances, 0.0), first)
        return self._spread(batch, -chances * (right - np.repeat(hit, options)))

    def metrics(self, scores: np.ndarray, columns: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
        """Accuracy, and F1 as the mean over classes."""
        return {"accuracy": float(np.mean(scores)), "f1": macro_f1(columns["predicted"], labels)}

    def pool(self, losses: Sequence[float], labels: np.ndarray) -> float:
        """1 - F1 of a batch, from its predicted options."""
        predicted = np.asarray(losses)
        return 1.0 - macro_f1(predicted, labels) if np.isfinite(predicted).all() else float("nan")
