"""Rows of Parquet files.

Parquet packs rows in groups that may hold a million, of which none can be read alone. So a large file is copied once,
as an Arrow file of small batches in zoray's cache, and single rows are read from that. A place is a row's number.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.models.folder import cache_dir
from zoray.records import WHOLE, ConfigError
from zoray.tasks.file.rows.faults import WrongRow
from zoray.tasks.file.rows.text import Row, Stamps, check_names

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH = 250  # rows that are read for one


class ParquetFiles:
    """The rows of Parquet files with the same columns.

    Args:
        name: what messages call them together.
        paths: in order.
    """

    cells = False

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.header = name, str(paths[0])
        self._stamps = Stamps(paths)
        self.columns: tuple[str, ...] = ()
        self.words: Mapping[str, Mapping[str, str]] = {}
        self._files = [self._batches(number) for number in range(len(paths))]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)]).tolist()

    def __iter__(self) -> Iterator[tuple[int, str, Row | WrongRow]]:
        for path, file, start in zip(self._stamps.paths, self._files, self._starts, strict=False):
            number = 0
            for batch in file:
                for row in plain_rows(batch, lambda i, path=path, first=number: f"{path}, row {first + i} (from 0)"):
                    yield start + number, f"{path}, row {number} (from 0)", row
                    number += 1

    def row(self, place: int) -> Row:
        number = self._file(place)
        self._stamps.check(number)
        (row,) = plain_rows(self._files[number].row(place - self._starts[number]), lambda _: self.where(place))
        if isinstance(row, WrongRow):
            raise row
        return row

    def where(self, place: int) -> str:
        number = self._file(place)
        return f"{self._stamps.paths[number]}, row {place - self._starts[number]} (from 0)"

    def _file(self, place: int) -> int:
        return bisect_right(self._starts, place) - 1

    def _batches(self, number: int) -> Batches:
        """The rows of a file, from its copy if it is large."""
        import pyarrow
        from pyarrow import parquet

        path = self._stamps.paths[number]
        try:
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                found = tuple(file.schema_arrow.names)
                check_names(found, str(path))
                self.columns = self.columns or found
                self.words = self.words or _class_words(file.schema_arrow.metadata)
                if set(found) != set(self.columns):
                    raise ConfigError(
                        f"{path}: expected the columns of {self._stamps.paths[0].name}, {list(self.columns)}; got "
                        f"{list(found)}. Give files of one kind"
                    )
                if file.metadata.num_rows <= WHOLE:
                    return Batches(list(file.iter_batches(BATCH, use_threads=False)))
                copy = _copy_path(path, self._stamps.known[number])
                if not copy.exists():
                    _copy(file, copy)
                    self._stamps.check(number)
                return Batches(copy)
        except (OSError, pyarrow.ArrowException) as error:
            advice = (
                "It is damaged or no Parquet file. Write it again, or use JSONL"
                if getattr(error, "errno", None) is None  # of the operating system's own errors only
                else f"Look at the file, and at the room in {cache_dir()} ($ZORAY_CACHE), where large ones are copied"
            )
            reason = " ".join(str(error).split())[:300].rstrip(". ")
            raise ConfigError(f"can't read task.path={path}: {reason}. {advice}") from error


class Batches:
    """Batches of rows, in memory or in an Arrow file."""

    def __init__(self, source: Sequence[RecordBatch] | Path) -> None:
        self._source, self._opened = source, None
        self._ends = np.cumsum([batch.num_rows for batch in self]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[RecordBatch]:
        return iter(self._source) if isinstance(self._source, list) else self._from_file()

    def row(self, number: int) -> RecordBatch:
        """A row by its number, as a batch of its own."""
        at = bisect_right(self._ends, number)
        first = self._ends[at - 1] if at else 0
        return self._batch(at).slice(number - first, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _batch(self, at: int) -> RecordBatch:
        return self._source[at] if isinstance(self._source, list) else self._reader().get_batch(at)

    def _from_file(self) -> Iterator[RecordBatch]:
        return (self._reader().get_batch(at) for at in range(self._reader().num_record_batches))

    def _reader(self) -> Any:
        """Read and not mapped into memory: a mapped file counts as the process's own memory, page by page."""
        import pyarrow

        if self._opened is None:
            self._opened = pyarrow.ipc.open_file(pyarrow.OSFile(str(self._source)))
        return self._opened


def plain_rows(batch: Any, where: Callable[[int], str]) -> Iterator[Row | WrongRow]:
    """The rows of an Arrow batch or table as plain values, or what is wrong with one; `where` is asked with its number.

    Arrow holds any bytes as text, and times that Python has no word for.
    """
    import pyarrow

    try:
        rows = batch.to_pylist()
    except (ValueError, ArithmeticError, pyarrow.ArrowException):
        rows = None  # which row it is, is found one by one
    yield from rows or ()
    for number in range(batch.num_rows if rows is None else 0):
        row, name = dict[str, Any](), ""
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = column[number].as_py()
            yield row
        except UnicodeDecodeError as error:
            got = f"; got the byte {error.object[error.start]:#04x} (byte {error.start + 1} of the text)"
            what = f"column {name!r} must hold text in UTF-8"
            yield WrongRow(where(number), what, f"{got}. Write the file anew, from text that was read right")
        except (ValueError, ArithmeticError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            yield WrongRow(where(number), f"column {name!r} can't be read", f" ({reason}). Write it in another type")


def _copy_path(path: Path, stamp: tuple[int, int]) -> Path:
    key = hashlib.sha256(f"{path.resolve()}:{stamp}:{BATCH}".encode()).hexdigest()[:16]
    return cache_dir() / "data" / f"{path.stem}-{key}.arrow"


def _copy(file: ParquetFile, target: Path) -> None:
    import pyarrow

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_file(sink, file.schema_arrow) as writer:
            for batch in file.iter_batches(BATCH, use_threads=False):
                writer.write_batch(batch)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
        pyarrow.default_memory_pool().release_unused()


def _class_words(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, str]]:
    """Names of labels, where the `datasets` library has written them into the file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {
            column: {str(label): str(name) for label, name in enumerate(feature["names"])}
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's own
        return {}
