"""The records of a step that cross processes: probes, commits, tiles, scores, and the results that are logged.

Every record pickles, and none holds a tensor that moves between machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Probe(NamedTuple):
    """One perturbed scoring: the direction at (run seed, step, index), times a signed scale.

    A scale of 0 is the unperturbed centre. Plus and minus of a pair share an index.
    """

    step: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple's own index() is not needed
    scale: float


@dataclass(frozen=True)
class Commit:
    """What one step does to the trained numbers x of an adapter state, in this order and in float32:

        x <- decay * x
        x <- x0 + anchor * (x - x0)                 x0: x before the first step
        m <- momentum * m + sum_k coefficients[k] * z(step, k) + sum_b gains[b] * s_b
        x <- x + rate * m

    Without momentum there is no m: both sums are added to x, and the rate is 1. s_b are the signs of a step's feedback
    (feedback.py) in the b-th trained matrix, +1 or -1 for each number, packed as one bit each.
    """

    step: int
    coefficients: tuple[float, ...]  # float32 values, like all others; 0.0 leaves its direction out
    decay: float = 1.0
    anchor: float = 1.0
    momentum: float | None = None
    rate: float = 1.0
    gains: tuple[float, ...] = ()  # float32 values, one for each matrix
    signs: bytes = b""  # in the order of the state's layout, eight a byte, the first in the highest bit

    def __post_init__(self) -> None:
        if self.momentum is None and self.rate != 1.0:
            raise ValueError(f"a commit without momentum has rate 1; got {self.rate}")
        if bool(self.gains) != bool(self.signs):
            raise ValueError(f"a commit has gains and signs, or neither; got {len(self.gains)} and {len(self.signs)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Send four bytes a coefficient, where pickle would take nine; the numbers arrive unchanged."""
        rest = (_packed(self.gains), self.signs) if self.signs else ()
        return _commit, (
            self.step,
            _packed(self.coefficients),
            self.decay,
            self.anchor,
            self.momentum,
            self.rate,
            *rest,
        )


@lru_cache(maxsize=8)  # the same commit goes to every replica
def _packed(coefficients: tuple[float, ...]) -> bytes | tuple[float, ...]:
    packed = np.array(coefficients, np.float32).tobytes()
    return packed if _unpacked(packed) == coefficients else coefficients


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> tuple[float, ...]:
    """Each float32 as its shortest decimal, as optimizers and the journal write it."""
    return tuple(float(str(value)) for value in np.frombuffer(packed, np.float32))


def _commit(step: int, coefficients: bytes | tuple[float, ...], *rest: Any) -> Commit:
    numbers, gains, signs = rest[:4], rest[4] if len(rest) > 4 else (), rest[5] if len(rest) > 5 else b""
    weights, factors = (_unpacked(part) if isinstance(part, bytes) else part for part in (coefficients, gains))
    return Commit(step, weights, *numbers, gains=factors, signs=signs)


class Tile(NamedTuple):
    """A unit of scoring, given to one replica as a whole: some probes of a step on a slice of its examples.

    `examples` are positions [start, stop) in the step's batch, or in a split when `split` is set.
    """

    probes: tuple[Probe, ...]
    start: int
    stop: int
    split: str = "train"


@dataclass(frozen=True, eq=False)
class Scores:
    """Losses and metrics of some tiles; see tiles.py for how losses add up.

    Idempotent: a tile counts once, whichever replica scores it.
    """

    losses: np.ndarray  # int64: a sum for each probe, in order of appearance; or float64: each example's, tile by tile
    score: float  # the metric, summed over all probes and examples
    tokens: int  # of the scored sequences, over all probes; a shared prefix counts for each sequence
    columns: Mapping[str, np.ndarray] | None = None  # in an evaluation: values of each example, (n,) each
    written: int = 0  # completions that were judged
    failed: int = 0  # those of them whose reward failed
    failure: str = ""  # the traceback of the first
    feedback: np.ndarray | None = (
        None  # (numbers of the layout,) a whole number each, summed over tiles, see feedback.py
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the bare numbers, at a fraction of the cost of pickling an array."""
        rest = (self.columns, self.written, self.failed, self.failure)
        own = rest if self.columns or self.written or self.feedback is not None else ()
        fed = () if self.feedback is None else (self.feedback.tobytes(), self.feedback.dtype.char)
        return _scores, (self.losses.tobytes(), self.losses.dtype.char, self.score, self.tokens, own, *fed)


def _scores(losses: bytes, dtype: str, score: float, tokens: int, rest: tuple[Any, ...], *fed: Any) -> Scores:
    feedback = np.frombuffer(*fed) if fed else None
    return Scores(np.frombuffer(losses, dtype), score, tokens, *rest, feedback=feedback)


@dataclass(frozen=True)
class StepResult:
    """The driver's summary of a finished step; one line of metrics.jsonl. `step` counts finished steps, from 1.

    `score` is the objective's metric (accuracy, a reward, ...), the mean over all probes; nan if it has none.
    """

    step: int
    loss: float
    score: float
    lr: float
    tokens: int
    seconds: float
    dropped: int = 0
    ties: int = 0
    buried: int = 0
    replicas: int = 0  # that could score at the end of the step
    failed: int = 0  # completions whose reward failed


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and metric of the state after `step` steps on `count` examples of a split.

    `score` is the value of `metric`, and decides which state is best; nan if there is no metric but the loss.
    `others` are further numbers by name; those of a part of a mixture are called part/name.
    """

    step: int
    split: str
    loss: float
    score: float
    count: int
    tokens: int
    seconds: float
    digest: str = ""
    metric: str | None = "accuracy"
    others: Mapping[str, float] = field(default_factory=dict, hash=False)
