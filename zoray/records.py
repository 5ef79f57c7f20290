"""What crosses files and processes: frozen records of plain values, and zoray's three errors.

Nothing here imports torch, vLLM or Ray. Every record pickles; none holds a tensor that moves between machines.
Shapes: T tokens of a sequence, M scored positions of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np


class ConfigError(ValueError):
    """The user asked for something that can't be done: what was expected, what came, what to do instead."""


class JournalError(ValueError):
    """A journal is damaged, or does not belong to what it is applied to."""


class ReplicaLost(RuntimeError):
    """A replica is gone, or too few are left to go on; the run can be resumed."""


class Probe(NamedTuple):
    """One perturbed scoring: the direction at (run seed, step, index), times a signed scale.

    A scale of 0 is the unperturbed centre. Plus and minus of a pair share an index.
    """

    step: int
    index: int
    scale: float


@dataclass(frozen=True)
class Commit:
    """What one step does to the trained numbers x of an adapter state, in this order and in float32:

        x <- decay * x
        x <- x0 + anchor * (x - x0)                 x0: x before the first step
        m <- momentum * m + sum_k coefficients[k] * z(step, k)
        x <- x + rate * m

    Without momentum there is no m: x <- x + sum_k coefficients[k] * z(step, k), and the rate is 1.
    """

    step: int
    coefficients: tuple[float, ...]  # float32 values, as all others; 0.0 leaves its direction out
    decay: float = 1.0
    anchor: float = 1.0
    momentum: float | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.momentum is None and self.rate != 1.0:
            raise ValueError(f"a commit without momentum has rate 1; got {self.rate}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Four bytes a coefficient between processes, where pickle would take nine; the very same numbers arrive."""
        return _commit, (self.step, _packed(self.coefficients), self.decay, self.anchor, self.momentum, self.rate)


@lru_cache(maxsize=4)  # the same commit goes to every replica
def _packed(coefficients: tuple[float, ...]) -> bytes | tuple[float, ...]:
    packed = np.array(coefficients, np.float32).tobytes()
    return packed if _unpacked(packed) == coefficients else coefficients


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> tuple[float, ...]:
    """Each float32 as the journal writes it, and as optimizers make it: its shortest decimal."""
    return tuple(float(str(value)) for value in np.frombuffer(packed, np.float32))


def _commit(step: int, coefficients: bytes | tuple[float, ...], *rest: Any) -> Commit:
    return Commit(step, _unpacked(coefficients) if isinstance(coefficients, bytes) else coefficients, *rest)


class Tile(NamedTuple):
    """A unit of scoring that is assigned as a whole: some probes of a step on a slice of its examples.

    `examples` are positions [start, stop) in the step's batch, or in a split when `split` is set.
    """

    probes: tuple[Probe, ...]
    start: int
    stop: int
    split: str = "train"


@dataclass(frozen=True, eq=False)
class Scores:
    """What the probes of some tiles made of their examples; see tiles.py for how losses add up.

    Idempotent: whoever scores a tile, it counts once.
    """

    losses: np.ndarray  # int64: a sum for each probe, in order of appearance; or float64: each example's, tile by tile
    correct: float  # sum over all probes and examples
    tokens: int  # of the sequences scored, over all probes; what sequences share counts for each

    def __reduce__(self) -> tuple[Any, ...]:
        """The bare numbers, which costs a fraction of what pickling an array does."""
        return _scores, (self.losses.tobytes(), self.losses.dtype.char, self.correct, self.tokens)


def _scores(losses: bytes, dtype: str, correct: float, tokens: int) -> Scores:
    return Scores(np.frombuffer(losses, dtype), correct, tokens)


@dataclass(frozen=True)
class Example:
    """A labelled example. `options` are the continuations to choose from, `label` the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        if not 0 <= self.label < len(self.options):
            raise ConfigError(
                f"label must be in 0..{len(self.options) - 1}, got {self.label} for prompt {self.prompt[:60]!r}"
            )


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens to run through the model, and which next-token log-probabilities to sum.

    For each j < M, log p(targets[j] | tokens[: rows[j] + 1]) is added to output outputs[j].
    Options of one token share a sequence: all read the same last row.
    """

    tokens: np.ndarray  # (T,) int32
    rows: np.ndarray  # (M,) int32, ascending positions in 0..T-1
    targets: np.ndarray  # (M,) int32 token ids
    outputs: np.ndarray  # (M,) int32 in 0..n_outputs-1
    n_outputs: int


@dataclass(frozen=True)
class StepResult:
    """What the driver knows of a finished step; one line of metrics.jsonl. `step` counts finished steps, from 1."""

    step: int
    loss: float
    accuracy: float
    lr: float
    tokens: int
    seconds: float
    dropped: int = 0
    ties: int = 0
    buried: int = 0
    replicas: int = 0  # that could score when it ended


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy of the state after `step` steps on `count` examples of a split."""

    step: int
    split: str
    loss: float
    accuracy: float
    count: int
    tokens: int
    seconds: float
    digest: str = ""


@dataclass(frozen=True)
class Splits:
    """A task's examples. The same config gives the same splits on every machine."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...] = field(default=())

    def __getitem__(self, split: str) -> tuple[Example, ...]:
        if split not in ("train", "dev", "test"):
            raise ConfigError(f"split must be train, dev or test, got {split!r}")
        return getattr(self, split)


def require(condition: bool, expected: str, got: object, instead: str = "") -> None:
    """Raise ConfigError with the three things a user needs: what was expected, what came, what to do."""
    if not condition:
        raise ConfigError(f"expected {expected}; got {got!r}" + (f". {instead}" if instead else ""))


def is_finite(value: object) -> bool:
    """True for a number that may enter an update; false for inf, nan, and what is no number (a config's text)."""
    return isinstance(value, Real) and math.isfinite(value)


def record(component: Any) -> Any:
    """A component as plain JSON values: its class name and its fields; components inside it likewise."""
    if is_dataclass(component) and not isinstance(component, type):
        inner = {field.name: record(getattr(component, field.name)) for field in fields(component)}
        return {"name": type(component).__name__, **inner}
    return [record(item) for item in component] if isinstance(component, (list, tuple)) else component
