"""The replicas of a run as Ray actors: placement, tiles out and scores in, and what happens when one is lost.

Guarantees: every tile of a call is counted exactly once, in the order of the grid, whoever scored it, so the pool's
size and the loss of actors change a step's time and never which tiles make it up. Commits ride on the next `evaluate`.
A lost actor's tiles go to the others at once; with no replica left the run stops and can be resumed.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from zoray.actor import Member, ReplicaActor, connect_all
from zoray.channel import Listener
from zoray.cluster import Cluster, connect, leave, own_host, size, totals
from zoray.records import Commit, ConfigError, JournalError, ReplicaLost, Scores
from zoray.tiles import Grid, as_ranges, contiguous, join_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from zoray.data import ReplicaSpec
    from zoray.replica import ReplicaInfo

log = logging.getLogger(__name__)


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
            actors = []
            for i in range(count):
                options = {
                    "name": f"zoray-{run_name}-{tag}-replica-{i}",
                    "num_cpus": cpus,
                    "num_gpus": gpus,
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
                }
                actors.append((options["name"], ray.remote(ReplicaActor).options(**options).remote()))
            with closing(Listener(own_host(), cluster.port)) as listener:
                members = connect_all(actors, listener, cluster.start_timeout_s)
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
        return self.evaluate(Grid(len(self.commits)), digest=True)[1] or ""

    def rewind(self, step: int) -> None:
        """Take all replicas to the state after `step` steps, by replay from the start."""
        asked = [(member, member.ask("reset")) for member in self.members]
        for member, number in asked:
            self._result(member, number)
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
            pending = []
            shares = contiguous(missing, self.size)
            for member, share in zip(list(self.members), shares, strict=False):
                if share or digest:
                    work = (grid.step, grid.split, as_ranges(share), digest)
                    number = member.ask("evaluate", tuple(self.commits[member.sent :]), *work)
                    member.sent = len(self.commits)
                    pending.append((member, share, number))
            for member, share, number in pending:
                answer = self._result(member, number)
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
            answer = self._result(member, member.ask("adapter", tuple(self.commits[member.sent :])))
            member.sent = len(self.commits)
            if answer is not None:
                return answer

    def _result(self, member: Member, number: int) -> Any:
        """An actor's answer, or None when the actor is gone: the one place where a failure is survived.

        An exception inside the replica's own code is not survived: it would meet every replica alike.
        """
        try:
            return member.answer(number)
        except ReplicaLost as error:
            self.members.remove(member)
            member.kill()  # it may be there still, cut off
            self.lost.append(member.name)
            log.warning("lost %s (%s); %d replicas left", member.name, str(error).split("\n")[0], self.size)
            if not self.members:
                raise ReplicaLost(f"all replicas are lost, the last one: {error}") from error
            return None

    def close(self) -> None:
        """End the actors; end Ray too if this pool started it."""
        try:
            for member in self.members:
                member.kill()
        finally:
            self.members.clear()
            leave(self.group, self.owns_ray)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load(members: list[Member], spec: ReplicaSpec, cores: int | None) -> ReplicaInfo:
    """Load all replicas side by side, each bound to cores of its own; weights and initial state must be the same."""
    nodes = [member.node for member in members]
    shares = [None if cores is None else (nodes[:i].count(node), cores) for i, node in enumerate(nodes)]
    asked = [member.ask("load", spec, share) for member, share in zip(members, shares, strict=True)]
    try:
        infos = [member.answer(number) for member, number in zip(members, asked, strict=True)]
    except ReplicaLost as error:
        raise ReplicaLost(f"a replica died while it loaded the model (out of memory?): {error}") from error
    for name in ("weights", "dtype", "digest"):
        found = {getattr(info, name) for info in infos}
        if len(found) > 1:
            raise ConfigError(
                f"expected the same {name} on every node; got {sorted(found)}: model files differ between nodes"
            )
    return infos[0]
