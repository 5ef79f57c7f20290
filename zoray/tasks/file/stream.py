"""One pass over rows that keeps 24 bytes of each, and examples that are read again on demand.

The result of a pass over a large file is kept in the cache folder, so that replicas and resumed runs need not repeat
it: the places of the rows, their labels and the schema, but no text. It holds while the files, the task's settings and
zoray's own code stay the same. Small files are read again each time.
"""

from __future__ import annotations

import pickle
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zoray.models.folder import cache_dir
from zoray.records import Example, ReadAsItGoes, disk
from zoray.tasks.file.cells.example import Prompt, Reader
from zoray.tasks.file.rows.faults import Faults, WrongRow
from zoray.tasks.file.rows.text import Rows, Stamps, Where

Found = TypeVar("Found")
LARGE = 1 << 24  # bytes of all files together from which the result is kept
KEPT = 8  # files in the cache folder; the oldest go first


@dataclass(frozen=True, eq=False)
class Scan:
    """What is kept of n rows."""

    places: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64, by first appearance
    keys: np.ndarray  # (n,) uint64, equal for equal prompts


def once(task: Any, stamps: Stamps | None, find: Callable[[], Found]) -> Found:
    """The result of `find()`, or a kept one for the same settings and files, from this process or another.

    Without `stamps` nothing is kept. A cache that can't be written to, or is damaged, does no harm.
    """
    if stamps is None or sum(size for size, _ in stamps.known) < LARGE:
        return find()
    folder, own = (cache_dir() / "scans").absolute(), sorted(Path(__file__).parent.rglob("*.py"))
    code = [(file.name, file.stat().st_mtime_ns) for file in own]
    known = repr((task, [str(path.absolute()) for path in stamps.paths], stamps.known, code, str(folder)))
    path = folder / f"{sha256(known.encode()).hexdigest()[:32]}.pickle"
    with suppress(Exception):  # not there, or cut short: the file itself has it all
        return pickle.loads(path.read_bytes())
    found = find()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        disk.replace(path, pickle.dumps(found, pickle.HIGHEST_PROTOCOL), folder / f".{uuid.uuid4().hex}")
        for old in sorted(folder.glob("*.pickle"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return found


def scan(rows: Rows, reader: Reader, number_of: Callable[[str, str], int]) -> Scan:
    """Read and check every row. `number_of` gives the number of a label, from the label and its place.

    Raises:
        ConfigError: rows are wrong; all are counted first.
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
    """Examples that are read from their file on demand.

    Args:
        rows: of the file.
        reader: makes examples of the rows.
        places: of the rows, (n,).
        labels: of the examples, (n,).
    """

    def __init__(self, rows: Rows, reader: Reader, places: np.ndarray, labels: np.ndarray) -> None:
        self._rows, self._reader, self._places, self.labels = rows, reader, places, labels
        self.parts = np.zeros(len(labels), np.int64)

    def __reduce__(self) -> Any:
        return Examples, (self._rows, self._reader, self._places, self.labels)

    def at(self, number: int, reader: Reader | None = None) -> Example:
        """The example of a number, by another reader if one is given."""
        place = int(self._places[number])
        return (reader or self._reader).example(self._rows.row(place), Where(self._rows, place))

    def part(self, numbers: np.ndarray) -> Examples:
        """The examples of these numbers, in this order."""
        return Examples(self._rows, self._reader, self._places[numbers], self.labels[numbers])

    def take(self, numbers: Iterable[int]) -> tuple[Example, ...]:
        """The examples of these numbers, in this order; read in the file's order."""
        wanted = list(numbers)
        found = {number: self.at(number) for number in sorted(set(wanted), key=lambda number: self._places[number])}
        return tuple(found[number] for number in wanted)


def _key(prompt: Prompt) -> bytes:
    text = prompt if isinstance(prompt, str) else "\x1e".join("\x1f".join(turn).rstrip("\x1f") for turn in prompt)
    return blake2b(text.encode(), digest_size=8).digest()
