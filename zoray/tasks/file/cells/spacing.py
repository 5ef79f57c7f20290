"""The space between a prompt and what follows it, where the file has none.

Guarantees: the file's own space is kept. One is put between words of scripts that are written with spaces, as
tokenizers expect; none next to Chinese, Japanese, Thai and others that are written without, nor inside brackets.
"""

from __future__ import annotations

import re

LOOK = 64  # characters at a prompt's end that are searched for a letter
UNSPACED = re.compile(  # scripts without spaces between words, their punctuation and full-width forms
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9df\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\U00020000-\U0003ffff]"
)  # from Thai to Tibetan, Burmese, Khmer, Tai, Balinese, CJK and kana, Yi, Javanese


def gap(before: str, after: str, space: bool | None = None) -> str:
    """A space or nothing, to put between a prompt and a text that follows it.

    Args:
        before: the prompt, or its end.
        after: what follows.
        space: whether to put one where neither text has it; None to follow the script.
    """
    if before[-1:].isspace() or after[:1].isspace():
        return ""
    return " " if (spaced(before, after) if space is None else space) else ""


def spaced(before: str, after: str) -> bool:
    """Whether a space belongs between two texts.

    After a letter, its script decides; after a digit or a sign, a script without spaces on either side rules it out.
    """
    last, first = before[-1:], after[:1]
    if last in ("(", "[", "{") or first in (")", "]", "}", ","):
        return False
    if last.isalpha() or UNSPACED.match(last):
        return not UNSPACED.match(last)
    letter = next((sign for sign in reversed(before[-LOOK:]) if sign.isalpha()), "")
    return not (UNSPACED.match(first) or UNSPACED.match(letter))
