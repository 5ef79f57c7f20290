"""A replica as a Ray actor: it connects to the driver, and answers the driver's calls until the driver is gone.

Ray places the actors, hands them the run's key and restarts them when they die. A step's messages go over each actor's
socket (sockets.py) as byte strings: a method's name and arguments one way, its result or exception the other.
"""

from __future__ import annotations

import os
import pickle
import traceback
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle
from ray.util import get_node_ip_address

from zoray.pool.on_ray.cluster import bind_cores
from zoray.pool.sockets import connect
from zoray.records import ConfigError
from zoray.scoring.replica import Replica, ReplicaInfo

if TYPE_CHECKING:
    import numpy as np

    from zoray.records import Commit, Scores
    from zoray.scoring.workload import ReplicaSpec

METHODS = ("load", "evaluate", "reset", "catch_up", "snapshot", "restore", "adapter")
BY_VALUE: Any = cloudpickle  # a script's or notebook's own classes travel as well


class ReplicaActor:
    """A replica in its own process. Loading is a method, so that its errors reach the driver unchanged."""

    def __init__(self) -> None:
        self.replica: Replica | None = None

    def serve(self, name: str, address: tuple[str, int], key: bytes) -> None:
        """Connect to the driver and answer its calls until it is gone; reconnect if the connection breaks."""
        connection = connect(address, key)
        hello = (name, get_node_ip_address(), ray.get_runtime_context().get_node_id(), os.getpid())
        while True:
            try:
                connection.send_bytes(pickle.dumps(hello))
                while True:
                    connection.send_bytes(self.call(connection.recv_bytes()))
            except (EOFError, OSError):
                connection.close()
            try:
                connection = connect(address, key)
            except ConfigError:  # the driver no longer listens: the run has ended
                return

    def call(self, message: bytes) -> bytes:
        """Run one of METHODS; Members packs the message and unpacks the answer."""
        number, method, arguments = pickle.loads(message)
        try:
            if method not in METHODS:
                raise ValueError(f"expected one of {', '.join(METHODS)}; got {method!r}")
            return pickle.dumps((number, None, getattr(self, method)(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            return _pickled(number, error)

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Bind this process to the i-th run of n cores of the node, before torch starts its threads; then load.

        If the replica exists already, because its connection was lost, it goes back to journal index 0.
        """
        if self.replica is not None:
            self.replica.reset()
            return self.replica.info
        if cores is not None:
            os.environ["OMP_NUM_THREADS"] = str(len(bind_cores(*cores)))
        self.replica = Replica(spec)
        return self.replica.info

    def evaluate(
        self,
        commits: tuple[Commit, ...],
        step: int,
        split: str,
        share: tuple[tuple[int, int], ...],
        digest: bool,
        canary: bool = False,
    ) -> tuple[Scores, str | None, float | None]:
        """Score ranges of a grid's tiles, see Replica.evaluate. The grid and its probes do not travel.

        Returns too, if asked for: the digest of the state that was scored, and the score of the canary.
        """
        assert self.replica is not None
        grid = self.replica.grid(step, split)
        tiles = [grid[i] for first, end in share for i in range(first, end)]
        scores, found = self.replica.evaluate(commits, tiles, digest, grid.per_example)
        return scores, found, self.replica.canary() if canary else None

    def reset(self) -> None:
        """Back to journal index 0."""
        assert self.replica is not None
        self.replica.reset()

    def catch_up(self, commits: tuple[Commit, ...], digest: bool) -> str | None:
        """Apply commits without scoring; returns the digest of the state after them if asked for.

        All computation is done when this returns, so a replica that is ready for tiles starts on them at once.
        """
        assert self.replica is not None
        self.replica.apply(commits)
        self.replica.engine.settle()
        return self.replica.engine.digest() if digest else None

    def snapshot(self, limit: int) -> bytes | None:
        """The current state, see Engine.snapshot."""
        assert self.replica is not None
        return self.replica.engine.snapshot(limit)

    def restore(self, data: bytes, step: int) -> str:
        """Restore a snapshot of the state before `step`; returns the digest of the result."""
        assert self.replica is not None
        self.replica.engine.restore(data, step)
        return self.replica.engine.digest()

    def adapter(self, commits: tuple[Commit, ...]) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after the given commits."""
        assert self.replica is not None
        self.replica.apply(commits)
        return self.replica.adapter(), self.replica.engine.digest()


def _pickled(number: int, error: Exception) -> bytes:
    """An exception as an answer, with the traceback as a note; one that can't be pickled is sent as its text."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"raised in a replica (process {os.getpid()}):\n{text}")
    try:
        packed: bytes = BY_VALUE.dumps((number, error, None))
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps((number, RuntimeError(text), None))
