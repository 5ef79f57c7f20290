"""What tasks share: the protocol, the seeded split, and the checks of template, label words and sizes.

Guarantees: a split depends on the rows' order, the sizes and the seed alone; it uses no random generator, so it is the
same on every machine and with every version of NumPy or Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from zoray.records import ConfigError, Example, Marked, Sampling, Splits

Row = TypeVar("Row")
CHUNK = 1 << 16  # digests made at a time


class Task(Protocol):
    """A dataset with its template.

    `metric` names the number that decides which state is best, the higher the better; without one the loss does.
    `sampling` says how the model writes answers, where it does.
    """

    metric: ClassVar[str | None] = "accuracy"
    sampling: ClassVar[Sampling] = Sampling()

    def load(self) -> Splits:
        """Read, check and split the data; raises ConfigError before a model loads."""
        ...


def seeded_split(rows: Sequence[Row], sizes: Sequence[int], seed: int, source: str) -> list[tuple[Row, ...]]:
    """Disjoint samples of `rows` of the given sizes, in order of SHA-256 of "seed:row number".

    An earlier sample does not change when a later size does. `source` names the data in the error.
    """
    return [tuple(rows[i] for i in part.tolist()) for part in seeded_parts(len(rows), sizes, seed, source)]


def seeded_parts(count: int, sizes: Sequence[int], seed: int, source: str) -> list[np.ndarray]:
    """The numbers of the rows, out of `count`, in each sample of `seeded_split`."""
    if sum(sizes) > count:
        raise too_few(count, sizes, source)
    ends = np.cumsum(sizes)
    return np.split(seeded_order(count, seed)[: ends[-1]], ends[:-1])


def seeded_order(count: int, seed: int) -> np.ndarray:
    """The numbers below `count` in order of SHA-256 of "seed:number", (count,) int64."""
    words = np.empty((4, count), np.uint64)
    for first in range(0, count, CHUNK):
        numbers = range(first, min(first + CHUNK, count))
        digests = b"".join([hashlib.sha256(b"%d:%d" % (seed, i)).digest() for i in numbers])
        words[:, first : numbers.stop] = np.frombuffer(digests, ">u8").reshape(-1, 4).T
    return np.lexsort(words[::-1])  # by the first word, then by the next


def too_few(usable: int, sizes: Sequence[int], source: str) -> ConfigError:
    """The error of a source that has fewer usable rows than all sizes together."""
    asked = " + ".join(str(size) for size in sizes)
    rows = "1 usable row" if usable == 1 else f"{usable} usable rows"
    return ConfigError(f"{source} has {rows}; asked for {asked} = {sum(sizes)}. Ask for fewer, or give more rows")


def distinct(examples: Iterable[Example]) -> list[Example]:
    """The first example with each prompt, so that no prompt is in two splits."""
    first: dict[object, Example] = {}
    for example in examples:
        first.setdefault(example.prompt, example)
    return list(first.values())


def fill(template: str, text: str) -> str:
    """The template with `{text}` replaced; other braces, in template or text, stay as they are."""
    before, _, behind = template.partition("{text}")
    filled = f"{before}{text}{behind}"
    if "<" not in before + behind and "[" not in before + behind:
        return filled
    return Marked(filled, ((0, len(before)), (len(before) + len(text), len(filled))))  # its own control tokens


def parted(prompt: str, texts: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """A prompt and the texts that may follow it, with the spaces between the two moved to the texts.

    MeZO's code strips spaces from both ends of the prompt, and of the prompt plus an option, before it tokenises
    them; white space in front of the prompt is dropped.
    """
    bare = prompt.rstrip(" ")
    return bare.lstrip(), tuple((prompt[len(bare) :] + text).rstrip(" ") for text in texts)


def check_template(template: object) -> None:
    """A template holds `{text}` exactly once."""
    if not isinstance(template, str) or template.count("{text}") != 1:
        raise ConfigError(
            f"template must be text with {{text}} in it once, such as '{{text}} It was'; got {template!r}"
        )


def check_words(words: Sequence[object], count: int | None = None) -> tuple[str, ...]:
    """Label words as a tuple: `count` of them (or at least two), none empty, no two the same."""
    enough = len(words) >= 2 if count is None else len(words) == count
    valid = all(isinstance(word, str) and word.strip() for word in words)
    if not enough or not valid or len(set(words)) != len(words):
        wanted = "two or more" if count is None else count
        raise ConfigError(
            f"words must be {wanted} different label words, one per label, each with its leading space; got {words!r}. "
            "For example [' terrible', ' great']"
        )
    return tuple(str(word) for word in words)


def check_sizes(train: object, dev: object, test: object, seed: object) -> None:
    """Train and dev hold at least one example, test may be empty, and all four numbers are whole."""
    for name, value, least in (("train", train, 1), ("dev", dev, 1), ("test", test, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}")
