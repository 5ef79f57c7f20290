"""Evolution strategies: a population's shaped losses weight its directions (ES, EGGROLL, RLOO)."""

from __future__ import annotations

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
    finite_mean,
)
from zoray.records import ConfigError, Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.methods.estimators.base import Losses

SHAPINGS = ("none", "zscore", "centred_rank")
CENTRINGS = ("batch", "prompt")


@dataclass(frozen=True)
class Evolution(InGroups):
    """Evolution strategies: a population's shaped losses weight its directions (Salimans et al., arXiv 1703.03864).

    weights[k] = sum over the members at +-z_k of (sign * s) / N, for N members with shaped losses s:

    shaping "none"          s = (L - mean L) / sigma: the score-function estimate of the gradient, with the population's
                            mean as baseline; without mirroring N - 1 takes N's place, which makes it unbiased
    shaping "zscore"        s = (L - mean L) / std L    (ES at scale, arXiv 2509.24372)
    shaping "centred_rank"  s = rank / (N - 1) - 1/2, ties sharing their mean rank    (Salimans et al., section 2.1)

    Shaped losses have no unit, so `optimizer.lr` is in units of the parameters and includes the 1 / sigma of the
    estimate, as in published code (ES at scale: lr = sigma / 2).

    Centring "batch" shapes each member's mean over the batch. "prompt" (EGGROLL, arXiv 2511.16652) subtracts the
    population's mean from each example, so that hard prompts weigh no more than easy ones; z-scores are then divided
    by one standard deviation over members and examples, ranks are taken within each example; the mean over examples
    follows.

    Args:
        population: N, members scored in a step; even if antithetic.
        sigma: size of the perturbation.
        antithetic: members come as mirrored pairs x + sigma z, x - sigma z.
        shaping: "none", "zscore" or "centred_rank".
        centring: "batch" or "prompt".
        max_dropped: share of directions that may be dropped before the step fails.
    """

    population: int = 32
    sigma: float = 1e-2
    antithetic: bool = True
    shaping: str = "zscore"
    centring: str = "batch"
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.population, "population", 2)
        require(isinstance(self.antithetic, bool), "estimator.antithetic to be true or false", self.antithetic)
        if self.antithetic and self.population % 2:
            raise ConfigError(
                f"expected an even estimator.population for mirrored pairs; got {self.population}. "
                "Add one, or set estimator.antithetic=false"
            )
        check_size(self.sigma, "sigma")
        require(self.shaping in SHAPINGS, f"estimator.shaping to be one of {', '.join(SHAPINGS)}", self.shaping)
        require(self.centring in CENTRINGS, f"estimator.centring to be one of {', '.join(CENTRINGS)}", self.centring)
        check_share(self.max_dropped)

    @property
    def per_example(self) -> bool:
        """Centring by prompt needs the loss of each example."""
        return self.centring == "prompt"

    @property
    def directions(self) -> int:
        """Directions a step."""
        return self.population // 2 if self.antithetic else self.population

    @property
    def groups(self) -> int:
        """The directions."""
        return self.directions

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """A member of the population, with its mirror image if antithetic."""
        member = Probe(step, number, self.sigma)
        return (member, Probe(step, number, -self.sigma)) if self.antithetic else (member,)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """See Estimator.tell. A mirrored pair is dropped as a whole."""
        each = 2 if self.antithetic else 1  # members of a direction
        means = [mean(row) for row in losses]
        kept = [all(map(is_finite, means[k * each : (k + 1) * each])) for k in range(self.directions)]
        dropped = count_dropped(kept, means, self.max_dropped, probes[0].step)
        rows = np.array([row for i, row in enumerate(losses) if kept[i // each]], np.float64)  # (members, examples)
        table = rows if self.centring == "prompt" else np.array([[mean(row)] for row in rows.tolist()])
        shaped = iter([mean(row) for row in self._shape(table).tolist()])
        members = self.directions - dropped if not self.antithetic else 2 * (self.directions - dropped)
        if self.shaping == "none" and not self.antithetic:
            members = max(members - 1, 1)
        weights = []
        for ok in kept:
            if not ok:
                weights.append(0.0)
            elif self.antithetic:
                weights.append((next(shaped) - next(shaped)) / members)
            else:
                weights.append(next(shaped) / members)
        finite = [loss for i, loss in enumerate(means) if kept[i // each]]
        if self.antithetic:
            gaps = [plus - minus for plus, minus in zip(finite[::2], finite[1::2], strict=True)]
        else:
            gaps = [loss - finite[0] for loss in finite]
            gaps = [gap - mean(gaps) for gap in gaps]
        return Estimate(tuple(weights), finite_mean(means), dropped, *count_silent(gaps, noise, len(losses[0])))

    def _shape(self, table: np.ndarray) -> np.ndarray:
        """Losses (members, columns) -> shaped losses of the same shape; all equal gives zeros."""
        centred = table - table[0]  # first, so that equal losses give zeros whatever their mean rounds to
        centred -= centred.mean(axis=0)
        if self.shaping == "none":
            return centred / self.sigma
        if self.shaping == "zscore":
            spread = float(np.sqrt((centred**2).mean()))
            return centred / spread if spread > 0 else np.zeros_like(table)
        return np.stack([_centred_ranks(column) for column in table.T], axis=1)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled to [-1/2, 1/2]; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    ranks = (first + (counts - 1) / 2)[inverse]
    return ranks / (len(values) - 1) - 0.5 if len(values) > 1 else np.zeros(1)
