"""Side by side in one run: every round times each contender, and ratios are taken within a round.

A machine's speed drifts, so a ratio of medians from different minutes says little; the median of paired ratios does.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def rounds(contenders: Mapping[str, Callable[[], object]], count: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each of `count` rounds, after some that are not counted.

    A contender runs twice in its turn and the second time counts, as in a run a step follows a step: the first one
    finds caches and threads as another contender has left them. The order is drawn anew for each round. Garbage is
    collected in between.
    """
    order = random.Random(0)
    names, seconds = list(contenders), {name: [] for name in contenders}
    gc.disable()
    try:
        for number in range(-warm_up, count):
            gc.collect()
            for name in order.sample(names, len(names)):
                contenders[name]()
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
