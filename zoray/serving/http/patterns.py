"""Regular expressions in a client's schema: which of them the engine's grammar can enforce.

xgrammar takes from milliseconds to minutes to prepare a pattern. The slow ones match a text in many ways: counted
repeats of a group with several lengths, or several repeats of any length in a row. Those are refused, and so are
patterns that xgrammar does not know, or accepts and does not enforce.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LOOKAROUND = re.compile(r"\(\?<?[=!]")
MOST_PLACES = 256  # characters of a pattern with its repeats written out
MOST_TIMES = 128  # of a counted repeat: xgrammar fails on patterns with larger ones
MOST_LOOSE = 20  # how far the counts of several repeats may vary in total
PIECE = re.compile(
    r"""(?P<open>\((?!\?)|\(\?:)
    |(?P<close>\))
    |(?P<either>\|)
    |(?P<times>[*+?]|\{(?P<least>\d{1,4})(?P<comma>,(?P<most>\d{1,4})?)?\})(?![?+])
    |(?P<one>\[\^?(?:[^\[\]\\]|\\(?:[dwsDWSnrt.^$*+?()\[\]{}|/\\"-]|x[0-9A-Fa-f]{2}|u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4}))+\]
        |\\(?:[dwsDWS.^$*+?()\[\]{}|/-]|x[2-7][0-9A-Fa-f]|u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4})
        |[^\\()\[\]{}*+?|^$"\x00-\x1f])""",
    re.X,
)


@dataclass
class Group:
    """The content of a pair of brackets so far."""

    places: int = 0  # characters, with repeats written out
    loose: bool = False  # whether it can match several lengths, or in different ways


def check_pattern(pattern: object) -> None:
    """Raise ValueError unless a grammar of bounded size enforces the pattern."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError("expected pattern to be a text")
    if LOOKAROUND.search(pattern):
        raise _refused(pattern, "lookaheads and lookbehinds are not enforced here; write it without")
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    at, end = int(begins), len(pattern) - int(ends)
    groups, before, varied = [Group()], None, []
    while at < end:
        found = PIECE.match(pattern, at, end)
        if found is None:
            raise _refused(pattern, f"what begins with {pattern[at : at + 10]!r} is not enforced here")
        at = found.end()
        if found["open"]:
            groups.append(Group())
            before = None
        elif found["close"]:
            before = groups.pop()
            if not groups:
                raise _refused(pattern, "expected a ( for each )")
            groups[-1].places += before.places
            groups[-1].loose |= before.loose
        elif found["either"]:
            if len(groups) == 1 and (begins or ends):
                raise _refused(pattern, "expected alternatives in brackets, as in ^(?:a|b)$")
            groups[-1].loose, before = True, None
        elif found["times"]:
            if before is None:
                raise _refused(pattern, f"expected a character or a group before {found['times']}")
            _repeat(pattern, found, before, groups[-1], varied)
            before = None
        else:
            before = Group(1)
            groups[-1].places += 1
    if len(groups) > 1:
        raise _refused(pattern, "expected a ) for each (")
    if groups[0].places > MOST_PLACES:
        raise _refused(pattern, f"expected at most {MOST_PLACES} characters, with repeats written out")
    if len(varied) > 1 and sum(varied) > MOST_LOOSE:
        raise _refused(pattern, f"expected counts of several repeats to vary by at most {MOST_LOOSE} in all")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise _refused(pattern, f"expected a regular expression; {error}") from None


def _repeat(pattern: str, found: re.Match[str], what: Group, group: Group, varied: list[int]) -> None:
    """Apply a *, +, ? or {...} to the item before it."""
    if found["least"] is None:
        group.loose = True
        return
    least = int(found["least"])
    most = int(found["most"] or least)
    if most > MOST_TIMES:
        raise _refused(pattern, f"expected counts of at most {MOST_TIMES}; got {found['times']}")
    if what.loose and most > 1:
        raise _refused(
            pattern, "a counted repeat of a group with several lengths, or of alternatives, is not enforced here"
        )
    group.places += what.places * max(0, most - 1)
    if found["comma"]:
        group.loose = True
        varied.append(most - least)


def _refused(pattern: str, why: str) -> ValueError:
    return ValueError(f"pattern {pattern[:60]!r}: {why}")
