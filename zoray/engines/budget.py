"""How many tokens of tuning a step of requests may take along.

A step that decodes reads the whole model for a few tokens; further tokens in it cost their arithmetic only: on a GPU
next to nothing, on a CPU most of what they cost anyway. (Sarathi-Serve, https://arxiv.org/abs/2403.02310, does it the
other way round: decoding is piggybacked on chunks of prompts.) Guarantees: with `max_slowdown` s, what tuning adds to a
step is expected to be at most (s - 1) of a usual step, and all of it together at most `SHARE` of the requests' time.
Where even the fewest tokens are expected to take longer, they are in one step of `RARE`, too few to move the 99th
percentile.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from zoray.engines.throttle import line

SHARE = 0.08  # of the time of requests' steps
RARE = 200  # steps
FEWEST = 8  # tokens
MOST_CREDIT = 0.2  # seconds
USUAL_OF = 16  # steps without tuning until a usual one is known


class StepBudget:
    """What is known of the steps of one engine. Seconds are those of whole steps."""

    def __init__(self, max_slowdown: float, most: int) -> None:
        self.max_slowdown, self._most = max_slowdown, most
        self._plain: deque[float] = deque(maxlen=128)  # seconds of steps without tuning
        self._mixed: deque[tuple[float, float]] = deque(maxlen=32)  # (tokens of tuning, seconds that they added)
        self._line: tuple[float, float] | None = None  # what these make
        self._credit = 0.0
        self._since = RARE  # steps since tuning was in one

    def tokens(self) -> int:
        """How many the next step may take along; 0 for none."""
        if len(self._plain) < USUAL_OF or self.max_slowdown <= 1:
            return 0
        if self._line is None:  # somebody has to be the first
            return FEWEST if self._credit > 0 else 0
        fixed, each = self._line
        seconds = min((self.max_slowdown - 1) * median(self._plain), MOST_CREDIT)
        if self._credit < seconds:  # few large pieces rather than many small ones: each has its fixed cost
            return 0
        found = (seconds - fixed) / each if each > 0 else self._most if seconds > fixed else 0.0
        if found >= FEWEST:
            largest = max(size for size, _ in self._mixed)  # twice what is known, and not further
            return int(min(found, 2 * largest, self._most))
        return FEWEST if self._since >= RARE else 0

    def took(self, tokens: int, seconds: float) -> None:
        """A step in which all requests have got one token, and tuning has run so many."""
        self._credit = min(self._credit + SHARE * seconds, MOST_CREDIT)
        self._since += 1
        if not tokens:
            self._plain.append(seconds)
        elif self._plain:
            added = max(0.0, seconds - median(self._plain))
            self._mixed.append((float(tokens), added))
            self._line = line(self._mixed)
            self._credit = max(self._credit - added, -MOST_CREDIT)
            self._since = 0
