"""The cost of tuning to requests: how long a piece of work will take, and how much time tuning may take in all."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARE = 0.08  # of the requests' time that tuning may take
RARE = 150  # steps: one long gap between tokens in this many does not move their 99th percentile
LONGEST = 0.2  # seconds that tuning may delay requests at once
REMEMBERED, REMEMBERED_IDLE = 32, 8  # pieces behind an estimate: of those with traffic, and without


class Credit:
    """Seconds that tuning may take: a share of the requests' time, never more than two longest delays in a row."""

    def __init__(self) -> None:
        self.left = 0.0

    def earn(self, seconds: float) -> None:
        """Note the seconds for which requests have been under way."""
        self.left = min(self.left + SHARE * seconds, LONGEST)

    def spend(self, seconds: float) -> None:
        """Note the seconds that tuning has taken."""
        self.left = max(self.left - seconds, -LONGEST)


class Cost:
    """Seconds of a piece of work by its size, estimated from earlier pieces: fixed + each * size.

    Pieces done without traffic (`idle`) are remembered separately: all of them are large, and say little about small
    ones.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[float, float, bool]] = []  # (size, seconds, without traffic)
        self._line: tuple[float, float] | None = None

    @property
    def known(self) -> bool:
        """Whether any piece has been done."""
        return self._line is not None

    @property
    def largest(self) -> float:
        """The size of the largest piece."""
        return max(size for size, _, _ in self._pieces)

    def took(self, size: float, seconds: float, idle: bool = False) -> None:
        """Note a finished piece."""
        self._pieces.append((size, seconds, idle))
        alike = [piece for piece in self._pieces if piece[2] == idle]
        if len(alike) > (REMEMBERED_IDLE if idle else REMEMBERED):
            self._pieces.remove(alike[0])
        self._line = line(self._pieces)

    def size(self, seconds: float) -> float:
        """The largest piece expected to take this long: negative if none is, infinite if size does not matter."""
        assert self._line is not None
        fixed, each = self._line
        if each <= 0:
            return math.inf if seconds >= fixed else -math.inf
        return (seconds - fixed) / each

    def doubt(self) -> None:
        """Forget the slowest piece: it may come from a bad moment."""
        if self._pieces:
            self._pieces.remove(max(self._pieces, key=lambda piece: piece[1] / max(piece[0], 1e-9)))
            self._line = line(self._pieces) if self._pieces else None


def line(points: Sequence[tuple[float, ...]]) -> tuple[float, float]:
    """(fixed, each) of seconds = fixed + each * size, neither negative: Theil-Sen; one slow piece moves it little."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    steepest = median(seconds / max(size, 1e-9) for size, seconds, *_ in points)  # through the origin
    each = min(max(median(slopes), 0.0), steepest) if slopes else steepest
    return max(0.0, median(seconds - each * size for size, seconds, *_ in points)), each
