"""Labels of a choice: which spellings, in files and settings, are one label, and the words that stand for labels.

Guarantees: a label that any format can hold may have a word; labels that only look alike are refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from zoray.records import ConfigError
from zoray.records.overrides import setting
from zoray.tasks.file.cells.spacing import gap

NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
DECIMAL = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,3})?", re.A)
CONSTANTS = ("true", "false", "null", "nan")  # formats and shells differ in their capitals
INVISIBLE = re.compile("[\u0000-\u0008\u000e-\u001b\u007f-\u0084\u034f\u115f\u1160\ufe00-\ufe0f]")
MOST = 20  # labels that become label words by themselves


def label_text(value: object) -> str:
    """A label as text: 1, 1.0 and "1" are the same label, and so are JSON's true and "true"."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def plain_form(label: str) -> str:
    """The common form of a label's spellings: true for True, 1 for 1.0 and +1; most labels themselves."""
    if label.lower() in CONSTANTS:
        return label.lower()
    found = DECIMAL.fullmatch(label)
    if not found:
        return label
    whole = not (found[2] or found[3])  # a float would keep 53 bits of it
    return label_text(int(label) if whole else float(label))


def look(label: str) -> str:
    """How a label looks, whatever its capitals, invisible characters, and ways to compose a letter."""
    text = unicodedata.normalize("NFKC", label).casefold()
    return " ".join(INVISIBLE.sub("", "".join(s for s in text if unicodedata.category(s) != "Cf")).split())


def unlike(labels: Iterable[str], source: str, advice: str) -> None:
    """Raise ConfigError for labels that look the same."""
    alike: dict[str, str] = {}
    for label in labels:
        if (other := alike.setdefault(look(label), label)) == label:
            continue
        if other.lower() == label.lower():
            how, shown = "differ in more than capitals", (repr(other), repr(label))
        else:
            how, shown = (
                "look different (in how a letter is composed or what is invisible)",
                (ascii(other), ascii(label)),
            )
        raise ConfigError(
            f"expected labels that {how}; {source} has {shown[0]} and {shown[1]}. Write them alike, or give {advice}"
        )


def label_words(labels: Sequence[str], source: str, before: str, space: bool | None) -> dict[str, str]:
    """Each label as its own word, in alphabetical order, where labels are words.

    Args:
        labels: of the source, each once.
        source: what messages call it.
        before: the end of the prompt, if it is known.
        space: see spacing.gap.
    """
    known = sorted(labels)
    if len(known) < 2:
        raise ConfigError(
            f"expected at least two labels in {source}; got only {known[0]!r}. Give rows with another one as well, or "
            "name another column: task.label_column=..."
        )
    if all(NUMBER.fullmatch(label) for label in known):
        forms = list(dict.fromkeys(map(plain_form, known)))
        words = ["no", "yes"] if forms == ["0", "1"] else [f"word{k}" for k in range(1, len(forms) + 1)]
        example = setting("task.words", {form: f" {word}" for form, word in zip(forms, words, strict=True)})
        raise ConfigError(
            f"expected labels that are words; {source} has the numbers {', '.join(known)}. Say which word stands for "
            f"which, with its leading space: {example}"
        )
    words = {label: gap(before, label, space) + label for label in known}
    unlike(labels, source, setting("task.words", words))
    return words


def spellings(words: Mapping[str, str]) -> dict[str, str]:
    """Other spellings of labels that have words -> those labels."""
    forms: dict[str, str] = {}
    for label in words:
        forms.setdefault(plain_form(label), label)
    return forms
