"""For tests of residual feedback: runs of it on the reference engine, and states that it has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chatty import experiment

from zoray.methods.estimators.feedback import Feedback
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora
from zoray.records import Commit

if TYPE_CHECKING:
    from pathlib import Path

    from zoray.run.experiment import Experiment
    from zoray.scoring.replica import Replica

SPACE = Lora(rank=2, alpha=4.0, targets="residual", train="AB")


def guided(folder: Path, task: Any, objective: Any, runs: Path, **settings: Any) -> Experiment:
    """A run of a few steps with feedback."""
    parts = {"space": SPACE, "estimator": Feedback(lens=8), "optimizer": Sgd(lr=0.01, momentum=0.9)}
    return experiment(folder, task, objective, runs, **(parts | settings))


def commit(step: int, numbers: int, matrices: int, **options: Any) -> Commit:
    """Signs by chance."""
    bits = np.random.default_rng(step).integers(0, 2, numbers).astype(np.uint8)
    gains = tuple(float(np.float32(0.02 * (k + 1))) for k in range(matrices))
    return Commit(step, (), gains=gains, signs=np.packbits(bits).tobytes(), **options)


def moved(replica: Replica) -> Replica:
    """The same, in a state in which neither A nor B is as it began."""
    space, matrices = replica.spec.space, replica.workload.matrices
    replica.apply([commit(step, space.trained(matrices), len(space.select(matrices))) for step in range(2)])
    return replica
