"""Fields of requests: unions that report the intended branch's error, and fields that accept only no-op values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BeforeValidator, Discriminator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TEXT, LIST, TEXTS, TOKENS, LISTS, OBJECT, NUMBER = TAGS = (  # branches of unions; left out of an error's place
    "<text>", "<list>", "<texts>", "<tokens>", "<lists>", "<object>", "<number>",
)  # fmt: skip
TYPES = {str: TEXT, list: LIST, dict: OBJECT, int: NUMBER, float: NUMBER}


def by_type(expected: str, choose: Callable[[Any], str | None] | None = None) -> Discriminator:
    """A union's branch by the value's outer type: TEXT, LIST, OBJECT or NUMBER, or by `choose`.

    `expected`: the error's text if no branch fits.
    """
    return Discriminator(
        choose or (lambda value: TYPES.get(type(value))),
        custom_error_type="kind",
        custom_error_message=f"expected {expected}",
    )


def only(*harmless: Any, why: str) -> BeforeValidator:
    """For a field without meaning here: values that ask for nothing pass (as does null), others are refused."""

    def check(value: Any) -> None:
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            said = " or ".join((*(json.dumps(one) for one in harmless), "nothing"))
            raise wrong(f"{why}: expected {said}")

    return BeforeValidator(check)


def wrong(said: str) -> PydanticCustomError:
    """A field's error with this text."""
    return PydanticCustomError("wrong", "{said}", {"said": said})


def place(loc: Sequence[str | int]) -> str:
    """An error's place in the form of OpenAI's API: messages[0].content."""
    where = ""
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part not in TAGS and part != "[key]":
            where += f".{part}" if where else part
    return where[:200]


def told(error: Mapping[str, Any]) -> str:
    """The text of a pydantic error."""
    numbers = error.get("ctx") or {}
    if error["type"] in ("too_long", "too_short"):
        most = error["type"] == "too_long"
        bound = f"at most {numbers['max_length']}" if most else f"at least {numbers['min_length']}"
        got = numbers.get("actual_length")
        return f"expected {bound} of them; got {'more' if got is None else got}"
    said = str(error["msg"]).removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            return "this server knows no such field here; leave it out, or see /openapi.json for its name"
        case "string_unicode":
            return "it holds half a character; write whole characters, in UTF-8"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{said}; got {error['input']}"
    return said
