"""Decides when tuning may use an engine that also answers requests, and for how long at a time.

Scoring and requests take turns: scoring between two steps of requests is a slice, and a slice delays a request by at
most its own length. Guarantees: with `max_slowdown` s, a slice that begins between requests, while there is traffic,
takes at most (s - 1) of the usual time to first token. A slice that begins while requests are under way takes at most
(s - 1) of their usual step, except one in `RARE` steps that may take as long as a slice between requests; all slices
together take at most `SHARE` of that time. All of this holds as far as the cost of a slice, estimated from earlier
ones, is right. Without traffic no slice is held back, and slices are as large as suits them: small slices cost up to
half of the speed. If even the smallest slice takes too long, there is no tuning during traffic, except for a try now
and then: the estimate may come from a bad moment.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from statistics import median
from typing import TYPE_CHECKING

from zoray.engines.shared.cost import LONGEST, RARE, REMEMBERED, Cost, Credit
from zoray.records import require

if TYPE_CHECKING:
    from collections.abc import Callable

TRAFFIC_SECONDS = 20.0  # after the last request, until no request is expected
DOUBT_SECONDS = 30.0  # for which a slice is held back for its cost, before the highest cost seen is forgotten


class Closed(Exception):
    """The engine is about to end, or its scores are no longer needed."""


class Throttle:
    """Turns of one engine. Requests report from the server's loop, slices come from the tuning thread."""

    def __init__(self, max_slowdown: float = 1.5, clock: Callable[[], float] = time.monotonic) -> None:
        require(max_slowdown >= 1.0, "max_slowdown of at least 1", max_slowdown)
        self.max_slowdown, self._clock = max_slowdown, clock
        self._changed = threading.Condition()
        self._under_way = 0
        self._last_request = -math.inf
        self._credit, self._credited = Credit(), clock()
        self._first: deque[float] = deque(maxlen=REMEMBERED)  # seconds to first tokens
        self._steps: deque[float] = deque(maxlen=4 * REMEMBERED)  # seconds between tokens of a request
        self._costs: defaultdict[str, Cost] = defaultdict(Cost)  # of slices, by their kind
        self._since_long = 0  # tokens of requests since a slice last took longer than a step allows
        self._ran: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # (begin, end) of slices
        self._closed = False
        self.waited = 0.0  # seconds that slices have been held back

    # Called by the server.

    def began(self) -> None:
        """Note that a request has come."""
        with self._changed:
            self._settle()
            self._under_way += 1

    def first_token(self, seconds: float) -> None:
        """Note its first token, this long after the request."""
        self._first.append(self._undisturbed(seconds))

    def token(self, seconds: float) -> None:
        """Note a further token, this long after the one before."""
        self._steps.append(self._undisturbed(seconds))
        self._since_long += 1

    def ended(self) -> None:
        """Note that a request has its last token, or was cancelled."""
        with self._changed:
            self._settle()
            self._under_way -= 1
            self._last_request = self._clock()
            self._changed.notify_all()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return self._under_way

    # Called by the tuning thread.

    def wait(self, kind: str, least: float, most: float = math.inf, join: bool = False) -> float:
        """Hold back a slice until it may run; returns how much work, `least` or more, it may do then.

        Returns 0 if the work can `join` requests that are under way, whose steps will take it along.

        Args:
            kind: of work; its speed is known from earlier slices of this kind.
            least: the smallest slice, in the units of the work.
            most: the largest slice, for times when no request is expected.
            join: whether the steps of requests can do the work.

        Raises:
            Closed: the engine ends.
        """
        began = doubted = self._clock()
        with self._changed:
            while True:
                if self._closed:
                    raise Closed
                if join and self._under_way:
                    self.waited += self._clock() - began
                    return 0.0
                if self._clock() - doubted > DOUBT_SECONDS:
                    self._costs[kind].doubt()
                    doubted = self._clock()
                seconds, for_how_long = self._allowed()
                size = most if math.isinf(seconds) else self._size(kind, seconds, least)
                if size is not None:
                    self.waited += self._clock() - began
                    return min(size, most)
                self._changed.wait(min(for_how_long, 0.25))

    def free(self, kind: str, size: float) -> bool:
        """Whether a slice of this size may run at once."""
        with self._changed:
            seconds, _ = self._allowed()
            return math.isinf(seconds) or (not self._under_way and self._size(kind, seconds, size) is not None)

    @property
    def idle(self) -> bool:
        """Whether no request is expected."""
        with self._changed:
            return math.isinf(self._allowed()[0])

    def took(self, kind: str, size: float, seconds: float) -> None:
        """Note a finished slice."""
        with self._changed:
            now = self._clock()
            self._ran.append((now - seconds, now))
            self._costs[kind].took(size, seconds, idle=math.isinf(self._allowed()[0]))
            if self._under_way:
                self._settle()
                self._credit.spend(seconds)
                if seconds > self._in_a_step():
                    self._since_long = 0

    def forget(self) -> None:
        """Forget the costs of slices so far: an engine's first slices are slow."""
        with self._changed:
            self._costs.clear()

    def close(self) -> None:
        """Make every `wait` raise Closed, including those under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _allowed(self) -> tuple[float, float]:
        """(seconds that a slice may take now, seconds until it may take more)."""
        self._settle()
        if self._under_way:
            rare = self._since_long >= RARE * self._under_way and self._credit.left > 0
            return self._between() if rare else min(self._in_a_step(), self._credit.left), 0.02
        left = self._last_request + TRAFFIC_SECONDS - self._clock()
        if left <= 0:
            return math.inf, math.inf
        return self._between(), left

    def _in_a_step(self) -> float:
        return (self.max_slowdown - 1) * median(self._steps) if self._steps else 0.0

    def _between(self) -> float:
        return min((self.max_slowdown - 1) * median(self._first), LONGEST) if self._first else 0.0

    def _settle(self) -> None:
        """Add credit for the time that requests have been under way."""
        now = self._clock()
        if self._under_way:
            self._credit.earn(now - self._credited)
        self._credited = now

    def _size(self, kind: str, seconds: float, least: float) -> float | None:
        """The most work expected to fit in these seconds; None if not even `least` does."""
        cost = self._costs[kind]
        if not cost.known:  # a first slice has to be tried
            return least if seconds > 0 and not self._under_way else None
        size = cost.size(seconds)
        return None if size < least else least if math.isinf(size) else size

    def _undisturbed(self, seconds: float) -> float:
        """A duration that has just ended, minus the slices in it: with them, slices would be allowed ever more time."""
        began = (now := self._clock()) - seconds
        with self._changed:
            return seconds - sum(max(0.0, min(end, now) - max(start, began)) for start, end in self._ran)
