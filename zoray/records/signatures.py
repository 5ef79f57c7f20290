"""A component's signature is its config's schema: plain settings are checked against it before the component is built.

Every key must be a parameter of the class that `_target_` names, and every value of the annotated type, so that a slip
never becomes a truthy string or a folder called "None". The component checks ranges and names itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from zoray.records import ConfigError
from zoray.records.overrides import setting

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def check_signature(settings: Any, where: str) -> None:
    """Raise ConfigError unless every setting is a parameter of the component's signature and has its type."""
    if not isinstance(settings, Mapping) or "_target_" not in settings:
        raise ConfigError(f"expected {where} to be a component's settings; got {settings!r}. Set {where}.KEY=...")
    module, _, name = str(settings["_target_"]).rpartition(".")
    try:
        types = get_type_hints(getattr(import_module(module), name).__init__)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"expected {where}._target_ to name a class; got {module}.{name} ({error})") from None
    types.pop("return", None)
    for key, value in settings.items():
        if key != "_target_" and key not in types:
            raise unknown_key(f"{where}.{key}", key, where, list(types))
        inner = value if isinstance(value, Mapping) else {}
        for name, item in inner.items():
            if isinstance(item, Mapping) and "_target_" in item:
                check_signature(item, f"{where}.{key}.{name}")
        if "_target_" in inner:
            check_signature(value, f"{where}.{key}")
        elif key != "_target_" and not _fits(value, types[key]):
            quote = f". Write {setting(f'{where}.{key}', _typed(value))} for text" if _fits("", types[key]) else ""
            raise ConfigError(f"expected {where}.{key} to be {_words(types[key])}; got {value!r}{quote}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value has an annotated type; a whole number is a number too, true and false are not numbers."""
    parts = get_args(kind)
    if get_origin(kind) in (UnionType, Union):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


def _typed(value: Any) -> str:
    """What was typed for a value, if text was meant: {text} is read as a mapping."""
    return f"{{{', '.join(map(str, value))}}}" if isinstance(value, Mapping) else str(value)


def _words(kind: Any) -> str:
    """An annotated type in words."""
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(dict.fromkeys(_words(part) for part in get_args(kind)))  # each once, in order
    if get_origin(kind) in (tuple, list, Sequence):
        return f"a list, each item {_words(get_args(kind)[0])}"
    return WORDS.get(
        kind, "a component {_target_: ..., key: value}" if is_dataclass(kind) else "a mapping {key: value}"
    )


def unknown_key(key: str, part: str, parent: str, known: list[str]) -> ConfigError:
    """The error for an unknown `part` of the dotted `key`; it lists what the `parent` has instead."""
    names = ", ".join(known) or "no keys"
    where = f"{parent} has {names}" if parent else f"the keys are {names}"
    return ConfigError(f"unknown config key {key!r}; {where}{did_you_mean(part, known)}")


def did_you_mean(word: str, known: list[str]) -> str:
    """The nearest known word, as a sentence to append; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f". Did you mean {close[0]}?" if close else ""


def in_quotes(value: str) -> str:
    """Text as a value of Hydra's grammar, with quotes and the backslashes before them escaped."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"


def record(component: Any) -> Any:
    """A component as plain JSON values: its class name and its fields; components inside it likewise."""
    if is_dataclass(component) and not isinstance(component, type):
        inner = {field.name: record(getattr(component, field.name)) for field in fields(component)}
        return {"name": type(component).__name__, **inner}
    if isinstance(component, Mapping):
        return {str(key): record(value) for key, value in component.items()}
    return [record(item) for item in component] if isinstance(component, (list, tuple)) else component
