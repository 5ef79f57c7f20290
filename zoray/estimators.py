"""Probes -> losses -> weights of directions. Pure: no engine, no Ray, no files; an estimator never sees a parameter.

`ask(step)` says what to score, `tell(probes, losses)` turns the losses into an `Estimate`: the gradient of the loss is
estimated as sum_k weights[k] * z(step, k). The optimizer turns weights into the coefficients of a commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoray.records import Probe, is_finite, require

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Estimate:
    """What a step's losses say of the gradient: one weight per direction index, and what went wrong."""

    weights: tuple[float, ...]
    loss: float  # mean over the finite probes; estimates the loss at the current state
    dropped: int = 0  # directions left out because a loss was not finite
    ties: int = 0  # directions whose probes scored exactly the same, so that they carry no information


@dataclass(frozen=True)
class TwoPoint:
    """Central differences along K random directions (SPSA, Spall 1992; MeZO, arXiv 2305.17333, Algorithm 1).

    weights[k] = (L(x + eps z_k) - L(x - eps z_k)) / (2 eps) / (number of pairs kept)

    A pair with a loss that is not finite is dropped and counted; the others are averaged as if it had not been asked.

    Args:
        pairs: K, plus/minus pairs a step.
        eps: size of the perturbation.
        max_dropped: share of pairs that may be dropped before the step fails.
    """

    pairs: int = 1
    eps: float = 1e-2
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        require(isinstance(self.pairs, int) and self.pairs >= 1, "estimator.pairs to be at least 1", self.pairs)
        require(is_finite(self.eps) and self.eps > 0, "estimator.eps to be a positive number", self.eps)
        require(
            is_finite(self.max_dropped) and 0 <= self.max_dropped < 1,
            "estimator.max_dropped to be a share in [0, 1)",
            self.max_dropped,
        )

    @property
    def directions(self) -> int:
        """Directions a step."""
        return self.pairs

    def ask(self, step: int) -> tuple[Probe, ...]:
        """Plus and minus of each pair, next to each other."""
        return tuple(Probe(step, k, sign * self.eps) for k in range(self.pairs) for sign in (+1, -1))

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> Estimate:
        """Losses of `probes`, in the order of `ask` -> Estimate.

        Raises:
            FloatingPointError: more than `max_dropped` of the pairs had a loss that is not finite.
        """
        pairs = list(zip(losses[::2], losses[1::2], strict=True))
        kept = [is_finite(plus) and is_finite(minus) for plus, minus in pairs]
        dropped = kept.count(False)
        if dropped > self.max_dropped * len(pairs):
            raise FloatingPointError(
                f"step {probes[0].step}: {dropped} of {len(pairs)} pairs had a loss that is not finite "
                f"({', '.join(f'{loss:g}' for loss in losses[:8])}); lower optimizer.lr or estimator.eps"
            )
        weights = tuple(
            (plus - minus) / (2 * self.eps) / (len(pairs) - dropped) if ok else 0.0
            for (plus, minus), ok in zip(pairs, kept, strict=True)
        )
        finite = [loss for loss in losses if is_finite(loss)]
        ties = sum(ok and plus == minus for (plus, minus), ok in zip(pairs, kept, strict=True))
        return Estimate(weights, sum(finite) / len(finite), dropped, ties)
