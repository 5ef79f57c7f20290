"""Fields of requests: unions with the error of the branch that was meant, and fields that may ask for nothing only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BeforeValidator, Discriminator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TEXT, LIST, TEXTS, TOKENS, LISTS, OBJECT, NUMBER = TAGS = (  # branches of unions; no part of where an error is
    "<text>", "<list>", "<texts>", "<tokens>", "<lists>", "<object>", "<number>",
)  # fmt: skip
TYPES = {str: TEXT, list: LIST, dict: OBJECT, int: NUMBER, float: NUMBER}


def by_type(expected: str, choose: Callable[[Any], str | None] | None = None) -> Discriminator:
    """A union's branch by the outer type of what came: TEXT, LIST, OBJECT or NUMBER, or what `choose` says.

    `expected` is what to say where there is none.
    """
    return Discriminator(
        choose or (lambda value: TYPES.get(type(value))),
        custom_error_type="kind",
        custom_error_message=f"expected {expected}",
    )


def only(*harmless: Any, why: str) -> BeforeValidator:
    """Of a field that has no meaning here: values that ask for nothing pass (as does null), others are refused."""

    def check(value: Any) -> None:
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            said = " or ".join((*(json.dumps(one) for one in harmless), "nothing"))
            raise wrong(f"{why}: expected {said}")

    return BeforeValidator(check)


def wrong(said: str) -> PydanticCustomError:
    """An error of a field, in these words."""
    return PydanticCustomError("wrong", "{said}", {"said": said})


def place(loc: Sequence[str | int]) -> str:
    """Where an error is, as OpenAI's API has it: messages[0].content."""
    where = ""
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part not in TAGS and part != "[key]":
            where += f".{part}" if where else part
    return where[:200]


def told(error: Mapping[str, Any]) -> str:
    """What pydantic has found wrong."""
    numbers = error.get("ctx") or {}
    if error["type"] in ("too_long", "too_short"):
        most = error["type"] == "too_long"
        bound = f"at most {numbers['max_length']}" if most else f"at least {numbers['min_length']}"
        got = numbers.get("actual_length")
        return f"expected {bound} of them; got {'more' if got is None else got}"
    return str(error["msg"]).removeprefix("Value error, ")
