"""Which Ray cluster a run uses: join or start one, see how many replicas it has room for, share out a node's cores.

Guarantees: what can't be reached is said within CONNECT_SECONDS; a cluster that was started here ends with the run, and
listens on loopback only; a cluster that is joined runs this process's zoray, whatever its nodes have installed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoray
from zoray.pool.on_ray import local as local_ray
from zoray.records import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONNECT_SECONDS = 30
TOKEN = re.compile(r"auth\w* token|AuthToken|RAY_AUTH", re.IGNORECASE)
_answered: set[str] = set()  # addresses that have answered this process; asking takes seconds


@dataclass(frozen=True)
class Cluster:
    """Where replicas run.

    Args:
        replicas: how many, or "auto": one per GPU, or one per node where there are none. In a cluster that is joined a
            wish: those without room wait for it, which lets an autoscaler add nodes, and join the run then.
        address: of a Ray cluster to join ("host:port", or "auto" for the one on this machine); null starts a local one,
            unless RAY_ADDRESS is set (as `ray job submit` does).
        cpus_per_replica: cores that each replica reserves and binds to; null shares each node's cores out evenly.
        gpus_per_replica: GPUs of each replica; null takes one where there are any.
        dashboard: serve Ray's dashboard on this machine (loopback only) when the cluster is started here.
        dashboard_port: its port, or the next one that is free.
        start_timeout_s: longest wait for the actors to be placed, and then for one after the other to connect.
        port: of this process, where replicas connect, at any time of the run; 0 takes a free one. Only replicas on
            other nodes make it listen on more than loopback.
        ship: send this zoray to the nodes of a cluster that is joined, where it goes before an installed one.
        min_replicas: below so many the run waits, at its start and later.
        wait_timeout_s: for that long at most; then it ends, and can be resumed.
        late_factor: a replica that takes so many times as long as it should is late: others score its tiles as well.
        late_floor_s: but nobody is late before.
        hang_timeout_s: a replica that does not answer for so long, and for ten times what it should take (for ten times
            this, where that is not known), is ended and started anew.
        snapshot_every: steps between snapshots of the state, from which a replica that comes late replays; 0 for none.
        snapshot_mib: a larger state has none, and is replayed from the start.
    """

    replicas: int | str = 1
    address: str | None = None
    cpus_per_replica: int | None = None
    gpus_per_replica: float | None = None
    dashboard: bool = True
    dashboard_port: int = 8265
    start_timeout_s: float = 300.0
    ship: bool = True
    port: int = 0
    min_replicas: int = 1
    wait_timeout_s: float = 600.0
    late_factor: float = 4.0
    late_floor_s: float = 1.0
    hang_timeout_s: float = 600.0
    snapshot_every: int = 1000
    snapshot_mib: float = 512.0

    def __post_init__(self) -> None:
        ok = self.replicas == "auto" or (isinstance(self.replicas, int) and self.replicas >= 1)
        require(ok, "cluster.replicas to be auto or a whole number of at least 1", self.replicas)
        cpus = self.cpus_per_replica
        require(cpus is None or cpus >= 1, "cluster.cpus_per_replica to be at least 1, or null", cpus)
        require(0 <= self.port < 65536, "cluster.port to be from 0 (any free one) to 65535", self.port)
        for name in ("start_timeout_s", "wait_timeout_s", "late_floor_s", "hang_timeout_s"):
            require(getattr(self, name) > 0, f"cluster.{name} to be positive", getattr(self, name))
        for name in ("snapshot_every", "snapshot_mib"):
            require(getattr(self, name) >= 0, f"cluster.{name} to be 0 or more", getattr(self, name))
        require(self.late_factor >= 1, "cluster.late_factor to be at least 1", self.late_factor)
        least = self.min_replicas
        require(isinstance(least, int) and least >= 1, "cluster.min_replicas to be a whole number of at least 1", least)
        if isinstance(self.replicas, int) and least > self.replicas:
            raise ConfigError(f"expected cluster.min_replicas of at most cluster.replicas={self.replicas}; got {least}")
        if self.address is not None:
            check_address(self.address)

    @property
    def joins(self) -> str | None:
        """The address of the running cluster to join; None if one is started here."""
        return self.address or os.environ.get("RAY_ADDRESS")

    @property
    def submits(self) -> bool:
        """Whether a run is handed over to a job scheduler rather than run here."""
        return False

    def check(self) -> None:
        """Raise ConfigError unless the cluster to join answers."""
        check_reachable(self.joins)


def connect(cluster: Cluster, say: Callable[[str], None]) -> bool:
    """Join or start a Ray cluster; whether this process connected, and so has to disconnect."""
    import ray

    if ray.is_initialized():  # a test or a notebook has its own
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at niceness 15: one busy process beside them slows a replica (OpenMP barriers) up to 40-fold.
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
    """A runtime_env with this zoray (0.5 MB, three seconds), merged with that of the job that this process may be.

    Ray refuses one field in both, so what the job says wins. Settings are composed by the driver: conf/ stays here.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    own = {"py_modules": [str(Path(zoray.__file__).parent)], "excludes": ["__pycache__"]}
    return {} if "py_modules" in job else {key: value for key, value in own.items() if key not in job}


def check_reachable(address: str | None) -> None:
    """Raise ConfigError within CONNECT_SECONDS unless a Ray cluster answers at `address` ("host:port"); null is fine.

    `ray.init` alone may wait for minutes. "auto" and "local" are left to it, which knows at once.
    """
    if address in (None, "auto", "local") or address in _answered:
        return
    check_address(address)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS / 3).close()
    except (OSError, UnicodeError) as error:  # refused, unreachable, no such host
        raise ConfigError(
            f"expected a Ray cluster at {address} (cluster.address or RAY_ADDRESS); it does not answer ({error}). "
            "Start one with `ray start --head`, or leave both unset for a local one"
        ) from None
    deadline = time.monotonic() + CONNECT_SECONDS
    said = _ask(address, deadline)
    if TOKEN.search(said) and "RAY_AUTH_MODE" not in os.environ and not _ask(address, deadline, RAY_AUTH_MODE="token"):
        os.environ["RAY_AUTH_MODE"] = "token"  # as `auto` has it: there is a token here, and it is the right one
        if "ray._raylet" in sys.modules:  # which has read the variable already
            sys.modules["ray._raylet"].Config.initialize("")
        said = ""
    if said:
        remedy = "Is it the address that `ray start --head` has printed, by default with port 6379?"
        if TOKEN.search(said):
            remedy = (
                "Put the token of the cluster here, as ~/.ray/auth_token or in RAY_AUTH_TOKEN (`ray get-auth-token` "
                "prints it on the head), and set RAY_AUTH_MODE=token"
            )
        raise ConfigError(
            f"expected a Ray cluster at {address} (cluster.address or RAY_ADDRESS); Ray says: {said}. {remedy}"
        )
    _answered.add(address)


def _ask(address: str, deadline: float, **variables: str) -> str:
    """What Ray has against a cluster in this process's place, in its own words; empty if nothing."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    options: dict[str, Any] = {"env": {**os.environ, **variables}, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=max(1.0, deadline - time.monotonic()), capture_output=True, **options)
    except subprocess.TimeoutExpired as late:
        words = local_ray.own_words((late.stderr or b"").decode(errors="replace"))
        return f"nothing: a connection is accepted, but no answer came within {CONNECT_SECONDS} s. {words}".rstrip(". ")
    if not done.returncode:
        return ""
    return local_ray.own_words(done.stderr + done.stdout) or f"nothing (its health-check ends with {done.returncode})"


def check_address(address: str) -> None:
    """Raise ConfigError unless `address` looks like that of a Ray cluster."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"expected cluster.address as host:port; got {address!r}. The Ray Client protocol is not used: "
            "run this command on a node of the cluster, or through `ray job submit -- python -m zoray.launch ...`"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"expected cluster.address (or RAY_ADDRESS) as host:port or auto; got {address!r}. "
            "`ray start --head` prints the address, by default port 6379; 8265 is the dashboard's"
        )


def size(cluster: Cluster, ranks: int = 1) -> tuple[int, int, float]:
    """(replicas, cores of each, GPUs of each) for the cluster that is there; `ranks` share a model out.

    Raises:
        ConfigError: a cluster that was started for this run is too small for it: no node will join that.
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
    """How many replicas with these resources the nodes that are there could hold, were they empty."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = {name: amount for name, amount in bundle.items() if amount}
    return sum(int(min(node.get(name, 0) // amount for name, amount in needed.items())) for node in nodes)


def own_host(elastic: bool = False) -> str:
    """Where this process listens for its replicas: loopback, if no node of the cluster is another machine.

    `elastic`: nodes are expected to join later, so that the other machines are not there yet.
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
    """Restrict this process to the index-th run of `count` of the cores that it may use; returns them.

    Replicas that start as many threads as a node has cores slow each other down several times.
    """
    cores = sorted(os.sched_getaffinity(0))
    mine = sorted({cores[i % len(cores)] for i in range(index * count, (index + 1) * count)})
    os.sched_setaffinity(0, mine)
    return mine
