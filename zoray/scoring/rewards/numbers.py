"""The number that a completion states as its result, compared exactly: for word problems such as GSM8K's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from zoray.records import ConfigError
from zoray.scoring.rewards.base import LIMIT, answers_of

DIGITS = 300  # of a number; longer ones are not read

# 7  1,234.5  .5  -3  -$2  3/4  2e6. A minus counts unless something before it makes it a subtraction.
UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))+|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2}(?![0-9]))?|\.[0-9]+"
NUMBER = re.compile(rf"(?P<minus>(?<![\w)\]])[-\u2212][$€£]?)?(?P<above>{UNSIGNED})(?:/(?P<below>{UNSIGNED}))?")
MIXED = re.compile(r"([0-9]+) +([0-9]+)/([0-9]+)")  # 1 1/2
FRACTION = re.compile(r"\\[dtc]?frac *(?:\{([^{}]*)\} *\{([^{}]*)\}|([0-9])([0-9]))")  # \frac{1}{2}, \frac12
SPACING = re.compile(r"\\[,;:! ]|~|\{,\}(?=[0-9])")
BOX, MARK = "\\boxed{", "####"


def numeric(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion's number equals that of the example's `answer` (or of the first of its `answers`).

    The number of a text is the one in its last \\boxed{...}; else the one after its last "####", on the same line; else
    its last one. Commas between thousands, $, % and units do not count: 50% is 50. 1/2, 0.5 and \\frac{1}{2} are
    equal, 0.33 and 1/3 are not.
    """
    answer = example["answer"] if "answer" in example else answers_of(example, "numeric")[0]
    right = stated_number(str(answer))
    if right is None:
        raise ConfigError(f"expected examples with a number as their answer for the reward numeric; got {answer!r}")
    return float(stated_number(completion) == right)


def stated_number(text: str) -> Fraction | None:
    """The number that a text states as its result."""
    text = text[-LIMIT:]
    boxed = _boxed(text)
    if boxed is not None:
        return _in_box(boxed)
    marked = text.rpartition(MARK)[2].strip(" ").partition("\n")[0] if MARK in text else ""
    return _value(NUMBER.search(marked) or next(reversed([*NUMBER.finditer(text)]), None))


def _boxed(text: str) -> str | None:
    """The content of the last box, if it is closed."""
    start = text.rfind(BOX) + len(BOX)
    if start < len(BOX):
        return None
    depth = 1
    for place in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(place[0], 0)  # \{ and \} are characters
        if depth == 0:
            return text[start : start + place.start()]
    return None


def _in_box(text: str) -> Fraction | None:
    """The first number after the last "=", whatever LaTeX stands around it."""
    text = SPACING.sub(lambda found: "," if found[0] == "{,}" else "", text.rpartition("=")[2])
    text = FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", text)
    text = re.sub(r"([-\u2212]) (?=[0-9])", r"\1", text)  # of -\frac{1}{2}
    match, mixed = NUMBER.search(text), MIXED.search(text)
    value = _value(match)
    if match and mixed and value is not None and match.start("above") == mixed.start():
        part = _value(NUMBER.fullmatch(f"{mixed[2]}/{mixed[3]}"))
        return None if part is None else value - part if value < 0 else value + part
    return value


def _value(match: re.Match[str] | None) -> Fraction | None:
    """The number of a match, if it has a sensible length and a value."""
    if match is None or len(match[0]) > DIGITS:
        return None
    above, below = (Fraction((match[name] or "1").replace(",", "")) for name in ("above", "below"))
    return None if below == 0 else -above / below if match["minus"] else above / below
