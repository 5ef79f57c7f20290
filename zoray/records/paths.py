"""Paths in a setting or a file of settings, which no shell has expanded.

A run keeps the absolute paths of what it reads, so that it can go on from any working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from zoray.records import ConfigError

VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{\w+\})(/|$)")


def user_path(path: object) -> Path:
    """The path, with a leading `~` or `~user` expanded as in a shell.

    Raises:
        ConfigError: the user or the home is unknown; or the path begins with a variable that the shell did not expand,
            and no file has that name.
    """
    given = Path(str(path))
    if VARIABLE.match(str(path)) and not Path(name := given.parts[0]).exists():
        raise ConfigError(
            f"expected a path; got {str(path)!r}, in which the shell did not expand {name}. Use double quotes, or in "
            f"a file of settings ${{oc.env:{name.strip('${}')}}}"
        )
    try:
        return given.expanduser()
    except RuntimeError:  # Python's message says no more
        raise ConfigError(
            f"expected a path; got {str(path)!r}; the home of {given.parts[0]} is unknown. Write the whole path, "
            "or set HOME"
        ) from None


LOCAL = re.compile(r"[/.~].*|.*\.(csv|tsv|jsonl?|parquet|txt|md|py)")  # never the name of a Hub model or a package


def absolute_paths(settings: Any, at: Path) -> Any:
    """Plain settings with absolute paths for all files and folders that exist.

    Paths are the values of `path` (of models and tasks), `function` (path/to/file.py:name) and `schema`, at any depth.

    Args:
        settings: mappings, lists and plain values; not changed.
        at: the folder that relative paths start from.
    """
    if isinstance(settings, list):
        return [absolute_paths(item, at) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: _absolute(key, value, at) if isinstance(value, str) else absolute_paths(value, at)
        for key, value in settings.items()
    }


def _absolute(key: object, value: str, at: Path) -> str:
    place, rest = _place(key, value)
    return value if place is None or not _there(at / user_path(place)) else f"{at / user_path(place)}{rest}"


def _place(key: object, value: str) -> tuple[str | None, str]:
    """The path in a setting's value, if it can have one, and what follows it."""
    if key == "function" and (value.rpartition(":")[0].endswith(".py") or "/" in value):
        return value.rpartition(":")[0], f":{value.rpartition(':')[2]}"
    return (value if key == "path" or (key == "schema" and value.endswith(".json")) else None), ""


def _there(path: Path) -> bool:
    """Whether a path, or a pattern such as data/*.csv, names anything."""
    return path.exists() or (any(mark in str(path) for mark in "*?[") and bool(glob(str(path), recursive=True)))


def missing_paths(settings: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of settings that name missing files or folders."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        name = f"{where}.{key}" if where else str(key)
        place = _place(key, value)[0] if isinstance(value, str) else None
        if place is not None and LOCAL.fullmatch(place) and not _there(user_path(place)):
            yield name, value
        yield from missing_paths(value, name)


def agree_but_for_places(found: Any, value: Any, key: object = None) -> bool:
    """Whether a journal's value equals this run's, ignoring the folders of files of the same name.

    A setting that the journal's version of zoray did not have yet counts as its default.
    """
    if isinstance(found, dict) and isinstance(value, dict):
        return all(name in value and agree_but_for_places(known, value[name], name) for name, known in found.items())
    if isinstance(found, str) and isinstance(value, str) and _place(key, found)[0] is not None:
        return found.rpartition("/")[2] == value.rpartition("/")[2]
    return found == value
