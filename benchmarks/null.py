"""Replicas that score nothing: what is left of a step is driver and messages.

The sockets and messages are those of a run; behind them are processes without Ray, torch or vLLM. One of them can stand
for many replicas, which then take next to nothing of the driver's machine, as replicas elsewhere would.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import pickle
import selectors
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.pool.members import Members
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.pool.sockets import Listener, connect
from zoray.records import Scores
from zoray.records.tiles import LEVELS, Grid, gives_feedback, scored, summed
from zoray.scoring.replica import ReplicaInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace


class NullReplica:
    """Answers as actor.ReplicaActor does, with losses that are ready-made for each share of a grid."""

    def __init__(self, spec: SimpleNamespace, counts: dict[str, int], weights: str, seconds: float) -> None:
        self.spec, self.counts, self.step, self.seconds = spec, counts, 0, seconds
        self.info = ReplicaInfo("0" * 16, weights, "null", "float32", 0.0, ())
        self.ready: dict[tuple[str, tuple[tuple[int, int], ...]], Scores] = {}

    def answer(self, message: bytes) -> tuple[bytes, float]:
        """What to send, and after how many seconds."""
        number, method, arguments = pickle.loads(message)
        if method == "load":
            return pickle.dumps((number, None, self.info)), 0.0
        commits = arguments[0] if arguments else ()
        self.step += len(commits)
        if method != "evaluate":
            self.step *= method != "reset"
            return pickle.dumps(
                (number, None, f"{self.step:016x}" if method == "catch_up" and arguments[1] else None)
            ), 0.0
        _, step, split, share, digest, canary = arguments
        if (split, share) not in self.ready:
            self.ready[split, share] = self.made_up(Grid.of(self.spec, step, split, self.counts.get(split, 0)), share)
        result = self.ready[split, share], f"{self.step:016x}" if digest else None, 0.5 if canary else None
        seconds = self.seconds * sum(end - first for first, end in share)
        return pickle.dumps((number, None, result), pickle.HIGHEST_PROTOCOL), seconds

    def made_up(self, grid: Grid, share: tuple[tuple[int, int], ...]) -> Scores:
        """Scores of tiles that nobody has scored; the losses differ between probes, as an estimator expects."""
        tiles = [grid[i] for first, end in share for i in range(first, end)]
        losses = 0.5 + 0.001 * (np.arange(scored(tiles)) % 17)
        scores = losses if grid.per_example else summed(tiles, losses)
        if not any(map(gives_feedback, tiles)):
            return Scores(scores, 0.0, 26 * scored(tiles))
        feedback = np.random.default_rng(0).integers(-LEVELS, LEVELS + 1, self.spec.numbers, np.int8)
        return Scores(scores, 0.0, 26 * scored(tiles), feedback=feedback)


def serve(names: list[str], address: tuple[str, int], key: bytes, replica: tuple[Any, ...]) -> None:
    """Be some replicas, until the driver is gone; on the last core, so that the driver has one to itself."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    selector, due = selectors.DefaultSelector(), []
    for name in names:
        connection = connect(address, key)
        connection.send_bytes(pickle.dumps((name, "127.0.0.1", "null", os.getpid())))
        selector.register(connection, selectors.EVENT_READ, (connection, NullReplica(*replica)))
    count = 0
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for found, _ in selector.select(wait):
            connection, null = found.data
            try:
                answer, seconds = null.answer(connection.recv_bytes())
            except (EOFError, OSError):
                return
            count += 1
            heapq.heappush(due, (time.monotonic() + seconds, count, connection, answer))
        while due and due[0][0] <= time.monotonic():
            _, _, connection, answer = heapq.heappop(due)
            connection.send_bytes(answer)


class NullHost:
    """What keeps the processes, in place of placement.Placement: starts them, and anew where one has died."""

    def __init__(self, names: list[str], each: int, replica: tuple[Any, ...]) -> None:
        self.listener = Listener("127.0.0.1", 0)
        self._replica, self._context = replica, multiprocessing.get_context("forkserver")
        self._groups = [names[i : i + each] for i in range(0, len(names), each)]
        self._processes = [self._start(group) for group in self._groups]

    def _start(self, names: list[str]) -> Any:
        arguments = (names, self.listener.address, self.listener.key, self._replica)
        process = self._context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        return process

    def resources(self) -> str:
        """Not asked for."""
        return ""

    def without_room(self) -> set[str]:
        """All have room."""
        return set()

    def ended(self, names: list[str]) -> dict[str, tuple[Exception | None, bool]]:
        """Start those anew that have died."""
        for i, process in enumerate(self._processes):
            if not process.is_alive():
                self._processes[i] = self._start(self._groups[i])
        return {}

    def serve(self, name: str) -> None:
        """It does."""

    def restart(self, node_id: str, pid: int) -> None:
        """Let `ended` find it dead."""
        os.kill(pid, 9)

    def let_go(self, name: str) -> None:
        """It is left alone."""

    def close(self) -> None:
        """End all."""
        self.listener.close()
        for process in self._processes:
            process.kill()
            process.join()


class Alike(Pool):
    """Replicas of equal speed: by measured ones, tiles that cost nothing would all go to whoever was fastest once."""

    def evaluate(self, grid: Grid, digest: bool = False) -> tuple[Scores, str | None]:
        """As it is, with nothing learnt."""
        for member in self.members.connected.values():
            member.speed = 0.0
        return super().evaluate(grid, digest)


def start(
    replicas: int,
    counts: dict[str, int],
    weights: str = "",
    seconds: float = 0.0,
    cluster: Cluster | None = None,
    each: int | None = None,
    numbers: int = 0,
) -> Callable[..., Pool]:
    """What driver.tune takes in place of on_ray.start.start_pool: a pool of null replicas.

    `counts` of examples in dev and test; `weights` is the hash of the model's; a tile takes `seconds`; a process stands
    for `each` replicas, or for all. `numbers`: that an adapter has, of which a guided step's feedback is made.
    """
    from types import SimpleNamespace

    def begin(spec: Any, *_: Any) -> Pool:
        light = SimpleNamespace(
            estimator=spec.estimator, batch=spec.batch, tile_examples=spec.tile_examples, numbers=numbers
        )
        names = [f"null-{i}" for i in range(replicas)]
        host = NullHost(names, each or replicas, (light, counts, weights, seconds))
        members = Members(names, host, spec, cluster or Cluster(replicas=replicas))
        members.spec = light  # what is sent to them
        pool = (Pool if seconds else Alike)(members)
        pool.gather()
        pool.spec = members.spec = spec
        return pool

    return begin
