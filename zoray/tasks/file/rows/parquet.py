"""Rows in Arrow's batches: those of Parquet files, and of data sets on the Hub (hub.py). A place is a row's number.

Parquet packs rows in groups of up to a million, from which no row can be read alone. So files of more than WHOLE rows
together are copied once, as Arrow files of small batches in zoray's cache, and single rows are read from those.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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

BATCH = 250  # rows that are read to get one
PLAIN = 1000  # rows of a data set on the Hub that are converted to plain values at a time

Words = Mapping[str, Mapping[str, str]]


class ArrowRows:
    """The rows of tables with the same columns.

    Args:
        name: what messages call them together.
        tables: (name in messages, rows): `Batches`, or a `datasets.Dataset` in Arrow's format.
        columns: their names, in order.
        words: names of labels, by label and column.
        stamps: of the tables' files; None where rows are in memory, or the Hub's.
    """

    cells = False

    def __init__(
        self, name: str, tables: list[Any], columns: tuple[str, ...], words: Words, stamps: Stamps | None = None
    ) -> None:
        self.name, self.columns, self.words, self.stamps = name, columns, words, stamps
        self.header, self._tables = tables[0][0], tables
        self._starts = np.cumsum([0, *(len(table) for _, table in tables)]).tolist()

    def __iter__(self) -> Iterator[tuple[int, str, Row | WrongRow]]:
        for (called, table), start in zip(self._tables, self._starts, strict=False):
            number = 0
            for batch in table.iter(PLAIN):
                for where, row in _plain_rows(batch, called, number):
                    yield start + number, where, row
                    number += 1

    def row(self, place: int) -> Row:
        at = bisect_right(self._starts, place) - 1
        if self.stamps is not None:
            self.stamps.check(at)
        (called, table), number = self._tables[at], place - self._starts[at]
        ((_, row),) = _plain_rows(table[number], called, number)
        if isinstance(row, WrongRow):
            raise row
        return row

    def where(self, place: int) -> str:
        at = bisect_right(self._starts, place) - 1
        return f"{self._tables[at][0]}, row {place - self._starts[at]} (from 0)"


class Batches:
    """Batches of rows in memory or in an Arrow file, with the interface of a `datasets.Dataset`.

    The file is read and not mapped into memory: mapped pages count as the process's own memory.
    """

    def __init__(self, source: list[RecordBatch] | Path) -> None:
        self._source, self._opened = source, None
        count = self._file().num_record_batches if isinstance(source, Path) else len(source)
        self._ends = np.cumsum([0, *(self._batch(at).num_rows for at in range(count))]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def iter(self, _: int) -> Iterator[RecordBatch]:
        """All batches, in the sizes that they have."""
        return (self._batch(at) for at in range(len(self._ends) - 1))

    def __getitem__(self, number: int) -> RecordBatch:
        """A row by its number, as a batch of its own."""
        at = bisect_right(self._ends, number) - 1
        return self._batch(at).slice(number - self._ends[at], 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each process opens the file itself

    def _batch(self, at: int) -> RecordBatch:
        return self._file().get_batch(at) if isinstance(self._source, Path) else self._source[at]

    def _file(self) -> Any:
        import pyarrow

        self._opened = self._opened or pyarrow.ipc.open_file(pyarrow.OSFile(str(self._source)))
        return self._opened


def parquet_rows(name: str, paths: Sequence[Path]) -> ArrowRows:
    """The rows of Parquet files with the same columns, in order; `name` is what messages call them together.

    Raises:
        ConfigError: a file can't be read, or has other columns; or there is no room for its copy.
    """
    import pyarrow
    from pyarrow import parquet

    stamps, tables = Stamps(paths), list[tuple[str, Batches]]()
    count, columns, words = 0, tuple[str, ...](), dict[str, dict[str, str]]()
    path = paths[0]
    try:
        for path in paths:
            head = parquet.read_metadata(path)
            schema, count = head.schema.to_arrow_schema(), count + head.num_rows
            check_names(schema.names, str(path))
            columns, words = columns or tuple(schema.names), words or _class_words(schema.metadata)
            if set(schema.names) != set(columns):
                raise ConfigError(
                    f"{path}: expected the columns of {paths[0].name}, {list(columns)}; got {schema.names}. Give files "
                    "of one kind"
                )
        for number, path in enumerate(paths):
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                rows = _copied(file, stamps, number) if count > WHOLE else Batches(list(_batches(file)))
                tables.append((str(path), rows))
    except (OSError, pyarrow.ArrowException) as error:
        advice = (
            "It is damaged or not a Parquet file. Write it again, or use JSONL"
            if getattr(error, "errno", None) is None  # of the operating system's own errors only
            else f"Look at the file, and at the room in {cache_dir()} ($ZORAY_CACHE), where large ones are copied"
        )
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise ConfigError(f"can't read task.path={path}: {reason}. {advice}") from error
    return ArrowRows(name, tables, columns, words, stamps if count > WHOLE else None)


def _copied(file: ParquetFile, stamps: Stamps, number: int) -> Batches:
    """The rows of a file from its copy, which is made unless a whole one exists."""
    import pyarrow

    path = stamps.paths[number]
    key = hashlib.sha256(f"{path.resolve()}:{stamps.known[number]}:{BATCH}".encode()).hexdigest()[:16]
    copy = cache_dir() / "data" / f"{path.stem}-{key}.arrow"
    with suppress(OSError, pyarrow.ArrowException):  # not there, or cut short
        return Batches(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_file(sink, file.schema_arrow) as writer:
            for batch in _batches(file):
                writer.write_batch(batch)
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
        pyarrow.default_memory_pool().release_unused()
    stamps.check(number)
    return Batches(copy)


def _batches(file: ParquetFile) -> Iterator[RecordBatch]:
    return file.iter_batches(BATCH, use_threads=False)


def _plain_rows(batch: Any, called: str, first: int) -> Iterator[tuple[str, Row | WrongRow]]:
    """The place of each row of a batch or table, and its plain values or what is wrong with it.

    Arrow accepts any bytes as text, and times that Python can't express.
    """
    import pyarrow

    places = [f"{called}, row {number} (from 0)" for number in range(first, first + batch.num_rows)]
    try:
        rows = batch.to_pylist()
    except (ValueError, ArithmeticError, pyarrow.ArrowException):
        rows = None  # the wrong row is then found one by one
    yield from zip(places, rows or (), strict=False)
    for number, where in enumerate(places if rows is None else ()):
        row, name = dict[str, Any](), ""
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = column[number].as_py()
            yield where, row
        except UnicodeDecodeError as error:
            got = f"; got the byte {error.object[error.start]:#04x} (byte {error.start + 1} of the text)"
            what = f"column {name!r} must hold text in UTF-8"
            yield where, WrongRow(where, what, f"{got}. Write the file again, from text that was decoded right")
        except (ValueError, ArithmeticError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            yield where, WrongRow(where, f"column {name!r} can't be read", f" ({reason}). Write it in another type")


def _class_words(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, str]]:
    """Names of labels, where the `datasets` library has written them into the file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {
            column: {str(label): str(name) for label, name in enumerate(feature["names"])}
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # written by another program
        return {}
