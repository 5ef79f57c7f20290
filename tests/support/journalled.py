"""For tests: runs of which only the journal was written, without any scoring, and what their states were."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from zoray.methods.optimizers import to_float32
from zoray.methods.spaces import LowRank
from zoray.models.folder import linear_matrices, load_matrices, weights_hash
from zoray.records import Commit, Evaluation
from zoray.run import journal
from zoray.run.journal import StepRecord

SEED, STEPS = 5, 5


def commit(step: int) -> Commit:
    """Large enough to change what the model says, small enough to leave it finite; one direction is silent."""
    return Commit(step, (to_float32(-0.012), to_float32(0.018 + 0.001 * step), 0.0))


@dataclass
class Made:
    """A run's folder, and what its state was after each step: digests and effective weights in float64."""

    folder: Path
    digests: list[str]
    effective: list[dict[str, np.ndarray]]


def make(folder, model, space, commits=commit, steps=STEPS, dtype="float32") -> Made:
    """A run as the driver journals it, without any scoring."""
    folder.mkdir()
    matrices = linear_matrices(model, space.targets)
    original = load_matrices(model, space.select(matrices), "float32")
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in original.items()}
    state = space.open(matrices, SEED, weights=weights)
    header = {
        "model": str(model),
        "revision": None,
        "weights": weights_hash(model),
        "matrices": {name: list(shape) for name, shape in space.select(matrices).items()},
        "space": {"name": type(space).__name__, **asdict(space)},
        "run": {"seed": SEED, "steps": steps},
        "dtype": dtype,
    }

    def effective() -> dict[str, np.ndarray]:
        now = {name: (b.double() @ a.double()).numpy() for name, a, b in centre(state)}
        return {name: weights[name].double().numpy() + space.scaling * now.get(name, 0) for name in weights}

    made = Made(folder, [state.digest()], [effective()])
    with journal.Journal.create(folder / journal.FILE_NAME, header) as log:
        for step in range(steps):
            log.append(StepRecord(commits(step), (0.7,) * 3, made.digests[-1] if step % 2 == 0 else None))
            state.apply(commits(step))
            made.digests.append(state.digest())
            made.effective.append(effective())
    return made


def centre(state):
    """(name, A, B) of the unperturbed state; nothing where all of it stands in the weights."""
    return [] if isinstance(state.space, LowRank) else state.tensors(state.flat)


def measured(folder: Path, *evaluations: tuple[int, str, float]) -> None:
    """metrics.jsonl with evaluations (step, split, accuracy), as a monitor writes them."""
    records = [Evaluation(step, split, 0.5, accuracy, 10, 100, 0.5) for step, split, accuracy in evaluations]
    lines = [json.dumps({"kind": "evaluation", **asdict(record)}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
