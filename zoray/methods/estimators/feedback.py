"""Residual feedback: the gradient that a forward pass reveals, as an estimator of a step.

The gradient of the loss at the residual stream before the final norm is exact and costs only the norm and the LM head.
The stream carries it down nearly unchanged, so for a matrix that writes to the stream dL/dW is about the sum of
delta x^T over the scored rows: delta is that gradient, x the matrix's input, which the forward pass has anyway. There
is no backward pass, and only the scored rows' activations are stored. This guide is biased: exact at the last layer,
good in the upper half of a model, noise in its lower third (docs/feedback.md has the cosines). ZO probes along the
guide, whose losses are unbiased, say how far to trust it in each matrix.

The journal keeps one bit a number: the sign of the step's sum. Replicas add +gain or -gain, so the journal alone
rebuilds the state to the bit, on any device; with momentum beta, x moves by lr times the mean of recent signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from zoray.methods.estimators.base import Estimate, InGroups, check_count
from zoray.methods.spaces.signs import ALONG, GROUPS, group_of, pattern
from zoray.records import Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.methods.estimators.base import Losses

WINDOW = 200.0  # probes along the guide that a slope is averaged over
DOUBT = 40.0  # probes with as much weight as the prior that all of the guide is good
REACH = 4.0  # the largest whole number, in root mean squares of a tensor's feedback


@dataclass(frozen=True)
class Feedback(InGroups):
    """One forward pass at the current state, whose residual feedback is the step's direction.

    gradient ~ sign(sum over the batch of (delta M_l) x^T)    elementwise, for each trained matrix

    M_l maps the stream at layer l to its end; a linear map fitted to the base model before the first step
    (engines/feedback/lens.py), or the identity.

    With `pairs`, each step also scores plus and minus of that many directions along the guide: its momentum, with a
    random sign for each group of matrices. Their losses are unbiased; averaged over the steps they give the slope of
    the loss along each group's guide, and groups whose guide leads nowhere are moved less:

    slope_g <- mean over probes of pattern_g * (L(x + eps z) - L(x - eps z)) / (2 eps)
    trust_g = clip(slope_g / mean of the positive slopes, 0, 1), drawn towards 1 while there are few probes

    Args:
        lens: rank of the maps M_l - 1; 0 for none.
        pairs: pairs of probes along the guide, of one example each, that judge it; 0 trusts the guide everywhere.
        eps: size of these probes, in the momentum's own units (signs).
        samples: completions of each prompt, over which a reward's policy gradient is taken.
    """

    guided: ClassVar[bool] = True
    directions: ClassVar[int] = 0

    lens: int = 64
    pairs: int = 0
    eps: float = 1e-2
    samples: int = 4

    def __post_init__(self) -> None:
        check_count(self.samples, "samples", 2)
        check_count(self.lens, "lens", 0)
        check_count(self.pairs, "pairs", 0)
        require(is_finite(self.eps) and self.eps > 0, "estimator.eps to be a positive number", self.eps)

    @property
    def groups(self) -> int:
        """The centre and each pair."""
        return 1 + self.pairs

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """The centre is group 0."""
        if not number:
            return (Probe(step, 0, 0.0),)
        index = ALONG + number - 1
        return Probe(step, index, self.eps), Probe(step, index, -self.eps)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """The loss of the centre; its feedback travels separately, and `judge` rates it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = mean(losses[0])
        if not is_finite(loss):
            raise FloatingPointError(f"step {probes[0].step}: the loss is not finite ({loss}); lower optimizer.lr")
        return Estimate((), loss)

    def judge(self, trust: tuple[float, ...], probes: Sequence[Probe], losses: Losses) -> tuple[float, ...]:
        """The guide's rating so far: (probes so far, the slope of each group); () before the first."""
        count, slopes = (trust[0], list(trust[1:])) if trust else (0.0, [0.0] * GROUPS)
        means = [mean(row) for row in losses[1:]]
        for probe, plus, minus in zip(probes[1::2], means[::2], means[1::2], strict=True):
            if not is_finite(plus) or not is_finite(minus) or plus == minus:
                continue
            count += 1.0
            slope, share = (plus - minus) / (2 * self.eps), 1 / min(count, WINDOW)
            signs = pattern(probe.step, probe.index).tolist()
            slopes = [old + (sign * slope - old) * share for old, sign in zip(slopes, signs, strict=True)]
        return (count, *slopes) if count else ()


def trusted(trust: tuple[float, ...]) -> tuple[float, ...]:
    """The trust in each group's guide, 0 to 1, (GROUPS,)."""
    if not trust:
        return (1.0,) * GROUPS
    count, slopes = trust[0], trust[1:]
    positive = [slope for slope in slopes if slope > 0]
    usual = sum(positive) / len(positive) if positive else math.inf
    known = count / (count + DOUBT)
    return tuple(min(1.0, max(0.0, 1 - known + known * slope / usual)) for slope in slopes)


def gains(trust: tuple[float, ...], matrices: int) -> tuple[float, ...]:
    """The same for each trained matrix."""
    of_group = trusted(trust)
    return tuple(of_group[group_of(number, matrices)] for number in range(matrices))


def quantised(feedback: Mapping[str, np.ndarray], levels: int, weight: float) -> np.ndarray:
    """Feedback as whole numbers from -levels to levels, (N,) int8, tensor after tensor.

    Each tensor is divided by its own root mean square, so that neither a model's scales nor a device's last bits
    matter; `weight`, from 0 to 1, is the weight of these examples relative to other tiles.
    """
    parts = [np.zeros(0, np.int8)]
    for values in feedback.values():
        flat = values.astype(np.float64).ravel()
        size = float(np.sqrt(np.mean(flat**2))) if np.isfinite(flat).all() else 0.0
        scaled = flat * (levels * min(weight, 1.0) / (REACH * size)) if size > 0 else np.zeros(len(flat))
        parts.append(np.clip(np.rint(scaled), -levels, levels).astype(np.int8))
    return np.concatenate(parts)
