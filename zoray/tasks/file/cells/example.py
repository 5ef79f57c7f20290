"""From a row's cells to an example.

Guarantees: a cell that is empty, has the wrong type, is no chat, or holds half a character is refused, with the row's
place and the column's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoray.records import Example, Facts, Marked, Message, settled
from zoray.tasks.file.cells import messages
from zoray.tasks.file.cells.labels import label_text, look, plain_form, spellings
from zoray.tasks.file.cells.messages import check_whole, shown
from zoray.tasks.file.cells.spacing import gap
from zoray.tasks.file.columns import Schema
from zoray.tasks.file.rows.faults import RowPlace, WrongRow
from zoray.tasks.file.rows.plain_text import GoesOn
from zoray.tasks.file.rows.strict_json import Twice, parse
from zoray.tasks.file.rows.text import Row

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Reader:
    """Makes examples of rows.

    Args:
        schema: which columns are what.
        chat: whether a plain text prompt is one message of a user.
        cells: whether a row's values are all text, so that a list comes as JSON in a cell.
        words: label -> label word, of a choice; None while they are still unknown.
        space: whether to put a space between a prompt and what follows; None to follow the script (spacing.py).
        control: whether control tokens in plain text count.
        turns: which of the assistant's turns in a chat are learnt, "all" or "last".
        ignore: keys of messages, and the column `tools`, that are left out.
    """

    schema: Schema
    chat: bool = False
    cells: bool = False
    words: Mapping[str, str] | None = None
    space: bool | None = None
    control: bool = False
    turns: str = "all"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_spellings", spellings(self.words or {}))

    def example(self, row: Row, where: Any) -> Example:
        """The example of a row; `where`, as text, is the row's place."""
        found = self._example(row, where)
        facts = Facts(found.data)
        facts.where = RowPlace(where, self._sources)
        found = replace(found, data=facts)
        if not self.control or not isinstance(found.prompt, str):
            return found
        options, answers = (tuple(map(settled, texts)) for texts in (found.options, found.answers))
        return replace(found, prompt=settled(found.prompt), options=options, answers=answers)

    @property
    def _sources(self) -> tuple[str, ...]:
        """The columns that a prompt is made of."""
        columns, template = self.schema.columns, self.schema.template
        if template is not None:
            return tuple(dict.fromkeys(template.columns))
        return (columns.get("messages") or columns["chosen"],)

    def _example(self, row: Row, where: Any) -> Example:
        kind = self.schema.kind
        if kind == "choice":
            assert self.words is not None
            label = list(self.words).index(self.label(row, where))
            return Example(self.prompt(row, where), tuple(self.words.values()), label)
        if kind == "chat":
            before, answer, untrained = self._turns(row, where)
            return Example(before, answers=(answer,), untrained=untrained)
        if kind == "preference":
            prompt, chosen, rejected = self._preference(row, where)
            return Example(prompt, (self._joined(prompt, chosen), self._joined(prompt, rejected)))
        if kind == "completion":
            prompt, answers = self._completion(row, where)
            texts = tuple(self._joined(prompt, answer) for answer in answers)
            silent, goes_on = _of_assistant(prompt), isinstance(row, GoesOn)
            return Example(prompt, answers=texts, data=plain(row), untrained=silent, goes_on=goes_on)
        return Example(self.prompt(row, where), data=plain(row))

    def scan(self, row: Row, where: Any) -> tuple[Prompt, str | None]:
        """Check every cell of a row; its prompt, and its label if it has one."""
        kind = self.schema.kind
        if kind == "choice":
            return self.prompt(row, where), self.label(row, where)
        if kind == "chat":
            return self._turns(row, where)[0], None
        if kind == "preference":
            return self._preference(row, where)[0], None
        for column, value in row.items():  # a reward gets all of them
            if not (type(value) is str and value.isascii()):
                check_whole(value, column, where)
        return self._completion(row, where)[0] if kind == "completion" else self.prompt(row, where), None

    def label(self, row: Row, where: Any) -> str:
        """The label of a row, as text."""
        column = self.schema.columns["label"]
        value = _filled(row, column, where)
        label = label_text(value)
        if isinstance(value, dict | list | bytes) or not label:
            raise WrongRow(where, f"column {column!r} must hold a label", f"; got {shown(value)}. Complete the row")
        check_whole(label, column, where)
        if self.words is None or label in self.words:
            return label
        spelled: Mapping[str, str] = getattr(self, "_spellings")  # noqa: B009
        if (known := spelled.get(plain_form(label))) is not None:
            return known
        if alike := [known for known in self.words if look(known) == look(label)]:
            how = "which only looks like it" if alike[0].lower() != label.lower() else "in other capitals"
            said = f"label {label!a} has no word; words has {alike[0]!a}, {how}. Write them alike"
        else:
            said = f"label {label!r} has no word; words has {list(self.words)}. Add it to words"
        raise WrongRow(where, said, kind="a label without a word")

    def prompt(self, row: Row, where: Any) -> Prompt:
        """The prompt of a row: its template filled, or its messages."""
        template = self.schema.template
        assert template is not None
        if template.texts == ("", ""):
            (column,) = template.columns
            value = row.get(column)
            listed = _json_list(value, dict, column, where) if self.cells and isinstance(value, str) else value
            if listed and isinstance(listed, list):
                turns = self._chat(listed, column, where)
                _ends(turns[-1], "user", column, where)
                return (*self._tools(row, where), *turns)
        if len(template.columns) == 1:
            values = [_text(row, template.columns[0], where)]
        else:
            pairs = zip(template.columns, template.optional, strict=True)
            values = [_optional(row, column, where, optional) for column, optional in pairs]
        if self.schema.kind == "choice":
            values = [value.strip() for value in values]
        text = template.fill(values)
        if self.schema.instruction or "system" in self.schema.columns or "history" in self.schema.columns:
            return self._instruction(row, text, where)
        return (*self._tools(row, where), Message("user", text)) if self.chat else text

    def _instruction(self, row: Row, text: str, where: Any) -> Prompt:
        """An instruction with what other columns say before it; in a chat without the line break at its end."""
        columns = self.schema.columns
        system = _optional(row, columns["system"], where) if "system" in columns else ""
        earlier = self._history(row, where) if "history" in columns else ()
        if not self.chat:
            if earlier:
                column = columns["history"]
                what = f"column {column!r} holds earlier turns, which a plain text has no place for"
                raise WrongRow(where, what, ". Set task.chat=true, or leave the column out")
            return f"{system}\n\n{text}" if system else text
        first = (*self._tools(row, where), *([Message("system", system)] if system else []))
        return (*first, *earlier, Message("user", text.rstrip("\n")))

    def _history(self, row: Row, where: Any) -> tuple[Message, ...]:
        """Earlier turns, [[what the user said, what was answered], ...]."""
        column = self.schema.columns["history"]
        value = row.get(column)
        listed = _json_list(value, list, column, where) or value if self.cells and isinstance(value, str) else value
        if not listed or (isinstance(listed, str) and listed.strip() in ("", "[]")):
            return ()
        pairs = listed if isinstance(listed, list) else [listed]
        if not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
            for pair in pairs
        ):
            what = f"column {column!r} must hold pairs of texts, [[asked, answered], ...]"
            raise WrongRow(where, what, f"; got {shown(value)}. Write them so, or leave the column out")
        check_whole(pairs, column, where)
        turns = [(Message("user", asked), Message("assistant", answered.strip())) for asked, answered in pairs]
        return tuple(turn for pair in turns for turn in pair)

    def _joined(self, prompt: Prompt, text: str) -> str:
        """A text that follows a prompt, with a space before it if one belongs there and the file has none."""
        return gap(prompt, text, self.space) + text if isinstance(prompt, str) else text

    def _turns(self, row: Row, where: Any) -> tuple[tuple[Message, ...], str, tuple[int, ...]]:
        """The messages before the last learnt answer, that answer, and which earlier turns are not learnt."""
        column = self.schema.columns["messages"]
        found, silent = messages.turns(_filled(row, column, where), column, where, self.ignore)
        _ends(found[-1], "assistant", column, where)
        while silent and (number := len(found) - 1) >= 0 and (found[-1].role != "assistant" or number in silent):
            found.pop()  # messages after the last learnt answer are of no use
        if not found:
            what = f"column {column!r}: all messages of the assistant have weight 0, which leaves nothing to learn"
            raise WrongRow(where, what, ". Remove the row, or a weight")
        *earlier, last = found
        if not earlier:
            raise WrongRow(where, f"column {column!r} begins with its answer", ". Put a question first")
        tools = self._tools(row, where)
        before, skipped = (*tools, *earlier), len(tools)
        if not silent and self.turns == "all":
            return before, _answer(last), ()
        kept = self.turns == "all"
        return before, _answer(last), tuple(n for n in _of_assistant(before) if not kept or n - skipped in silent)

    def _chat(self, value: Any, column: str, where: Any) -> tuple[Message, ...]:
        return tuple(messages.turns(value, column, where, self.ignore)[0])

    def _side(self, value: Any, column: str, where: Any) -> tuple[tuple[Message, ...], str]:
        """The messages before an answer, and the answer: a text, or the last message of a list."""
        if isinstance(value, list):
            found, silent = messages.turns(value, column, where, self.ignore)
            *before, last = found
            _ends(last, "assistant", column, where)
            if len(before) in silent:
                raise WrongRow(where, f"column {column!r}: its answer has weight 0", ". Remove the row, or the weight")
            return tuple(before), _answer(last)
        if not isinstance(value, str) or not value.strip():
            what = f"column {column!r} must hold text or messages"
            raise WrongRow(where, what, f"; got {shown(value)}. Remove the row")
        check_whole(value, column, where)
        return (), value

    def _tools(self, row: Row, where: Any) -> tuple[Message, ...]:
        """The tools that a chat's model may call, from the column `tools`."""
        return () if "tools" in self.ignore else messages.tools(row.get("tools"), where)

    def _completion(self, row: Row, where: Any) -> tuple[Prompt, tuple[str, ...]]:
        prompt, column = self.prompt(row, where), self.schema.columns["completion"]
        value = _filled(row, column, where)
        if isinstance(value, str) and self.cells:
            value = _json_list(value, str, column, where) or _json_list(value, dict, column, where) or value
        if isinstance(value, list) and value and isinstance(value[0], dict):
            before, text = self._side(value, column, where)
            if before:
                raise WrongRow(
                    where,
                    f"column {column!r} must hold one message of the assistant's",
                    f"; got {len(before) + 1}. Give the others in the prompt, or the whole chat in a column messages",
                )
            return _as_chat(prompt), (text,)
        answers = value if isinstance(value, list) else [value]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise WrongRow(
                where,
                f"column {column!r} must hold text, or a list of texts that are all right",
                f"; got {shown(value)}. Complete the row, or write numbers in quotes",
            )
        check_whole(answers, column, where)
        return prompt, tuple(answers)

    def _preference(self, row: Row, where: Any) -> tuple[Prompt, str, str]:
        names = [self.schema.columns[role] for role in ("chosen", "rejected")]
        values = [_filled(row, name, where) for name in names]
        if self.cells:
            pairs = zip(values, names, strict=True)
            values = [_json_list(value, dict, name, where) or value for value, name in pairs]
        (before, chosen), (also, rejected) = (self._side(*pair, where) for pair in zip(values, names, strict=True))
        if before != also:
            raise WrongRow(
                where,
                f"columns {names[0]!r} and {names[1]!r} must be answers to the same messages",
                "; they differ before the last one. Cut both chats where they part",
            )
        if chosen.strip() == rejected.strip():
            raise WrongRow(where, f"columns {names[0]!r} and {names[1]!r} hold the same text", ". Remove the row")
        if before:
            _ends(before[-1], "user", names[0], where)
        if self.schema.template is None:
            if not before:
                raise WrongRow(
                    where,
                    f"no prompt: no column has it, and column {names[0]!r} holds no messages before the answer",
                    ". Add a column prompt, or name it: task.prompt_column=...",
                )
            return (*self._tools(row, where), *before), chosen, rejected
        prompt = self.prompt(row, where)
        if before:
            asked = tuple(turn for turn in _as_chat(prompt) if turn.role != "tools")
            if [_bare(turn) for turn in before[-len(asked) :]] != [_bare(turn) for turn in asked]:
                raise WrongRow(
                    where,
                    f"the messages of column {names[0]!r} before the answer must be the prompt's",
                    f"; got {shown(before[-1].content)} for {shown(asked[-1].content)}. Give only answers there",
                )
            return (*self._tools(row, where), *before), chosen, rejected
        return (_as_chat(prompt) if any(isinstance(value, list) for value in values) else prompt), chosen, rejected


def plain(value: Any) -> Any:
    """A value as JSON has it; other types become text, bytes are left out."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items() if not isinstance(inner, bytes)}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value if not isinstance(inner, bytes)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _filled(row: Row, column: str, where: Any) -> Any:
    value = row.get(column)
    if value is None or value != value:  # some tables write nan for an empty cell
        has = [str(key) for key, value in row.items() if value is not None]
        raise WrongRow(where, f"no value for column {column!r}", f"; the row has {has}. Complete the row, or remove it")
    return value


def _text(row: Row, column: str, where: Any, advice: str = "Remove the row") -> str:
    value = _filled(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise WrongRow(where, f"column {column!r} must hold text", f"; got {shown(value)}. {advice}")
    check_whole(value, column, where)
    return value


def _optional(row: Row, column: str, where: Any, optional: bool = True) -> str:
    """The text of one of several cells; an optional one may be empty."""
    if not optional:
        return _text(row, column, where, f"Remove the row, or write {{{column}?}} in task.template if it may be empty")
    value = row.get(column)
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return "" if empty else _text(row, column, where)


def _answer(message: Message) -> str:
    """An assistant's text, with the other keys of its message."""
    return Marked(message.content, more=message.more) if message.more else message.content


def _of_assistant(prompt: Prompt) -> tuple[int, ...]:
    """The numbers of the assistant's messages in a prompt."""
    if isinstance(prompt, str):
        return ()
    return tuple(number for number, message in enumerate(prompt) if message.role == "assistant")


def _ends(last: Message, role: str, column: str, where: Any) -> None:
    if last.role != role:
        raise WrongRow(
            where,
            f"column {column!r} must end in a message of the {role}",
            f"; got one of the {last.role}. Remove what follows the last {role} message",
        )


def _as_chat(prompt: Prompt) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _bare(turn: Message) -> Message:
    return Message(turn.role, turn.content.strip())


def _json_list(text: str, kind: type, column: str, where: Any) -> list[Any]:
    """The items of a cell that holds a JSON list of them; none for any other text."""
    if not text.strip().startswith("["):
        return []
    try:
        items = parse(text)
    except Twice as error:
        raise WrongRow(where, f"column {column!r}: {error}", ". Leave one out") from None
    except (ValueError, RecursionError):
        return []
    return items if isinstance(items, list) and all(isinstance(item, kind) for item in items) else []
