"""Rows of JSONL, CSV and TSV files: one pass over all of them, and any single one again by its place.

Guarantees: every line is read or refused with file, line and, where there is one, the character; only a row's place is
kept; a file that has changed since is an error. Not noticed: a change that keeps a file's size and time.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from unicodedata import normalize

import numpy as np

from zoray.records import ConfigError
from zoray.tasks.file.rows.faults import WrongRow
from zoray.tasks.file.rows.strict_json import Twice, parse_line

TEXT_SUFFIXES = (".jsonl", ".csv", ".tsv")
MARK = "\ufeff"  # byte order mark, which spreadsheets put first
HANDLES = 64  # files that are held open
DOUBTS = 10_000  # noted rows that may be several, at most
BLANK = " \t\r\n\f\v\xa0\u200b\ufeff"  # around the name of a column
ENDS = re.compile(rb"\r\n|\r|\n")
SEPARATOR = re.compile(rb"(?:\xef\xbb\xbf)?sep=([,;|\t])\s*$", re.I)
LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

csv.field_size_limit(sys.maxsize)  # a long text is no mistake

Row = Mapping[str, Any]


class Doubt(NamedTuple):
    """A row of a table that may be several: a quoted cell seems to hold whole lines."""

    where: str
    lines: list[dict[str, str]]  # each as a row, without the quotes


class Rows(Protocol):
    """Rows by their places, which are whole numbers.

    name: what messages call them.
    columns: names of columns; for JSONL, of all rows so far. Text files have them once iteration has begun.
    header: the place of the columns' names, for messages; known at the same time.
    cells: whether a row's values are all text, so that a list comes as JSON in a cell.
    words: names of labels that the source itself knows, by label and column.
    stamps: of the files that rows are read from again; None where rows are in memory, or not from files.
    """

    name: str
    columns: tuple[str, ...]
    header: str
    words: Mapping[str, Mapping[str, str]]

    @property
    def cells(self) -> bool: ...

    @property
    def stamps(self) -> Stamps | None: ...

    def __iter__(self) -> Iterator[tuple[int, str, Row | WrongRow]]:
        """(place, "FILE, line N", row) of each row, in order, or what is wrong with it."""
        ...

    def row(self, place: int) -> Row:
        """Read a row again."""
        ...

    def where(self, place: int) -> str:
        """Where a row stands, for messages."""
        ...


class Where:
    """A row's place, found only when it is shown: to count lines, the file has to be read."""

    def __init__(self, rows: Rows, place: int) -> None:
        self._rows, self.place = rows, place

    def __str__(self) -> str:
        return self._rows.where(self.place)


class Stamps:
    """Files as they were when a run began to use them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.known = tuple(self._now(path) for path in paths)

    def check(self, number: int) -> None:
        """Raise ConfigError if a file has changed."""
        path, known = self.paths[number], self.known[number]
        if (now := self._now(path)) != known:
            raise ConfigError(
                f"{path} has changed since this run began to use it: it had {known[0]:,} bytes and has {now[0]:,}"
                f"{'' if now[0] != known[0] else ', and was written again'}. Put it back as it was and resume the run, "
                "or start a new one"
            )

    @staticmethod
    def _now(path: Path) -> tuple[int, int]:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"can't read task.path={path}: {error.strerror}. Give an existing file") from error
        return status.st_size, status.st_mtime_ns


class TextFiles:
    """The rows of text files of one format; a place is the byte where a row begins, counted through all files.

    Args:
        name: what messages call them together.
        paths: in order.

    Attributes:
        empty: number of empty rows of a table, which are left out.
        long: number of rows of a table that span several lines.
        first_long: where the first of them begins.
        doubts: the first rows of a table that may be several.
    """

    words: Mapping[str, Mapping[str, str]] = {}

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.header = name, name
        self.columns: tuple[str, ...] = ()
        self.empty, self.long, self.first_long = 0, 0, ""
        self.doubts = list[Doubt]()
        self.stamps = Stamps(paths)
        sizes = [size for size, _ in self.stamps.known]
        self._starts = np.cumsum([0, *sizes])
        self._suffix = paths[0].suffix.lower()
        self._formats: dict[int, tuple[list[str], str]] = {}  # of CSV and TSV: header and delimiter
        self._handles: dict[int, BinaryIO] = {}

    @property
    def cells(self) -> bool:
        return self._suffix != ".jsonl"

    def __iter__(self) -> Iterator[tuple[int, str, Row | WrongRow]]:
        self.empty, self.long, self.first_long, self.doubts = 0, 0, "", []
        for number, path in enumerate(self.stamps.paths):
            try:
                with path.open("rb") as file:
                    start = int(self._starts[number])
                    rows = self._table_rows(number, file) if self.cells else self._json_rows(path, file)
                    for offset, where, row in rows:
                        yield start + offset, where, row
            except OSError as error:
                raise ConfigError(f"can't read task.path={path}: {error.strerror}. Give an existing file") from error
            self.stamps.check(number)

    def row(self, place: int) -> Row:
        number = self._file(place)
        self.stamps.check(number)
        file, path = self._handle(number), self.stamps.paths[number]
        file.seek(place - int(self._starts[number]))
        if not self.cells:
            where = Where(self, place)
            return _object(_decoded(file.readline(), where), where)
        header, delimiter = self._formats[number]
        return dict(zip(header, next(csv.reader(_lines(file, path), delimiter=delimiter, strict=True)), strict=True))

    def where(self, place: int) -> str:
        number = self._file(place)
        path, ends = self.stamps.paths[number], ENDS if self.cells else re.compile(rb"\n")
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            line = 1 + sum(1 for _ in ends.finditer(data, 0, place - int(self._starts[number])))
        return f"{path}, line {line}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # each process opens the files itself

    def _file(self, place: int) -> int:
        return int(np.searchsorted(self._starts, place, side="right")) - 1

    def _handle(self, number: int) -> BinaryIO:
        if number not in self._handles:
            if len(self._handles) >= HANDLES:
                self._handles.pop(next(iter(self._handles))).close()
            self._handles[number] = self.stamps.paths[number].open("rb")
        return self._handles[number]

    def _json_rows(self, path: Path, file: BinaryIO) -> Iterator[tuple[int, str, Row | WrongRow]]:
        offset, known = 0, dict.fromkeys(self.columns)
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = _decoded(raw, where)
                if text.strip() not in ("", MARK):
                    row = _object(text, where)
                    if not known.keys() >= row.keys():  # also at the first row
                        known = self._more_columns(row, where)
                    yield offset, where, row
            except WrongRow as error:
                yield offset, where, error
            offset += len(raw)

    def _more_columns(self, row: Row, where: str) -> dict[str, None]:
        """All columns so far, including the new ones of a row."""
        more = [name for name in row if name not in self.columns]
        check_names([*self.columns, *more], where)
        if not self.columns:
            self.header = where
        elif more:
            self.header = f"{self.header.partition(' (')[0]} ({more[0]!r} from {where.rpartition(', ')[2]} on)"
        self.columns = (*self.columns, *more)
        return dict.fromkeys(self.columns)

    def _table_rows(self, number: int, file: BinaryIO) -> Iterator[tuple[int, str, Row | WrongRow]]:
        # strict: a quote that is opened and not closed properly is an error, not half the file in one cell.
        path, first = self.stamps.paths[number], next((line for line in file if line.strip()), b"")
        delimiter = "\t" if self._suffix == ".tsv" else ";" if b";" in first and b"," not in first else ","
        said = SEPARATOR.match(first)  # a line that names it for spreadsheets
        delimiter = said[1].decode() if said else delimiter
        file.seek(0)
        feed = _Feed(_lines(file, path))
        reader = csv.reader(feed, delimiter=delimiter, strict=True)
        header, first_cells = list[str](), list[str]()
        while True:
            offset, line = feed.start()
            where = f"{path}, line {line}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                at = _bad_quote("".join(feed.record), delimiter)
                raise ConfigError(f"{where}: {error}{at}. Quote cells as spreadsheets do, or use JSONL") from error
            except WrongRow as error:  # not UTF-8
                yield offset, error.where, error
                yield from ((offset, wrong.where, wrong) for wrong in _undecoded(file, path, error.where))
                return
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                self.empty += any(line.strip() for line in feed.record)
            elif not header and said and SEPARATOR.match(feed.record[0].encode()):
                continue
            elif not header:
                header, first_cells = self._header(cells, number, delimiter, where), cells
            elif len(cells) != len(header):
                short = f"; column {header[len(cells)]!r} has none" if len(cells) < len(header) else ""
                yield (
                    offset,
                    where,
                    WrongRow(
                        where,
                        f"expected {len(header)} cells ({header})",
                        f"; got {len(cells)}{short}. Quote or complete it",
                    ),
                )
            elif cells == first_cells and len(header) > 1:
                yield offset, where, WrongRow(where, "expected a row", "; got the header line again. Delete this line")
            elif len(feed.record) > 1 and (error := self._doubt(feed.record, header, delimiter, where)):
                yield offset, where, error
            else:
                yield offset, where, dict(zip(header, cells, strict=True))

    def _doubt(self, record: Sequence[str], header: Sequence[str], delimiter: str, where: str) -> WrongRow | None:
        """Note a row of several lines, each of which could be a row; in TSV, where that is no accident, refuse it.

        TSV is as often written without quoting as with it, and then a cell's text may begin with a quote.
        """
        self.long += 1
        self.first_long = self.first_long or where
        lines = [line.rstrip("\r\n").split(delimiter) for line in record if line.strip()]
        if len(lines) < 2 or any(len(cells) != len(header) for cells in lines):
            return None
        if delimiter != "\t" or len(header) == 1:
            if len(self.doubts) < DOUBTS:
                self.doubts.append(Doubt(where, [dict(zip(header, cells, strict=True)) for cells in lines]))
            return None
        return several_rows(where, len(lines), f"each of which has {len(header)} cells", "TSV")

    def _header(self, cells: Sequence[str], number: int, delimiter: str, where: str) -> list[str]:
        header = [cell.strip(BLANK) for cell in cells]
        named = [name for name in header if name]
        if any("\0" in name for name in named):
            raise ConfigError(f"{where}: not UTF-8 (UTF-16, it seems). Save the file as UTF-8")
        check_names(named, where)
        if self._formats and set(header) != set(first := self._formats[min(self._formats)][0]):
            raise ConfigError(
                f"{where}: expected the columns of {self.stamps.paths[0].name}, {first}; got {header}. Give all files "
                "the same header line"
            )
        self._formats[number] = header, delimiter
        if not self.columns:
            self.columns, self.header = tuple(named), where
        return header


class _Feed:
    """Lines for csv.reader that track where the next row begins: the reader takes no line before it needs it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._bytes, self._number = lines, 0, 0
        self.record: list[str] = []  # the row's lines

    def start(self) -> tuple[int, int]:
        """Byte and line of the next row."""
        self.record.clear()
        return self._bytes, self._number + 1

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if self._number == 0 and line.startswith(MARK):
            line, self._bytes = line[1:], len(MARK.encode())
        self._number += 1
        self._bytes += len(line.encode())
        self.record.append(line)
        return line


def check_names(names: Sequence[str], where: str) -> None:
    """Raise ConfigError for columns whose names are the same, or look so."""
    found: dict[str, str] = {}
    for name in names:
        if name.strip() and (other := found.setdefault(normalize("NFC", name.strip(BLANK)), name)) != name:
            raise ConfigError(f"{where}: expected each column once; got {other!a} and {name!a}. Rename one")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{where}: expected each column once; got {', '.join(map(repr, twice))} twice. Rename one")


def several_rows(where: str, lines: int, each: str, form: str) -> WrongRow:
    """The error of a row that has swallowed others."""
    return WrongRow(
        where,
        f"a cell that begins with a quote goes on over {lines} lines, {each}",
        f". Where a quote is part of the text, write the cell in quotes and its own quotes twice, as spreadsheets do "
        f"in {form}, or use JSONL",
        "a cell that swallows lines",
    )


def _undecoded(file: BinaryIO, path: Path, where: str) -> Iterator[WrongRow]:
    """The other lines of a table that are not UTF-8, after the one at `where`."""
    for number, raw in enumerate(file, start=int(where.rpartition(" ")[2]) + 1):
        try:
            _decoded(raw, f"{path}, line {number}")
        except WrongRow as error:
            yield error


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Lines of a table, with any of the three line ends."""
    for number, raw in enumerate(file, start=1):
        text = _decoded(raw, f"{path}, line {number}")
        if 0 <= text.find("\r") < len(text) - 2:
            yield from LINES.findall(text)
        else:
            yield text


def _decoded(raw: bytes, where: Any) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        character = len(raw[: error.start].decode()) + 1
        kind = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {raw[error.start]:#04x}"
        raise WrongRow(
            where,
            "not UTF-8",
            f" at character {character} ({kind}; {error.reason}). Save the file as UTF-8 (in a spreadsheet: Save as, "
            "CSV UTF-8)",
        ) from error


def _object(text: str, where: Any) -> Row:
    try:
        row = parse_line(text)
    except Twice as error:
        raise WrongRow(where, str(error), ". Leave one out") from None
    except (ValueError, RecursionError) as error:
        at = f" at character {error.colno}, {error.msg}" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        raise WrongRow(where, "not JSON", f"{at}. Write one JSON object a line") from error
    if not isinstance(row, dict):
        raise WrongRow(where, "expected a JSON object", f"; got {type(row).__name__}. Write one JSON object a line")
    return row


def _bad_quote(text: str, delimiter: str) -> str:
    """The place of a row's quote that is never closed, or is followed by a wrong character; empty if there is none."""
    opened, past = -1, 0
    for quote in re.finditer('"', text):
        place = quote.start()
        if place < past:
            continue
        if opened < 0:
            before = text[place - 1] if place else delimiter
            opened = place if before in (delimiter, "\n", "\r") else opened
            continue
        after = text[place + 1 : place + 2]
        if after == '"':
            past = place + 2  # a quote in the cell
        elif after in ("", delimiter, "\n", "\r"):
            opened = -1
        else:
            return f" at character {place - _line_start(text, place) + 1} of the row's line {_line(text, place)}"
    return "" if opened < 0 else f": the quote at character {opened - _line_start(text, opened) + 1} is not closed"


def _line_start(text: str, place: int) -> int:
    return max(text.rfind("\n", 0, place), text.rfind("\r", 0, place)) + 1


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
