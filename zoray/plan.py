"""`python -m zoray.plan [any setting of a run]`: what a run will need, before it starts; refuses one that can't fit."""

from __future__ import annotations

from typing import Any

from zoray.records import ConfigError
from zoray.run.config import build_experiment, run_main
from zoray.run.plan import GIB, REMEDIES, device_of_here, lines, make
from zoray.scoring.workload import load_workload


def main(config: Any) -> None:
    """Print the plan, or refuse it."""
    e = build_experiment(config)
    workload = load_workload(e.spec)
    device, limit = device_of_here()
    plan = make(e, workload, device)
    replicas = 1 if e.cluster.replicas == "auto" else int(e.cluster.replicas)
    for line in lines(plan, e, device, limit, replicas):
        print(line)
    here = replicas if device == "cpu" else 1
    if plan.total * here > limit:
        largest = max(plan.memory, key=plan.memory.__getitem__)
        raise ConfigError(
            f"expected {here} replica(s) of {plan.total / GIB:.1f} GiB to fit the {limit / GIB:.1f} GiB of this "
            f"{'machine' if device == 'cpu' else 'GPU'}; the largest part is {largest}, "
            f"{plan.memory[largest] / GIB:.1f} GiB. {REMEDIES[largest]}"
        )


if __name__ == "__main__":
    run_main("config", main)
