"""Weights of directions -> the commit of a step: learning rate, schedule, decay. Pure functions of the step number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import Commit, is_finite, require

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEDULES = ("constant", "linear", "cosine")


def to_float32(value: float) -> float:
    """The nearest float32, as the shortest decimal that names it: what is journalled and what replicas multiply by."""
    with np.errstate(over="ignore"):  # infinity is the caller's to refuse
        return float(str(np.float32(value)))


@dataclass(frozen=True)
class Sgd:
    """ZO-SGD: coefficients[k] = -lr(step) * weights[k], rounded to float32.

    Args:
        lr: peak learning rate.
        schedule: "constant", or "linear" / "cosine" decay from `lr` after the warm-up to zero just after the last step.
        warmup: steps of linear warm-up from lr / warmup to lr.
    """

    lr: float = 1e-2
    schedule: str = "linear"
    warmup: int = 0

    def __post_init__(self) -> None:
        require(is_finite(self.lr) and self.lr > 0, "optimizer.lr to be a positive number", self.lr)
        require(self.schedule in SCHEDULES, f"optimizer.schedule to be one of {', '.join(SCHEDULES)}", self.schedule)
        require(isinstance(self.warmup, int) and self.warmup >= 0, "optimizer.warmup to be 0 or more", self.warmup)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step in a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr

    def commit(self, step: int, steps: int, weights: Sequence[float]) -> Commit:
        """The commit of a step, from the weights of its estimate.

        Raises:
            FloatingPointError: a coefficient overflows float32.
        """
        lr = self.lr_at(step, steps)
        coefficients = tuple(to_float32(-lr * weight) if weight else 0.0 for weight in weights)
        if not all(map(is_finite, coefficients)):
            raise FloatingPointError(f"step {step}: a coefficient overflows float32; lower optimizer.lr")
        return Commit(step, coefficients)
