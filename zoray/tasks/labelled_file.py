"""Your own data: a JSONL, CSV or TSV file with a text and a label column.

Guarantees: every row is used or refused, and a refusal names file and line. Rows that repeat an earlier row's text are
left out, so that no text is in two splits.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoray.records import ConfigError, Example, Splits
from zoray.tasks.base import Task, check_sizes, check_template, check_words, distinct, fill, seeded_split

SUFFIXES = (".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class LabelledFile(Task):
    """Text classification on a file of yours.

    `words` maps each label of the file to its label word, `{negative: " terrible", positive: " great"}`; a plain list
    is for labels 0, 1, ... A size of null is 10 % of the file for dev and test, and all that remains for train. CSV
    and TSV need a header line; a cell with a separator, a quote or a line break in it is quoted, as spreadsheets do.
    """

    path: str
    words: Mapping[str, str] | Sequence[str]
    text_column: str = "text"
    label_column: str = "label"
    template: str = "{text} It was"
    train: int | None = None
    dev: int | None = None
    test: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or Path(self.path).suffix not in SUFFIXES:
            raise ConfigError(f"task.path must end in {', '.join(SUFFIXES)}; got {self.path!r}. Convert the file")
        if isinstance(self.words, str) or not isinstance(self.words, Mapping | Sequence):
            raise ConfigError(f"words must map labels to label words, or list them; got {self.words!r}")
        words = self.words if isinstance(self.words, Mapping) else dict(enumerate(self.words))
        words = {_label(key): word for key, word in words.items()}
        check_words(list(words.values()))
        object.__setattr__(self, "words", words)
        check_template(self.template)
        train, dev, test = (1 if size is None else size for size in (self.train, self.dev, self.test))
        check_sizes(train, dev, test, self.seed)
        for name in ("text_column", "label_column"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} must be a column's name; got {getattr(self, name)!r}")

    def load(self) -> Splits:
        """Read, check and split the file."""
        assert isinstance(self.words, Mapping)  # made so in __post_init__
        options, index = tuple(self.words.values()), {label: i for i, label in enumerate(self.words)}
        examples = []
        for where, row in _rows(Path(self.path).expanduser()):
            for column in (self.text_column, self.label_column):
                if row.get(column) is None:
                    has = [str(key) for key, value in row.items() if value is not None]
                    raise ConfigError(
                        f"{where}: no value for column {column!r}; the row has {has}. "
                        "Complete the row, or set text_column and label_column"
                    )
            text, label = row[self.text_column], _label(row[self.label_column])
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"{where}: column {self.text_column!r} must hold text; got {text!r}. Remove the row")
            if label not in index:
                raise ConfigError(f"{where}: label {label!r} has no word; words has {list(index)}. Add it to words")
            examples.append(Example(fill(self.template, text.strip()), options, index[label]))
        if not examples:
            raise ConfigError(f"{self.path} has no rows; expected a text and a label a row")
        examples = distinct(examples)
        tenth = max(1, len(examples) // 10)
        test = tenth if self.test is None else self.test
        dev = tenth if self.dev is None else self.dev
        train = max(1, len(examples) - dev - test) if self.train is None else self.train
        parts = seeded_split(examples, (test, dev, train), self.seed, self.path)
        return Splits(parts[2], parts[1], parts[0])


def _label(value: object) -> str:
    """A label as text: 1 and "1" are the same label, and so are JSON's true and "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", row) for each row of the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read task.path={path}: {error.strerror}. Give an existing file") from error
    try:
        text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8") from error
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text)
    else:
        yield from _table_rows(path, text, "\t" if path.suffix == ".tsv" else ",")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error}). Write one JSON object a line") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where}: expected a JSON object; got {type(row).__name__}. Write one JSON object a line"
            )
        yield where, row


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # strict: a quote that is opened and not closed properly is an error, not half the file in one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1  # a quoted cell may span lines: errors name the line where the row starts
    try:
        for cells in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise ConfigError(
                    f"{where}: expected {len(header)} cells ({header}); got {len(cells)}. Quote or complete it"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {start}: {error}. Quote cells as spreadsheets do, or use JSONL") from error
