"""Settings as typed on a command line: key=value in Hydra's grammar, quoted for the shell.

Guarantees: what `setting` prints can be pasted into bash, and Hydra reads exactly the intended value.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from zoray.records import ConfigError

WORD = re.compile(r"[A-Za-z_./][\w./-]*", re.A)  # text that needs no quotes in Hydra
NO_WORDS = ("null", "true", "false", "nan", "inf")  # in either case
KEY = re.compile(r"[A-Za-z_][\w-]*|-?(0|[1-9][0-9]*)", re.A)  # of a mapping; Hydra does not allow quotes there
ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
BREAKS = {shown[1]: real for real, shown in ESCAPES.items()}
WRITTEN = re.compile(r"\\(\\*)([ntr])")


def setting(key: str, value: Any) -> str:
    """`key=value`, for pasting into bash; a value is text, a number, true, false, null, a list or a mapping."""
    return shlex.quote(f"{key}={value_of(value)}")


def value_of(value: Any) -> str:
    """The part after the = in Hydra's grammar. A mapping whose keys the grammar can't hold becomes JSON text."""
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        return value if WORD.fullmatch(value) and value.lower() not in NO_WORDS else _quoted(_escaped(value))
    if isinstance(value, Mapping):
        if all(KEY.fullmatch(key := str(known)) and key.lower() not in NO_WORDS for known in value):
            return f"{{{', '.join(f'{key}: {_item(item)}' for key, item in value.items())}}}"
        text = json.dumps(dict(value), ensure_ascii=False)
        clear = text.isprintable() and unicodedata.is_normalized("NFC", text)  # else a terminal may change it
        return _quoted(_escaped(text if clear else json.dumps(dict(value))))
    return f"[{', '.join(map(_item, value))}]" if isinstance(value, Sequence) else value_of(str(value))


def mapping_of(text: str) -> dict[str, str] | None:
    """A mapping written as text, in JSON or as YAML's {key: value}, with text for values; None for any other text."""
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        try:
            found = yaml.load(text, Loader=yaml.BaseLoader)  # which does not read `yes` or `no` as a truth value
        except (yaml.YAMLError, ValueError, RecursionError):
            return None
    plain = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return {str(key): value for key, value in found.items()} if plain else None


def unescaped(text: str) -> str:
    r"""The text that a command line means: \n, \t and \r are escapes as in a program, and \\n is \n itself."""
    return WRITTEN.sub(lambda found: found[1] + found[2] if found[1] else BREAKS[found[2]], text)


def check_whole(text: str, where: str) -> None:
    """Raise ConfigError for text that no UTF-8 can hold: half a character, or bytes of another encoding."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} holds half a character, {text[error.start]!r} (character {error.start + 1}). Write whole "
            "characters, in UTF-8"
        ) from None


def _item(value: Any) -> str:
    """A value inside a list or mapping, where text is always quoted."""
    return _quoted(_escaped(value)) if isinstance(value, str) else value_of(value)


def _escaped(text: str) -> str:
    """The inverse of `unescaped`."""
    text = WRITTEN.sub(lambda found: "\\" + found[0], text)
    return re.sub(r"(?<!\\)[\n\t\r]", lambda found: ESCAPES[found[0]], text)


def _quoted(text: str) -> str:
    """The text within double quotes, with ${...} escaped, which OmegaConf would interpolate."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    ending = len(text) - len(text.rstrip("\\"))
    return '"' + text + "\\" * ending + '"'
