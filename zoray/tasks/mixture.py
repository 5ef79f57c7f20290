"""Several tasks in one run, each with its share of the training examples, and with its own objective if wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from zoray.records import ConfigError, Example, ReadAsItGoes, Splits, is_finite
from zoray.tasks.base import Task
from zoray.tasks.batches import labels_of


@dataclass(frozen=True)
class Part:
    """A task of a mixture. `weight` is its share of training examples, relative to the others' weights."""

    task: Any
    weight: float = 1.0
    objective: Any = None
    name: str = ""


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks by name. On the command line a part is a task's option with its weight, and with settings of its own:

    `task=mixture 'task.parts={sst2: 2, mail: {task: file, path: mail.csv, weight: 1, objective: answer_nll}}'`

    Dev and test are those of all parts together. The best state is the one with the best mean of the parts' metrics,
    by weight; each metric is reported under its part's name.
    """

    metric: ClassVar[str | None] = "score"

    parts: Mapping[str, Part]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or len(self.parts) < 2:
            raise ConfigError(
                f"expected two or more tasks in task.parts; got {self.parts!r}. For example "
                "'task.parts={sst2: 1, rte: 1}'"
            )
        for name, part in self.parts.items():
            if not isinstance(part, Part) or not is_finite(part.weight) or part.weight <= 0:
                raise ConfigError(f"expected a positive weight for task.parts.{name}; got {part!r}")
            if isinstance(part.task, Mixture):
                raise ConfigError(f"expected a plain task as task.parts.{name}; got another mixture. List its parts")
        object.__setattr__(self, "parts", {name: replace(part, name=name) for name, part in self.parts.items()})

    @property
    def mixed(self) -> tuple[Part, ...]:
        """The parts, in the order of their numbers in examples."""
        return tuple(self.parts.values())

    def load(self) -> Splits:
        """All parts' splits, one after another."""
        loaded = [part.task.load() for part in self.mixed]
        return Splits(*(_joined([splits[name] for splits in loaded]) for name in ("train", "dev", "test")))


def _joined(splits: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The parts' splits as one, read as it goes if one of them is."""
    if all(isinstance(examples, tuple) for examples in splits):
        return tuple(replace(example, part=k) for k, examples in enumerate(splits) for example in examples)
    return Joined(splits)


class Joined(ReadAsItGoes):
    """Examples of several parts end to end, without reading them."""

    def __init__(self, splits: Sequence[Sequence[Example]]) -> None:
        self._splits = tuple(splits)
        sizes = [len(examples) for examples in splits]
        self._starts = np.cumsum([0, *sizes]).tolist()
        self.labels = np.concatenate([labels_of(examples) for examples in splits])
        self.parts = np.repeat(np.arange(len(splits)), sizes)

    def at(self, number: int) -> Example:
        part = bisect_right(self._starts, number) - 1
        return replace(self._splits[part][number - self._starts[part]], part=part)
