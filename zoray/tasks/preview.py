"""Shows what a run will learn from: how the data were understood, sizes, and a few examples.

An example is shown as the model will read it, chat template included; what is trained, or chosen from, is »marked«.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.models.control import shown
from zoray.models.tokens import answered
from zoray.tasks.batches import labels_of, part_numbers

if TYPE_CHECKING:
    from zoray.models.tokens import Encoder
    from zoray.records import Example, Splits

EXAMPLES = 3
LONGEST = 600  # characters of a prompt, and of what follows it, that are shown
OPTIONS = 6  # of an example
LINES = 40  # of an example


def preview(task: Any, splits: Splits, encoder: Encoder) -> list[str]:
    """Lines about a task, its splits, and three training examples, of different labels and parts if there are any.

    Raises:
        ConfigError: a chat for a model that has no chat template.
    """
    describe = getattr(task, "describe", None)
    lines = list(describe()) if describe is not None else [f"task: {type(task).__name__.lower()}"]
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "dev", "test"))
    lines += [f"examples: {sizes}", *encoder.notes()]
    for number in _varied(splits.train):
        shown = _few(rendered(splits.train[number], encoder))
        lines += ["", f"training example {number}, as the model reads it:", *(f"    {line}" for line in shown)]
    return lines


def rendered(example: Example, encoder: Encoder) -> list[str]:
    """An example as the model reads it, line by line."""
    prompt = example.prompt
    if example.options:
        chosen = [example.label, *(k for k in range(len(example.options)) if k != example.label)][:OPTIONS]
        right = {example.label, *example.also}
        texts = [_marked(encoder.continuation(prompt, example.options[k])) for k in chosen]
        notes = ["right" if k in right else "wrong" for k in chosen]
        lines = (shortened(encoder.text(prompt)) + texts[0]).splitlines()
        for text, note in zip(texts[1:], notes[1:], strict=True):
            first, *rest = text.splitlines() or [""]
            lines += [f"or, {note}: {first}", *rest]
        left = len(example.options) - len(chosen)
        return [*lines, f"or one of {left} others"] if left else lines
    if not example.answers:
        return [*shortened(encoder.text(prompt)).splitlines(), "» the model goes on here «"]
    answer, *also = example.answers
    if isinstance(prompt, str):
        lines = (shortened(prompt) + _marked(answer)).splitlines()
    else:  # every turn of the assistant is trained
        whole, spans = encoder.assistant_spans(answered(prompt, answer), example.untrained)
        text, end = "", 0
        for first, last in spans:
            text, end = text + shortened(shown(whole[end:first])) + _marked(shown(whole[first:last])), last
        lines = (text + shown(whole[end:])).splitlines()
    return lines + [f"or, also right: {shortened(text)!r}" for text in also[: OPTIONS - 1]]


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it is too long to read."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _few(lines: list[str]) -> list[str]:
    """Lines without those in the middle, if there are too many."""
    half = LINES // 2
    return lines if len(lines) <= LINES else [*lines[:half], f"[... {len(lines) - 2 * half} lines ...]", *lines[-half:]]


def _marked(text: str) -> str:
    return f"»{shortened(text)}«"


def _varied(examples: Sequence[Example]) -> list[int]:
    """The numbers of a few examples: the first of each part and label, then the first ones."""
    pairs = np.stack([part_numbers(examples), labels_of(examples)])
    firsts = np.unique(pairs, axis=1, return_index=True)[1]
    chosen = [*sorted(firsts.tolist())[:EXAMPLES], *range(min(EXAMPLES, len(examples)))]
    return sorted(list(dict.fromkeys(chosen))[:EXAMPLES])
