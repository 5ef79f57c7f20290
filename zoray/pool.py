"""The replicas of a run as Ray actors: placement, tiles out and scores in, and what happens when one is lost.

Guarantees: every tile of a call is counted exactly once, in the order of the grid, whoever scored it, so the pool's
size and the loss of actors change a step's time and never which tiles make it up. Commits ride on the next `evaluate`.
A lost actor's tiles go to the others at once; with no replica left the run stops and can be resumed.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from zoray.cluster import Cluster, bind_cores, connect, leave, size, totals
from zoray.records import Commit, ConfigError, JournalError, ReplicaLost, Scores
from zoray.replica import Replica, ReplicaInfo
from zoray.tiles import Grid, as_ranges, contiguous, join_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from zoray.data import ReplicaSpec

log = logging.getLogger(__name__)


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
        """Bind to the i-th run of n cores of the node, before torch starts its threads, and load."""
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
    """An actor and how many commits it has been sent."""

    name: str
    actor: Any
    sent: int = 0


@dataclass
class Pool:
    """The replicas of a run. Use as a context manager; see `start`."""

    members: list[Member]
    spec: ReplicaSpec
    info: ReplicaInfo
    group: Any
    owns_ray: bool
    commits: list[Commit] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, spec: ReplicaSpec, cluster: Cluster, run_name: str, say: Callable[[str], None] = log.info) -> Pool:
        """Connect to Ray, place one named actor per replica, load them side by side.

        Raises:
            ConfigError: the cluster does not answer or is too small, or a replica refuses its config.
        """
        owns_ray = connect(cluster, say)
        group = None
        try:
            count, cpus, gpus = size(cluster)
            bundle: dict[str, float] = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            group = placement_group([bundle] * count, strategy="SPREAD")
            if not group.wait(cluster.start_timeout_s):
                raise ConfigError(
                    f"expected room for {count} replicas of {bundle}; the cluster has {totals()} of which "
                    f"{totals(ray.available_resources())} is free. Lower cluster.replicas or cluster.cpus_per_replica"
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
                members.append(Member(options["name"], ray.remote(ReplicaActor).options(**options).remote()))
            info = _load(members, spec, None if gpus else cpus)
            return cls(members, spec, info, group, owns_ray)
        except BaseException:
            leave(group, owns_ray)
            raise

    @property
    def size(self) -> int:
        """Replicas that are alive."""
        return len(self.members)

    def commit(self, commit: Commit) -> None:
        """Take a journalled commit; it is sent with each replica's next message."""
        self.commits.append(commit)

    def digest(self) -> str:
        """Digest of the state after all commits."""
        return self.evaluate(Grid(len(self.commits), "train", ()), digest=True)[1] or ""

    def rewind(self, step: int) -> None:
        """Take all replicas to the state after `step` steps, by replay from the start."""
        references = [(member, member.actor.reset.remote()) for member in self.members]
        for member, reference in references:
            self._result(member, reference)
            member.sent = 0
        del self.commits[step:]

    def evaluate(self, grid: Grid, digest: bool = False) -> tuple[Scores, str | None]:
        """Scores of all tiles of a grid at the state after all commits; and the state's digest if asked for.

        Raises:
            ReplicaLost: no replica is left.
            JournalError: replicas disagree about the state.
        """
        answers: list[tuple[list[int], Scores]] = []
        digests: dict[str, str] = {}
        missing = list(range(len(grid)))
        while missing or (digest and not digests):
            pending = {}
            shares = contiguous(missing, self.size)
            for member, share in zip(list(self.members), shares, strict=False):
                if share or digest:
                    work = (grid.step, grid.split, as_ranges(share), digest)
                    reference = member.actor.evaluate.remote(tuple(self.commits[member.sent :]), *work)
                    member.sent = len(self.commits)
                    pending[reference] = (member, share)
            for (member, share), answer in zip(pending.values(), self._results(pending), strict=True):
                if answer is None:
                    continue
                answers += [(share, answer[0])] if share else []
                if answer[1] is not None:
                    digests[member.name] = answer[1]
            missing = sorted(set(missing).difference(*(share for share, _ in answers)))
        if len(set(digests.values())) > 1:
            raise JournalError(
                f"replicas disagree about the state after {len(self.commits)} steps: {digests}; "
                "the journal is sound: resume the run"
            )
        scores = join_scores(grid.tiles, answers, grid.per_example)
        return scores, next(iter(digests.values()), None)

    def adapter(self) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after all commits, from the first replica that answers."""
        while True:
            member = self.members[0]
            answer = self._result(member, member.actor.adapter.remote(tuple(self.commits[member.sent :])))
            member.sent = len(self.commits)
            if answer is not None:
                return answer

    def _results(self, pending: dict[Any, tuple[Member, list[int]]]) -> list[Any]:
        """The answers to several messages: at once where all have come, one by one where somebody is gone."""
        try:
            return ray.get(list(pending))
        except (RayActorError, RayTaskError):
            return [self._result(member, reference) for reference, (member, _) in pending.items()]

    def _result(self, member: Member, reference: Any) -> Any:
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
        leave(self.group, self.owns_ray)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load(members: list[Member], spec: ReplicaSpec, cores: int | None) -> ReplicaInfo:
    """Load all replicas side by side, each bound to cores of its own; weights and initial state must be the same."""
    nodes = ray.get([member.actor.node.remote() for member in members])
    shares = [None if cores is None else (nodes[:i].count(node), cores) for i, node in enumerate(nodes)]
    references = [member.actor.load.remote(spec, share) for member, share in zip(members, shares, strict=True)]
    try:
        infos = ray.get(references)
    except RayTaskError as error:
        raise _cause(error) from error
    except RayActorError as error:
        raise ReplicaLost(f"a replica died while it loaded the model (out of memory?): {error}") from error
    for name in ("weights", "dtype", "digest"):
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
