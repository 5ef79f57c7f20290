"""Limits the tokens of tuning that a step of requests takes along.

A decoding step reads the whole model for a few tokens; further tokens in it cost only their arithmetic: next to nothing
on a GPU, most of their usual cost on a CPU. (Sarathi-Serve, https://arxiv.org/abs/2403.02310, does it the other way
round: decoding is piggybacked on chunks of prompts.) Guarantees: with `max_slowdown` s, a step with tuning is expected
to take at most s times as long as a slow step without it (the 95th percentile), and tuning adds at most `SHARE` of the
requests' time to steps. One step in `RARE`, too few to move the 99th percentile, may take longer: by one usual step
with s = 1.5, or by the time of the fewest tokens, if the first token is expensive. It is on a CPU, where a step without
adapters is twice as fast as one with any.
"""

from __future__ import annotations

from collections import deque
from statistics import median, quantiles

from zoray.engines.shared.cost import LONGEST, RARE, Cost, Credit

FEWEST = 8  # tokens
MOST_ALONE = 64  # tokens of a step without requests
USUAL_OF = 16  # steps without tuning until a usual one is known


class StepBudget:
    """Observations of one engine's steps. Seconds are those of whole steps."""

    def __init__(self, max_slowdown: float, most: int) -> None:
        self.max_slowdown, self._most = max_slowdown, most
        self._plain: deque[float] = deque(maxlen=256)  # seconds of steps without tuning
        self._cost, self._credit = Cost(), Credit()  # of tokens of tuning: the seconds that they add to a step
        self._since_long = RARE  # steps since tuning last made one longer than the usual limit

    def tokens(self) -> int:
        """The number of tokens that the next step may take along."""
        if len(self._plain) < USUAL_OF or self.max_slowdown <= 1:
            return 0
        if not self._cost.known:  # a first step has to be tried
            return FEWEST if self._credit.left > 0 else 0
        rare, seconds = self._since_long >= RARE, self._limit()
        if rare:
            seconds = max(seconds, min(min(2 * (self.max_slowdown - 1), 1.0) * median(self._plain), LONGEST))
        if self._credit.left < seconds:  # few large pieces rather than many small ones: each has a fixed cost
            return 0
        found = self._cost.size(seconds)
        if found >= FEWEST:
            return int(min(found, 4 * self._cost.largest, self._most))  # at most four times the largest known
        return FEWEST if rare else 0

    def alone(self) -> int:
        """The tokens that a step without requests may have; the next request may have to wait for it.

        Its expected time is `max_slowdown` times a usual step of requests, or the time of the fewest tokens.
        """
        if not self._cost.known or not self._plain:
            return FEWEST if self._plain else MOST_ALONE
        room = self._cost.size((self.max_slowdown - 1) * median(self._plain))
        return int(min(max(room, FEWEST), MOST_ALONE))

    @property
    def starved(self) -> bool:
        """Whether tuning has run no token for seconds, with its credit full."""
        return self._credit.left >= LONGEST

    def took(self, tokens: int, seconds: float) -> None:
        """Note a step in which each request got one token, and tuning ran this many."""
        self._credit.earn(seconds)
        self._since_long += 1
        if not tokens:
            self._plain.append(seconds)
        elif self._plain:
            added = max(0.0, seconds - median(self._plain))
            self._cost.took(tokens, added)
            self._credit.spend(added)
            if len(self._plain) >= USUAL_OF and added > self._limit():
                self._since_long = 0

    def _limit(self) -> float:
        """Seconds that tuning may add to any step."""
        usual, slow = median(self._plain), quantiles(self._plain, n=20, method="inclusive")[-1]
        return min(self.max_slowdown * slow - usual, 2 * usual, LONGEST)
