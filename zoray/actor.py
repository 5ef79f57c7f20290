"""A replica as a Ray actor, and the driver's end of the line to it.

A message is a method's name and its arguments, pickled into one byte string each way: what the pool sends is what goes
over the wire, and no array of an answer lies in memory that the next answer overwrites. An ordinary actor call costs
Ray's scheduler, store and RPC threads some milliseconds of a small machine; a compiled graph, a loop in the actor that
waits on shared memory, costs a fraction of one (docs/results), but takes a while to set up for each replica. All of a
replica then runs in that loop's thread: torch and CUDA keep state by thread.
"""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle
from ray.exceptions import RayChannelError, RayChannelTimeoutError

from zoray.cluster import bind_cores
from zoray.replica import Replica, ReplicaInfo

if TYPE_CHECKING:
    import numpy as np

    from zoray.data import ReplicaSpec
    from zoray.records import Commit, Scores

METHODS = ("load", "evaluate", "reset", "adapter")
FOREVER = 1e6  # seconds; Ray reads -1 as no time at all when it writes
BUFFER = 1 << 16  # bytes of a channel's buffers to begin with; a longer message gets a longer one


class ReplicaActor:
    """A replica in a process of its own. Loading is a method, so that its errors reach the driver as they are."""

    def __init__(self) -> None:
        self.replica: Replica | None = None

    def node(self) -> str:
        """Id of the node that this actor runs on."""
        return ray.get_runtime_context().get_node_id()

    def pid(self) -> int:
        """Process id of this actor on its node."""
        return os.getpid()

    def call(self, message: bytes) -> bytes:
        """Run one of METHODS; message and answer as Member packs and unpacks them."""
        method, arguments = pickle.loads(message)
        if method not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}; got {method!r}")
        return pickle.dumps(getattr(self, method)(*arguments), pickle.HIGHEST_PROTOCOL)

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Bind this thread, and those that it starts, to the i-th run of n cores of the node; load."""
        if cores is not None:
            import torch

            count = len(bind_cores(*cores))
            os.environ["OMP_NUM_THREADS"] = str(count)
            torch.set_num_threads(count)  # a compiled graph's loop has imported torch by now
        self.replica = Replica(spec)
        return self.replica.info

    def evaluate(
        self, commits: tuple[Commit, ...], step: int, split: str, share: tuple[tuple[int, int], ...], digest: bool
    ) -> tuple[Scores, str | None]:
        """Score ranges of a grid's tiles, see Replica.evaluate. The grid itself, and its probes, do not travel."""
        assert self.replica is not None
        grid = self.replica.grid(step, split)
        tiles = [tile for first, end in share for tile in grid.tiles[first:end]]
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


@dataclass
class Member:
    """The driver's handle of an actor, and how many commits it has been sent."""

    name: str
    actor: Any
    sent: int = 0
    graph: Any = None

    def compile(self) -> None:
        """From now on calls go through shared memory; before the first `ask`."""
        from ray.dag import InputNode

        # A lost actor is the pool's to report; Ray would print the traceback of its own cleaning up as well.
        logging.getLogger("ray.dag.compiled_dag_node").setLevel(logging.CRITICAL)
        with InputNode() as message:
            bound = self.actor.call.bind(message)
        self.graph = bound.experimental_compile(
            _submit_timeout=FOREVER, _buffer_size_bytes=BUFFER, _max_inflight_executions=2
        )

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor; returns what `answer` takes, once."""
        by_value: Any = (
            cloudpickle if method == "load" else pickle
        )  # a script's or notebook's own classes travel as well
        message = by_value.dumps((method, arguments), pickle.HIGHEST_PROTOCOL)
        if self.graph is None:
            return self.actor.call.remote(message)
        try:
            return self.graph.execute(message)
        except RayChannelTimeoutError:
            raise
        except RayChannelError as gone:  # for `answer` to say, as where the actor dies a moment later
            return gone

    def answer(self, reference: Any) -> Any:
        """Wait for the result, however long it takes.

        Raises:
            RayActorError, RayChannelError: the actor is gone.
            RayTaskError: what the method itself has raised.
        """
        if isinstance(reference, RayChannelError):
            raise reference
        return pickle.loads(ray.get(reference) if self.graph is None else reference.get(timeout=-1))

    def kill(self) -> None:
        """End the actor, at once, whatever it is doing."""
        ray.kill(self.actor)

    def end(self) -> None:
        """End the actor and what stands around it; waits for its node."""
        self.kill()
        if self.graph is not None:
            self.graph.teardown()
