"""The examples that a step sees, for tests that need no more of a run than that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from zoray.tasks.batches import Order

if TYPE_CHECKING:
    from collections.abc import Sequence


def batch_indices(data_seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of n examples a step sees, (batch,)."""
    return Order(SimpleNamespace(data_seed=data_seed, batch=batch, stratify=False), np.zeros(n, np.int64)).step(step)


def stratified_indices(data_seed: int, step: int, batch: int, labels: Sequence[int]) -> np.ndarray:
    """The same with labels in turn."""
    spec = SimpleNamespace(data_seed=data_seed, batch=batch, stratify=True)
    return Order(spec, np.array(labels, np.int64)).step(step)
