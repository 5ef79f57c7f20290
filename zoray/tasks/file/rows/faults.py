"""Rows that can't be used: each is named by its place, and those of a kind are counted in one message."""

from __future__ import annotations

from typing import Any, NamedTuple

from zoray.records import ConfigError

NAMED = 3  # further places of a kind that a message names


class RowPlace(NamedTuple):
    """Where an example comes from, for messages: a row, and the columns that its prompt is made of."""

    row: Any
    columns: tuple[str, ...]

    def __str__(self) -> str:
        names = " and ".join(map(repr, self.columns))
        return f"{self.row}, column{'s' * (len(self.columns) > 1)} {names}" if names else str(self.row)


class WrongRow(ConfigError):
    """A row that can't be used.

    Args:
        where: "FILE, line N".
        what: what is wrong with it, in the same words for all rows of the kind.
        rest: what this row has, and what to do.
        kind: replaces `what` for counting, if `what` is about this row alone.
    """

    def __init__(self, where: str, what: str, rest: str = "", kind: str = "") -> None:
        super().__init__(where, what, rest, kind)
        self.where, self.kind = where, kind or what

    def __str__(self) -> str:
        where, what, rest, _ = self.args
        return f"{where}: {what}{rest}"


class Faults:
    """The wrong rows of a pass: the first of each kind, how many there are, and where the next ones are."""

    def __init__(self) -> None:
        self._first: dict[str, WrongRow] = {}
        self._more: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, error: WrongRow) -> None:
        """Note a wrong row."""
        self._first.setdefault(error.kind, error)
        self._counts[error.kind] = self._counts.get(error.kind, -1) + 1
        if 0 < self._counts[error.kind] <= NAMED:
            self._more.setdefault(error.kind, []).append(_place(error.where, self._first[error.kind].where))

    def check(self) -> None:
        """Raise ConfigError if there are any: the first one, and how many others."""
        if not self._first:
            return
        (kind, first), *others = self._first.items()
        text, count = str(first), self._counts[kind]
        if count:
            named = self._more[kind]
            left = f" and {count - len(named):,} others" if count > len(named) else ""
            text += f" (and {count:,} more: {', '.join(named)}{left})"
        if others:
            rest = sum(self._counts[kind] + 1 for kind, _ in others)
            text += f" ({rest:,} wrong in other ways, the first in {_place(others[0][1].where, first.where)})"
        raise ConfigError(text)


def _place(where: str, first: str) -> str:
    """A place, without the file's name if `first` has named it."""
    file, _, line = where.rpartition(", ")
    return line if file and file == first.rpartition(", ")[0] else where
