"""Where replicas run, and how patient a run is with them: the settings `cluster`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from zoray.pool.on_ray.reach import check_address, check_reachable
from zoray.records import ConfigError, require


@dataclass(frozen=True)
class Cluster:
    """Where replicas run.

    Args:
        replicas: how many, or "auto": one per GPU, or one per node where there are none. In a cluster that is joined,
            replicas without room wait for it, which lets an autoscaler add nodes, and join the run later.
        address: of a Ray cluster to join ("host:port", or "auto" for the one on this machine); null starts a local one,
            unless RAY_ADDRESS is set (as `ray job submit` does).
        cpus_per_replica: cores that each replica reserves and binds to; null shares each node's cores out evenly.
        gpus_per_replica: GPUs of each replica; null takes one where there are any.
        dashboard: serve Ray's dashboard on this machine (loopback only) when the cluster is started here.
        dashboard_port: its port, or the next one that is free.
        start_timeout_s: longest wait for the actors to be placed, and then for one after the other to connect.
        port: of this process, where replicas connect throughout the run; 0 takes a free one. It listens on more than
            loopback only for replicas on other nodes.
        ship: send this zoray to the nodes of a cluster that is joined, where it takes precedence over an installed one.
        min_replicas: with fewer the run waits, at its start and later.
        wait_timeout_s: the longest such wait; then the run ends, and can be resumed.
        late_factor: a replica is late when it takes this many times the expected time: others score its tiles as well.
        late_floor_s: no replica is late before this many seconds.
        hang_timeout_s: a replica that does not answer for this long, and for ten times its expected time (for ten times
            this, if that is unknown), is ended and restarted.
        snapshot_every: steps between snapshots of the state, from which a replica that joins late replays; 0 for none.
        snapshot_mib: a larger state gets no snapshot, and is replayed from the start.
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
        """Whether a run is handed to a job scheduler rather than run here."""
        return False

    def check(self) -> None:
        """Raise ConfigError unless the cluster to join answers."""
        check_reachable(self.joins)
