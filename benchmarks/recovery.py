"""How long does a run stand still when a replica dies or hangs, and how long does a new one take to catch up?

    python -m benchmarks.recovery [events=12] [replicas=4] [tile_ms=50] [steps=10000] [threads=1]

`killed` and `stopped`: replicas that sleep for their tiles (benchmarks/null.py), four tiles each, so that the machine's
cores do not matter; one gets SIGKILL or SIGSTOP at a random moment of a step. What counts is the time from there to the
end of that step, which is when it is committed, and again in units of an undisturbed step. `catch_up`: a replica that
joins a run of so many steps, with an adapter of about a million numbers: from loaded to ready, by replay, and once more
with a snapshot of the last thousand steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from benchmarks.null import start
from benchmarks.options import parse
from benchmarks.timing import spread
from zoray.methods.estimators import TwoPoint
from zoray.pool.members import Members
from zoray.pool.on_ray.start import start_pool
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.records import Commit
from zoray.records.tiles import Grid

DEFAULTS = {"events": "12", "replicas": "4", "tile_ms": "50", "steps": "10000", "threads": "1"}
TILES, FLOOR, FACTOR = 4, 0.1, 2.0  # of a replica; seconds and factor of the deadline


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        result: dict[str, Any] = {"benchmark": "recovery"}
        replicas, seconds = int(options["replicas"]), float(options["tile_ms"]) / 1000
        for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
            result[name] = disturbed(number, int(options["events"]), replicas, seconds)
            print(json.dumps({name: result[name]}), file=sys.stderr, flush=True)
        result["catch_up"] = catch_up(int(options["steps"]), int(options["threads"]))
        print(json.dumps(result))
    finally:
        ray.shutdown()


def disturbed(number: int, events: int, replicas: int, seconds: float) -> dict[str, Any]:
    """From a signal to one replica to the end of the step: seconds, and seconds in excess of the deadline by steps."""
    tiles = TILES * replicas
    spec: Any = SimpleNamespace(estimator=TwoPoint(pairs=tiles), batch=1, tile_examples=1)
    cluster = Cluster(replicas=replicas, late_floor_s=FLOOR, late_factor=FACTOR)
    dice, quiet, waits = random.Random(0), [], []
    with start(replicas, {}, seconds=seconds, cluster=cluster, each=1)(spec) as pool:
        step = steps_of(pool)
        for _ in range(20):
            step()
        while len(waits) < events:
            while pool.size < replicas or len(pool.members.idle) < replicas:  # all are back
                pool.members.pump(0.1)
            quiet += [step() for _ in range(3)]
            pid = dice.choice(pool.members.ready).pid
            sent: list[float] = []

            def disturb(pid: int = pid, sent: list[float] = sent) -> None:
                sent.append(time.monotonic())
                os.kill(pid, number)

            timer = threading.Timer(dice.uniform(0.1, 0.9) * seconds * TILES, disturb)
            timer.start()
            step()
            waits.append(time.monotonic() - sent[0])
            if number == signal.SIGSTOP:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    usual = statistics.median(quiet)
    deadline = max(FLOOR, FACTOR * usual) if number == signal.SIGSTOP else 0.0
    return {
        "step_seconds": usual,
        "deadline_seconds": deadline,
        "seconds": spread(waits),
        "steps": spread([(wait - deadline) / usual for wait in waits]),
        "most_steps": (max(waits) - deadline) / usual,
    }


def steps_of(pool: Pool) -> Any:
    """A function that takes a pool's next step and says how long it took."""

    def step() -> float:
        number = len(pool.commits)
        began = time.monotonic()
        pool.evaluate(Grid.of(pool.spec, number))
        pool.commit(Commit(number, (0.01,) * pool.spec.estimator.pairs))
        return time.monotonic() - began

    return step


def catch_up(steps: int, threads: int) -> dict[str, float]:
    """Seconds from a loaded replica to one that is ready, after so many steps of a pair each."""
    from zoray.models.folder import linear_matrices
    from zoray.run.config import build_experiment, compose

    with tempfile.TemporaryDirectory() as folder:
        e = build_experiment(compose("config", ["space.rank=8", "estimator=two_point"]))
        commits = [Commit(step, (1e-4 * (-1) ** step,)) for step in range(steps)]
        cluster = Cluster(replicas=1, cpus_per_replica=threads)
        seconds = {}
        with timed() as clock, start_pool(e.spec, cluster, "recovery", lambda _: None, commits) as pool:
            seconds["replay_seconds"] = clock()
            pool.digest()
            pool.keep_snapshot(Path(folder) / "snapshot.safetensors")
            while pool.members.snapshot is None:
                pool.members.pump(1.0)
            seconds["snapshot_step"] = pool.members.snapshot.step
            for step in range(steps, steps + 1000):
                pool.commit(Commit(step, (1e-4,)))
            os.kill(pool.members.ready[0].pid, signal.SIGKILL)
            while not pool.lost or not pool.size:
                pool.members.pump(1.0)
            seconds["from_snapshot_seconds"] = clock()
        numbers = e.space.trained(linear_matrices(e.model.resolve()))
        return {"steps": steps, "numbers": numbers, "threads": threads, **seconds}


class timed:
    """While it lasts: a call gives the seconds that the last member took from loaded to ready."""

    def __enter__(self) -> Any:
        self.loaded, self.advance = Members._loaded, Members._advance
        times: list[float] = [0.0, 0.0]

        def loaded(members: Members, member: Any, info: Any) -> None:
            times[0] = time.monotonic()
            self.loaded(members, member, info)

        def advance(members: Members, member: Any, *rest: Any, **named: Any) -> None:
            self.advance(members, member, *rest, **named)
            times[1] = time.monotonic() if member.ready else times[1]

        Members._loaded, Members._advance = loaded, advance  # type: ignore[method-assign]
        return lambda: times[1] - times[0]

    def __exit__(self, *_: object) -> None:
        Members._loaded, Members._advance = self.loaded, self.advance  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1:])
