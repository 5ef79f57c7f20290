"""Probes -> losses -> weights of directions. Pure: no engine, no Ray, no files; an estimator never sees a parameter.

`ask(step)` says what to score, `tell(probes, losses)` turns the losses into an `Estimate`: the gradient of the loss is
estimated as sum_k weights[k] * z(step, k). The optimizer turns weights into the coefficients of a commit.

`losses[i]` is probe i's row: its mean loss over its examples, or where the estimator is `per_example` the loss of each.
A direction with a probe whose mean loss is not finite is dropped and counted, and the others are used as if it had not
been asked; above a share of dropped directions the step fails. Directions that carry no information are counted too:
`ties` scored exactly the same, `buried` differ by no more than the engine's score noise, so that their sign is chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from zoray.records import ConfigError, Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    Losses = Sequence[Sequence[float]]  # a row per probe

SHAPINGS = ("none", "zscore", "centred_rank")
CENTRINGS = ("batch", "prompt")


@dataclass(frozen=True)
class Estimate:
    """What a step's losses say of the gradient: one weight per direction index, and what went wrong."""

    weights: tuple[float, ...]
    loss: float  # of the centre, or else the mean over the finite probes: estimates the loss at the current state
    dropped: int = 0  # directions left out because a loss was not finite
    ties: int = 0  # directions whose probes scored exactly the same, so that they carry no information
    buried: int = 0  # directions whose probes differ by no more than the score noise; ties are not among them


class InGroups(Protocol):
    """Which probes there are; a replica asks for those of its own tiles only."""

    guided: ClassVar[bool] = False  # whether the centre's forward pass gives feedback as well, see feedback.py

    @property
    def groups(self) -> int:
        """Groups of probes a step: those of a direction, and a centre by itself."""
        ...

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """Probes that are scored together, on the same examples."""
        ...

    def ask(self, step: int) -> tuple[Probe, ...]:
        """What to score: all groups in order."""
        return tuple(probe for number in range(self.groups) for probe in self.group(step, number))


class Estimator(InGroups, Protocol):
    """What the driver needs of an estimator."""

    @property
    def directions(self) -> int:
        """Directions a step."""
        ...

    @property
    def shared(self) -> bool:
        """Whether every direction sees the whole batch; else they share it out among them."""
        ...

    @property
    def per_example(self) -> bool:
        """Whether `tell` needs the loss of each example; else a probe's mean is all that travels."""
        ...

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """Losses of `probes`, in the order of `ask` -> Estimate.

        Args:
            probes: what was scored.
            losses: per probe its mean loss, (1,); or the loss of each of its examples.
            noise: standard deviation of an entry of `losses` at the same state, from batch-mates and packing.

        Raises:
            FloatingPointError: more than `max_dropped` of the directions had a loss that is not finite.
        """
        ...


@dataclass(frozen=True)
class TwoPoint(InGroups):
    """Central differences along K random directions (SPSA, Spall 1992; MeZO, arXiv 2305.17333, Algorithm 1).

    weights[k] = (L(x + eps z_k) - L(x - eps z_k)) / (2 eps) / (number of pairs kept)

    With `shared=False` pair k scores only its own K-th of the batch. The estimate stays unbiased, and a step of the
    same cost sees K times the directions; this is the sampling of GRZO (arXiv 2606.02857) without its normalisation.

    Args:
        pairs: K, plus/minus pairs a step.
        eps: size of the perturbation.
        shared: every pair sees the whole batch; false: a K-th of it each.
        max_dropped: share of pairs that may be dropped before the step fails.
    """

    per_example: ClassVar[bool] = False

    pairs: int = 1
    eps: float = 1e-2
    shared: bool = True
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.pairs, "pairs", 1)
        _check_size(self.eps, "eps")
        require(isinstance(self.shared, bool), "estimator.shared to be true or false", self.shared)
        _check_share(self.max_dropped)

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
        dropped = _dropped(kept, means, self.max_dropped, probes[0].step)
        weights = tuple(
            (plus - minus) / (2 * self.eps) / (len(pairs) - dropped) if ok else 0.0
            for (plus, minus), ok in zip(pairs, kept, strict=True)
        )
        gaps = [plus - minus for (plus, minus), ok in zip(pairs, kept, strict=True) if ok]
        return Estimate(weights, _finite_mean(means), dropped, *_silent(gaps, noise, len(losses[0])))


@dataclass(frozen=True)
class OneSided(InGroups):
    """Differences of N perturbed losses to the one centre they share (FZOO, arXiv 2506.09034).

    weights[k] = (l_k - l_0) / (N sigma),   sigma^2 = sum_k (l_k - mean_j l_j)^2 / (N - 1)

    This is the paper's g / sigma with g = sum_k (l_k - l_0) u_k / (eps N), times eps: near x sigma is about
    eps |grad L|, so the step is that of normalised SGD whatever eps is, and `optimizer.lr` is its size, as in the
    official trainer. With `scale=none` it is the plain forward difference g. FZOO draws Rademacher directions.

    Args:
        probes: N, perturbed losses a step; N + 1 are scored.
        eps: size of the perturbation.
        scale: "std" divides by sigma (FZOO), "none" by eps.
        max_dropped: share of probes that may be dropped before the step fails.
    """

    shared: ClassVar[bool] = True
    per_example: ClassVar[bool] = False

    probes: int = 8
    eps: float = 1e-3
    scale: str = "std"
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        require(self.scale in ("std", "none"), "estimator.scale to be std or none", self.scale)
        check_count(self.probes, "probes", 2 if self.scale == "std" else 1)
        _check_size(self.eps, "eps")
        _check_share(self.max_dropped)

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
        dropped = _dropped(kept, [centre, *means], self.max_dropped, probes[0].step)
        used = [loss for loss, ok in zip(means, kept, strict=True) if ok]
        scale = self.eps
        if self.scale == "std":  # of differences, so that equal losses have none, whatever their mean rounds to
            scale = float(np.std(np.subtract(used, used[0]), ddof=1)) if len(used) > 1 else 0.0
        if scale == 0:  # all the same, or a single one: no slope to be seen, and nothing to divide by
            scale = math.inf
        weights = tuple(
            (loss - centre) / (len(used) * scale) if ok else 0.0 for loss, ok in zip(means, kept, strict=True)
        )
        gaps = [loss - centre for loss in used]
        return Estimate(weights, centre, dropped, *_silent(gaps, noise, len(losses[0])))


@dataclass(frozen=True)
class Evolution(InGroups):
    """Evolution strategies: a population's shaped losses weigh its directions (Salimans et al., arXiv 1703.03864).

    weights[k] = sum over the members at +-z_k of (sign * s) / N, N members, s their shaped losses:

    shaping "none"          s = (L - mean L) / sigma: the score-function estimate of the gradient, with the population's
                            mean as baseline; without mirroring N - 1 takes N's place, which makes it unbiased
    shaping "zscore"        s = (L - mean L) / std L    (ES at scale, arXiv 2509.24372)
    shaping "centred_rank"  s = rank / (N - 1) - 1/2, ties sharing their mean rank    (Salimans et al., section 2.1)

    Shaped losses have no unit, so the step is `optimizer.lr` in units of the parameters, and the 1 / sigma of the
    estimate is left to it, as published code does (ES at scale: lr = sigma / 2).

    Centring "batch" shapes each member's mean over the batch. "prompt" (EGGROLL, arXiv 2511.16652) takes the mean over
    the population away example by example, so that hard prompts weigh no more than easy ones; z-scores are then divided
    by one standard deviation over members and examples, ranks are taken within each example; the mean over examples
    follows.

    Args:
        population: N, scored members a step; even when antithetic.
        sigma: size of the perturbation.
        antithetic: members come as mirrored pairs x + sigma z, x - sigma z.
        shaping: "none", "zscore" or "centred_rank".
        centring: "batch" or "prompt".
        max_dropped: share of directions that may be dropped before the step fails.
    """

    shared: ClassVar[bool] = True

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
        _check_size(self.sigma, "sigma")
        require(self.shaping in SHAPINGS, f"estimator.shaping to be one of {', '.join(SHAPINGS)}", self.shaping)
        require(self.centring in CENTRINGS, f"estimator.centring to be one of {', '.join(CENTRINGS)}", self.centring)
        _check_share(self.max_dropped)

    @property
    def per_example(self) -> bool:
        """Centring by prompt needs the loss of each."""
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
        """A member of the population, or one and its mirror image."""
        member = Probe(step, number, self.sigma)
        return (member, Probe(step, number, -self.sigma)) if self.antithetic else (member,)

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """See Estimator.tell. A mirrored pair is dropped as a whole."""
        each = 2 if self.antithetic else 1  # members of a direction
        means = [mean(row) for row in losses]
        kept = [all(map(is_finite, means[k * each : (k + 1) * each])) for k in range(self.directions)]
        dropped = _dropped(kept, means, self.max_dropped, probes[0].step)
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
        return Estimate(tuple(weights), _finite_mean(means), dropped, *_silent(gaps, noise, len(losses[0])))

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
    """Ranks mapped to [-1/2, 1/2]; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    ranks = (first + (counts - 1) / 2)[inverse]
    return ranks / (len(values) - 1) - 0.5 if len(values) > 1 else np.zeros(1)


def _dropped(kept: Sequence[bool], losses: Sequence[float], allowed: float, step: int) -> int:
    """How many directions are dropped; FloatingPointError above the allowed share."""
    dropped = len(kept) - sum(kept)
    if dropped > allowed * len(kept) + 1e-9:  # 0.29 * 100 is a little less than 29
        raise FloatingPointError(
            f"step {step}: {dropped} of {len(kept)} directions had a loss that is not finite "
            f"({', '.join(f'{loss:g}' for loss in losses[:8])}); lower optimizer.lr or the estimator's perturbation"
        )
    return dropped


def _silent(gaps: Sequence[float], noise: float, entries: int) -> tuple[int, int]:
    """(ties, buried) among differences of two rows' means, `entries` of independent score noise each."""
    floor = noise * math.sqrt(2 / entries)
    return sum(gap == 0 for gap in gaps), sum(0 < abs(gap) <= floor for gap in gaps)


def _finite_mean(values: Sequence[float]) -> float:
    return mean([value for value in values if is_finite(value)])


def check_count(value: object, name: str, least: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, f"estimator.{name} to be a whole number of at least {least}", value)


def _check_size(value: float, name: str) -> None:
    require(is_finite(value) and value > 0, f"estimator.{name} to be a positive number", value)


def _check_share(value: float) -> None:
    require(is_finite(value) and 0 <= value < 1, "estimator.max_dropped to be a share in [0, 1)", value)
