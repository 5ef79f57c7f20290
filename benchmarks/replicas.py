"""How much faster are more replicas, when each has cores of its own?

    python -m benchmarks.replicas [replicas=1,2] [rounds=10] [batch=16] [pairs=1] [tile=4] [engine=vllm]

Pools of so many replicas, each with one core and one thread, side by side in one Ray: every round takes a step with
each, in an order drawn anew, while the others wait for messages; `speedup_N` is the median of paired ratios to the
first. A step is the pool's whole step: messages, commits, slots, forward passes, sums of losses.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import Any

import ray

from benchmarks.options import parse
from benchmarks.timing import ratio, rounds, spread
from zoray.pool.on_ray.start import start_pool
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.records import Commit
from zoray.records.tiles import Grid
from zoray.run.config import build_experiment, compose

DEFAULTS = {"replicas": "1,2", "rounds": "10", "batch": "16", "pairs": "1", "tile": "4", "engine": "vllm"}


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    counts = [int(count) for count in options["replicas"].split(",")]
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=sum(counts), include_dashboard=False, log_to_driver=False)
    try:
        print(json.dumps(measure(counts, options)))
    finally:
        ray.shutdown()


def measure(counts: list[int], options: dict[str, str], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Seconds of a step of each pool, and how often that of the first they are."""
    settings = [f"run.batch={options['batch']}", f"run.tile_examples={options['tile']}", "estimator=two_point"]
    settings += [f"estimator.pairs={options['pairs']}", f"engine={options['engine']}"]
    e = build_experiment(compose("config", [*settings, *where]))
    with ExitStack() as stack:
        pools = {
            str(n): stack.enter_context(start_pool(e.spec, Cluster(replicas=n, cpus_per_replica=1), f"pool-{n}"))
            for n in counts
        }

        def step(pool: Pool) -> None:
            number = len(pool.commits)
            pool.evaluate(Grid.of(pool.spec, number))
            pool.commit(Commit(number, (1e-4,) * int(options["pairs"])))

        seconds = rounds({name: lambda pool=pool: step(pool) for name, pool in pools.items()}, int(options["rounds"]))
    first = str(counts[0])
    result: dict[str, Any] = {"benchmark": "replicas", "tiles": len(Grid.of(e.spec, 0)), "batch": int(options["batch"])}
    for name, values in seconds.items():
        result[f"seconds_per_step_{name}"] = spread(values)
        if name != first:
            result[f"speedup_{name}"] = ratio(seconds[first], values)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
