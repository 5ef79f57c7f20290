"""Which Ray cluster a run uses: join or start one, count the replicas it has room for, share out a node's cores.

Guarantees: a cluster started here ends with the run, and listens on loopback only; a cluster that is joined runs this
process's zoray, whatever its nodes have installed.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoray
from zoray.pool.on_ray import local as local_ray
from zoray.pool.on_ray.reach import check_reachable
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zoray.pool.settings import Cluster


def connect(cluster: Cluster, say: Callable[[str], None]) -> bool:
    """Join or start a Ray cluster; returns whether this process connected, and so must disconnect."""
    import ray

    if ray.is_initialized():  # a test or a notebook has its own
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default is niceness 15: one busy process beside them slows a replica (OpenMP barriers) up to 40-fold.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = cluster.joins
    if not address:
        local_ray.start(cluster.dashboard, cluster.dashboard_port, say)
        return True
    check_reachable(address)
    try:
        code = _own_code() if cluster.ship else None
        ray.init(address=address, runtime_env=code, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # its errors have no type in common
        words = local_ray.own_words(str(error)) or type(error).__name__
        raise ConfigError(
            f"expected to join the Ray cluster at cluster.address={address}; Ray says: {words}"
        ) from error
    say(f"joined the Ray cluster at {address}: {totals()}")
    return True


def _own_code() -> dict[str, Any]:
    """A runtime_env with this zoray (0.5 MB, three seconds), merged with that of the Ray job this process may run in.

    Ray refuses a field set in both, so the job's wins. The driver composes the settings: conf/ stays here.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    own = {"py_modules": [str(Path(zoray.__file__).parent)], "excludes": ["__pycache__"]}
    return {} if "py_modules" in job else {key: value for key, value in own.items() if key not in job}


def size(cluster: Cluster, ranks: int = 1) -> tuple[int, int, float]:
    """(replicas, cores of each, GPUs of each) for the current cluster; `ranks` share a model.

    Raises:
        ConfigError: a cluster started for this run is too small for it: no node will join it later.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_gpu = cluster.gpus_per_replica if cluster.gpus_per_replica is not None else (ranks if gpus else 0)
    if per_gpu and per_gpu < ranks > 1:
        raise ConfigError(
            f"expected cluster.gpus_per_replica={ranks}, a GPU for each rank of engine.tensor_parallel; got {per_gpu:g}"
        )
    if cluster.replicas == "auto":
        count = int(gpus // per_gpu) if per_gpu else len([node for node in nodes if node.get("CPU", 0) >= 1])
    else:
        count = int(cluster.replicas)
    per_node = max(1, -(-count // len(nodes)))
    fewest = min((node["CPU"] for node in nodes if node.get("CPU", 0) >= 1), default=1)
    cpus = cluster.cpus_per_replica or max(1, int(fewest // per_node))
    if not cluster.joins and room({"CPU": cpus, "GPU": per_gpu}) < count:
        raise ConfigError(
            f"expected room for {count} replicas of {cpus} CPU and {per_gpu:g} GPU each; the cluster has {totals()}. "
            "Lower cluster.replicas, or join a larger cluster with cluster.address"
        )
    if not count:
        raise ConfigError(
            f"expected nodes with room for a replica, to count them for cluster.replicas=auto; the cluster has "
            f"{totals()}. Where an autoscaler starts nodes only when they are asked for, set cluster.replicas, "
            "cluster.cpus_per_replica and cluster.gpus_per_replica to numbers"
        )
    return count, cpus, per_gpu


def room(bundle: Mapping[str, float]) -> int:
    """How many replicas with these resources the current nodes could hold if they were empty."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = {name: amount for name, amount in bundle.items() if amount}
    return sum(int(min(node.get(name, 0) // amount for name, amount in needed.items())) for node in nodes)


def own_host(elastic: bool = False) -> str:
    """Where this process listens for its replicas: loopback, if no node of the cluster is another machine.

    `elastic`: nodes are expected to join later, so other machines may come.
    """
    import ray
    from ray.util import get_node_ip_address

    own = get_node_ip_address()
    here = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} <= {own}
    return "127.0.0.1" if here and not elastic else own


def totals(resources: Mapping[str, float] | None = None) -> str:
    import ray

    found = ray.cluster_resources() if resources is None else resources
    return f"{found.get('CPU', 0):g} CPU, {found.get('GPU', 0):g} GPU"


def leave(owns_ray: bool) -> None:
    """End Ray if it was joined or started by this process."""
    import ray

    if owns_ray:
        ray.shutdown()


def bind_cores(index: int, count: int) -> list[int]:
    """Restrict this process to the index-th run of `count` of the cores it may use; returns them.

    Replicas that start as many threads as a node has cores slow each other down several times.
    """
    cores = sorted(os.sched_getaffinity(0))
    mine = sorted({cores[i % len(cores)] for i in range(index * count, (index + 1) * count)})
    os.sched_setaffinity(0, mine)
    return mine
