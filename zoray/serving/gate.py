"""The promotion gate: whether a new version may answer people. Pure: numbers in, verdict out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from zoray.records import require

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Measured:
    """A version's measurements: on held-out rows of a job's data, and on a neutral text that no job knows."""

    score: float  # in the job's metric, higher is better; NaN where it has none
    loss: float  # mean loss
    perplexity: float  # on the neutral text
    metric: str | None = None  # the metric's name
    rows: tuple[float, ...] = ()  # worth of each row, higher is better: its score, or -loss where there is none


@dataclass(frozen=True)
class Verdict:
    """Whether to promote, and the reason, for people."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class Gate:
    """When a version becomes the live one.

    Args:
        automatic: promote every version that passes; else people promote.
        margin: by how much a version must beat the live one on held-out rows: in its metric (0.02 of accuracy is two
            points), or where there is none, as a share of the loss.
        confidence: required certainty that the gain is not chance, see `confidence`; 0.5 requires nothing.
        max_forgetting: largest allowed rise of perplexity on a neutral text, as a share of the base model's.
    """

    automatic: bool = True
    margin: float = 0.02
    confidence: float = 0.9
    max_forgetting: float = 0.05

    def __post_init__(self) -> None:
        require(isinstance(self.automatic, bool), "gate.automatic to be true or false", self.automatic)
        require(self.margin >= 0, "gate.margin of 0 or more", self.margin)
        require(0.5 <= self.confidence < 1, "gate.confidence of at least 0.5 and below 1", self.confidence)
        require(self.max_forgetting > 0, "gate.max_forgetting over 0", self.max_forgetting)

    def judge(self, new: Measured, live: Measured, base_perplexity: float) -> Verdict:
        """Compare a version with the live one, measured on the same rows, and with the base model."""
        limit = base_perplexity * (1 + self.max_forgetting)
        forgets = not new.perplexity <= limit  # NaN as well
        if math.isfinite(new.score) and math.isfinite(live.score):
            name, better, needed = new.metric or "score", new.score - live.score, self.margin
            compared = f"{name} {new.score:.3f}, live {live.score:.3f}"
        else:
            better, needed = live.loss - new.loss, self.margin * abs(live.loss)
            compared = f"loss {new.loss:.4f}, live {live.loss:.4f}"
        if not (better >= needed and better > 0):
            return Verdict(False, f"{compared}: not better by the margin of {needed:.3g}")
        sure = confidence(new.rows, live.rows)
        if sure < self.confidence:
            return Verdict(
                False,
                f"{compared}: on {len(new.rows)} held-out rows that may be chance ({_percent(sure)} sure, at least "
                f"{self.confidence:.0%} needed)",
            )
        if forgets:
            return Verdict(
                False,
                f"{compared}, but it forgets: perplexity on a neutral text {new.perplexity:.2f}, base model "
                f"{base_perplexity:.2f}, at most {limit:.2f}",
            )
        compared += f" ({_percent(sure)} sure on {len(new.rows)} rows)"
        return Verdict(True, f"{compared}; perplexity on a neutral text {new.perplexity:.2f} (at most {limit:.2f})")


def confidence(new: Sequence[float], live: Sequence[float]) -> float:
    """How likely it is that rows are worth more under `new`, from n paired rows (n,); 0.5 without any evidence.

    The normal distribution at sum(d) / sqrt(sum(d^2)) of the differences d. For accuracy, where d is -1, 0 or 1, that
    is McNemar's test (https://doi.org/10.1007/BF02295996), one-sided and without a correction for continuity.
    """
    differences = [a - b for a, b in zip(new, live, strict=True)]
    spread = math.sqrt(math.fsum(d * d for d in differences))
    return NormalDist().cdf(math.fsum(differences) / spread) if 0 < spread < math.inf else 0.5


def _percent(sure: float) -> str:
    """Never says 100%."""
    return "over 99%" if sure > 0.99 else f"{sure:.0%}"
