"""A run's pool on Ray: one named actor for each replica, placed as the cluster has room."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

from zoray.pool.members import Members
from zoray.pool.on_ray.actor import BY_VALUE, ReplicaActor
from zoray.pool.on_ray.cluster import connect, leave, own_host, room, size
from zoray.pool.on_ray.placement import Placement
from zoray.pool.pool import Pool
from zoray.pool.sockets import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoray.methods.snapshots import Snapshot
    from zoray.pool.settings import Cluster
    from zoray.records import Commit
    from zoray.scoring.workload import ReplicaSpec

log = logging.getLogger(__name__)


def start_pool(
    spec: ReplicaSpec,
    cluster: Cluster,
    run_name: str,
    say: Callable[[str], None] = log.info,
    commits: Sequence[Commit] = (),
    known: Sequence[tuple[int, str]] = (),
    snapshot: Snapshot | None = None,
) -> Pool:
    """Connect to Ray, place the actors, load them in parallel; the rest is as in `Pool.gathered`.

    Returns when all replicas that have room are ready, at least `cluster.min_replicas`. The others join later.

    Raises:
        ConfigError: the cluster does not answer or is too small, or a replica refuses its config.
    """
    owns_ray = connect(cluster, say)
    placement = None
    try:
        count, cpus, gpus = size(cluster, spec.engine.tensor_parallel)
        bundle: dict[str, float] = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        here = room(bundle)
        if here < count:
            say(f"room for {here} of {count} replicas now; the others join when the cluster has grown")
        tag = uuid.uuid4().hex[:6]
        names = [f"zoray-{run_name}-{tag}-replica-{i}" for i in range(count)]
        placement = Placement(Listener(own_host(elastic=here < count), cluster.port), owns_ray)
        placement.start(names, ReplicaActor, (), bundle)
    except BaseException:
        if placement is not None:
            placement.close()  # leaves Ray as well
        else:
            leave(owns_ray)
        raise
    members = Members(names, placement, spec, cluster, None if gpus else cpus, say, BY_VALUE.dumps)
    return Pool.gathered(members, commits, known, snapshot)
