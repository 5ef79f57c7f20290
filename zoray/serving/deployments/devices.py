"""Which devices a server's engine gets: GPUs that Ray reserves for it, or its share of a node's cores."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import ray

from zoray.pool.on_ray.cluster import bind_cores, room, totals
from zoray.records import ConfigError

if TYPE_CHECKING:
    from zoray.serving.settings import Settings


def gpus(settings: Settings) -> int:
    """GPUs of each engine: serve.gpus, or if that is null one for each rank of the model, if there are any.

    Raises:
        ConfigError: serve.gpus is null and there is no cluster yet.
    """
    if settings.gpus is not None:
        return settings.gpus
    if not ray.is_initialized():
        raise ConfigError(
            "expected serve.gpus to be a number, since there is no Ray cluster yet to look for GPUs in. Set "
            "serve.gpus=1, or serve.gpus=0 for CPUs"
        )
    return settings.engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0


def check_room(settings: Settings) -> None:
    """Raise ConfigError unless the cluster, which no node will join, has GPUs for all engines."""
    each = gpus(settings)
    if each and room({"GPU": each}) < settings.replicas:
        raise ConfigError(
            f"expected room for {settings.replicas} engines of {each} GPU each; the cluster has {totals()}. Lower "
            "serve.replicas, or set serve.gpus=0 for CPUs"
        )


def share_cores(settings: Settings, number: int) -> list[int]:
    """Bind this process, the `number`-th on its node, to its share of the node's cores, if engines run on CPUs.

    Engines that start as many threads as a node has cores slow each other down several times. Ray sets such processes
    to a single thread, and the engine's process inherits what is set here.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus(settings):
        return cores
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    here = -(-settings.replicas // nodes)
    if here > 1:
        cores = bind_cores(number, max(1, len(cores) // here))
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // settings.engine.tensor_parallel))
    return cores
