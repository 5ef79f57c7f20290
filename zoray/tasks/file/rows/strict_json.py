"""JSON in which each key of an object comes once: Python's own reader would silently take the last of two."""

from __future__ import annotations

import json
from typing import Any


class Twice(ValueError):
    """A JSON object has a key more than once."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise Twice(f"expected each key once; got {', '.join(map(repr, twice))} twice")
    return found


DECODER: Any = json.JSONDecoder(object_pairs_hook=_once)
parse = DECODER.decode
BLANK = ("\n", "", "\r\n")


def parse_line(text: str) -> Any:
    """The value of a line. The scanner is asked directly, which saves what `json.loads` does around it.

    Raises:
        Twice: a key comes twice.
        ValueError, RecursionError: as `json.loads`.
    """
    try:
        value, end = DECODER.scan_once(text, 0)
    except StopIteration as error:  # white space or a byte order mark first, or no JSON
        stripped = text.strip("\ufeff \t\r\n")
        if stripped != text:
            return parse_line(stripped)
        raise json.JSONDecodeError("Expecting value", text, error.value) from None
    return value if text[end:] in BLANK else parse(text)
