"""When tuning may take an engine that answers people as well, and for how long at a time.

Scoring and requests take turns: what is scored between two steps of the requests is a slice, and the longest delay that
a slice can cause is its own length. Guarantees: with `max_slowdown` s, a slice that begins between requests, while
there is traffic, takes at most (s - 1) of the usual time to a first token. One that begins while requests are under way
takes at most (s - 1) of their usual step, but for one in `RARE` steps that may take as long as one between requests,
and all of them together take at most `SHARE` of that time. All this as far as the cost of a slice, estimated from
those before it, is right. Without traffic nothing is held back, and slices are as large as is best for them: small ones
cost up to half of the speed. Where the smallest slice takes too long there is no tuning during traffic, but for a try
now and then: the estimate may be of a bad moment.
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

TRAFFIC_SECONDS = 20.0  # after the last request, until nobody is expected
DOUBT_SECONDS = 30.0  # that a slice is held back for its cost, until the highest cost seen is forgotten


class Closed(Exception):
    """The engine is about to end, or nobody waits for what it scores any more."""


class Throttle:
    """Turns of one engine. Requests report from the server's loop, slices come from the thread that tunes."""

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
        self._since_long = 0  # tokens of requests since the last slice that took longer than a step allows
        self._ran: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # slices, from when to when
        self._closed = False
        self.waited = 0.0  # seconds that slices have been held back

    # What the server reports.

    def began(self) -> None:
        """A request has come."""
        with self._changed:
            self._settle()
            self._under_way += 1

    def first_token(self, seconds: float) -> None:
        """Its first token has come, so long after it."""
        self._first.append(self._undisturbed(seconds))

    def token(self, seconds: float) -> None:
        """A further one, so long after the one before."""
        self._steps.append(self._undisturbed(seconds))
        self._since_long += 1

    def ended(self) -> None:
        """It has got its last token, or has gone."""
        with self._changed:
            self._settle()
            self._under_way -= 1
            self._last_request = self._clock()
            self._changed.notify_all()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return self._under_way

    # What the tuning thread asks.

    def wait(self, kind: str, least: float, most: float = math.inf, join: bool = False) -> float:
        """Hold back a slice until it may run; how much of its work, `least` at least, it may do then.

        0 says that requests are under way whose steps can take the work along, where it can `join` them.

        Args:
            kind: of work, whose speed is known from earlier slices of it.
            least: the smallest slice, in the units of the work.
            most: the largest one, which is taken where nobody is expected.
            join: whether the work can be done in the steps of requests.

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
        """Whether a slice of that size may run at once."""
        with self._changed:
            seconds, _ = self._allowed()
            return math.isinf(seconds) or (not self._under_way and self._size(kind, seconds, size) is not None)

    @property
    def idle(self) -> bool:
        """Whether nobody is expected."""
        with self._changed:
            return math.isinf(self._allowed()[0])

    def took(self, kind: str, size: float, seconds: float) -> None:
        """A slice has run."""
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
        """Forget what slices have cost: the first ones of an engine are slow."""
        with self._changed:
            self._costs.clear()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _allowed(self) -> tuple[float, float]:
        """(seconds that a slice may take now, seconds after which that may be more)."""
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
        """Credit for the time in which requests have been under way."""
        now = self._clock()
        if self._under_way:
            self._credit.earn(now - self._credited)
        self._credited = now

    def _size(self, kind: str, seconds: float, least: float) -> float | None:
        """The most work that is expected to take so long; None if not even the least is."""
        cost = self._costs[kind]
        if not cost.known:  # somebody has to be the first
            return least if seconds > 0 and not self._under_way else None
        size = cost.size(seconds)
        return None if size < least else least if math.isinf(size) else size

    def _undisturbed(self, seconds: float) -> float:
        """What has just ended, so long after it began, without the slices in it: they would be allowed ever more."""
        began = (now := self._clock()) - seconds
        with self._changed:
            return seconds - sum(max(0.0, min(end, now) - max(start, began)) for start, end in self._ran)
