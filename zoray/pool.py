"""The replicas of a run as Ray actors: placement, tiles out and scores in, and what happens when one is lost.

Guarantees: every tile of a call is counted exactly once, in the order of the grid, whoever scored it, so the pool's
size and the loss of actors change a step's time and never which tiles make it up. Commits ride on the next `evaluate`.
A lost actor's tiles go to the others at once; with no replica left the run stops and can be resumed.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from zoray.records import Commit, ConfigError, JournalError, Probe, ReplicaLost, Tile, TileScore, require
from zoray.replica import Replica, ReplicaInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from zoray.data import ReplicaSpec

log = logging.getLogger(__name__)
CONNECT_SECONDS = 30


@dataclass(frozen=True)
class Cluster:
    """Where replicas run.

    Args:
        replicas: how many, or "auto": one per GPU, or one per node where there are none.
        address: of a Ray cluster to join ("host:port", or "auto" for the one on this machine); null starts a local one,
            unless RAY_ADDRESS is set (as `ray job submit` does).
        cpus_per_replica: cores that each replica reserves and binds to; null shares each node's cores out evenly.
        gpus_per_replica: GPUs of each replica; null takes one where there are any.
        dashboard: serve Ray's dashboard on this machine (loopback only) when the cluster is started here.
        dashboard_port: its port; taken only if it is free.
        start_timeout_s: longest wait for the actors to be placed.
    """

    replicas: int | str = 1
    address: str | None = None
    cpus_per_replica: int | None = None
    gpus_per_replica: float | None = None
    dashboard: bool = True
    dashboard_port: int = 8265
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        ok = self.replicas == "auto" or (isinstance(self.replicas, int) and self.replicas >= 1)
        require(ok, "cluster.replicas to be auto or a whole number of at least 1", self.replicas)
        cpus = self.cpus_per_replica
        require(cpus is None or cpus >= 1, "cluster.cpus_per_replica to be at least 1, or null", cpus)
        require(self.start_timeout_s > 0, "cluster.start_timeout_s to be positive", self.start_timeout_s)
        if self.address is not None:
            check_address(self.address)

    @property
    def joins(self) -> str | None:
        """The address of the running cluster to join; None if one is started here."""
        return self.address or os.environ.get("RAY_ADDRESS")


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

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Bind to this replica's share of the node's cores (i of n; before torch starts its threads) and load."""
        if cores is not None:
            os.environ["OMP_NUM_THREADS"] = str(len(bind_cores(*cores)))
        self.replica = Replica(spec)
        return self.replica.info

    def evaluate(
        self, commits: tuple[Commit, ...], tiles: tuple[Tile, ...], digest: bool
    ) -> tuple[tuple[TileScore, ...], str | None]:
        """See Replica.evaluate."""
        assert self.replica is not None
        return self.replica.evaluate(commits, tiles, digest)

    def adapter(self, commits: tuple[Commit, ...]) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after the given commits."""
        assert self.replica is not None
        self.replica.apply(commits)
        return self.replica.adapter(), self.replica.engine.digest()


def bind_cores(index: int, count: int) -> list[int]:
    """Restrict this process to the index-th of `count` equal shares of the cores it may use; returns them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // count)
    mine = [cores[(index * share + i) % len(cores)] for i in range(share)]
    os.sched_setaffinity(0, mine)
    return mine


@dataclass
class _Member:
    """An actor and how many commits it has been sent."""

    name: str
    actor: Any
    sent: int = 0


@dataclass
class Pool:
    """The replicas of a run. Use as a context manager; see `start`."""

    members: list[_Member]
    info: ReplicaInfo
    group: Any
    owns_ray: bool
    dashboard: str | None
    commits: list[Commit] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, spec: ReplicaSpec, cluster: Cluster, run_name: str, say: Callable[[str], None] = log.info) -> Pool:
        """Connect to Ray, place one named actor per replica, load them side by side.

        Raises:
            ConfigError: the cluster does not answer or is too small, or a replica refuses its config.
        """
        owns_ray, dashboard = connect(cluster, say)
        group = None
        try:
            count, cpus, gpus = _size(cluster)
            bundle: dict[str, float] = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            group = placement_group([bundle] * count, strategy="SPREAD")
            if not group.wait(cluster.start_timeout_s):
                raise ConfigError(
                    f"expected room for {count} replicas of {bundle}; the cluster has {_totals()} of which "
                    f"{_totals(ray.available_resources())} is free. Lower cluster.replicas or cluster.cpus_per_replica"
                )
            tag = uuid.uuid4().hex[:6]
            members = []
            for i in range(count):
                options = {
                    "name": f"zoray-{run_name}-{tag}-replica-{i}",
                    "num_cpus": cpus,
                    "num_gpus": gpus,
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
                }
                members.append(_Member(options["name"], ray.remote(ReplicaActor).options(**options).remote()))
            info = _load(members, spec, bind=gpus == 0)
            return cls(members, info, group, owns_ray, dashboard)
        except BaseException:
            _leave(group, owns_ray)
            raise

    @property
    def size(self) -> int:
        """Replicas that are alive."""
        return len(self.members)

    def commit(self, commit: Commit) -> None:
        """Take a journalled commit; it is sent with each replica's next message."""
        self.commits.append(commit)

    def evaluate(self, tiles: Sequence[Tile], digest: bool = False) -> tuple[list[TileScore], str | None]:
        """Scores of all tiles, in their order, at the state after all commits; and the state's digest if asked for.

        Raises:
            ReplicaLost: no replica is left.
            JournalError: replicas disagree about the state.
        """
        scores: list[TileScore | None] = [None] * len(tiles)
        digests: dict[str, str] = {}
        missing = list(range(len(tiles)))
        while missing:
            pending = {}
            shares = _contiguous(missing, self.size)
            for member, share in zip(list(self.members), shares, strict=False):
                if share or digest:
                    arguments = (tuple(self.commits[member.sent :]), tuple(tiles[i] for i in share), digest)
                    member.sent = len(self.commits)
                    pending[member.actor.evaluate.remote(*arguments)] = (member, share)
            while pending:
                done, _ = ray.wait(list(pending))
                for reference in done:
                    member, share = pending.pop(reference)
                    answer = self._result(member, reference)
                    if answer is None:
                        continue
                    for i, score in zip(share, answer[0], strict=True):
                        scores[i] = score
                    if answer[1] is not None:
                        digests[member.name] = answer[1]
            missing = [i for i in missing if scores[i] is None]
        if len(set(digests.values())) > 1:
            raise JournalError(
                f"replicas disagree about the state after {len(self.commits)} steps: {digests}; "
                "the journal is sound: resume the run"
            )
        return [score for score in scores if score is not None], next(iter(digests.values()), None)

    def adapter(self) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after all commits, from the first replica that answers."""
        while True:
            member = self.members[0]
            answer = self._result(member, member.actor.adapter.remote(tuple(self.commits[member.sent :])))
            member.sent = len(self.commits)
            if answer is not None:
                return answer

    def _result(self, member: _Member, reference: Any) -> Any:
        """An actor's answer, or None when the actor is gone: the one place where a failure is survived.

        An exception inside the replica's own code is not survived: it would meet every replica alike.
        """
        try:
            return ray.get(reference)
        except (ActorDiedError, ActorUnavailableError, RayActorError) as error:
            self.members.remove(member)
            self.lost.append(member.name)
            log.warning("lost %s (%s); %d replicas left", member.name, str(error).split("\n")[0], self.size)
            if not self.members:
                raise ReplicaLost(f"all replicas are lost, the last one: {error}") from error
            return None
        except RayTaskError as error:
            raise _cause(error) from error

    def close(self) -> None:
        """End the actors; end Ray too if this pool started it."""
        for member in self.members:
            ray.kill(member.actor)
        self.members.clear()
        _leave(self.group, self.owns_ray)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def tile_grid(probes: Sequence[Probe], examples: int, tile_examples: int, split: str = "train") -> list[Tile]:
    """All probes x all examples, cut into tiles: the probes of one direction, on `tile_examples` examples.

    Plus and minus of a direction stay in one tile, so that both are scored by one replica: what a device adds to both
    cancels in their difference. The grid follows from the config and never from the number of replicas.
    """
    directions: dict[int, list[Probe]] = {}
    for probe in probes:
        directions.setdefault(probe.index, []).append(probe)
    return [
        Tile(tuple(group), start, min(start + tile_examples, examples), split)
        for group in directions.values()
        for start in range(0, examples, tile_examples)
    ]


def sum_tiles(
    probes: Sequence[Probe], tiles: Sequence[Tile], scores: Sequence[TileScore]
) -> tuple[list[float], list[float]]:
    """Mean loss and accuracy of each probe over its tiles, added in the order of the grid: (losses, accuracies)."""
    position = {probe: i for i, probe in enumerate(probes)}
    loss, correct, count = [0.0] * len(probes), [0.0] * len(probes), [0] * len(probes)
    for tile, score in zip(tiles, scores, strict=True):
        for probe, loss_sum, correct_sum in zip(tile.probes, score.loss_sums, score.correct_sums, strict=True):
            i = position[probe]
            loss[i], correct[i], count[i] = loss[i] + loss_sum, correct[i] + correct_sum, count[i] + score.count
    return [s / n for s, n in zip(loss, count, strict=True)], [s / n for s, n in zip(correct, count, strict=True)]


def connect(cluster: Cluster, say: Callable[[str], None]) -> tuple[bool, str | None]:
    """Join or start a Ray cluster: (did we start Ray in this process, the dashboard's address)."""
    if ray.is_initialized():  # a test or a notebook has its own
        return False, None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at niceness 15: one busy process beside them was seen to slow a replica (OpenMP barriers) 40-fold.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = cluster.joins
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        check_reachable(address)
        try:
            context = ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise ConfigError(f"expected a Ray cluster at cluster.address={address}; {error}") from error
        say(f"joined the Ray cluster at {address}: {_totals()}")
        return True, context.dashboard_url or None
    port = cluster.dashboard_port if cluster.dashboard and _port_is_free(cluster.dashboard_port) else None
    context = ray.init(
        address="local",
        include_dashboard=port is not None,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        **quiet,
    )
    if context.dashboard_url:
        say(f"Ray dashboard: http://{context.dashboard_url}")
    elif cluster.dashboard:
        say(f"Ray dashboard: off, port {cluster.dashboard_port} is taken (cluster.dashboard_port=... for another)")
    return True, context.dashboard_url or None


def check_reachable(address: str | None) -> None:
    """Raise ConfigError within CONNECT_SECONDS unless a Ray cluster answers at `address` ("host:port"); null is fine.

    `ray.init` alone may wait for minutes. "auto" and "local" are left to it, which knows at once.
    """
    if address in (None, "auto", "local"):
        return
    check_address(address)
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS / 3).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        subprocess.run(command, timeout=deadline - time.monotonic(), check=True, capture_output=True)
        return
    except subprocess.TimeoutExpired:
        why = f"a connection is accepted, but no answer came within {CONNECT_SECONDS} s"
    except subprocess.CalledProcessError:
        why = "what listens there is no Ray head, or one of another version"
    except (OSError, UnicodeError) as error:  # refused, unreachable, no such host
        why = str(error)
    raise ConfigError(
        f"expected a Ray cluster at {address} (cluster.address or RAY_ADDRESS); it does not answer ({why}). "
        "Start one with `ray start --head`, or leave both unset for a local one"
    )


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


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _size(cluster: Cluster) -> tuple[int, int, float]:
    """(replicas, cores of each, GPUs of each) for the cluster that is there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_gpu = cluster.gpus_per_replica if cluster.gpus_per_replica is not None else (1 if gpus else 0)
    if cluster.replicas == "auto":
        count = int(gpus // per_gpu) if per_gpu else len([node for node in nodes if node.get("CPU", 0) >= 1])
    else:
        count = int(cluster.replicas)
    per_node = -(-count // len(nodes))
    fewest = min(node.get("CPU", 1) for node in nodes if node.get("CPU", 0) >= 1)
    cpus = cluster.cpus_per_replica or max(1, int(fewest // per_node))
    if cpus * count > sum(node.get("CPU", 0) for node in nodes) or per_gpu * count > gpus:
        raise ConfigError(
            f"expected room for {count} replicas of {cpus} CPU and {per_gpu:g} GPU each; the cluster has {_totals()}. "
            "Lower cluster.replicas, or join a larger cluster with cluster.address"
        )
    return count, cpus, per_gpu


def _totals(resources: Mapping[str, float] | None = None) -> str:
    found = ray.cluster_resources() if resources is None else resources
    return f"{found.get('CPU', 0):g} CPU, {found.get('GPU', 0):g} GPU"


def _load(members: list[_Member], spec: ReplicaSpec, bind: bool) -> ReplicaInfo:
    """Load all replicas side by side; they must have the same weights and the same initial state."""
    nodes = ray.get([member.actor.node.remote() for member in members])
    shares = [(nodes[:i].count(node), nodes.count(node)) if bind else None for i, node in enumerate(nodes)]
    references = [member.actor.load.remote(spec, share) for member, share in zip(members, shares, strict=True)]
    try:
        infos = ray.get(references)
    except RayTaskError as error:
        raise _cause(error) from error
    except RayActorError as error:
        raise ReplicaLost(f"a replica died while it loaded the model (out of memory?): {error}") from error
    for name in ("weights", "digest"):
        found = {getattr(info, name) for info in infos}
        if len(found) > 1:
            raise ConfigError(
                f"expected the same {name} on every node; got {sorted(found)}: model files differ between nodes"
            )
    return infos[0]


def _cause(error: RayTaskError) -> BaseException:
    """The exception that a replica raised, as itself where it is one of ours; Ray's wrapping of it otherwise."""
    cause = error.cause
    return cause if isinstance(cause, (ConfigError, JournalError, FloatingPointError)) else error


def _contiguous(items: list[int], shares: int) -> list[list[int]]:
    """Cut a list into `shares` runs of nearly equal length."""
    cuts = [round(k * len(items) / shares) for k in range(shares + 1)]
    return [items[a:b] for a, b in pairwise(cuts)]


def _leave(group: Any, owns_ray: bool) -> None:
    if group is not None and ray.is_initialized():
        remove_placement_group(group)
    if owns_ray:
        ray.shutdown()
