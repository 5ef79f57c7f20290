"""Turns prompts and continuations into tokens: plain text directly, a chat's messages by the model's own template.

Guarantees: prompt and continuation are tokenised together, as the model would read them; if a tokenizer merges across
their border, their common tokens are the prompt. A sequence over the limit loses its beginning, as in MeZO's own code,
or is refused by the caller (scoring/workload.py).
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from zoray.models.control import Control, shown
from zoray.records import ConfigError, Marked, Message, SettingError, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from zoray.records import Example

    Prompt = str | tuple[Message, ...]

AMBIENT = re.compile(r"\|\s*random\b|\blipsum\b")  # Jinja's sources of anything but the chat
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
PROBE = "zoray"  # a sample answer, to see how the template renders one


class Encoder:
    """A tokenizer with a limit.

    Args:
        tokenizer: from transformers; a chat needs one with a chat template.
        limit: the longest sequence that may reach the model, in tokens; None for no limit.
        cut: longer sequences lose their beginning; else they stay as they are.
        embeddings: number of tokens that the model has embeddings for; None if unknown.
        name: the model's name in messages.
        date: YYYY-MM-DD, today's date for chat templates; None for the real one, in UTC.
    """

    def __init__(
        self,
        tokenizer: Any,
        limit: int | None = None,
        cut: bool = False,
        embeddings: int | None = None,
        name: str = "the model",
        date: str | None = None,
    ) -> None:
        self.tokenizer, self.limit, self.cut = tokenizer, limit, cut
        self.control = Control(tokenizer, embeddings, name)
        self._now = clock_of(checked_date(date, "date"))
        self.shortened = 0  # sequences that lost their beginning
        self.literal, self._first_literal = 0, ""  # examples with control tokens in their text, and where the first is

    def note_literal(self, example: Example) -> None:
        """Count an example with control tokens in its text."""
        self.literal += 1
        if self.literal == 1:
            place = f"; the first in {example.where.row}" if example.where else ""  # in any of its columns
            plain = ". task.control_tokens=true makes them control tokens" if isinstance(example.prompt, str) else ""
            self._first_literal = f"{place}{plain}"

    def notes(self) -> list[str]:
        """Remarks on the texts so far, for the log."""
        if not self.literal:
            return []
        names = ", ".join(map(repr, sorted(self.control.hidden)[:5]))
        several = "examples have" if self.literal > 1 else "example has"
        return [f"{self.literal:,} {several} control tokens ({names}) as text, read as such{self._first_literal}"]

    def text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, up to where the model continues."""
        return shown(self._begun(prompt))

    def tokens(self, prompt: Prompt, room: int = 0) -> list[int]:
        """A prompt's tokens, with `room` below the limit for the model's completion."""
        if not isinstance(prompt, str):
            self.check_keys(prompt)
        return self._fit(self._ids(self._begun(prompt), prompt), room)[0]

    def continuation(self, prompt: Prompt, text: str) -> str:
        """The text as it follows the prompt; in a chat, with the template's end of turn."""
        return shown(self._following(prompt, text))

    def continued(
        self, prompt: Prompt, texts: Sequence[str], start: bool = False, ended: bool = True
    ) -> tuple[int, list[list[int]]]:
        """Tokens of the prompt followed by each text, and the number of tokens that all share with the prompt.

        With `start`, an empty prompt becomes the beginning-of-text token, or else the model's end of text. `ended`:
        with the tokens that the tokenizer appends to every text, if any.

        Raises:
            ConfigError: a text adds no token, or no token comes before it.
        """
        if not isinstance(prompt, str):
            for text in texts:
                self.check_keys(answered(prompt, text))
        before = self._begun(prompt)
        begun = self._ids(before, prompt)
        whole = [self._ids(before + self._following(prompt, text), prompt, ended) for text in texts]
        if start and not begun:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            mark = eos if bos is None else bos
            begun, whole = [mark], [[mark, *tokens] for tokens in whole]
        # A tokenizer may merge across the border: keep the common tokens.
        shared = min(_common_prefix(begun, tokens) for tokens in whole)
        for text, tokens in zip(texts, whole, strict=True):
            if len(tokens) == shared:
                raise ConfigError(f"option {text!r} adds no token to the prompt {shown(before)[-40:]!r}")
        if shared == 0:
            raise ConfigError(f"expected a prompt of at least one token; got {shown(before)!r}")
        return shared, whole

    def answer(self, prompt: Prompt, text: str, eos: bool | None) -> TokenSequence:
        """A prompt with an answer whose tokens are scored.

        `eos`: whether the model's end of text follows a plain answer; None: unless the answer ends in a line break.
        """
        end = self.tokenizer.eos_token_id
        shared, (tokens,) = self.continued(prompt, (self._with_end(text),), ended=False)
        ends = eos if eos is not None else not text.endswith("\n")
        if isinstance(prompt, str) and ends and end is not None and tokens[-1] != end:
            self.control.check([end])
            tokens = [*tokens, end]
        return self.sequence(tokens, range(shared, len(tokens)))

    def sequence(self, tokens: Sequence[int], targets: Iterable[int]) -> TokenSequence:
        """Tokens, of which those at the positions `targets` (ascending, from 1) are scored, summed in one output."""
        fitted, lost = self._fit(list(tokens), -1)
        places = np.array([place - lost for place in targets if place - lost >= 1], np.int64)
        return TokenSequence(
            tokens=np.array(
                fitted[: places[-1]], np.int32
            ),  # nothing after the last row is needed, nor is the last target
            rows=(places - 1).astype(np.int32),
            targets=np.array(fitted, np.int32)[places],
            outputs=np.zeros(len(places), np.int32),
            n_outputs=1,
        )

    def assistant_spans(
        self, messages: tuple[Message, ...], untrained: Collection[int] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """A whole chat as text, and the (begin, end) of each assistant's turn in it, including the end of turn.

        `untrained`: indices of messages to leave out. Control tokens in the messages are marked, see control.py.
        """
        self.check_keys(messages)
        whole, spans = self._render(messages), []
        for i, message in enumerate(messages):
            if message.role == "assistant" and i not in untrained:
                before = self._begun(messages[:i])
                turn = self._following(messages[:i], Marked(message.content, more=message.more))
                if not whole.startswith(before + turn):
                    raise ConfigError(
                        f"the model's chat template renders turn {i + 1} of a chat differently when more turns follow "
                        f"({shown(turn)[:60]!r}...), like templates that drop earlier thoughts: that turn can't be "
                        "trained. Set task.turns=last, which trains only the last answer"
                    )
                spans.append((len(before), len(before) + len(turn)))
        return whole, spans

    def tokens_in(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens of a rendered chat, and the positions of tokens that begin within one of the spans of characters."""
        tokens, places = self.control.placed(text)
        bounds = [(len(shown(text[:first])), len(shown(text[:last]))) for first, last in spans]
        inside = [k for k, (start, _) in enumerate(places) if any(first <= start < last for first, last in bounds)]
        return tokens, inside

    def stop_ids(self, stops: Sequence[str]) -> frozenset[int]:
        """Tokens that end a completion: the model's own end tokens, and all whose text holds one of `stops`."""
        ends = {self.tokenizer.eos_token_id} - {None}
        self.control.check(sorted(ends))
        ends |= self._ends_of_turns()
        if stops:
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            ends |= {i for i, text in enumerate(texts) if any(stop in text for stop in stops)}
        return frozenset(ends)

    def _ends_of_turns(self) -> set[int]:
        """The control token that ends an answer in the model's chat template, if there is one."""
        if not self.tokenizer.chat_template:
            return set()
        try:
            said = self._render((Message("user", "a"), Message("assistant", "b"))).rstrip("\n")
        except ConfigError:  # the template wants another order of roles; a task of chats will report it
            return set()
        return set(self.control.ids(said, False)[-1:]) & set(self.tokenizer.all_special_ids)

    def written(self, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """A completion as text, up to the first of `stops`, and whether it contains one."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
        return (text[: min(cuts)], True) if cuts else (text, False)

    def _begun(self, prompt: Prompt) -> str:
        """A prompt as the model reads it, with marks (control.py), up to where the model continues."""
        if isinstance(prompt, str):
            return self.control.hide(prompt)
        before = self._render(prompt, add_generation_prompt=True)
        return opening(before, self.tokenizer.eos_token, lambda: self._render((*prompt, Message("assistant", PROBE))))

    def _following(self, prompt: Prompt, text: str) -> str:
        """`continuation` with marks."""
        if isinstance(prompt, str):
            return self.control.hide(text)
        before, whole = self._begun(prompt), self._render(answered(prompt, text))
        if not whole.startswith(before):
            raise ConfigError(
                "the model's chat template does not begin an answer as it renders one: "
                f"{shown(before)[-40:]!r} is not in {shown(whole)[-80:]!r}. Take text prompts, or another model"
            )
        return whole[len(before) :].rstrip("\n")

    def _with_end(self, text: str) -> str:
        """Let the model's own end of text at the end of an answer, as some files have it, count as such."""
        end = self.tokenizer.eos_token
        if not end or not text.endswith(end) or isinstance(text, Marked) or text.count(end) > 1:
            return text
        if self.control.found(text.removesuffix(end)):
            return text
        return Marked(text, ((len(text) - len(end), len(text)),))

    def _ids(self, text: str, prompt: Prompt, ended: bool = False) -> list[int]:
        """Tokens of a text; adds special tokens unless a chat template has written them."""
        return self.control.ids(text, isinstance(prompt, str), ended)

    def _fit(self, tokens: list[int], room: int) -> tuple[list[int], int]:
        """Tokens within the limit, and the number of lost ones; a beginning-of-text token at the start stays."""
        most = None if self.limit is None else self.limit - room
        if not self.cut or most is None or len(tokens) <= most:
            return tokens, 0
        self.shortened += 1
        head = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
        kept = tokens[len(tokens) - max(1, most - len(head)) :]
        return head + kept, len(tokens) - len(head) - len(kept)

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise SettingError(
                "expected a model with a chat template for a task of messages; this one's tokenizer has none. Take a "
                "chat model (one that is called Instruct or Chat), or give text prompts"
            )
        if AMBIENT.search(str(self.tokenizer.chat_template)):
            raise SettingError(
                "expected a chat template without randomness; the model's template draws at random. Take "
                "text prompts, or another model"
            )
        if not any(message.role != "tools" for message in messages):
            raise ConfigError(
                "expected a chat that begins with a question; got one that begins with an answer. Add one"
            )
        texts = [text for message in messages for text in (message.content, message.more)]
        return self.control.rendered(lambda change: self._rendered(messages, change, options), texts)

    def _rendered(self, messages: Sequence[Message], change: Callable[[str], str], options: dict[str, Any]) -> str:
        """The messages rendered by the template, after `change` of each text."""
        chat = [
            {"role": m.role, "content": change(m.content), **(every_text(json.loads(m.more), change) if m.more else {})}
            for m in messages
            if m.role != "tools"
        ]
        for message in messages:
            if message.role == "tools":
                options = {**options, "tools": every_text(json.loads(message.content), change)}
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, strftime_now=self._now, **options)
        except (ValueError, TypeError, TemplateError) as error:  # many templates refuse some order of roles
            roles = ", ".join(message.role for message in messages[:8])
            raise ConfigError(
                f"the model's chat template does not take messages of {roles}: {error}. Change them"
            ) from error

    def check_keys(self, messages: tuple[Message, ...]) -> None:
        """Raise ConfigError if the chat template leaves out a message's key, the tools, or a tool's message."""
        if not any(message.more or message.role in ("tools", "tool") for message in messages):
            return
        keys: dict[str, list[int]] = {}
        for place, message in enumerate(messages):
            for key in json.loads(message.more) if message.more else ():
                keys.setdefault(key, []).append(place)
        lost = [key for key, places in keys.items() if not any(self._writes(messages, k, key) for k in places)]
        called = [place for place, message in enumerate(messages) if message.role == "tools"]
        if called and not any(self._writes(messages, place, "") for place in called):
            lost.append("tools")
        if lost:
            raise ConfigError(
                f"the model's chat template does not write {' and '.join(map(repr, lost))}, which would be lost. Take "
                f"a model whose template does, or leave this out: 'task.ignore=[{', '.join(lost)}]'"
            )
        for place, message in enumerate(messages):
            if message.role == "tool" and not self._writes(messages, place, ""):
                raise ConfigError("the model's chat template does not write messages of the role tool. Remove them")

    def _writes(self, messages: tuple[Message, ...], place: int, key: str) -> bool:
        """Whether the template's text depends on a key of a message, or ("") on that message.

        The message is also tried as the last one: templates drop thoughts of earlier turns on purpose.
        """
        for end in {place + 1, len(messages)}:
            some = messages[:end]
            try:
                with_it, without = self._render(some), self._render(_without(some, place, key))
            except ConfigError:  # the template needs later messages; a chat that it refuses is refused as a whole
                continue
            if with_it != without:
                return True
        return False


def _without(messages: tuple[Message, ...], place: int, key: str) -> tuple[Message, ...]:
    """A chat without a key of a message, or ("") without that message."""
    if not key:
        return messages[:place] + messages[place + 1 :]
    kept = {name: value for name, value in json.loads(messages[place].more).items() if name != key}
    changed = messages[place]._replace(more=json.dumps(kept) if kept else "")
    return (*messages[:place], changed, *messages[place + 1 :])


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` applied to every text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: every_text(inner, change) for key, inner in value.items()}
    return [every_text(inner, change) for inner in value] if isinstance(value, list) else value


def opening(before: str, end: str | None, whole: Callable[[], str]) -> str:
    """A chat up to where the model continues, without an end of text that a rendered answer would not have there.

    Some templates have no generation prompt: the beginning of an answer appears only together with an answer.

    Args:
        before: the chat as the template renders it before an answer.
        end: the model's end of text.
        whole: renders the chat with PROBE as the answer.
    """
    if not end or not before.rstrip().endswith(end):
        return before
    said = whole()
    for begun in (before, before.rstrip().removesuffix(end)):
        if said.startswith(begun) and (place := said.find(PROBE, len(begun))) >= 0:
            return said[:place]
    return before


def checked_date(date: object, name: str) -> str:
    """A date as YYYY-MM-DD; for None, today's in UTC."""
    if date is None:
        return datetime.now(UTC).date().isoformat()
    try:
        return datetime.strptime(str(date), "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise ConfigError(f"expected {name} as YYYY-MM-DD, such as 2026-12-01; got {str(date)!r}") from None


def clock_of(date: str) -> Callable[[str], str]:
    """The function strftime_now for chat templates: at the start of that day, in English in any locale."""
    day = datetime.fromisoformat(date)
    weekday, month = WEEKDAYS[day.weekday()], MONTHS[day.month - 1]
    names = {"%A": weekday, "%a": weekday[:3], "%B": month, "%b": month[:3], "%h": month[:3], "%p": "AM"}
    names |= {"%x": "%m/%d/%y", "%X": "%H:%M:%S", "%c": f"{weekday[:3]} {month[:3]} %e %H:%M:%S %Y"}
    return lambda form: day.strftime(re.sub("%.", lambda found: names.get(found[0], found[0]), form))


def answered(prompt: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """A chat followed by its answer."""
    return (*prompt, Message("assistant", text.strip(), text.more if isinstance(text, Marked) else ""))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
