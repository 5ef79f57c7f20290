"""A replica as a Ray actor, and the driver's end of the line to it.

Ray places the actors, hands them the run's key and says when one is gone. What a step needs goes over a socket of each
actor's (channel.py), as byte strings: a method's name and its arguments one way, what it returns or raises the other.
"""

from __future__ import annotations

import os
import pickle
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError

from zoray.channel import Listener, connect
from zoray.cluster import bind_cores
from zoray.records import ConfigError, ReplicaLost
from zoray.replica import Replica, ReplicaInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    import numpy as np

    from zoray.data import ReplicaSpec
    from zoray.records import Commit, Scores

METHODS = ("load", "evaluate", "reset", "adapter")
BY_VALUE: Any = cloudpickle  # a script's or notebook's own classes travel as well
LAST_WORDS = 2.0  # seconds for Ray to say why an actor is gone


class ReplicaActor:
    """A replica in a process of its own. Loading is a method, so that its errors reach the driver as they are."""

    def __init__(self) -> None:
        self.replica: Replica | None = None

    def serve(self, name: str, address: tuple[str, int], key: bytes) -> None:
        """Connect to the driver and do what it asks for, until it is gone."""
        connection = connect(address, key)
        connection.send_bytes(pickle.dumps((name, ray.get_runtime_context().get_node_id(), os.getpid())))
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            connection.send_bytes(self.call(message))

    def call(self, message: bytes) -> bytes:
        """Run one of METHODS; message and answer as Member packs and unpacks them."""
        number, method, arguments = pickle.loads(message)
        try:
            if method not in METHODS:
                raise ValueError(f"expected one of {', '.join(METHODS)}; got {method!r}")
            return pickle.dumps((number, None, getattr(self, method)(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            return _pickled(number, error)

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Bind this process to the i-th run of n cores of the node, before torch starts its threads; load."""
        if cores is not None:
            os.environ["OMP_NUM_THREADS"] = str(len(bind_cores(*cores)))
        self.replica = Replica(spec)
        return self.replica.info

    def evaluate(
        self, commits: tuple[Commit, ...], step: int, split: str, share: tuple[tuple[int, int], ...], digest: bool
    ) -> tuple[Scores, str | None]:
        """Score ranges of a grid's tiles, see Replica.evaluate. The grid itself, and its probes, do not travel."""
        assert self.replica is not None
        grid = self.replica.grid(step, split)
        tiles = [grid[i] for first, end in share for i in range(first, end)]
        return self.replica.evaluate(commits, tiles, digest, grid.per_example)

    def reset(self) -> None:
        """Back to journal index 0."""
        assert self.replica is not None
        self.replica.reset()

    def adapter(self, commits: tuple[Commit, ...]) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after the given commits."""
        assert self.replica is not None
        self.replica.apply(commits)
        return self.replica.adapter(), self.replica.engine.digest()


def _pickled(number: int, error: Exception) -> bytes:
    """An exception as an answer, with the traceback as a note; one that can't travel goes as its text."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"raised in a replica (process {os.getpid()}):\n{text}")
    try:
        packed: bytes = BY_VALUE.dumps((number, error, None))
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps((number, RuntimeError(text), None))


@dataclass
class Member:
    """The driver's handle of an actor, and how many commits it has been sent."""

    name: str
    actor: Any
    serving: Any  # what Ray's call of `serve` returns, when the actor is gone
    connection: Connection
    node: str
    pid: int
    sent: int = 0
    asked: int = 0
    answered: int = 0

    def ask(self, method: str, *arguments: Any) -> int:
        """Call a method of the actor; returns what `answer` takes, once, and in the order of the calls."""
        by_value: Any = BY_VALUE if method == "load" else pickle
        self.asked += 1
        message = by_value.dumps((self.asked, method, arguments), pickle.HIGHEST_PROTOCOL)
        with suppress(OSError):  # for `answer` to say, as where the actor dies a moment later
            self.connection.send_bytes(message)
        return self.asked

    def answer(self, number: int) -> Any:
        """Wait for the result, however long it takes; answers that nobody has waited for are dropped.

        Raises:
            ReplicaLost: the actor is gone.
            Exception: what the method itself has raised, with the replica's traceback as a note.
        """
        if number <= self.answered:
            raise RuntimeError(f"expected the answer to call {number}; it has been dropped for that to {self.answered}")
        error, value = None, None
        while self.answered < number:
            try:
                message = self.connection.recv_bytes()
            except (EOFError, OSError) as gone:
                raise ReplicaLost(self._last_words() or f"no connection: {gone or 'closed'}") from gone
            self.answered, error, value = pickle.loads(message)
        if error is not None:
            raise error
        return value

    def _last_words(self) -> str:
        """What Ray knows about the end of the actor."""
        try:
            ray.get(self.serving, timeout=LAST_WORDS)
        except GetTimeoutError:
            return ""
        except RayError as error:
            return str(error)
        return ""

    def kill(self) -> None:
        """End the actor, at once, whatever it is doing."""
        self.connection.close()
        ray.kill(self.actor)


def connect_all(actors: Sequence[tuple[str, Any]], listener: Listener, seconds: float) -> list[Member]:
    """Let named actors connect to the driver, in whatever order they start; members in the order given.

    Raises:
        ConfigError: an actor can't reach the driver, or does not start in so many seconds.
        ReplicaLost: an actor died before it could.
    """
    serving = {name: actor.serve.remote(name, listener.address, listener.key) for name, actor in actors}
    found: dict[str, tuple[Connection, str, int]] = {}

    def check() -> None:
        for ended in ray.wait(list(serving.values()), num_returns=1, timeout=0)[0]:
            try:
                ray.get(ended)
            except RayError as error:
                cause = getattr(error, "cause", None)
                raise (
                    cause
                    if isinstance(cause, ConfigError)
                    else ReplicaLost(f"a replica ended before it was connected: {error}")
                ) from error

    while len(found) < len(actors):
        try:
            connection = listener.accept(check, seconds)
        except TimeoutError as error:
            raise ConfigError(
                f"expected {len(actors)} replicas to start and connect to {listener.address}; {len(found)} have done "
                f"so, and nothing has come for {seconds:g} s (cluster.start_timeout_s)"
            ) from error
        name, node, pid = pickle.loads(connection.recv_bytes())
        found[name] = (connection, node, pid)
    return [Member(name, actor, serving[name], *found[name]) for name, actor in actors]
