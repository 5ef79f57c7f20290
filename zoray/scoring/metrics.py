"""From the scores of a grid to the losses of its probes and the metrics of a split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import ConfigError
from zoray.records.tiles import Grid, losses_of, mean
from zoray.tasks.batches import labels_of, part_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.records import Probe, Scores
    from zoray.scoring.workload import Workload
    from zoray.tasks.batches import Order


class Losses:
    """The losses of a step's probes. F1 is defined on a batch, so it is computed here, from the predicted options."""

    def __init__(self, workload: Workload, order: Order) -> None:
        self._pool = workload.parts[0].objective.pool if workload.pooled else None
        self._labels = labels_of(workload.splits.train) if workload.pooled else np.zeros(0)
        self._order = order

    def of(self, probes: Sequence[Probe], grid: Grid, scores: Scores) -> tuple[list[tuple[float, ...]], int]:
        """A row for each probe, and how many examples each of its entries covers, as tiles.losses_of."""
        rows, examples = losses_of(probes, grid.tiles, scores, grid.per_example)
        if self._pool is None:
            return rows, examples
        places: dict[Probe, list[int]] = {probe: [] for probe in probes}
        for tile in grid.tiles:
            for probe in tile.probes:
                places[probe] += range(tile.start, tile.stop)
        labels = self._labels[self._order.step(grid.step)]
        pooled = [(self._pool(row, labels[places[probe]]),) for probe, row in zip(probes, rows, strict=True)]
        return pooled, len(rows[0])


def check_rewards(scores: Scores, workload: Workload, where: str) -> None:
    """Raise ConfigError, with the first traceback, if too many completions have no reward."""
    if not scores.failed:
        return
    allowed = min(o.max_failed for part in workload.parts for o in (part.objective, part.evaluator))
    if scores.failed > allowed * scores.written:
        raise ConfigError(
            f"{where}: expected a reward for at least {1 - allowed:.0%} of the completions (objective.max_failed="
            f"{allowed}); got none for {scores.failed} of {scores.written}. Fix the function, or raise the share. The "
            f"first failure:\n{scores.failure}"
        )


def worth(score: float, losses: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """What each example is worth, (n,), higher is better: its score; where the split's `score` is NaN, -loss."""
    return columns["score"] if math.isfinite(score) else -losses


def metrics(
    workload: Workload, split: str, losses: np.ndarray, columns: Mapping[str, np.ndarray]
) -> tuple[float, str | None, dict[str, float]]:
    """(score, its name, other numbers) of a split from its examples' losses and columns, (n,) each.

    The score of a mixture is the mean over its parts by weight, without parts that have no metric.
    """
    if "score" not in columns or not workload.parts:
        return math.nan, None, {}
    labels, part_of, found = labels_of(workload.splits[split]), part_numbers(workload.splits[split]), []
    for number, part in enumerate(workload.parts):
        own = part_of == number
        values = {name: columns[name][own] for name in part.evaluator.columns}
        numbers = part.evaluator.metrics(columns["score"][own], values, labels[own]) if own.any() else {}
        found.append((part, numbers, mean(losses[own].tolist()) if own.any() else math.nan))
    if len(found) == 1:
        ((part, numbers, _),) = found
        metric = part.evaluator.metric
        score = numbers.get(metric, math.nan) if metric else math.nan
        return score, metric, {name: value for name, value in numbers.items() if name != metric}
    others = {f"{part.name}/{name}": value for part, numbers, _ in found for name, value in numbers.items()}
    others |= {f"{part.name}/loss": loss for part, _, loss in found}
    scored = [
        (part.weight, numbers[metric]) for part, numbers, _ in found if (metric := part.evaluator.metric) in numbers
    ]
    if not scored:
        return math.nan, None, others
    return sum(weight * value for weight, value in scored) / sum(weight for weight, _ in scored), "score", others
