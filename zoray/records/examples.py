"""Examples, their messages and answers, the splits of a task, and the token sequences that are scored.

Shapes: T tokens of a sequence, M scored positions of a sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from zoray.records.errors import ConfigError, is_finite, require

WHOLE = 20_000  # examples; a split of at most this many is kept in memory and tokenised at start


class Message(NamedTuple):
    """A message of a chat. The content of one with the role "tools" is a JSON list of the functions on offer."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    more: str = ""  # further keys (tool_calls, name, ...) for the chat template, as a JSON object


class Facts(dict[str, Any]):
    """An example's `data`, with the place of its row in `where`."""

    where: Any = None


class Marked(str):
    """A text that knows which of its characters do not come from the data.

    own: (first, end) of characters that come from a template or a setting; control tokens in them count.
    more: for an answer in a chat, see Message.
    """

    own: tuple[tuple[int, int], ...]
    more: str

    def __new__(cls, text: str, own: tuple[tuple[int, int], ...] = (), more: str = "") -> Marked:
        self = super().__new__(cls, text)
        self.own, self.more = own, more
        return self


def settled(text: str) -> str:
    """A text whose control tokens all count, as in a setting."""
    return Marked(text, ((0, len(text)),))


@dataclass(frozen=True)
class Example:
    """A question to the model and its right answers. The task decides which fields are set.

    A continuation begins with the space or line break that separates it from the prompt.

    Args:
        prompt: text; or the messages of a chat, which the model's own template renders.
        options: continuations to choose from; for a preference (chosen, rejected).
        label: the index of the right option.
        also: indices of other options that are equally right; training takes `label`.
        answers: right continuations, where the model writes one itself; training takes the first.
        calibration: a prompt without the input, which shows how likely an option is in any case.
        data: whatever a reward needs, as plain JSON values.
        part: the part of a mixture that the example belongs to.
        untrained: indices of the assistant's messages in the prompt that are not learnt.
        goes_on: whether an answer stops short, as when a long text is cut: no end of text is learnt after it.
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
    goes_on: bool = False

    @property
    def where(self) -> Any:
        """Where the example comes from, for messages (tasks/file/rows/faults.py); None if unknown."""
        return getattr(self.data, "where", None)

    @property
    def asked(self) -> str:
        """The part that messages show: the prompt, or the last message of a chat."""
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
    """How completions are sampled.

    Args:
        max_tokens: longest completion.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens whose probabilities sum to this.
        stop: a completion ends before the first of these texts, and always at the model's end of text.
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
    Single-token options share a sequence: all read the same last row.
    """

    tokens: np.ndarray  # (T,) int32
    rows: np.ndarray  # (M,) int32, ascending positions in 0..T-1
    targets: np.ndarray  # (M,) int32 token ids
    outputs: np.ndarray  # (M,) int32 in 0..n_outputs-1
    n_outputs: int


class ReadAsItGoes(Sequence[Example]):
    """A split that reads each example from its file when it is needed.

    labels: (n,) int64.
    parts: (n,) int64, the part of a mixture that each example belongs to.
    """

    labels: np.ndarray
    parts: np.ndarray

    def at(self, number: int) -> Example:
        """The example of this number."""
        raise NotImplementedError

    def take(self, numbers: Iterable[int]) -> tuple[Example, ...]:
        """The examples of these numbers, in this order."""
        return tuple(map(self.at, numbers))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected an example from 0 to {len(self) - 1}; got {number}")
        return self.at(number % len(self))


@dataclass(frozen=True)
class Splits:
    """A task's examples. The same config gives the same splits on every machine.

    A split is a tuple, or a `ReadAsItGoes` if its file is large.
    """

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example] = field(default=())

    def __getitem__(self, split: str) -> Sequence[Example]:
        if split not in ("train", "dev", "test"):
            raise ConfigError(f"split must be train, dev or test, got {split!r}")
        return getattr(self, split)
