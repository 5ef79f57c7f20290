"""A step's work as tiles, each scored by one replica as a whole, and how the scores of tiles add up.

The grid follows from the config and never from the replicas, so their number changes no sum. Replicas add up losses as
whole numbers of 2^-40 nats: such a sum is exact in any order, so a step's result does not depend on how its batch was
cut either, and a replica answers with eight bytes a probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.records import Probe, Scores, Tile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

UNITS = 2.0**40  # in one nat
LARGEST = 2.0**13  # nats; a larger loss is as useless as one that is not finite, and counts as not finite
MAX_TILE = 1023  # examples, so that a sum stays below 2^63 units
NOT_FINITE = -(2**63)
EVALUATED = 32  # examples in a tile of dev or test
LEVELS = 127  # largest sum over all tiles of a number's feedback: one byte


@dataclass(frozen=True)
class Grid:
    """All tiles of a step, or of a split at the state before it. Messages name only the step and numbers of tiles.

    Each group of probes (plus and minus of a direction, or the centre) is scored on `examples` examples, in tiles of up
    to `tile_examples`. All probes of a group stay in one tile, so that one replica scores them: a device's error that
    all share cancels in their differences. With `shared=False` the examples are divided among the groups: group k of K
    sees examples [k * n/K, (k + 1) * n/K). In a guided step the first group sees all examples, every other group one.
    Tiles are made on demand: a replica needs only its own.
    """

    step: int
    split: str = "train"
    groups: int = 0
    group: Callable[[int], tuple[Probe, ...]] = lambda _: ()
    examples: int = 0
    tile_examples: int = EVALUATED
    shared: bool = True
    per_example: bool = False  # whether the loss of each example is needed, not only sums
    guided: bool = False  # whether the first group is the centre, which also gives feedback, see feedback.py

    @classmethod
    def of(cls, spec: Any, step: int, split: str = "train", count: int = 0, pooled: bool = False) -> Grid:
        """The grid of a run's step (`spec`: a ReplicaSpec), or of the unperturbed model on `count` of another split.

        `pooled`: a batch's loss is not the mean over its examples, so the loss of each is needed.
        """
        if split != "train":
            return cls(step, split, 1, lambda _: (Probe(step, 0, 0.0),), count, per_example=True)
        e = spec.estimator
        group, examples = partial(e.group, step), spec.batch
        per_example = e.per_example or pooled
        return cls(step, split, e.groups, group, examples, spec.tile_examples, e.shared, per_example, e.guided)

    @property
    def _width(self) -> int:
        """Examples in a group."""
        return self.examples if self.shared else self.examples // self.groups

    def __len__(self) -> int:
        pieces = -(-self._width // self.tile_examples)
        return pieces + self.groups - 1 if self.guided else self.groups * pieces if self.groups else 0

    def __getitem__(self, number: int) -> Tile:
        """The tile of this number."""
        if not 0 <= number < len(self):
            raise IndexError(f"expected a tile from 0 to {len(self) - 1}; got {number}")
        width, pieces = self._width, -(-self._width // self.tile_examples)
        if self.guided and number >= pieces:
            k = number - pieces + 1
            start = (self.step * (self.groups - 1) + k - 1) % width
            return Tile(self.group(k), start, start + 1, self.split)
        k, piece = divmod(number, pieces)
        first = 0 if self.shared else k * width
        start = first + piece * self.tile_examples
        return Tile(self.group(k), start, min(start + self.tile_examples, first + width), self.split)

    @property
    def levels(self) -> int:
        """The largest whole number in a tile's feedback, so that the sum over all tiles fits a byte."""
        return max(1, LEVELS // -(-self._width // self.tile_examples))

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles."""
        return tuple(self[number] for number in range(len(self)))


def gives_feedback(tile: Tile) -> bool:
    """Whether a tile of a guided step is the centre's, see feedback.py."""
    return tile.split == "train" and len(tile.probes) == 1 and not tile.probes[0].scale


def probes_of(tiles: Sequence[Tile]) -> list[Probe]:
    """The tiles' probes, each once, in order of appearance."""
    return list(dict.fromkeys(probe for tile in tiles for probe in tile.probes))


def summed(tiles: Sequence[Tile], losses: np.ndarray) -> np.ndarray:
    """Sums in units over all examples of each probe of some tiles, (probes,) int64; NOT_FINITE where a loss is not.

    `losses` (n,): the loss of each example, tile after tile, probe after probe.
    """
    counts = np.array([tile.stop - tile.start for tile in tiles for _ in tile.probes], np.int64)
    if not len(counts):
        return np.zeros(0, np.int64)
    bad = ~(np.abs(losses) < LARGEST)
    units = np.where(bad, 0.0, np.rint(losses * UNITS)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    sums = np.where(np.logical_or.reduceat(bad, starts), NOT_FINITE, np.add.reduceat(units, starts))
    return _added(tiles, zip((probe for tile in tiles for probe in tile.probes), sums.tolist(), strict=True))


def _added(tiles: Sequence[Tile], parts: Iterable[tuple[Probe, int]]) -> np.ndarray:
    """The sum of each probe's parts, in the order of `probes_of`; NOT_FINITE if a part is."""
    totals: dict[Probe, int] = {}
    for probe, part in parts:
        total = totals.get(probe, 0)
        fits = NOT_FINITE not in (part, total) and abs(part + total) < -NOT_FINITE
        totals[probe] = part + total if fits else NOT_FINITE
    return np.array([totals[probe] for probe in probes_of(tiles)], np.int64)


def join_scores(tiles: Sequence[Tile], answers: Sequence[tuple[Sequence[int], Scores]], per_example: bool) -> Scores:
    """Scores of all tiles together, from (tile numbers, their scores) of each answer."""
    parts, columns = [scores for _, scores in answers], None
    if per_example:
        joined = _in_order(tiles, [(numbers, scores.losses) for numbers, scores in answers])
        if parts and all(part.columns is not None for part in parts):
            named = [(numbers, scores.columns or {}) for numbers, scores in answers]
            columns = {
                name: _in_order(tiles, [(numbers, values[name]) for numbers, values in named]) for name in named[0][1]
            }
    else:
        joined = _added(
            tiles,
            (
                (probe, total)
                for numbers, scores in answers
                for probe, total in zip(probes_of([tiles[i] for i in numbers]), scores.losses.tolist(), strict=True)
            ),
        )
    tokens, written, failed = (sum(getattr(part, name) for part in parts) for name in ("tokens", "written", "failed"))
    failure = next((part.failure for part in parts if part.failure), "")
    feedback = _joined_feedback([part.feedback for part in parts if part.feedback is not None])
    return Scores(joined, math.fsum(part.score for part in parts), tokens, columns, written, failed, failure, feedback)


def _joined_feedback(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """The sum of some tiles' feedback, exact in any order; one byte a number if it fits."""
    if len(parts) < 2:
        return parts[0] if parts else None
    total = np.asarray(np.sum(parts, axis=0, dtype=np.int32))
    return total.astype(np.int8) if int(np.abs(total).max(initial=0)) <= LEVELS else total


def _in_order(tiles: Sequence[Tile], answers: Sequence[tuple[Sequence[int], np.ndarray]]) -> np.ndarray:
    """Each example's value, tile after tile, from (tile numbers, their examples' values) of each answer."""
    of_tile: list[np.ndarray] = [np.zeros(0)] * len(tiles)
    for numbers, values in answers:
        sizes = [scored([tiles[i]]) for i in numbers]
        for i, part in zip(numbers, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            of_tile[i] = part
    return np.concatenate([np.zeros(0), *of_tile])


def losses_of(
    probes: Sequence[Probe], tiles: Sequence[Tile], scores: Scores, per_example: bool = False
) -> tuple[list[tuple[float, ...]], int]:
    """A row for each probe, and the number of examples behind each entry: (rows, n).

    A row holds the mean loss alone; with `per_example` the loss of each example, in the order of the grid.
    """
    seen, rows, begin = dict.fromkeys(probes, 0), dict[Probe, tuple[float, ...]]((probe, ()) for probe in probes), 0
    for tile in tiles:
        width = tile.stop - tile.start
        for probe in tile.probes:
            seen[probe] += width
            if per_example:
                rows[probe] += tuple(scores.losses[begin : begin + width].tolist())
                begin += width
    if per_example:
        return list(rows.values()), 1
    for probe, total in zip(probes_of(tiles), scores.losses.tolist(), strict=True):
        rows[probe] = (math.nan if total == NOT_FINITE else total / (int(UNITS) * seen[probe]),)
    return list(rows.values()), seen[probes[0]]


def scored(tiles: Sequence[Tile]) -> int:
    """How many times examples are scored, over all probes."""
    return sum(len(tile.probes) * (tile.stop - tile.start) for tile in tiles)


def mean(values: Sequence[float]) -> float:
    """The mean by an exactly rounded sum, the same in any order; nan or inf where a value is not finite."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # an infinity, or two of both signs
        return math.nan


def as_ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending whole numbers as ranges (first, last + 1)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


def contiguous(items: list[int], shares: int) -> list[list[int]]:
    """Cut a list into `shares` runs of nearly equal length."""
    cuts = [round(k * len(items) / shares) for k in range(shares + 1)]
    return [items[a:b] for a, b in pairwise(cuts)]
