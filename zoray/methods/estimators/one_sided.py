"""Differences between perturbed losses and their shared centre (FZOO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.methods.estimators.base import (
    Estimate,
    InGroups,
    check_count,
    check_share,
    check_size,
    count_dropped,
    count_silent,
)
from zoray.records import Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.methods.estimators.base import Losses


@dataclass(frozen=True)
class OneSided(InGroups):
    """Differences between N perturbed losses and their shared centre (FZOO, arXiv 2506.09034).

    weights[k] = (l_k - l_0) / (N sigma),   sigma^2 = sum_k (l_k - mean_j l_j)^2 / (N - 1)

    This is the paper's g / sigma with g = sum_k (l_k - l_0) u_k / (eps N), times eps: near x sigma is about
    eps |grad L|, so the step is a normalised SGD step for any eps, and `optimizer.lr` is its size, as in the official
    trainer. `scale=none` gives the plain forward difference g. FZOO draws Rademacher directions.

    Args:
        probes: N, perturbed losses a step; N + 1 are scored.
        eps: size of the perturbation.
        scale: "std" divides by sigma (FZOO), "none" by eps.
        max_dropped: share of probes that may be dropped before the step fails.
    """

    probes: int = 8
    eps: float = 1e-3
    scale: str = "std"
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        require(self.scale in ("std", "none"), "estimator.scale to be std or none", self.scale)
        check_count(self.probes, "probes", 2 if self.scale == "std" else 1)
        check_size(self.eps, "eps")
        check_share(self.max_dropped)

    @property
    def directions(self) -> int:
        """Directions a step."""
        return self.probes

    @property
    def groups(self) -> int:
        """The centre and each direction."""
        return 1 + self.probes

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """The centre is group 0, direction k group k + 1."""
        return (Probe(step, number - 1, self.eps) if number else Probe(step, 0, 0.0),)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """See Estimator.tell. A centre that is not finite drops all directions."""
        centre, *means = [mean(row) for row in losses]
        kept = [is_finite(centre) and is_finite(loss) for loss in means]
        dropped = count_dropped(kept, [centre, *means], self.max_dropped, probes[0].step)
        used = [loss for loss, ok in zip(means, kept, strict=True) if ok]
        scale = self.eps
        if self.scale == "std":  # of differences, so that equal losses give 0, whatever their mean rounds to
            scale = float(np.std(np.subtract(used, used[0]), ddof=1)) if len(used) > 1 else 0.0
        if scale == 0:  # all equal, or a single one: no slope, and nothing to divide by
            scale = math.inf
        weights = tuple(
            (loss - centre) / (len(used) * scale) if ok else 0.0 for loss, ok in zip(means, kept, strict=True)
        )
        gaps = [loss - centre for loss in used]
        return Estimate(weights, centre, dropped, *count_silent(gaps, noise, len(losses[0])))
