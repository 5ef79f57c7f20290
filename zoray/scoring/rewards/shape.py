"""How a completion looks, whatever it says: a regular expression, a length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from zoray.records import ConfigError, is_finite, require
from zoray.scoring.rewards.base import LIMIT, column

MODES, UNITS = ("full", "contains"), ("characters", "words")


def format(prompt: str, completion: str, example: Mapping[str, Any], pattern: str, mode: str = "full") -> float:
    """1 if the completion matches a regular expression of Python's `re`: as a whole, or somewhere (mode=contains).

    The dot matches line breaks, too. Spaces around the completion do not count. A pattern can run forever
    (`(a+)+b`), so the judge runs this reward under its time limit, like a function of yours.
    """
    require(mode in MODES, "mode to be full or contains", mode)
    expression, text = _compiled(pattern), completion[:LIMIT].strip()
    return float(bool(expression.fullmatch(text) if mode == "full" else expression.search(text)))


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"expected pattern to be a regular expression; got {pattern!r}: {error}") from None


def length(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    most: float,
    least: float = 0,
    unit: str = "characters",
    target_column: str | None = None,
) -> float:
    """1 up to `least` characters or words, 0 from `most` on, and linear between; an empty completion is worth 0.

    With `target_column`, the difference from the length of that column's text counts instead of the length, as in the
    conciseness task of ES at scale (Qiu et al., 2025), whose reward is -|difference|.
    """
    require(unit in UNITS, "unit to be characters or words", unit)
    bounds = is_finite(least) and is_finite(most) and 0 <= least < most
    require(bounds, "least and most to be numbers with 0 <= least < most", (least, most))
    size = _size(completion, unit)
    away = size if target_column is None else abs(size - _size(str(column(example, target_column, "length")), unit))
    return min(1.0, max(0.0, (most - away) / (most - least))) if size else 0.0


def _size(text: str, unit: str) -> int:
    return len(text.strip()) if unit == "characters" else len(text.split())
