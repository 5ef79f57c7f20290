"""One pass over rows that keeps 24 bytes of each, and examples that are read again when they are asked for."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from zoray.records import Example, ReadAsItGoes
from zoray.tasks.file.cells.example import Prompt, Reader
from zoray.tasks.file.rows.faults import Faults, WrongRow
from zoray.tasks.file.rows.text import Rows, Where


@dataclass(frozen=True, eq=False)
class Scan:
    """What is kept of n rows."""

    places: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64, by first appearance
    keys: np.ndarray  # (n,) uint64, equal for equal prompts


def scan(rows: Rows, reader: Reader, number_of: Callable[[str, str], int]) -> Scan:
    """Read and check every row. `number_of` numbers a label, given it and where it stands.

    Raises:
        ConfigError: rows are wrong; they are counted first.
    """
    places, labels, keys, faults = array("q"), array("q"), bytearray(), Faults()
    for place, where, row in rows:
        try:
            if isinstance(row, WrongRow):
                raise row
            prompt, label = reader.scan(row, where)
        except WrongRow as error:
            faults.add(error)
            continue
        places.append(place)
        labels.append(0 if label is None else number_of(label, where))
        keys += _key(prompt)
    faults.check()
    return Scan(np.frombuffer(places, np.int64), np.frombuffer(labels, np.int64), np.frombuffer(keys, np.uint64))


def first_of_each(keys: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which rows of several scans are the first with their key, (n,) bool for each scan."""
    joined = np.concatenate(keys)
    first = np.zeros(len(joined), bool)
    first[np.unique(joined, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(some) for some in keys])[:-1])


class Examples(ReadAsItGoes):
    """Examples that are read from their file as they are asked for.

    Args:
        rows: where from.
        reader: makes examples of them.
        places: of the rows, (n,).
        labels: of the examples, (n,).
    """

    def __init__(self, rows: Rows, reader: Reader, places: np.ndarray, labels: np.ndarray) -> None:
        self._rows, self._reader, self._places, self.labels = rows, reader, places, labels
        self.parts = np.zeros(len(labels), np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected an example below {len(self)}; got {number}")
        place = int(self._places[number])
        return self._reader.example(self._rows.row(place), Where(self._rows, place))

    def again(self, reader: Reader, index: int) -> Example:
        """One of them, made in another way."""
        place = int(self._places[index])
        return reader.example(self._rows.row(place), Where(self._rows, place))

    def part(self, numbers: np.ndarray) -> Examples:
        """Some of them, in this order."""
        return Examples(self._rows, self._reader, self._places[numbers], self.labels[numbers])

    def take(self, numbers: Iterable[int]) -> tuple[Example, ...]:
        """Some of them, in this order; read in the file's."""
        wanted = list(numbers)
        found = {number: self[number] for number in sorted(set(wanted), key=lambda number: self._places[number])}
        return tuple(found[number] for number in wanted)


def _key(prompt: Prompt) -> bytes:
    text = prompt if isinstance(prompt, str) else "\x1e".join("\x1f".join(turn).rstrip("\x1f") for turn in prompt)
    return blake2b(text.encode(), digest_size=8).digest()
