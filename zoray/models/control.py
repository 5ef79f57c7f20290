"""Control tokens in text: a template's tokens count, the same characters in a user's text stay text.

A tokenizer reads `</s>` anywhere as the end of text. So `hide` puts a mark inside each control token of a user's text;
the text goes through templates with its marks, and is tokenised so that marked tokens are letters and all others
control tokens. A text without control tokens, which is nearly every text, goes to the tokenizer unchanged.
Guarantees: no id reaches a model that has no embedding for it.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError, Marked

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

BREAK = "\ufdd0"  # a Unicode noncharacter, which texts don't have; doubled if one does
MARKS = re.compile(f"{BREAK}({BREAK}?)")

Span = tuple[int, int]


class Control:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: from transformers.
        embeddings: number of tokens that the model has embeddings for; None if unknown.
        name: the model's name in messages.
    """

    def __init__(self, tokenizer: Any, embeddings: int | None = None, name: str = "the model") -> None:
        self._tokenizer, self._embeddings, self._name = tokenizer, embeddings, name
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._tokens = {token.content: (number, token) for number, token in added.items() if token.special}
        longest = sorted((text for text in self._tokens if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self.hidden: Counter[str] = Counter()  # control tokens found in texts and read as text
        whole, bare = self._plain("a", True), self._plain("a", False)
        starts = [k for k in range(len(whole)) if whole[k : k + len(bare)] == bare]
        first = starts[0] if starts else 0
        self._before, self._behind = whole[:first], whole[first + len(bare) :] if starts else []

    @property
    def appended(self) -> int:
        """The number of tokens that the tokenizer appends to every text."""
        return len(self._behind)

    def hide(self, text: str, only: Collection[str] | None = None) -> str:
        """The text with a mark in each of its control tokens that is not a template's own; or only those in `only`."""
        if BREAK in text:
            text = text.replace(BREAK, 2 * BREAK)
        if not self._pattern.search(text):
            return text
        own = text.own if isinstance(text, Marked) else ()

        def broken(found: re.Match[str]) -> str:
            if only is not None and found[0] not in only:
                return found[0]
            if any(first <= found.start() and found.end() <= end for first, end in own):
                return found[0]
            self.check([self._tokens[found[0]][0]])  # a text with a token in it was made for that token
            self.hidden[found[0]] += 1
            return f"{found[0][0]}{BREAK}{found[0][1:]}"

        return self._pattern.sub(broken, text)

    def found(self, text: str) -> set[str]:
        """The control tokens in a text."""
        return set(self._pattern.findall(text))

    def rendered(self, render: Callable[[Callable[[str], str]], str], texts: Iterable[str]) -> str:
        """Texts rendered by a template, with marks in their control tokens.

        A token that the template itself looks for in a text (such as the end of a thought) keeps its meaning.

        Args:
            render: gives the template's text, with a function applied to each of the texts.
            texts: all texts that the template gets.
        """

        def apart(tokens: Collection[str]) -> str:
            return render(lambda text: self.hide(text, tokens))

        plain = apart(())
        held = sorted({token for text in texts for token in self.found(text)})
        taken = [token for token in held if shown(apart((token,))) == shown(plain)]
        return apart(taken) if taken else plain

    def ids(self, text: str, special: bool, ended: bool = False) -> list[int]:
        """Tokens of a text that may have marks.

        Args:
            text: from `hide`, or rendered from such texts.
            special: with the tokens that the tokenizer puts before every text.
            ended: also with those it appends, an end of text.

        Raises:
            ConfigError: the model has no embedding for one of the tokens.
        """
        if BREAK not in text:
            found = self._plain(text, special)
            if special and self._behind and not ended:
                found = found[: -len(self._behind)]
        else:
            inner = [number for piece, _ in self._pieces(text) for number in piece]
            found = [*self._before, *inner, *(self._behind if ended else ())] if special else inner
        self.check(found)
        return found

    def placed(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokens of a text that may have marks, and each token's characters in `shown(text)`."""
        if BREAK not in text:
            found, places = self._offsets(text, False)
        else:
            found, places = [], []
            for piece, spans in self._pieces(text):
                found += piece
                places += spans
        self.check(found)
        return found, places

    def check(self, numbers: Sequence[int]) -> None:
        """Raise ConfigError if the model has no embedding for one of these tokens."""
        if self._embeddings is None or not numbers or (most := max(numbers)) < self._embeddings:
            return
        raise ConfigError(
            f"the tokenizer and the weights of {self._name} do not match: token "
            f"{self._tokenizer.convert_ids_to_tokens(int(most))!r} has id {most}, and the model has "
            f"{self._embeddings} embeddings (ids 0 to {self._embeddings - 1}). Take the tokenizer that the model was "
            "trained with, or give the model more embeddings (resize_token_embeddings of transformers)"
        )

    def _pieces(self, text: str) -> Iterator[tuple[list[int], list[Span]]]:
        """Tokens and places of the text between control tokens, and of the control tokens, in order."""
        place, at, eaten = 0, 0, ""
        for found in [*self._pattern.finditer(text), None]:
            piece = shown(text[at : found.start() if found else len(text)])
            bare = piece.lstrip() if eaten else piece
            number, token = self._tokens[found[0]] if found else (None, None)
            if token is not None and token.lstrip:
                bare = bare.rstrip()
            first = place + (len(piece) - len(piece.lstrip()) if eaten else 0)
            numbers, places = self._letters(bare, at > 0) if bare else ([], [])
            yield numbers, [(first + start, first + end) for start, end in places]
            place += len(piece)
            if found is not None and token is not None and number is not None:
                yield [number], [(place, place + len(found[0]))]
                place, at, eaten = place + len(found[0]), found.end(), "rstrip" if token.rstrip else ""

    def _letters(self, text: str, behind: bool) -> tuple[list[int], list[Span]]:
        """A text without control tokens; `behind`: it follows one, where some tokenizers put no space first."""
        if behind and self._spaced:
            lead, (longer, spans) = self._offsets("\n", True)[0], self._offsets(f"\n{text}", True)
            if longer[: len(lead)] == lead:
                return longer[len(lead) :], [(start - 1, end - 1) for start, end in spans[len(lead) :]]
        return self._offsets(text, True)

    @cached_property
    def _spaced(self) -> bool:
        """Whether the tokenizer puts a space before a text alone, but not before one behind a control token."""
        token, (number, _) = next(iter(self._tokens.items()))
        return self._plain(f"{token}a", False) != [number, *self._plain("a", False)]

    def _plain(self, text: str, special: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def _offsets(self, text: str, letters: bool) -> tuple[list[int], list[Span]]:
        """Tokens with their places in the text, before a tokenizer trims spaces from the places."""
        if not getattr(self._tokenizer, "is_fast", True):
            return self._borders(text, letters)
        backend = self._tokenizer.backend_tokenizer
        trims, backend.post_processor = backend.post_processor, None
        try:
            more = {"split_special_tokens": True} if letters else {}
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **more)
        finally:
            backend.post_processor = trims
        return found["input_ids"], found["offset_mapping"]

    def _borders(self, text: str, letters: bool) -> tuple[list[int], list[Span]]:
        """The same for a tokenizer without offsets: a token ends where the decoded text up to it ends."""
        more = {"split_special_tokens": True} if letters else {}
        numbers = self._tokenizer(text, add_special_tokens=False, **more)["input_ids"]
        ends = [len(self._tokenizer.decode(numbers[: k + 1])) for k in range(len(numbers))]
        return numbers, list(zip([0, *ends], ends, strict=False))


def shown(text: str) -> str:
    """A text without marks, as people and models read it."""
    return MARKS.sub(r"\1", text) if BREAK in text else text
