"""Which replica scores which tiles of a call: shares by speed, tiles not handed out, and which answers count.

Guarantees: the answers that count cover every tile exactly once, whichever replicas gave them and however often a tile
was handed out. Nothing here knows about sockets, clocks or Ray.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zoray.records.tiles import contiguous

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.records import Scores

ALIKE = 1.25  # speeds within this factor count as equal: a measured speed varies as much from call to call


def cut(tiles: Sequence[int], speeds: Sequence[float]) -> list[list[int]]:
    """Runs of tiles, one for each speed, so that all are done at about the same time.

    An unknown speed (0) counts as the mean of the others. A slow worker may be left out.
    """
    known = [speed for speed in speeds if speed > 0]
    if not known or max(known) <= ALIKE * min(known):
        return contiguous(list(tiles), len(speeds))
    mean = sum(known) / len(known)
    rates = [speed or mean for speed in speeds]
    counts = [0] * len(rates)
    ends = [(1 / rate, k) for k, rate in enumerate(rates)]  # when each would finish one more tile
    heapq.heapify(ends)
    for _ in tiles:
        _, k = ends[0]
        counts[k] += 1
        heapq.heapreplace(ends, ((counts[k] + 1) / rates[k], k))
    runs, start = [], 0
    for count in counts:
        runs.append(list(tiles[start : start + count]))
        start += count
    return runs


@dataclass
class Shares:
    """The tiles of one call, numbered from 0. Workers are known by name."""

    count: int
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tiles each worker is scoring
    late: set[str] = field(default_factory=set)  # workers whose tiles are handed out again
    answers: dict[tuple[int, ...], tuple[str, Scores]] = field(default_factory=dict)  # the answers that count
    answered: set[int] = field(default_factory=set)  # their tiles

    @property
    def done(self) -> bool:
        """Whether every tile has an answer."""
        return len(self.answered) == self.count

    def missing(self) -> list[int]:
        """Tiles without an answer that no worker holds, except late ones."""
        if not self.held and not self.answers:
            return list(range(self.count))
        held = {tile for name, share in self.held.items() if name not in self.late for tile in share}
        return [tile for tile in range(self.count) if tile not in self.answered and tile not in held]

    def hand_out(self, idle: Mapping[str, float], busy: Sequence[float] = ()) -> list[tuple[str, tuple[int, ...]]]:
        """(worker, tiles) for the idle workers, {name: speed}; some tiles are left for busy ones, soon idle too."""
        if not idle or self.done or not (missing := self.missing()):
            return []
        runs = cut(missing, [*idle.values(), *busy])
        given = [(name, tuple(run)) for name, run in zip(idle, runs, strict=False) if run]
        if not given:  # so few tiles that all would be left to faster workers, which are busy
            given = [(max(idle, key=lambda name: idle[name]), tuple(missing))]
        self.held.update(given)
        return given

    def answer(self, name: str, scores: Scores) -> bool:
        """Take a worker's answer for the tiles it holds; returns whether it counts.

        It counts if none of its tiles has an answer yet: the sums of a share can't be divided. Tiles still missing are
        handed out again.
        """
        share = self.held.pop(name)
        self.late.discard(name)
        if not self.answered.isdisjoint(share):
            return False
        self.answers[share] = (name, scores)
        self.answered.update(share)
        return True

    def drop(self, name: str) -> None:
        """Drop a worker: the tiles it holds are missing again."""
        self.held.pop(name, None)
        self.late.discard(name)

    def reject(self, name: str) -> None:
        """Discard a worker's answers, past and pending."""
        self.drop(name)
        self.answers = {share: answer for share, answer in self.answers.items() if answer[0] != name}
        self.answered = {tile for share in self.answers for tile in share}
