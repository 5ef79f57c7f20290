"""The protocol of estimators, and what they share: which directions to drop, and which say nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from zoray.records import Probe, is_finite, require
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    Losses = Sequence[Sequence[float]]  # a row per probe


@dataclass(frozen=True)
class Estimate:
    """The gradient that a step's losses imply: one weight per direction index, and counts of what went wrong."""

    weights: tuple[float, ...]
    loss: float  # at the centre, or else the mean over the finite probes: estimates the loss at the current state
    dropped: int = 0  # directions left out because a loss was not finite
    ties: int = 0  # directions whose probes scored exactly the same, so they carry no information
    buried: int = 0  # directions whose probes differ by no more than the score noise, not counting ties


class InGroups(Protocol):
    """An estimator's groups of probes; a replica asks only for those of its own tiles."""

    guided: ClassVar[bool] = False  # whether the centre's forward pass also gives feedback, see feedback.py

    @property
    def shared(self) -> bool:
        """Whether every direction sees the whole batch; else the batch is divided among them."""
        return True

    @property
    def per_example(self) -> bool:
        """Whether `tell` needs the loss of each example; else replicas send only a probe's mean."""
        return False

    @property
    def groups(self) -> int:
        """Groups of probes a step: a direction's probes are one, a centre is one by itself."""
        ...

    def group(self, step: int, number: int) -> tuple[Probe, ...]:
        """A group's probes, which are scored together on the same examples."""
        ...

    def ask(self, step: int) -> tuple[Probe, ...]:
        """All probes of a step, group after group."""
        return tuple(probe for number in range(self.groups) for probe in self.group(step, number))


class Estimator(InGroups, Protocol):
    """What the driver needs of an estimator."""

    @property
    def directions(self) -> int:
        """Directions a step."""
        ...

    def tell(self, probes: Sequence[Probe], losses: Losses, noise: float = 0.0) -> Estimate:
        """Losses of `probes`, in the order of `ask` -> Estimate.

        Args:
            probes: the scored probes.
            losses: for each probe its mean loss, (1,); or the loss of each of its examples.
            noise: standard deviation of an entry of `losses` at the same state, from batch-mates and packing.

        Raises:
            FloatingPointError: more than `max_dropped` of the directions had a loss that is not finite.
        """
        ...


def count_dropped(kept: Sequence[bool], losses: Sequence[float], allowed: float, step: int) -> int:
    """The number of dropped directions; FloatingPointError above the allowed share."""
    dropped = len(kept) - sum(kept)
    if dropped > allowed * len(kept) + 1e-9:  # 0.29 * 100 is a little less than 29
        raise FloatingPointError(
            f"step {step}: {dropped} of {len(kept)} directions had a loss that is not finite "
            f"({', '.join(f'{loss:g}' for loss in losses[:8])}); lower optimizer.lr or the estimator's perturbation"
        )
    return dropped


def count_silent(gaps: Sequence[float], noise: float, entries: int) -> tuple[int, int]:
    """(ties, buried) among differences of two rows' means; a row has `entries` with independent score noise."""
    floor = noise * math.sqrt(2 / entries)
    return sum(gap == 0 for gap in gaps), sum(0 < abs(gap) <= floor for gap in gaps)


def finite_mean(values: Sequence[float]) -> float:
    return mean([value for value in values if is_finite(value)])


def check_count(value: object, name: str, least: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, f"estimator.{name} to be a whole number of at least {least}", value)


def check_size(value: float, name: str) -> None:
    require(is_finite(value) and value > 0, f"estimator.{name} to be a positive number", value)


def check_share(value: float) -> None:
    require(is_finite(value) and 0 <= value < 1, "estimator.max_dropped to be a share in [0, 1)", value)
