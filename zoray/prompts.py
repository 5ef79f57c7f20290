"""From a prompt and what follows it to tokens: plain text as it is, the messages of a chat by the model's own template.

Guarantees: prompt and continuation are tokenised together, as the model would read them; where a tokenizer merges
across their border, what both have in common is the prompt. What is too long for the limit loses its beginning, as in
MeZO's own code, or is refused by who asks (data.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from zoray.records import ConfigError, Message, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Prompt = str | tuple[Message, ...]


class Encoder:
    """A tokenizer with a limit.

    Args:
        tokenizer: of transformers; a chat needs one with a chat template.
        limit: the longest sequence that may reach the model, in tokens; None for no limit.
        cut: longer ones lose their beginning; otherwise they come as they are.
    """

    def __init__(self, tokenizer: Any, limit: int | None = None, cut: bool = False) -> None:
        self.tokenizer, self.limit, self.cut = tokenizer, limit, cut
        self.shortened = 0  # sequences that have lost their beginning

    def text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, up to where it goes on itself."""
        if isinstance(prompt, str):
            return prompt
        return self._render(prompt, add_generation_prompt=True)

    def tokens(self, prompt: Prompt, room: int = 0) -> list[int]:
        """A prompt's tokens, with `room` below the limit for what the model is to write."""
        return self._fit(self._ids(self.text(prompt), prompt), room)[0]

    def continuation(self, prompt: Prompt, text: str) -> str:
        """What follows the prompt: the text itself; in a chat with the end of turn that its template has."""
        if isinstance(prompt, str):
            return text
        before, whole = self.text(prompt), self._render((*prompt, Message("assistant", text.strip())))
        if not whole.startswith(before):
            raise ConfigError(
                f"the model's chat template does not begin an answer as it renders one: {before[-40:]!r} is not in "
                f"{whole[-80:]!r}. Take text prompts, or another model"
            )
        return whole[len(before) :].rstrip("\n")

    def continued(self, prompt: Prompt, texts: Sequence[str], start: bool = False) -> tuple[int, list[list[int]]]:
        """Tokens of the prompt with each of some texts behind it, and how many tokens all have in common with it.

        With `start`, a prompt of no tokens is the mark of a beginning, or else the model's end of text.

        Raises:
            ConfigError: a text adds no token, or there is nothing before it.
        """
        before = self.text(prompt)
        begun = self._ids(before, prompt)
        whole = [self._ids(before + self.continuation(prompt, text), prompt) for text in texts]
        if start and not begun:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            mark = eos if bos is None else bos
            begun, whole = [mark], [[mark, *tokens] for tokens in whole]
        # A tokenizer may merge across the border (or end a text with a special token): keep what all have in common.
        shared = min(_common_prefix(begun, tokens) for tokens in whole)
        for text, tokens in zip(texts, whole, strict=True):
            if len(tokens) == shared:
                raise ConfigError(f"option {text!r} adds no token to the prompt {before[-40:]!r}")
        if shared == 0:
            raise ConfigError(f"expected a prompt of at least one token; got {before!r}")
        return shared, whole

    def answer(self, prompt: Prompt, text: str, eos: bool | None) -> TokenSequence:
        """A prompt with an answer whose tokens are asked for.

        `eos`: whether the model's end of text follows a plain answer; None: unless the answer ends in a line break.
        """
        shared, (tokens,) = self.continued(prompt, (text,))
        end = self.tokenizer.eos_token_id
        ends = eos if eos is not None else not text.endswith("\n")
        if isinstance(prompt, str) and ends and end is not None and tokens[-1] != end:
            tokens = [*tokens, end]
        return self.sequence(tokens, range(shared, len(tokens)))

    def sequence(self, tokens: Sequence[int], targets: Iterable[int]) -> TokenSequence:
        """Tokens of which those at the positions `targets` (ascending, from 1) are asked for, summed in one output."""
        fitted, lost = self._fit(list(tokens), -1)
        places = np.array([place - lost for place in targets if place - lost >= 1], np.int64)
        return TokenSequence(
            tokens=np.array(
                fitted[: places[-1]], np.int32
            ),  # what follows the last row is no use, nor is the last target
            rows=(places - 1).astype(np.int32),
            targets=np.array(fitted, np.int32)[places],
            outputs=np.zeros(len(places), np.int32),
            n_outputs=1,
        )

    def assistant_spans(self, messages: tuple[Message, ...]) -> tuple[str, list[tuple[int, int]]]:
        """A whole chat as text, and where in it each assistant's turn begins and ends, its end of turn included."""
        whole, spans = self._render(messages), []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                before = self.text(messages[:i])
                turn = self.continuation(messages[:i], message.content)
                if not whole.startswith(before + turn):
                    raise ConfigError(
                        f"the model's chat template renders turn {i + 1} of a chat otherwise once more follows "
                        f"({turn[:60]!r}...): its loss can't be taken there. Give only the last answer's turns"
                    )
                spans.append((len(before), len(before) + len(turn)))
        return whole, spans

    def tokens_in(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens of a rendered chat, and the positions of those that begin within one of the spans of characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            place
            for place, (start, end) in enumerate(encoded["offset_mapping"])
            if end > start and any(first <= start < last for first, last in spans)
        ]
        return encoded["input_ids"], inside

    def stop_ids(self, stops: Sequence[str]) -> frozenset[int]:
        """Tokens that end a completion: the model's own ends, and all whose text holds one of `stops`."""
        ends = {self.tokenizer.eos_token_id} - {None}
        if self.tokenizer.chat_template:
            turn = self.tokenizer(self.continuation((Message("user", "a"),), "b"), add_special_tokens=False)
            ends |= {turn["input_ids"][-1]} & set(self.tokenizer.all_special_ids)
        if stops:
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            ends |= {i for i, text in enumerate(texts) if any(stop in text for stop in stops)}
        return frozenset(ends)

    def written(self, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """A completion as text, up to the first of `stops`, and whether one of them is in it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
        return (text[: min(cuts)], True) if cuts else (text, False)

    def _ids(self, text: str, prompt: Prompt) -> list[int]:
        """A chat template writes special tokens itself."""
        return self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]

    def _fit(self, tokens: list[int], room: int) -> tuple[list[int], int]:
        """Tokens within the limit, and how many are lost; the first one stays if it is the mark of a beginning."""
        most = None if self.limit is None else self.limit - room
        if not self.cut or most is None or len(tokens) <= most:
            return tokens, 0
        self.shortened += 1
        head = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
        kept = tokens[len(tokens) - max(1, most - len(head)) :]
        return head + kept, len(tokens) - len(head) - len(kept)

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "expected a model with a chat template for a task of messages; this one's tokenizer has none. Take a "
                "chat model (one that is called Instruct or Chat), or give text prompts"
            )
        if not messages:
            raise ConfigError(
                "expected a chat that begins with a question; got one that begins with an answer. Add one"
            )
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, **options)
        except (ValueError, TypeError, TemplateError) as error:  # many refuse some order of roles
            roles = ", ".join(message.role for message in messages[:8])
            raise ConfigError(
                f"the model's chat template does not take messages of {roles}: {error}. Change them"
            ) from error


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
