"""A server's engines as the replicas of a job's pool: they connect by themselves, when they hear of the job."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zoray.pool.members import Members
from zoray.pool.on_ray.actor import BY_VALUE
from zoray.pool.on_ray.placement import end_process
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.pool.sockets import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoray.methods.snapshots import Snapshot
    from zoray.records import Commit
    from zoray.scoring.workload import ReplicaSpec

log = logging.getLogger(__name__)
PATIENT = 86_400.0  # seconds: an engine that answers requests may take this long for tuning's share


class ServedHost:
    """A Host whose processes belong to Ray Serve; here they only connect."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def resources(self) -> str:
        return ""

    def without_room(self) -> set[str]:
        return set()

    def ended(self, names: Sequence[str]) -> dict[str, tuple[Exception | None, bool]]:
        return {}

    def serve(self, name: str) -> None:
        pass

    def restart(self, node_id: str, pid: int) -> None:
        end_process(node_id, pid)

    def let_go(self, name: str) -> None:
        pass

    def close(self) -> None:
        self.listener.close()


def start_pool(
    listener: Listener,
    replicas: int,
    stopping: Callable[[], bool],
    spec: ReplicaSpec,
    cluster: Cluster,
    run_name: str,
    say: Callable[[str], None] = log.info,
    commits: Sequence[Commit] = (),
    known: Sequence[tuple[int, str]] = (),
    snapshot: Snapshot | None = None,
) -> Pool:
    """As on_ray.start.start_pool, for running engines that connect to `listener`; waits until `stopping`."""
    names = [f"engine-{i}" for i in range(replicas)]
    members = Members(names, ServedHost(listener), spec, cluster, None, say, BY_VALUE.dumps)
    return Pool.gathered(members, commits, known, snapshot, stopping)
