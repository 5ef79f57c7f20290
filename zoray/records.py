"""What crosses files and processes: frozen records of plain values, and zoray's three errors.

Nothing here imports torch, vLLM or Ray. Every record pickles; none holds a tensor that moves between machines.
Shapes: T tokens of a sequence, M scored positions of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

WHOLE = 20_000  # examples of a split up to which it is in memory, and tokenised at start


class ConfigError(ValueError):
    """The user asked for something that can't be done: what was expected, what came, what to do instead."""


class SettingError(ConfigError):
    """What is wrong is a setting, whatever an example says."""


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
        m <- momentum * m + sum_k coefficients[k] * z(step, k) + sum_b gains[b] * s_b
        x <- x + rate * m

    Without momentum there is no m: both sums are added to x, and the rate is 1. s_b are the signs of a step's feedback
    (feedback.py) in the b-th matrix that moves, +1 or -1 for each number, packed as one bit each.
    """

    step: int
    coefficients: tuple[float, ...]  # float32 values, as all others; 0.0 leaves its direction out
    decay: float = 1.0
    anchor: float = 1.0
    momentum: float | None = None
    rate: float = 1.0
    gains: tuple[float, ...] = ()  # float32 values, one for each matrix
    signs: bytes = b""  # of the numbers in the order of the state's layout, eight a byte, the first one its highest bit

    def __post_init__(self) -> None:
        if self.momentum is None and self.rate != 1.0:
            raise ValueError(f"a commit without momentum has rate 1; got {self.rate}")
        if bool(self.gains) != bool(self.signs):
            raise ValueError(f"a commit has gains and signs, or neither; got {len(self.gains)} and {len(self.signs)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Four bytes a coefficient between processes, where pickle would take nine; the very same numbers arrive."""
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
    """Each float32 as the journal writes it, and as optimizers make it: its shortest decimal."""
    return tuple(float(str(value)) for value in np.frombuffer(packed, np.float32))


def _commit(step: int, coefficients: bytes | tuple[float, ...], *rest: Any) -> Commit:
    numbers, gains, signs = rest[:4], rest[4] if len(rest) > 4 else (), rest[5] if len(rest) > 5 else b""
    weights, factors = (_unpacked(part) if isinstance(part, bytes) else part for part in (coefficients, gains))
    return Commit(step, weights, *numbers, gains=factors, signs=signs)


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
    score: float  # the metric, summed over all probes and examples
    tokens: int  # of the sequences scored, over all probes; what sequences share counts for each
    columns: Mapping[str, np.ndarray] | None = None  # of an evaluation: what is known of each example, (n,) each
    written: int = 0  # completions that were judged
    failed: int = 0  # of them those whose reward could not be had
    failure: str = ""  # the first one's traceback
    feedback: np.ndarray | None = (
        None  # (numbers of the layout,) a whole number each, summed over tiles, see feedback.py
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """The bare numbers, which costs a fraction of what pickling an array does."""
        rest = (self.columns, self.written, self.failed, self.failure)
        own = rest if self.columns or self.written or self.feedback is not None else ()
        fed = () if self.feedback is None else (self.feedback.tobytes(), self.feedback.dtype.char)
        return _scores, (self.losses.tobytes(), self.losses.dtype.char, self.score, self.tokens, own, *fed)


def _scores(losses: bytes, dtype: str, score: float, tokens: int, rest: tuple[Any, ...], *fed: Any) -> Scores:
    feedback = np.frombuffer(*fed) if fed else None
    return Scores(np.frombuffer(losses, dtype), score, tokens, *rest, feedback=feedback)


class Message(NamedTuple):
    """A message of a chat. One of the role "tools" holds no words: its content is a JSON list of what may be called."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    more: str = ""  # further keys (tool_calls, name, ...) for the chat template, as a JSON object


class Facts(dict[str, Any]):
    """An example's `data` that knows where its row stands."""

    where: Any = None


class Marked(str):
    """A text of which it is known what in it is not the data's own.

    own: (first, end) of characters that a template or a setting has put there; control tokens in them count.
    more: of an answer in a chat, see Message.
    """

    own: tuple[tuple[int, int], ...]
    more: str

    def __new__(cls, text: str, own: tuple[tuple[int, int], ...] = (), more: str = "") -> Marked:
        self = super().__new__(cls, text)
        self.own, self.more = own, more
        return self


def settled(text: str) -> str:
    """A text whose control tokens all count, as those of a setting do."""
    return Marked(text, ((0, len(text)),))


@dataclass(frozen=True)
class Example:
    """What a model is asked, and what is right. Which of the fields an example has is its task's business.

    A continuation begins with the space or line break that parts it from the prompt.

    Args:
        prompt: text; or the messages of a chat, which the model's own template renders.
        options: continuations to choose from; of a preference (chosen, rejected).
        label: the index of the right option.
        also: indices of further options that are as right; training takes `label`.
        answers: continuations that are right where the model writes one itself; training takes the first.
        calibration: what stands for the prompt without its input, to learn how likely an option is anyhow.
        data: whatever a reward wants to know, as plain JSON values.
        part: which part of a mixture it belongs to.
        untrained: of a prompt's messages, the numbers of those of the assistant's that are not learnt.
    """

    prompt: str | tuple[Message, ...]
    options: tuple[str, ...] = ()
    label: int = 0
    also: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    calibration: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)
    part: int = 0
    untrained: tuple[int, ...] = ()

    @property
    def where(self) -> Any:
        """Where it comes from, for messages (tasks/faults.py); None where that is not known."""
        return getattr(self.data, "where", None)

    @property
    def asked(self) -> str:
        """What messages show of it: the prompt, or the last message of a chat."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1].content

    def __post_init__(self) -> None:
        for label in (self.label, *self.also) if self.options else ():
            if not 0 <= label < len(self.options):
                raise ConfigError(
                    f"label must be in 0..{len(self.options) - 1}, got {label} for prompt {self.asked[:60]!r}"
                )
        if not self.options and (self.label or self.also):
            raise ConfigError(f"label must be 0 without options, got {self.label} for prompt {self.asked[:60]!r}")


@dataclass(frozen=True)
class Sampling:
    """How completions are written.

    Args:
        max_tokens: longest completion.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that have this much probability together.
        stop: a completion ends before the first of these texts; the model's own end of text always ends it.
    """

    max_tokens: int = 50
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        tokens, heat = self.max_tokens, self.temperature
        require(isinstance(tokens, int) and tokens >= 1, "max_tokens to be a whole number of at least 1", tokens)
        require(is_finite(heat) and heat >= 0, "temperature to be a number of 0 or more", heat)
        require(is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p to be above 0 and at most 1", self.top_p)
        ok = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        require(ok, "stop to be a list of texts", self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))


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
    """What the driver knows of a finished step; one line of metrics.jsonl. `step` counts finished steps, from 1.

    `score` is the objective's metric (accuracy, a reward, ...), the mean over all probes; nan where it has none.
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
    replicas: int = 0  # that could score when it ended
    failed: int = 0  # completions whose reward could not be had


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and metric of the state after `step` steps on `count` examples of a split.

    `score` is what `metric` names, and decides which state is best; nan where there is no metric but the loss.
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


@dataclass(frozen=True)
class Splits:
    """A task's examples. The same config gives the same splits on every machine.

    A split that is no tuple reads its examples when they are asked for; it has their labels as `labels`, (n,) int64.
    """

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example] = field(default=())

    def __getitem__(self, split: str) -> Sequence[Example]:
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
    if isinstance(component, Mapping):
        return {str(key): record(value) for key, value in component.items()}
    return [record(item) for item in component] if isinstance(component, (list, tuple)) else component
