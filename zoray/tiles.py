"""A step's work as tiles: what is handed to a replica as a whole, and how the scores of tiles add up.

The grid follows from the config and never from who is there, so the number of replicas changes no sum.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from zoray.records import Probe, Tile, TileScore

if TYPE_CHECKING:
    from collections.abc import Sequence


def tile_grid(
    probes: Sequence[Probe], examples: int, tile_examples: int, split: str = "train", shared: bool = True
) -> list[Tile]:
    """All probes x all examples, cut into tiles: the probes of one direction, on up to `tile_examples` examples.

    Plus and minus of a direction stay in one tile, so that both are scored by one replica: what a device adds to both
    cancels in their difference. With `shared=False` the directions share the examples out among them: direction k of K
    sees examples [k * n/K, (k + 1) * n/K).
    """
    groups = list(by_direction(probes).values())
    width = examples if shared else examples // len(groups)
    tiles = []
    for k, group in enumerate(groups):
        first = 0 if shared else k * width
        for start in range(first, first + width, tile_examples):
            tiles.append(Tile(tuple(group), start, min(start + tile_examples, first + width), split))
    return tiles


def by_direction(probes: Sequence[Probe]) -> dict[int, list[Probe]]:
    """Probes by the direction that they lie on; the centre (scale 0) lies on none and has the key -1."""
    groups: dict[int, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.index if probe.scale else -1, []).append(probe)
    return groups


def join_tiles(
    probes: Sequence[Probe], tiles: Sequence[Tile], scores: Sequence[TileScore]
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Losses and correctness of each probe on each of its examples, in the order of the grid: (losses, correct)."""
    position = {probe: i for i, probe in enumerate(probes)}
    losses: list[tuple[float, ...]] = [()] * len(probes)
    correct: list[tuple[float, ...]] = [()] * len(probes)
    for tile, score in zip(tiles, scores, strict=True):
        for probe, some_losses, some_correct in zip(tile.probes, score.losses, score.correct, strict=True):
            i = position[probe]
            losses[i] += some_losses
            correct[i] += some_correct
    return losses, correct


def mean(values: Sequence[float]) -> float:
    """The mean of an exactly rounded sum, so that it is free of order; nan or inf where a value is not finite."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # an infinity, or two of both signs
        return math.nan


def contiguous(items: list[int], shares: int) -> list[list[int]]:
    """Cut a list into `shares` runs of nearly equal length."""
    cuts = [round(k * len(items) / shares) for k in range(shares + 1)]
    return [items[a:b] for a, b in pairwise(cuts)]
