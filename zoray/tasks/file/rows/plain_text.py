"""Rows of plain text: the first part of each paragraph is the prompt, the rest is the completion.

The end of a completion is the text's own: a blank line after a paragraph, the end of text after the last one, and
nothing to learn after a piece of a paragraph that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoray.records import ConfigError
from zoray.tasks.file.rows.text import MARK, Row

PLAIN_SUFFIXES = (".txt", ".md")
WORDS = 120  # of a piece; a longer paragraph is several
GIVEN = 3  # a piece's first third is given
FEWEST_WORDS = 2 * GIVEN  # of a piece
FEWEST = 10  # pieces


class GoesOn(dict[str, Any]):
    """A row whose completion is not the end of a paragraph."""


class _Piece(NamedTuple):
    where: str
    row: Row


class PlainText:
    """The pieces of texts in UTF-8, as columns prompt and completion. Paragraphs are set apart by blank lines.

    Line breaks within a paragraph are spaces, a blank line is two line breaks. Pieces of fewer than FEWEST_WORDS
    words are counted (`short`), but not used. A place is a piece's number.

    Args:
        name: what messages call the texts together.
        paths: in order.

    Raises:
        ConfigError: too little text, or none in UTF-8.
    """

    cells = False
    words: Mapping[str, Mapping[str, str]] = {}
    stamps = None

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = self.header = name
        self.columns: tuple[str, ...] = ("prompt", "completion")
        every = [piece for path in paths for piece in _pieces(path)]
        self._pieces = [piece for piece in every if piece.row]
        self.short = len(every) - len(self._pieces)
        if len(self._pieces) < FEWEST:
            raise ConfigError(
                f"expected at least {FEWEST} paragraphs of {FEWEST_WORDS} words or more in {name}; got "
                f"{len(self._pieces)}. Set paragraphs apart by blank lines, give more text, or rows with questions and "
                "answers (CSV with columns prompt and completion)"
            )

    def __iter__(self) -> Iterator[tuple[int, str, Row]]:
        yield from ((place, where, row) for place, (where, row) in enumerate(self._pieces))

    def row(self, place: int) -> Row:
        return self._pieces[place].row

    def where(self, place: int) -> str:
        return self._pieces[place].where


def _pieces(path: Path) -> Iterator[_Piece]:
    """The pieces of a text, each with the line where its paragraph begins; without a row where it is too short."""
    first, words = 1, list[str]()
    lines = _read(path).removeprefix(MARK).rstrip().split("\n")
    for number, line in enumerate((*lines, ""), start=1):
        if line.strip():
            first = first if words else number
            words += line.split()
            continue
        for begin in range(0, len(words), WORDS):
            piece = words[begin : begin + WORDS]
            cut, ends = len(piece) // GIVEN, begin + WORDS >= len(words)
            rest = " " + " ".join(piece[cut:]) + ("\n\n" if ends and number <= len(lines) else "")
            row = {"prompt": " ".join(piece[:cut]), "completion": rest} if len(piece) >= FEWEST_WORDS else {}
            yield _Piece(f"{path}, line {first}", row if ends else GoesOn(row))
        words.clear()


def _read(path: Path) -> str:
    """A text with the line ends of Unix, whatever the file has."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read task.path={path}: {error.strerror}. Give an existing file") from error
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = f"byte {data[error.start]:#04x}"
        raise ConfigError(f"{path}, line {line}: not UTF-8 ({byte}; {error.reason}). Save the file as UTF-8") from error
