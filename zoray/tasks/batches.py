"""Which examples a step sees.

Guarantees: they depend only on (data seed, step, batch size) and on the number, labels and parts of the examples, and
are the same on every machine; over the steps, every example of a label (or of a part) comes equally often.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.methods.directions import name_hash, philox_numpy
from zoray.records import ReadAsItGoes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.records import Example

_SHUFFLE = name_hash("zoray.data.shuffle")
CYCLE = 1000  # positions over which the parts of a mixture get their shares
CHUNK = 1 << 16  # random words made at a time


def labels_of(examples: Sequence[Example]) -> np.ndarray:
    """The label of each example, (n,) int64; a split that is read as it goes knows them already."""
    if isinstance(examples, ReadAsItGoes):
        return examples.labels
    return np.array([example.label for example in examples], np.int64)


def part_numbers(examples: Sequence[Example]) -> np.ndarray:
    """The part of a mixture that each example belongs to, (n,) int64."""
    if isinstance(examples, ReadAsItGoes):
        return examples.parts
    return np.array([example.part for example in examples], np.int64)


class Order:
    """The examples of all steps.

    Args:
        spec: a ReplicaSpec, or anything with its `data_seed`, `batch` and `stratify`.
        labels: (n,) of all training examples.
        parts: (n,) the part of a mixture that each belongs to; None if there is only one.
        weights: of the parts.
    """

    def __init__(
        self, spec: Any, labels: np.ndarray, parts: np.ndarray | None = None, weights: Sequence[float] = (1.0,)
    ) -> None:
        self._seed, self._batch = spec.data_seed, spec.batch
        parts = np.zeros(len(labels), np.int64) if parts is None else parts
        self._cycle, self._rank = _cycle(tuple(weights))
        self._counts = np.bincount(self._cycle, minlength=len(weights))
        self._members = [np.flatnonzero(parts == part) for part in range(len(weights))]
        self._strata = [_strata(labels[own]) if spec.stratify else None for own in self._members]

    @property
    def labels(self) -> int:
        """How many labels batches are balanced over; 1 if they are not."""
        return max(1 if strata is None else len(strata) for strata in self._strata)

    def step(self, step: int) -> np.ndarray:
        """The examples that a step sees, (batch,)."""
        positions = np.arange(step * self._batch, (step + 1) * self._batch)
        if len(self._members) == 1:
            return self._of_part(0, positions)
        chosen, at = np.zeros(len(positions), np.int64), positions % len(self._cycle)
        part_of = self._cycle[at]
        places = positions // len(self._cycle) * self._counts[part_of] + self._rank[at]
        for part in np.unique(part_of):
            own = part_of == part
            chosen[own] = self._of_part(part, places[own])
        return chosen

    def _of_part(self, part: int, places: np.ndarray) -> np.ndarray:
        """The examples at these places of a part's own order."""
        members, strata, seed = self._members[part], self._strata[part], (self._seed + 7919 * part) % 2**32
        if strata is None:
            return members[_at(seed, places, len(members))]
        chosen = np.zeros(len(places), np.int64)
        for number, own in enumerate(strata):
            here = places % len(strata) == number
            if here.any():  # labels of equal counts get orders of their own
                chosen[here] = own[_at((seed + number) % 2**32, places[here] // len(strata), len(own))]
        return members[chosen]


def _at(seed: int, places: np.ndarray, n: int) -> np.ndarray:
    """The examples at these places of the endless order of n examples."""
    chosen = np.zeros(len(places), np.int64)
    for epoch in np.unique(places // n):
        own = places // n == epoch
        chosen[own] = _permutation(seed, int(epoch), n)[places[own] % n]
    return chosen


def _strata(labels: np.ndarray) -> list[np.ndarray]:
    """The positions of each label, labels in ascending order."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


@lru_cache(maxsize=16)
def _cycle(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The part at each position of a cycle, spread evenly by weight, and which of that part's turns it is."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    exact = np.array(weights) / sum(weights) * CYCLE
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for part in np.argsort(counts - exact, kind="stable")[: max(0, CYCLE - int(counts.sum()))]:
        counts[part] += 1  # by largest remainder
    turns = [(np.arange(count) + 0.5) / count for count in counts]
    part_of = np.repeat(np.arange(len(weights)), counts)
    order = np.lexsort((part_of, np.concatenate(turns)))
    return part_of[order], np.concatenate([np.arange(count) for count in counts])[order]


@lru_cache(maxsize=16)
def _permutation(data_seed: int, epoch: int, n: int) -> np.ndarray:
    """An order of n examples, sorted by 64 random bits each: the same on every machine."""
    keys = np.zeros(n, np.uint64)
    for first in range(0, n, CHUNK):
        numbers = np.arange(first, min(first + CHUNK, n))
        words = philox_numpy((numbers, epoch, 0, _SHUFFLE >> 32), (data_seed, _SHUFFLE & 0xFFFFFFFF)).astype(np.uint64)
        keys[numbers] = words[:, 0] << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable")
