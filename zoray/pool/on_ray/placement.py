"""A run's actors in Ray: one placement group and one named actor for each replica.

Ray places an actor as soon as its group has room, which may be when a node joins, and restarts it when its process or
node is lost; either way it connects to the driver's listener by itself. The driver decides which replica is given up.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from zoray.pool.on_ray.cluster import leave, totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.pool.sockets import Listener


CLOSE_SECONDS = 2.0


@ray.remote
def _kill(pid: int) -> None:
    """kill -9 a process of this node, if it is still an actor's."""
    with suppress(OSError):
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


@dataclass
class Placement:
    """The actors of a run by name; `listener` is where they connect."""

    listener: Listener
    owns_ray: bool = False  # whether Ray ends with the actors
    actors: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)  # references to the calls of `serve`

    def start(
        self, names: Sequence[str], actor_class: type, arguments: Sequence[Any], bundle: dict[str, float]
    ) -> None:
        """Ask Ray for one actor per name, each in its own placement group; does not wait.

        All resources of an actor are in one bundle: the ranks of a tensor-parallel replica share a node.
        """
        remote = ray.remote(actor_class)
        for name in names:
            options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
            if bundle:
                group = self.groups[name] = placement_group([bundle], strategy="PACK", name=name)
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
            options |= {"name": name, "max_restarts": -1, "max_task_retries": -1}
            self.actors[name] = remote.options(**options).remote(*arguments)
            self.serve(name)

    def serve(self, name: str) -> None:
        """Let an actor connect and answer calls; Ray repeats this call on an actor that it has restarted."""
        self.serving[name] = self.actors[name].serve.remote(name, self.listener.address, self.listener.key)

    def resources(self) -> str:
        """The cluster's resources, for messages."""
        return totals()

    def without_room(self) -> set[str]:
        """Names whose placement group is waiting for room."""
        table = placement_group_table()
        states = {name: table.get(group.id.hex(), {}).get("state") for name, group in self.groups.items()}
        return {name for name, state in states.items() if state != "CREATED"}

    def ended(self, names: Sequence[str]) -> dict[str, tuple[Exception | None, bool]]:
        """Of `names`, those whose `serve` has ended: the error, if any, and whether Ray has given the actor up."""
        found: dict[str, tuple[Exception | None, bool]] = {}
        by_reference = {self.serving[name]: name for name in names if name in self.serving}
        if not by_reference:
            return found
        for reference in ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)[0]:
            name = by_reference[reference]
            try:
                ray.get(reference)
                found[name] = (None, False)
            except RayError as error:
                cause = getattr(error, "cause", None)
                found[name] = (cause if isinstance(cause, Exception) else error, isinstance(error, ActorDiedError))
        return found

    def restart(self, node_id: str, pid: int) -> None:
        """End an actor's process, whatever it is doing, and let Ray restart it; does not wait.

        A task on its node does it: `ray.kill` asks the process itself, and one that hangs or is stopped ignores it.
        """
        end_process(node_id, pid)

    def let_go(self, name: str) -> None:
        """End an actor for good, and free its place."""
        self.serving.pop(name, None)
        if name in self.actors:
            ray.kill(self.actors.pop(name))
        if name in self.groups:
            remove_placement_group(self.groups.pop(name))

    def close(self) -> None:
        """End all actors; idle ones end by themselves once the listener is closed."""
        self.listener.close()
        try:
            if ray.is_initialized():
                if serving := list(self.serving.values()):
                    ray.wait(serving, num_returns=len(serving), timeout=CLOSE_SECONDS)
                for name in list(self.actors):
                    self.let_go(name)
        finally:
            leave(self.owns_ray)


def end_process(node_id: str, pid: int) -> None:
    """End an actor's process by a task on its node; does not wait."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    _kill.options(scheduling_strategy=where, num_cpus=0, max_retries=0).remote(pid)
