"""Residual feedback: what a forward pass knows of the gradient, as an estimator of a step.

The gradient of the loss at the residual stream before the final norm is exact and costs the norm and the LM head only.
The stream carries it down nearly unchanged, so that for a matrix that writes to the stream dL/dW is about the sum over
the rows that are asked for of delta x^T: delta that gradient, x the matrix's input, which the forward pass has anyway.
No backward pass, no stored activations but those rows. It is a guide, and biased: exact at the last layer, good in the
upper half of a model, noise in its lower third (docs/feedback.md has the cosines). ZO probes along the guide itself,
whose losses are unbiased, say how far to trust it in each matrix.

What is journalled is one bit a number: the sign of the step's sum. Replicas add +gain or -gain, so the state is rebuilt
to the bit from the journal alone, on any device; with momentum beta, x moves by lr times the mean of recent signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from zoray.estimators import Estimate, InGroups, check_count
from zoray.records import Probe, is_finite, require
from zoray.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.estimators import Losses

REACH = 4.0  # root mean squares of a tensor's feedback that its largest whole number stands for


@dataclass(frozen=True)
class Feedback(InGroups):
    """One forward pass at the current state, whose residual feedback is the step's direction.

    gradient ~ sign(sum over the batch of (delta M_l) x^T)    elementwise, for each matrix that moves

    M_l is how the stream goes on from layer l to its end, a linear map fitted to the base model before the first step
    (engines/lens.py); without it, the identity.

    Args:
        lens: rank of the maps M_l - 1; 0 for none.
        samples: completions of each prompt that a reward's policy gradient is taken over.
    """

    lens: int = 64
    samples: int = 4

    def __post_init__(self) -> None:
        check_count(self.samples, "samples", 2)
        ok = isinstance(self.lens, int) and not isinstance(self.lens, bool) and self.lens >= 0
        require(ok, "estimator.lens to be a whole number of 0 or more", self.lens)

    guided: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    per_example: ClassVar[bool] = False
    directions: ClassVar[int] = 0
    groups: ClassVar[int] = 1

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """The centre."""
        return (Probe(step, 0, 0.0),)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """The loss of the centre; its feedback comes beside it.

        Raises:
            FloatingPointError: it is not finite.
        """
        loss = mean(losses[0])
        if not is_finite(loss):
            raise FloatingPointError(f"step {probes[0].step}: the loss is not finite ({loss}); lower optimizer.lr")
        return Estimate((), loss)


def quantised(feedback: Mapping[str, np.ndarray], levels: int, weight: float) -> np.ndarray:
    """Feedback as whole numbers from -levels to levels, (N,) int8, tensor after tensor.

    Each tensor is measured by its own root mean square, so that neither a model's scales nor a device's last bits
    matter; `weight`, from 0 to 1, is what these examples count for beside those of other tiles.
    """
    parts = [np.zeros(0, np.int8)]
    for values in feedback.values():
        flat = values.astype(np.float64).ravel()
        size = float(np.sqrt(np.mean(flat**2))) if np.isfinite(flat).all() else 0.0
        scaled = flat * (levels * min(weight, 1.0) / (REACH * size)) if size > 0 else np.zeros(len(flat))
        parts.append(np.clip(np.rint(scaled), -levels, levels).astype(np.int8))
    return np.concatenate(parts)
