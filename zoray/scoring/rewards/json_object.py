"""A JSON object of a given schema, with partial credit on the way to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoray.records import ConfigError
from zoray.records.paths import user_path
from zoray.scoring.rewards.base import LIMIT, column

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SCHEMAS = Path(__file__).parent / "schemas"
BEGIN = re.compile(r'\{\s*["}]')
OUTSIDE = re.compile(r'"\$(?:dynamicR|r)ef": *"(?!#)[^"]*"')  # nothing is fetched from anywhere
TRIES = 20  # places where an object may begin
BEGINS, PARSES, ALONE, KEYS = 0.1, 0.3, 0.1, 0.5  # see json_schema


def json_schema(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    schema: Mapping[str, Any] | str,
    strict: bool = True,
    values: bool = False,
) -> float:
    """How far the completion is a JSON object that satisfies a schema:

        0.0  nothing begins like an object, with "{" and then a quote or "}"
        0.1  something does, but there is no whole object
        0.3  there is a whole object; the first counts
       +0.1  only spaces are around it, or not `strict`
       +0.5  x the share of required keys that it has with the right type
        1.0  the object satisfies the whole schema; `strict`: and nothing else is around it

    `schema` is a mapping, a .json file, or the name of one that comes with zoray (person). If it requires no key, all
    its properties count. With `values`, a key is right only if its value is the example's under that name.
    """
    validator, wanted = _validator(_key(schema))
    right = {key: column(example, key, "json_schema") for key in wanted} if values else {}
    text = completion[:LIMIT].strip()
    found = _first_object(text)
    if found is None:
        return BEGINS if BEGIN.search(text) else 0.0
    value, alone = found
    alone = alone or not strict
    keys = sum(_has(validator, value, key, right) for key in wanted)
    if alone and keys == len(wanted) and _satisfies(validator, value):
        return 1.0
    return PARSES + ALONE * alone + KEYS * keys / max(1, len(wanted))


def has_pattern(schema: Mapping[str, Any] | str) -> bool:
    """Whether the schema has regular expressions, which can run forever."""
    return "pattern" in _read(_key(schema))


def _first_object(text: str) -> tuple[dict[str, Any], bool] | None:
    """The first whole object, and whether it stands alone."""
    for count, begin in enumerate(BEGIN.finditer(text)):
        if count == TRIES:
            break
        try:
            value, end = DECODER.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            continue
        return value, begin.start() == 0 and end == len(text)
    return None


def _has(validator: Validator, value: Mapping[str, Any], key: str, right: Mapping[str, Any]) -> bool:
    """Whether a key is there with the right type, and value where that counts."""
    schema = validator.schema
    inner = schema.get("properties", {}).get(key) if isinstance(schema, Mapping) else None
    kinds = inner.get("type", []) if isinstance(inner, Mapping) else []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    typed = key in value and (not kinds or any(validator.is_type(value[key], kind) for kind in kinds))
    return typed and (key not in right or value[key] == right[key])


def _satisfies(validator: Validator, value: Mapping[str, Any]) -> bool:
    try:
        return validator.is_valid(value)
    except (ArithmeticError, ValueError, TypeError, RecursionError):  # numbers beyond float, deep objects
        return False


def _key(schema: Mapping[str, Any] | str) -> str:
    """The schema as text: a path or name, or the JSON itself."""
    try:
        return schema if isinstance(schema, str) else json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"expected schema to be plain JSON values; got {schema!r} ({error})") from None


@lru_cache(maxsize=64)
def _read(schema: str) -> str:
    """The schema's JSON."""
    if schema.lstrip().startswith("{"):
        return schema
    path = user_path(schema) if schema.endswith(".json") else SCHEMAS / f"{schema}.json"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(file.stem for file in SCHEMAS.glob("*.json")))
        raise ConfigError(
            f"expected schema to be a mapping, a .json file or one of: {names}; got {schema!r} ({error})"
        ) from None


@lru_cache(maxsize=64)
def _validator(schema: str) -> tuple[Validator, tuple[str, ...]]:
    """A checked schema as its validator, and the keys that count."""
    from jsonschema import Draft202012Validator, SchemaError  # takes 0.1 s, and most runs do without
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        parsed = json.loads(_read(schema))
        cls = validator_for(parsed, Draft202012Validator)
        cls.check_schema(parsed)
    except (ValueError, SchemaError, AttributeError, TypeError) as error:
        raise ConfigError(f"expected schema to be a JSON schema; got {schema[:200]!r}: {str(error)[:300]}") from None
    kinds = parsed.get("type", "object") if isinstance(parsed, dict) else ()
    if "object" not in ([kinds] if isinstance(kinds, str) else kinds):
        raise ConfigError(f"expected schema to describe an object; got {schema[:200]!r}")
    outside = OUTSIDE.search(json.dumps(parsed))
    if outside:
        raise ConfigError(f"expected schema to refer to nothing but parts of itself (#/$defs/...); got {outside[0]}")
    return cls(parsed, registry=Registry()), tuple(parsed.get("required") or parsed.get("properties", {}))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
