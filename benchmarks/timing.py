"""Side by side in one run: every round times each contender once, and ratios are taken within a round.

A machine's speed drifts, so a ratio of medians from different minutes says little; the median of paired ratios does.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def rounds(contenders: Mapping[str, Callable[[], object]], count: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each of `count` rounds, after some that are not counted.

    The order turns from round to round, so that nobody always follows the same one. Garbage is collected in between.
    """
    names, seconds = list(contenders), {name: [] for name in contenders}
    gc.disable()
    try:
        for number in range(-warm_up, count):
            gc.collect()
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                began = time.perf_counter()
                contenders[name]()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
