"""Countdown: write an equation that makes a target of three or four given numbers. Problems are made up, all solvable.

The game of TinyZero (Pan et al., 2025) and of ES at scale (Qiu et al., 2025). Problems are hashed from the seed, so
they are the same on every machine; no two problems of a task have the same numbers and target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from zoray.records import ConfigError, Example, Message, Sampling, Splits, require
from zoray.tasks.base import Task, check_sizes

COUNTS = (3, 4)
TRIES = 50  # draws for each problem, on average, before we report that there are too few
TEMPLATE = (
    "Make {target} out of the numbers {numbers}: use each of them exactly once, with +, -, *, / and parentheses. "
    "You may think first. Then write the equation without an equals sign in answer tags, like "
    "<answer>(1 + 2) / 3</answer>."
)


@dataclass(frozen=True)
class Countdown(Task):
    """Numbers from 1 to `largest`, and a target from 1 to `highest` that some equation of them gives.

    `counts` says how many numbers a problem may have. The test split does not change with train and dev.
    """

    metric: ClassVar[str | None] = "reward"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=128)

    train: int = 1000
    dev: int = 100
    test: int = 200
    seed: int = 0
    chat: bool = True
    counts: tuple[int, ...] = COUNTS
    largest: int = 99
    highest: int = 999
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        check_sizes(self.train, self.dev, self.test, self.seed)
        object.__setattr__(self, "counts", tuple(self.counts))
        ok = bool(self.counts) and all(count in COUNTS for count in self.counts)
        require(ok, "counts to be a list of 3 and 4, or of one of them", self.counts)
        for name in ("largest", "highest"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, f"{name} to be a whole number of at least 1", value)
        ok = [str(self.template).count(part) for part in ("{numbers}", "{target}")] == [1, 1]
        require(ok, "template to be text with {numbers} and {target} in it, each once", self.template)

    def load(self) -> Splits:
        """Make the problems up."""
        sizes = (self.test, self.dev, self.train)
        problems = self._problems(sum(sizes))
        test, dev, train = (tuple(self._example(*next(problems)) for _ in range(size)) for size in sizes)
        return Splits(train, dev, test)

    def _example(self, numbers: list[int], target: int) -> Example:
        text = self.template.replace("{numbers}", ", ".join(map(str, numbers))).replace("{target}", str(target))
        prompt = (Message("user", text),) if self.chat else f"{text}\nAnswer:"
        return Example(prompt, data={"numbers": numbers, "target": target})

    def _problems(self, wanted: int) -> Iterator[tuple[list[int], int]]:
        """The wanted number of different problems, in order."""
        seen: set[tuple[int, ...]] = set()
        for number in range(TRIES * wanted):
            numbers, target = self._draw(number)
            key = (*sorted(numbers), target)
            if 1 <= target <= self.highest and key not in seen:
                seen.add(key)
                yield numbers, target
        raise ConfigError(
            f"expected train + dev + test to be at most {len(seen)}, the problems found with largest={self.largest}, "
            f"highest={self.highest} and counts={list(self.counts)}; got {wanted}. Ask for fewer, or raise these"
        )

    def _draw(self, number: int) -> tuple[list[int], int]:
        """Numbers, and the result of joining two of them at a time until one is left.

        Every result on the way is a positive whole number.
        """
        draws = _draws(f"countdown:{self.seed}:{number}")
        count = self.counts[next(draws) % len(self.counts)]
        numbers = [1 + next(draws) % self.largest for _ in range(count)]
        left = list(numbers)
        while len(left) > 1:
            a = left.pop(next(draws) % len(left))
            b = left.pop(next(draws) % len(left))
            results = [a + b, a * b]
            results += [a - b] if a > b else []
            results += [a // b] if a % b == 0 else []
            left.append(results[next(draws) % len(results)])
        return numbers, left[0]


def _draws(address: str) -> Iterator[int]:
    """Numbers below 2**32 that depend on the address alone."""
    for block in range(1 << 32):
        digest = hashlib.sha256(f"{address}:{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4))
