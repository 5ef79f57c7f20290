"""Messages of a chat from a cell: roles, contents, and other keys of a message.

Guarantees: no key of a message is dropped silently. `weight` decides whether a turn is learnt, keys in `ignored` are
left out, and all others go to the model's chat template, which is checked for writing them (prompts.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

from zoray.records import Message
from zoray.records.overrides import setting
from zoray.tasks.file.rows.faults import WrongRow
from zoray.tasks.file.rows.strict_json import parse

CHAT_ROLES = ("system", "user", "assistant", "tool")
CALLS = ("tool_calls", "function_call")  # what an assistant may write instead of text
DEEPEST = 100  # levels of nested lists and objects in a cell
SHOWN = 80  # characters of a cell in a message


def turns(value: Any, column: str, where: Any, ignored: Collection[str] = ()) -> tuple[list[Message], list[int]]:
    """The messages that a cell holds as a list or as JSON, and the numbers, from 0, of those with weight 0.

    Space around an assistant's text is dropped.

    Raises:
        WrongRow: there are no messages, or one is wrong, which is named by its number.
    """
    if isinstance(value, str):
        try:
            value = parse(value)
        except (ValueError, RecursionError) as error:
            at = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise WrongRow(
                where,
                f"column {column!r} must hold a JSON list of messages",
                f"; got {shown(value)}, which is no JSON{at} ({error}). "
                'Write [{"role": "user", "content": "..."}, ...]',
            ) from error
    if not isinstance(value, list) or not value:
        raise WrongRow(
            where,
            f"column {column!r} must hold a list of messages",
            f'; got {shown(value)}. Write [{{"role": "user", "content": "..."}}, ...]',
        )
    found, silent = list[Message](), list[int]()
    for number, turn in enumerate(value, start=1):
        if isinstance(turn, dict) and len(turn) == 2:  # role and content, as nearly all have
            role, content = turn.get("role"), turn.get("content")
            if role in CHAT_ROLES and isinstance(content, str):
                if role == "assistant":
                    content = content.strip()
                if content or role != "assistant":
                    if not content.isascii():
                        check_whole(content, column, where)
                    found.append(Message(role, content))
                    continue
        message, learnt = _turn(turn, _Here(where, column, number), ignored)
        check_whole(turn, column, where)
        found.append(message)
        if not learnt:
            silent.append(number - 1)
    return found, silent


class _Here(NamedTuple):
    """A message in a cell, for errors."""

    where: Any
    column: str
    number: int

    def wrong(self, about: str, rest: str) -> WrongRow:
        """An error about the message; messages with errors about the same thing are counted together."""
        return WrongRow(
            self.where, f"column {self.column!r}, message {self.number}", rest, f"column {self.column!r}: {about}"
        )


def tools(value: Any, where: Any) -> tuple[Message, ...]:
    """The value of the column `tools`, as a message of that role; nothing if it is empty."""
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):  # text that is not JSON is refused below
            value = parse(value)
    if not value or value != value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise WrongRow(
            where,
            "column 'tools' must hold a list of JSON objects",
            f"; got {shown(value)}. Write them as the model's chat template wants them, or leave the column out: "
            f"{setting('task.ignore', ['tools'])}",
        )
    check_whole(value, "tools", where)
    return (Message("tools", json.dumps(_filled(value), ensure_ascii=False)),)


def check_whole(value: Any, column: str, where: Any, depth: int = 0) -> None:
    """Refuse half a character, which JSON can spell and no tokenizer can read, anywhere in a cell."""
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise WrongRow(
                where,
                f"column {column!r} holds half a character",
                f", {value[error.start]!r} (character {error.start + 1}). Write whole characters, in UTF-8",
            ) from None
    elif isinstance(value, list | dict):
        if depth > DEEPEST:
            what = f"column {column!r} holds more than {DEEPEST} lists and objects within each other"
            raise WrongRow(where, what, ". Remove the row")
        for inner in value if isinstance(value, list) else (*value, *value.values()):
            check_whole(inner, column, where, depth + 1)


def shown(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _turn(turn: Any, here: _Here, ignored: Collection[str]) -> tuple[Message, bool]:
    if not isinstance(turn, dict) or "role" not in turn or ("content" not in turn and not _calls(turn)):
        got = f"the keys {', '.join(map(repr, turn))}" if isinstance(turn, dict) else shown(turn)
        raise here.wrong("keys", f" must have role and content; got {got}. Rename from and value, if it has those")
    role, more = turn["role"], {key: value for key, value in turn.items() if key not in ("role", "content", "weight")}
    if role not in CHAT_ROLES:
        roles = ", ".join(CHAT_ROLES[:-1])
        raise here.wrong("role", f": role must be {roles}; got {shown(role)}. Rename or remove it")
    content = _content(turn.get("content"), here)
    if role == "assistant":
        content = content.strip() if isinstance(content, str) else "" if _calls(turn) else content
    if not isinstance(content, str) or (role == "assistant" and not content and not _calls(turn)):
        raise here.wrong("text", f": content must be text; got {shown(turn.get('content'))}. Complete or remove it")
    more = {str(key): _called(value) for key, value in _filled(more).items() if key not in ignored}
    text = json.dumps(more, ensure_ascii=False, default=str) if more else ""
    return Message(role, content, text), _weight(turn.get("weight"), here)


def _calls(turn: dict[str, Any]) -> bool:
    return turn.get("role") == "assistant" and any(turn.get(key) for key in CALLS)


def _weight(weight: Any, here: _Here) -> bool:
    if weight is None or (isinstance(weight, bool | int | float) and weight in (0, 1)):
        return weight is None or bool(weight)
    raise here.wrong("weight", f": weight must be 0 (not learnt) or 1; got {shown(weight)}. Round it, or remove it")


def _content(content: Any, here: _Here) -> Any:
    """A content that is a list of parts, as one text: each part is on its own line, as servers join them."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    texts = []
    for number, part in enumerate(content, start=1):
        known = _filled(part)
        if (
            set(known) - {"type", "text"}
            or known.get("type", "text") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise here.wrong(
                "parts",
                f', part {number}: expected {{"type": "text", "text": "..."}}; got {shown(part)}. zoray takes text '
                "only; remove the part or the row",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _filled(value: Any) -> Any:
    """A value without its empty parts: tables give every row the keys of all rows."""
    if isinstance(value, dict):
        kept = {key: _filled(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None and inner != [] and inner != ""}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _called(value: Any) -> Any:
    """Calls with objects as arguments, which templates write; OpenAI's API has them as JSON within a text."""
    if isinstance(value, list):
        return [_called(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {key: _called(inner) for key, inner in value.items()}
    if isinstance(text := found.get("arguments"), str):
        try:
            inner = json.loads(text)
        except (ValueError, RecursionError):
            return found
        found["arguments"] = inner if isinstance(inner, dict) else text
    return found
