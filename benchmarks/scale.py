"""How many steps a second can the driver make with many replicas? Those score nothing, so the driver is the limit.

    python -m benchmarks.scale [replicas=1,2,8,32,128] [steps=300] [tile_ms=0]

The whole loop of a run (driver.tune): estimate, optimizer, journal, metrics, a message to every replica and an answer;
a step has a pair for each. All replicas are one process without torch or Ray (benchmarks/null.py), on a core of its own
where there are two, so what is measured is the driver.
With `tile_ms` a tile takes so long, which replicas sleep; each has one, so a step can't take less, and `lost_N` is the
share of a step's time with N replicas that goes beyond it. `driver_ms_N` is what a step takes of the driver's core.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.host import toy
from benchmarks.null import start
from benchmarks.options import parse
from benchmarks.timing import spread
from zoray.records import Example, Splits

DEFAULTS = {"replicas": "1,2,8,32,128", "steps": "300", "tile_ms": "0"}
DEV, WINDOWS = 64, 5


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    if (cores := sorted(os.sched_getaffinity(0)))[1:]:
        os.sched_setaffinity(0, cores[:-1])  # the last one is the replicas'
    ideal = float(options["tile_ms"]) / 1000
    result: dict[str, Any] = {"benchmark": "scale", "steps": int(options["steps"]), "tile_seconds": ideal}
    for count in map(int, options["replicas"].split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found, cpu = measure(count, int(options["steps"]), Path(folder), ideal)
            result[f"steps_per_second_{count}"], result[f"driver_ms_{count}"] = found, cpu
            if ideal:
                result[f"lost_{count}"] = {name: 1 - ideal * rate for name, rate in found.items()}
        print(json.dumps(result), file=sys.stderr, flush=True)
    print(json.dumps(result))


def measure(replicas: int, steps: int, folder: Path, seconds: float = 0.0) -> tuple[dict[str, float], dict[str, float]]:
    """Of a run with so many replicas, over windows of its steps; the first tenth warms up.

    Steps a second, and milliseconds of a core that the driver's thread takes for a step.
    """
    from zoray.models.folder import linear_matrices, weights_hash
    from zoray.run.config import build_experiment, compose
    from zoray.run.driver import tune
    from zoray.scoring.workload import Workload

    settings = [
        "model=hf",
        f"model.path={toy(folder)}",
        "space=lozo",
        "estimator=two_point",
        f"estimator.pairs={replicas}",
    ]
    settings += [
        "run.batch=16",
        "run.tile_examples=16",
        f"run.steps={steps}",
        "run.eval_every=0",
        "run.test=false",
        "run.select=last",
    ]
    settings += [f"run.folder={folder}", "logging.progress=false", "logging.curve=false", "run.stratify=false"]
    e = build_experiment(compose("config", settings))
    e.run.path.mkdir()
    examples = tuple(Example("", ("a", "b"), i % 2) for i in range(DEV))
    workload = Workload(folder, linear_matrices(folder, e.space.targets), Splits(examples, examples), {})
    times, cpu = [], []
    pool = start(replicas, {"dev": DEV}, weights_hash(folder), seconds)

    def timed(*arguments: Any) -> Any:
        running = pool(*arguments)
        evaluate = running.evaluate

        def note(grid: Any, digest: bool = False) -> Any:
            times.append(time.monotonic())
            cpu.append(time.thread_time())
            return evaluate(grid, digest)

        running.evaluate = note  # type: ignore[method-assign]
        return running

    tune(e, workload, {}, timed)
    times, cpu = (found[1 + steps // 10 : 1 + steps] for found in (times, cpu))  # without evaluations before and after
    cuts = list(pairwise(round(i * (len(times) - 1) / WINDOWS) for i in range(WINDOWS + 1)))
    rates = [(b - a) / (times[b] - times[a]) for a, b in cuts]
    return spread(rates), spread([1000 * (cpu[b] - cpu[a]) / (b - a) for a, b in cuts])


if __name__ == "__main__":
    main(sys.argv[1:])
