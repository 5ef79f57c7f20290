"""How loud is the noise of a loss beside the difference that a step measures? For one dtype of the weights.

    python -m benchmarks.noise [model=smollm2] [dtype=float32] [space=lora] [batch=16] [probes=16]

A step's signal is D(eps) = L(x + eps z) - L(x - eps z) of its batch: the median of |D| over some directions. The noise
is how much a loss differs for reasons that are none. Three are the engine's: the same batch scored again (`repeat`), in
another order (`reorder`), beside other sequences (`mates`), as root mean squares of the difference of two scorings. The
fourth is `rounding`, as a standard deviation of D: how far D is from smooth between 0.9 and 1.1 of an eps. What an
estimator sees is signal plus all of them, so an eps is sound where the signal is ten times the loudest. Models other
than smollm2 have random weights, written to a file, since those of load_format=dummy are too small to round.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.options import parse
from benchmarks.shapes import vocabulary, with_weights
from benchmarks.timing import spread
from benchmarks.workload import random_workload
from zoray.records import Probe
from zoray.records.tiles import mean
from zoray.scoring.replica import Replica
from zoray.scoring.scorer import NEAR, rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SOUND = 10.0  # how many times the noise a signal has to be
REPEATS = 8  # of every reason for noise
GRAIN = float(np.finfo(np.float64).eps)  # of a mean loss: where no noise is seen, and maybe no signal either
CENTRE = Probe(0, 0, 0.0)
DEFAULTS = {"model": "smollm2", "dtype": "float32", "space": "lora", "batch": "16", "probes": "16", "invariant": ""}


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


def measure(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Noise, and the signal for every eps, in nats of a batch's mean loss. `where`: further settings of the experiment.

    `invariant=1` turns vLLM's batch-invariant kernels on, before vLLM is imported.
    """
    if options["invariant"]:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    e, workload = weighted(options["model"], options["dtype"], folder, (f"space={options['space']}", *where))
    replica, batch = Replica(e.spec, workload), np.arange(int(options["batch"]))
    found = noise(replica, batch)
    rows = [{"eps": eps} | signal(replica, batch, eps, int(options["probes"])) for eps in EPS]
    for row in rows:
        row["over noise"] = row["signal"] / max(row["rounding"], GRAIN, *found.values())
    sound = [row["eps"] for row in rows if row["over noise"] >= SOUND]
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        replica.losses((Probe(0, 0, 1e-3), Probe(0, 0, -1e-3)), batch)
        seconds.append(time.perf_counter() - began)
    result = {"benchmark": "noise", **options, "dtype": replica.info.dtype}
    result |= {"loss": float(replica.losses((CENTRE,), batch).mean()), **found}
    return result | {"sound from eps": min(sound, default=None), "seconds": spread(seconds), "rows": rows}


def noise(replica: Any, batch: np.ndarray) -> dict[str, float]:
    """Root mean squares of the difference of two scorings of a batch (n,) at the state itself, by reason."""
    random, others = np.random.default_rng(0), np.arange(len(batch), len(replica.workload.splits.train))
    expected = mean(replica.losses((CENTRE,), batch)[0].tolist())  # exact, so in any order

    def mean_of(examples: np.ndarray) -> float:
        return mean(replica.losses((CENTRE,), examples)[0][np.isin(examples, batch)].tolist())

    def beside() -> np.ndarray:
        mates = random.choice(others, min(len(batch), len(others)), replace=False)
        return random.permutation(np.concatenate([batch, mates]))

    ways = {"repeat": lambda: batch, "reorder": lambda: random.permutation(batch), "mates": beside}
    squares = {name: [(mean_of(way()) - expected) ** 2 for _ in range(REPEATS)] for name, way in ways.items()}
    return {name: float(np.sqrt(np.mean(values))) for name, values in squares.items()}


def signal(replica: Any, batch: np.ndarray, eps: float, probes: int) -> dict[str, float]:
    """Signal and rounding of a batch's (n,) mean loss under some directions."""
    differences = np.zeros((len(NEAR), probes))
    for k in range(probes):
        both = tuple(Probe(0, k, sign * eps * near) for near in NEAR for sign in (1.0, -1.0))
        plus, minus = replica.losses(both, batch).mean(axis=1).reshape(-1, 2).T
        differences[:, k] = plus - minus
    return {"signal": float(np.median(np.abs(differences[NEAR.index(1.0)]))), "rounding": rounding(differences)}


def weighted(model: str, dtype: str, folder: Path, settings: Sequence[str]) -> tuple[Any, Any]:
    """An experiment and its workload on a model that has weights; made in the folder, but for smollm2."""
    from zoray.run.config import build_experiment, compose
    from zoray.scoring.workload import load_workload

    common = [f"model.dtype={dtype}", *settings]
    if model == "smollm2":
        e = build_experiment(compose("config", common))
        return e, load_workload(e.spec)
    path = with_weights(model, folder / model)
    e = build_experiment(compose("config", ["model=hf", f"model.path={path}", "run.stratify=false", *common]))
    return e, random_workload(e.spec, path, vocabulary(model), 64)


if __name__ == "__main__":
    main(sys.argv[1:])
