"""How much a score differs where exact arithmetic has nothing to tell: by what it is scored with, and by rounding.

A difference of probes that is smaller is chance, and so is a difference of replicas.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import Probe
from zoray.records.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.scoring.scorer import Scorer

NEAR = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a probe's scale


def rounding(losses: np.ndarray) -> float:
    """Standard deviation of the error of losses (5, n) that n smooth functions take at five equidistant points.

    A fourth difference is zero for every cubic; that of independent errors has 1 + 16 + 36 + 16 + 1 times their
    variance.
    """
    fourth = np.array([1.0, -4.0, 6.0, -4.0, 1.0]) @ losses
    return math.sqrt(mean((fourth**2).tolist()) / 70)


def score_noise(scorer: Scorer, probes: Sequence[Probe], examples: int = 8) -> tuple[float, float]:
    """Standard deviations of a training example's loss, and of its surprise (see Scorer), for no reason of its own.

    An objective that is not smooth has no noise to tell apart from its steps: 0.

    Args:
        scorer: at the state before a step.
        probes: of that step.
        examples: training examples to try, at most.
    """
    chosen = np.arange(min(examples, len(scorer.workload.splits.train)))
    centre = Probe(probes[0].step, 0, 0.0)
    together = _values(scorer, (centre,), chosen)
    alone = [_values(scorer, (centre,), chosen[i : i + 1]) for i in chosen]
    squares = (together - np.concatenate(alone, axis=1)) ** 2
    packing = [math.sqrt(mean(row.tolist()) / 2) for row in squares]  # a difference of two has twice one's variance
    probe = next((probe for probe in probes if probe.scale), None)
    if probe is None:
        return packing[0], packing[1]
    near = _values(scorer, tuple(probe._replace(scale=probe.scale * factor) for factor in NEAR), chosen)
    loss, surprise = (math.hypot(a, rounding(row.reshape(len(NEAR), -1))) for a, row in zip(packing, near, strict=True))
    return loss, surprise


def _values(scorer: Scorer, probes: tuple[Probe, ...], examples: np.ndarray) -> np.ndarray:
    """Losses (0 where they are not smooth) and surprises of examples under each of some probes, (2, P * n)."""
    probe_of, tiled = np.repeat(np.arange(len(probes)), len(examples)), np.tile(examples, len(probes))
    return np.stack(scorer.smooth_losses(probes, probe_of, tiled))
