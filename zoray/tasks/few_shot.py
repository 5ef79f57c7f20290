"""In-context learning: a task whose prompts begin with solved examples, the baseline that needs no tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zoray.records import ConfigError, Example, Marked, Message, Splits, require
from zoray.tasks.base import Task, seeded_split

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class FewShot:
    """A task's dev and test with `shots` training examples before each prompt, the same for all (MeZO: 32, icl.sh).

    Examples are separated by an empty line; in a chat each is a turn of its own. A calibration prompt is not changed,
    as in MeZO's `sfc`.
    """

    task: Task
    shots: int
    seed: int = 0

    def __post_init__(self) -> None:
        ok = isinstance(self.shots, int) and not isinstance(self.shots, bool) and self.shots >= 1
        require(ok, "shots to be a whole number of at least 1", self.shots)

    @property
    def metric(self) -> str | None:
        """The task's."""
        return self.task.metric

    @property
    def sampling(self) -> Any:
        """The task's."""
        return self.task.sampling

    def load(self) -> Splits:
        """The task's splits with longer prompts; train stays as it is."""
        splits = self.task.load()
        (chosen,) = seeded_split(range(len(splits.train)), (self.shots,), self.seed, "train, for shots=...,")
        shown = [splits.train[int(i)] for i in chosen]
        dev, test = (tuple(before(example, shown) for example in split) for split in (splits.dev, splits.test))
        return Splits(splits.train, dev, test)


def before(example: Example, shown: list[Example]) -> Example:
    """The example with others, and their right answers, before its prompt."""
    if isinstance(example.prompt, str):
        return replace(example, prompt=_chained([*map(_solved, shown), example.prompt]))
    turns: list[Message] = []
    for other in shown:
        if isinstance(other.prompt, str):
            raise ConfigError("expected all prompts of a task to be chats, or none; got both")
        turns += [*other.prompt, Message("assistant", _answer(other).strip())]
    systems = [message for message in example.prompt if message.role == "system"]
    asked = [message for message in example.prompt if message.role != "system"]
    return replace(example, prompt=(*systems, *(turn for turn in turns if turn.role != "system"), *asked))


def _solved(example: Example) -> str:
    """A plain prompt with its answer; control tokens of its template still count."""
    whole = f"{example.prompt}{_answer(example)}"
    text = whole.strip()
    own, first = example.prompt.own if isinstance(example.prompt, Marked) else (), whole.index(text)
    ends = [(max(0, start - first), min(end - first, len(text))) for start, end in own]
    return Marked(text, tuple((start, end) for start, end in ends if start < end))


def _chained(texts: list[str]) -> str:
    own, at = list[tuple[int, int]](), 0
    for text in texts:
        own += [(start + at, end + at) for start, end in (text.own if isinstance(text, Marked) else ())]
        at += len(text) + len(SEPARATOR)
    return Marked(SEPARATOR.join(texts), tuple(own)) if own else SEPARATOR.join(texts)


def _answer(example: Example) -> str:
    if not example.answers and not example.options:
        raise ConfigError("expected a task with answers or options for shots=...; its examples have neither")
    return example.answers[0] if example.answers else example.options[example.label]
