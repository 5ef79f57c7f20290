"""A step's work as tiles: what is handed to a replica as a whole, and how the scores of tiles add up.

The grid follows from the config and never from who is there, so the number of replicas changes no sum.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from zoray.records import Probe, Tile, TileScore

if TYPE_CHECKING:
    from collections.abc import Sequence


def tile_grid(probes: Sequence[Probe], examples: int, tile_examples: int, split: str = "train") -> list[Tile]:
    """All probes x all examples, cut into tiles: the probes of one direction, on `tile_examples` examples.

    Plus and minus of a direction stay in one tile, so that both are scored by one replica: what a device adds to both
    cancels in their difference.
    """
    directions: dict[int, list[Probe]] = {}
    for probe in probes:
        directions.setdefault(probe.index, []).append(probe)
    return [
        Tile(tuple(group), start, min(start + tile_examples, examples), split)
        for group in directions.values()
        for start in range(0, examples, tile_examples)
    ]


def sum_tiles(
    probes: Sequence[Probe], tiles: Sequence[Tile], scores: Sequence[TileScore]
) -> tuple[list[float], list[float]]:
    """Mean loss and accuracy of each probe over its tiles, added in the order of the grid: (losses, accuracies)."""
    position = {probe: i for i, probe in enumerate(probes)}
    loss, correct, count = [0.0] * len(probes), [0.0] * len(probes), [0] * len(probes)
    for tile, score in zip(tiles, scores, strict=True):
        for probe, loss_sum, correct_sum in zip(tile.probes, score.loss_sums, score.correct_sums, strict=True):
            i = position[probe]
            loss[i], correct[i], count[i] = loss[i] + loss_sum, correct[i] + correct_sum, count[i] + score.count
    return [s / n for s, n in zip(loss, count, strict=True)], [s / n for s, n in zip(correct, count, strict=True)]


def contiguous(items: list[int], shares: int) -> list[list[int]]:
    """Cut a list into `shares` runs of nearly equal length."""
    cuts = [round(k * len(items) / shares) for k in range(shares + 1)]
    return [items[a:b] for a, b in pairwise(cuts)]
