"""Central differences along random directions (SPSA, MeZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoray.methods.estimators.base import (
    Estimate,
    InGroups,
    check_count,
    check_share,
    check_size,
    count_dropped,
    count_silent,
    finite_mean,
)
from zoray.records import Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.methods.estimators.base import Losses


@dataclass(frozen=True)
class TwoPoint(InGroups):
    """Central differences along K random directions (SPSA, Spall 1992; MeZO, arXiv 2305.17333, Algorithm 1).

    weights[k] = (L(x + eps z_k) - L(x - eps z_k)) / (2 eps) / (number of pairs kept)

    With `shared=False` pair k scores only its own K-th of the batch. The estimate stays unbiased, and a step of the
    same cost sees K times the directions; this is the sampling of GRZO (arXiv 2606.02857) without its normalisation.

    Args:
        pairs: K, plus/minus pairs a step.
        eps: size of the perturbation.
        shared: every pair sees the whole batch; false: each sees a K-th of it.
        max_dropped: share of pairs that may be dropped before the step fails.
    """

    pairs: int = 1
    eps: float = 1e-2
    shared: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]  # a setting here
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.pairs, "pairs", 1)
        check_size(self.eps, "eps")
        require(isinstance(self.shared, bool), "estimator.shared to be true or false", self.shared)
        check_share(self.max_dropped)

    @property
    def directions(self) -> int:
        """Directions a step."""
        return self.pairs

    @property
    def groups(self) -> int:
        """The pairs."""
        return self.pairs

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """Plus and minus of a pair."""
        return Probe(step, number, self.eps), Probe(step, number, -self.eps)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """See Estimator.tell."""
        means = [mean(row) for row in losses]
        pairs = list(zip(means[::2], means[1::2], strict=True))
        kept = [is_finite(plus) and is_finite(minus) for plus, minus in pairs]
        dropped = count_dropped(kept, means, self.max_dropped, probes[0].step)
        weights = tuple(
            (plus - minus) / (2 * self.eps) / (len(pairs) - dropped) if ok else 0.0
            for (plus, minus), ok in zip(pairs, kept, strict=True)
        )
        gaps = [plus - minus for (plus, minus), ok in zip(pairs, kept, strict=True) if ok]
        return Estimate(weights, finite_mean(means), dropped, *count_silent(gaps, noise, len(losses[0])))
