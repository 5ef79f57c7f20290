"""Rewrites a client's JSON schema into one that the engine's grammar enforces: pydantic, zod and OpenAI's write more.

Guarantees: the result allows no answer that the schema forbids; its grammar is no larger than the written schema,
except for what MOST_COUNT and MOST_LENGTHS allow; a ValueError names what can't be enforced. No schema that passes
makes vLLM choose another backend than xgrammar: the first request's backend serves all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from zoray.serving.http.patterns import LOOKAROUND, MOST_TIMES, check_pattern

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_SCHEMA = 16_384  # characters, without annotations and with each $ref replaced by its target
MOST_WRITTEN = 131_072  # characters as received
DEEPEST = 12  # levels
MOST_REFS = 32  # length of a chain of $refs
MOST_COUNT = 10_000  # of characters or items
MOST_LENGTHS = 12  # different text lengths and patterns: each takes up to a second or two to prepare
LARGEST = 2**53  # largest bound of a number
NOTES = {  # keywords that restrict nothing (JSON Schema 2020-12, sections 8 and 9 of Validation, 8 of Core)
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$id", "$defs", "definitions", "discriminator", "contentEncoding", "contentMediaType", "contentSchema",
}  # fmt: skip
FORMATS = (
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
ANY_TEXT = {"password", "binary", "byte", "path", "file-path", "directory-path", "regex"}  # formats of any text
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
BOUNDS = {  # keyword -> the types it applies to
    **dict.fromkeys(OF_NUMBERS, ("integer", "number")),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), ("string",)),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), ("array",)),
    **dict.fromkeys(("properties", "required", "additionalProperties", "minProperties", "maxProperties"), ("object",)),
}
INSTEAD = {  # advice for keywords that no grammar here enforces
    "uniqueItems": "take a list, and check the answer",
    "multipleOf": "check the answer",
    "not": "list what is allowed: enum or anyOf",
    "patternProperties": "name the properties",
    "propertyNames": "name the properties",
    "nullable": 'take {"anyOf": [..., {"type": "null"}]}',
    "if": "take anyOf", "then": "take anyOf", "else": "take anyOf",
}  # fmt: skip
TYPES = {
    "string": str, "boolean": bool, "null": type(None), "object": dict, "array": list, "integer": int,
    "number": (int, float),
}  # fmt: skip


def enforced(schema: dict[str, Any]) -> dict[str, Any] | bool:
    """The schema for the grammar.

    Raises:
        ValueError: the schema is too large, refers to itself or outside itself, or has parts that are not enforced.
    """
    if len(json.dumps(schema)) > MOST_WRITTEN:
        raise ValueError(f"expected a schema of at most {MOST_SCHEMA:,} characters")
    return Grammar(schema).node(schema, ())


@dataclass
class Grammar:
    """The rewriting of one schema; `root` is the target of #/..."""

    root: dict[str, Any]
    spent: int = 0  # characters of the result
    lengths: set[Any] = field(default_factory=set)

    def node(self, schema: Any, path: tuple[str, ...], refs: tuple[str, ...] = (), depth: int = 1) -> Any:
        """A subschema at `path`, inside the targets of these `refs`."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict) or depth > DEEPEST:
            raise wrong(path, f"expected schemas that are objects, at most {DEEPEST} levels deep")
        schema, refs = self._plain(schema, path, refs)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._either(name, schema, path, refs, depth)
        for name in sorted(schema):
            if name not in BOUNDS and name not in ("type", "enum", "const"):
                raise wrong(path, f"{name[:50]!r} is not enforced here; {INSTEAD.get(name, 'leave it out')}")
        kinds = _kinds(schema, path)
        found: dict[str, Any]
        if "enum" in schema or "const" in schema:
            found = _values(schema, kinds, path)
        else:
            found = {} if "type" not in schema else {"type": schema["type"]}
            for name, about in BOUNDS.items():
                if name not in schema:
                    continue
                if not kinds and about != ("object",) and name != "items":
                    raise wrong(path, f"expected a type beside {name}")
                if not kinds or set(kinds) & set(about):  # else it applies to no value that fits
                    found[name] = schema[name]
            self._bounded(found, path)
        self.spent += 2 + len(json.dumps({key: found[key] for key in found if key not in ("properties", "items")}))
        if self.spent > MOST_SCHEMA:
            raise ValueError(f"expected a schema of at most {MOST_SCHEMA:,} characters, with $ref replaced")
        return found | self._within(found, kinds, path, refs, depth + 1)

    def _plain(self, schema: Any, path: tuple[str, ...], refs: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
        """The schema without annotations, and with $ref and an allOf of one replaced by their targets."""
        for _ in range(MOST_REFS):
            schema = {key: value for key, value in schema.items() if key not in NOTES and not key.startswith("x-")}
            if schema.get("uniqueItems") is False:
                del schema["uniqueItems"]
            name = "$ref" if "$ref" in schema else "allOf"
            if name not in schema:
                return schema, refs
            inner = schema.pop(name)
            if name == "$ref":
                if inner in refs or inner == "#":
                    raise wrong(
                        path,
                        f"{str(inner)[:100]!r} refers to itself: a recursive schema, which has no end, is not enforced "
                        "here; write out as many levels as you need",
                    )
                refs, inner = (*refs, inner), self._target(inner, path)
            elif not isinstance(inner, list) or len(inner) != 1:
                raise wrong(path, "an allOf of several is not enforced here; write them as one schema")
            else:
                inner = inner[0]
            if inner is True:
                continue
            if not isinstance(inner, dict):
                raise wrong(path, f"expected {name} to be of schemas that are objects")
            schema = _joined({k: v for k, v in inner.items() if k not in NOTES}, schema, path)
        raise wrong(path, f"expected at most {MOST_REFS} of $ref and allOf for one schema")

    def _target(self, pointer: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(pointer, str) or not pointer.startswith("#/"):
            raise wrong(path, f"expected $ref to a part of the schema itself (#/$defs/...); got {str(pointer)[:100]!r}")
        found: Any = self.root
        for part in pointer[2:].split("/"):
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                raise wrong(path, f"expected $ref to a part of the schema; there is no {pointer[:100]!r}")
            found = found[name]
        return found

    def _either(self, name: str, schema: dict[str, Any], path: tuple[str, ...], refs: Any, depth: int) -> Any:
        """The branches of an anyOf or oneOf, each joined with the keywords beside it."""
        branches = schema.pop(name)
        if not isinstance(branches, list) or not branches:
            raise wrong(path, f"expected {name} to be a list of schemas")
        told = [self._plain(one, path, refs) if isinstance(one, dict) else (one, refs) for one in branches]
        if name == "oneOf" and not _apart([one for one, _ in told], lambda one: self._plain(one, path, refs)[0]):
            raise wrong(path, "a oneOf whose schemas may fit the same answer is not enforced here; take anyOf, or give "
                              "each a property of its own `const`")  # fmt: skip
        if any(isinstance(one, dict) and set(_kinds(one, path)) & {"number", "integer"} for one, _ in told):
            told = [(one, own) for one, own in told if not _decimal(one)]  # the number's branch covers it
        found = []
        for (one, own), number in zip(told, range(len(told)), strict=True):
            both = _joined(one, schema, path) if isinstance(one, dict) else one
            found.append(self.node(both, (*path, f"{name}[{number}]"), own, depth + 1))
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _within(
        self, found: dict[str, Any], kinds: Any, path: tuple[str, ...], refs: Any, depth: int
    ) -> dict[str, Any]:
        """A schema's subschemas."""
        inner: dict[str, Any] = {}
        extra = found.get("additionalProperties")
        if extra is not None:
            inner["additionalProperties"] = self.node(extra, (*path, "additionalProperties"), refs, depth)
        if "properties" in found or found.get("required"):
            own = found.get("properties", {})
            if not isinstance(own, dict):
                raise wrong(path, "expected properties to be an object")
            inner["properties"] = {name: self.node(one, (*path, name), refs, depth) for name, one in own.items()}
            for name in found.get("required", ()):
                if name not in own:  # the grammar reads only `properties`
                    inner["properties"][name] = {} if extra is None else inner["additionalProperties"]
                if inner["properties"][name] is False:
                    raise wrong(path, f"expected required properties to be allowed; {name[:50]!r} is not")
        if "prefixItems" in found:
            if not isinstance(found["prefixItems"], list):
                raise wrong(path, "expected prefixItems to be a list")
            parts = enumerate(found["prefixItems"])
            inner["prefixItems"] = [self.node(one, (*path, f"[{k}]"), refs, depth) for k, one in parts]
        if "items" in found:
            inner["items"] = self.node(found["items"], (*path, "[]"), refs, depth)
        elif "array" in kinds and "prefixItems" not in found:
            inner["items"] = {}  # else the grammar would allow no item
        return inner

    def _bounded(self, found: dict[str, Any], path: tuple[str, ...]) -> None:
        """Raise ValueError unless a grammar of bounded size can enforce all bounds."""
        for low, high in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties")):
            for name in (low, high):
                value = found.get(name, 0)
                whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
                if not whole or not 0 <= value <= MOST_COUNT:
                    raise wrong(
                        path, f"expected {name} to be a whole number of at most {MOST_COUNT:,}; got {_shown(value)}"
                    )
                if name in found:
                    found[name] = int(value)
            if found.get(low, 0) > found.get(high, MOST_COUNT):
                raise wrong(path, f"expected {low} to be at most {high}; got {found[low]} and {found[high]}")
        if "required" in found:
            names = found["required"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise wrong(path, "expected required to be a list of names")
        if {"minProperties", "maxProperties"} & found.keys() and found.get("properties"):
            raise wrong(path, "minProperties and maxProperties are not enforced beside properties; use required")
        self._text(found, path)
        _numbers(found, path)

    def _text(self, found: dict[str, Any], path: tuple[str, ...]) -> None:
        form = found.get("format")
        if form in ANY_TEXT:
            del found["format"]
        elif form is not None and form not in FORMATS:
            known = ", ".join(FORMATS)
            raise wrong(path, f"the format {_shown(form)} is not enforced here; expected one of {known}, or none")
        shape = next((name for name in ("pattern", "format") if name in found), None)
        length = next((name for name in ("minLength", "maxLength") if name in found), None)
        if shape and length:
            how = r"say it in the pattern, as in ^\d{1,5}$" if shape == "pattern" else "leave it out"
            raise wrong(path, f"{length} is not enforced beside {shape}; {how}")
        if {"pattern", "format"} <= found.keys():
            raise wrong(path, "a pattern is not enforced beside a format; leave one of them out")
        if "pattern" in found:
            try:
                check_pattern(found["pattern"])
            except ValueError as error:
                raise wrong(path, str(error)) from None
        if shape == "pattern" or found.get("minLength", 0) > 1 or "maxLength" in found:
            self.lengths.add((found.get("pattern"), found.get("minLength"), found.get("maxLength")))
        if len(self.lengths) > MOST_LENGTHS:
            raise wrong(
                path,
                f"expected at most {MOST_LENGTHS} different lengths and patterns in a schema; got more. Take the same "
                "for several, or leave some out and check the answer",
            )
        _length_as_pattern(found)


def _length_as_pattern(found: dict[str, Any]) -> None:
    """Write bounds of a text's length as a pattern, where that can be prepared.

    The grammar's own bounds allow tabs and other control characters in the text, and the answer would not be JSON.
    """
    least, most = found.get("minLength", 0), found.get("maxLength")
    if {"minLength", "maxLength"} & found.keys() and max(least, most or 0) <= MOST_TIMES:
        for bound in ("minLength", "maxLength"):
            found.pop(bound, None)
        if least or most is not None:
            found["pattern"] = f"^.{{{least},{'' if most is None else most}}}$"


def wrong(path: tuple[str, ...], said: str) -> ValueError:
    """An error at a place in a schema."""
    where = ".".join(path).replace(".[", "[")[-150:]
    return ValueError(f"in {where}: {said}" if where else said)


def _numbers(found: dict[str, Any], path: tuple[str, ...]) -> None:
    """Raise ValueError unless some number is within the bounds; bounds of whole numbers are rounded to whole ones."""
    whole = "number" not in _kinds(found, path)
    for name in OF_NUMBERS:
        value = found.get(name, 0)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not fits or (value and abs(value) < 1e-4):  # the grammar knows no exponents
            raise wrong(
                path, f"expected {name} to be a number of 0.0001 to {LARGEST:,} or of its negative; got {_shown(value)}"
            )
        if name in found and whole:
            up = name in ("minimum", "exclusiveMaximum")
            found[name] = int(-(-value // 1) if up else value // 1)
    lows = [found[n] + (whole and n == "exclusiveMinimum") for n in ("minimum", "exclusiveMinimum") if n in found]
    highs = [found[n] - (whole and n == "exclusiveMaximum") for n in ("maximum", "exclusiveMaximum") if n in found]
    closed = whole or not {"exclusiveMinimum", "exclusiveMaximum"} & found.keys()
    if lows and highs and (max(lows) > min(highs) or (max(lows) == min(highs) and not closed)):
        raise wrong(path, "expected minimum and maximum to leave a number between them")


def _kinds(schema: dict[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """A schema's types; none if it names none."""
    given = schema.get("type", [])
    kinds = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else (given,)
    for kind in kinds:
        if not isinstance(kind, str) or kind not in TYPES:
            raise wrong(path, f"expected a type of {', '.join(TYPES)}; got {_shown(kind)}")
    return kinds


def _values(schema: dict[str, Any], kinds: tuple[str, ...], path: tuple[str, ...]) -> dict[str, Any]:
    """The values of an enum or a const that fit the schema's types; the grammar would allow all."""
    if others := sorted(set(schema) - {"enum", "const", "type"}):
        raise wrong(path, f"{others[0]} is not enforced beside enum or const; leave it out")
    values = schema.get("enum", [schema.get("const")])
    if not isinstance(values, list):
        raise wrong(path, "expected enum to be a list")
    if "const" in schema:
        values = [value for value in values if value == schema["const"] and type(value) is type(schema["const"])]
    fitting = [value for value in values if not kinds or any(_is(value, kind) for kind in kinds)]
    if not fitting:
        raise wrong(path, "expected enum and const to have a value of its type")
    return {"enum": fitting}


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _joined(one: dict[str, Any], other: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Two schemas that must both fit, as one."""
    if twice := sorted(key for key in one.keys() & other.keys() if one[key] != other[key]):
        raise wrong(
            path,
            f"{twice[0]} comes twice, in a schema and beside the $ref, allOf or anyOf that it is in; write it once",
        )
    return one | other


def _decimal(schema: Any) -> bool:
    """Whether a schema is for a decimal's text, which pydantic allows beside the number, with lookaheads as pattern."""
    return isinstance(schema, dict) and LOOKAROUND.search(str(schema.get("pattern", ""))) is not None


def _apart(branches: list[Any], plain: Callable[[Any], dict[str, Any]]) -> bool:
    """Whether no answer can fit two of the schemas: values or types differ, or those of a property in both do."""
    known: list[tuple[set[str], dict[str, set[str]]]] = []
    for one in branches:
        if not isinstance(one, dict):
            return False
        kinds = set(_kinds(one, ()))
        own, needed = one.get("properties"), one.get("required")
        consts = {"": only} if (only := _only(one)) else {}
        if isinstance(own, dict) and isinstance(needed, list):
            inner = {name: _only(plain(own[name])) for name in own if name in needed and isinstance(own[name], dict)}
            consts |= {f"/{name}": values for name, values in inner.items() if values}
        for others, other_consts in known:
            types = kinds and others and not kinds & others and not {"integer", "number"} <= kinds | others
            if not types and not any(not consts[name] & other_consts[name] for name in consts.keys() & other_consts):
                return False
        known.append((kinds, consts))
    return True


def _only(schema: dict[str, Any]) -> set[str] | None:
    """The values that fit, as JSON; None for any."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else None


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
