"""The replicas of a run: tiles out and scores in, and what happens when a replica is late, lost, new, or wrong.

Guarantees: every tile of a call counts exactly once, whichever replica scored it, so the set of replicas changes how
long a step takes and never which tiles make it up. Commits ride on the next `evaluate`. A lost replica's tiles go to
the others at once, a late one's after its deadline; a replica that connects, first or again, replays the commits and
joins between steps. A replica whose state or scores differ from the majority is detected and rebuilt, and none of its
answers in that step count.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from zoray.methods.snapshots import write
from zoray.pool.agreement import differing_digests, differing_scores
from zoray.pool.members import Known
from zoray.pool.shares import Shares
from zoray.records import ConfigError, JournalError, ReplicaLost, Scores
from zoray.records.tiles import NOT_FINITE, Grid, as_ranges, join_scores, scored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from zoray.methods.snapshots import Snapshot
    from zoray.pool.members import Member, Members
    from zoray.records import Commit
    from zoray.scoring.replica import ReplicaInfo

log = logging.getLogger(__name__)
REMIND_SECONDS = 60.0
STRIKES = 3  # times a replica differs from the majority before it is given up: that is no bad luck
FORGIVEN = 1.1  # factor on a replica's speed each time it got no tiles: the measurement may have been a bad moment


def never() -> bool:
    return False


@dataclass
class Round:
    """A call of `Pool.evaluate` under way. `weight`: examples per tile."""

    grid: Grid
    digest: bool
    canary: bool
    shares: Shares
    weight: int
    digests: dict[str, str] = field(default_factory=dict)
    canaries: dict[str, float] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # replicas asked for a digest and canary
    changed: bool = True  # whether there may be tiles to hand out


class Pool:
    """The replicas of a run. Use as a context manager.

    Args:
        members: the replicas.
        stopping: whether the run should stop; asked while the pool waits for replicas.

    Attributes:
        lost: name and reason of each loss of a replica.
        rebuilt: how often a replica was rebuilt because its state or scores differed.
        scored: examples that each node has scored, over all probes.
    """

    def __init__(self, members: Members, stopping: Callable[[], bool] = never) -> None:
        self.members, self.stopping, self.rebuilt = members, stopping, 0
        self.spec, self.commits, self.lost, self.scored = members.spec, members.commits, members.lost, members.scored
        self._work: Round | None = None
        self._strikes: Counter[str] = Counter()  # how often each replica differed from the majority
        self._slowest = 0.0  # lowest known speed
        members.on_lost, members.on_late, members.on_doubt = self._lost, self._late, self._doubted

    @classmethod
    def gathered(
        cls,
        members: Members,
        commits: Sequence[Commit] = (),
        known: Sequence[tuple[int, str]] = (),
        snapshot: Snapshot | None = None,
        stopping: Callable[[], bool] = never,
    ) -> Pool:
        """A pool of members, once enough of them have connected and replayed `commits`; see `gather`.

        `known`: (step, digest of the state before it) from the journal; a replay is checked against the last one.
        `snapshot`: where a replay may begin.
        """
        members.commits += commits
        members.known = Known(*known[-1]) if known else None
        members.snapshot = snapshot
        pool = cls(members, stopping)
        try:
            pool.gather()
        except BaseException:
            pool.close()
            raise
        return pool

    @property
    def info(self) -> ReplicaInfo:
        """What the replicas report about themselves; the same for all."""
        assert self.members.info is not None
        return self.members.info

    @property
    def size(self) -> int:
        """Number of replicas that can score."""
        return len(self.members.ready)

    def gather(self) -> None:
        """Wait at the start of a run for all replicas that have room, at least `cluster.min_replicas`.

        Raises:
            ConfigError: they did not connect in time.
            KeyboardInterrupt: the run should stop.
        """
        members, cluster = self.members, self.members.cluster
        least = min(cluster.min_replicas, len(members.names))
        seen, progress = 0, time.monotonic()
        while len(members.ready) < len(members.names) - len(members.given_up):
            if self.stopping():
                raise KeyboardInterrupt
            members.pump(1.0)
            if len(members.connected) != seen or any(not m.ready for m in members.connected.values()):
                seen, progress = len(members.connected), time.monotonic()
            if len(members.ready) >= least and not members.loading():
                break
            if time.monotonic() - progress > cluster.start_timeout_s:
                if len(members.ready) >= least:
                    break
                absent, there = members.host.without_room(), members.host.resources()
                raise ConfigError(
                    f"expected {least} replicas to start and connect to {members.host.listener.address}; "
                    f"{len(members.ready)} did, and none followed for {cluster.start_timeout_s:g} s "
                    f"(cluster.start_timeout_s). "
                    + (f"The cluster has no room for {len(absent)} of them: it has {there}. " if absent else "")
                    + "Lower cluster.replicas or cluster.cpus_per_replica, or see Ray's logs"
                )
        members.running = True

    def commit(self, commit: Commit) -> None:
        """Add a journalled commit; it is sent with each replica's next message."""
        self.commits.append(commit)

    def digest(self) -> str:
        """Digest of the state after all commits."""
        return self.evaluate(Grid(len(self.commits)), digest=True)[1] or ""

    def rewind(self, step: int) -> None:
        """Bring all replicas to the state after `step` steps, by replay from the start."""
        del self.commits[step:]
        members = self.members
        if members.known is not None and members.known.step > step:
            members.known = None
        if members.snapshot is not None and members.snapshot.step > step:
            members.snapshot = None
        for member in list(members.connected.values()):
            members.rebuild(member)

    def keep_snapshot(self, path: Path) -> None:
        """Write a replica's state before the next commit to a file, while the run goes on.

        Call it after an evaluation with a digest; a state over `cluster.snapshot_mib` is not kept.
        """
        members, step = self.members, len(self.commits)
        member = next((member for member in members.idle if member.sent == step), None)
        if member is None or members.known is None or members.known.step != step:
            return
        expected = members.known.digest

        def keep(_: Member, data: bytes | None) -> None:
            if data is None or len(self.commits) < step:
                return
            try:
                found = write(path, data)
            except OSError as error:
                members.say(f"the run goes on without a snapshot: can't write {path}: {error.strerror}")
                return
            members.snapshot = found if (found.step, found.digest) == (step, expected) else None

        members.ask(member, "snapshot", int(members.cluster.snapshot_mib * 2**20), then=keep)

    def evaluate(self, grid: Grid, digest: bool = False) -> tuple[Scores, str | None]:
        """Scores of all tiles of a grid at the state after all commits; and the state's digest if asked for.

        All replicas are asked for the digest, and in a step for their score of one common tile.

        Raises:
            ReplicaLost: too few replicas are left, and none connected in time.
            JournalError: most replicas disagree about the state, or about a score.
        """
        weight = scored([grid[0]]) if len(grid) else 1
        canary = digest and grid.split == "train" and len(grid) > 0
        work = self._work = Round(grid, digest, canary, Shares(len(grid)), weight)
        doubted = False
        try:
            self._await_enough()
            while True:
                self._hand_out(work)
                if work.shares.done and not self._awaited(work):
                    clear = len(work.digests) > 2  # of two, either may be wrong
                    if suspects := self._suspects(work, clear):
                        if doubted:
                            raise JournalError(
                                f"replicas still disagree after they were rebuilt: {suspects}, at step {grid.step}. "
                                "The journal is sound; look at the devices, and resume the run"
                            )
                        doubted = not clear
                        self._await_enough()
                        continue
                    if not digest or work.digests:
                        break
                self.members.pump(REMIND_SECONDS)
                if not self.members.ready:
                    self._await_enough()
        finally:
            self._work = None
        self.members.evaluated()
        found = next(iter(work.digests.values()), None)
        if found is not None:
            self.members.known = Known(len(self.commits), found, frozenset(work.digests))
        answers = [(share, scores) for share, (_, scores) in work.shares.answers.items()]
        return join_scores(grid.tiles, answers, grid.per_example), found if digest else None

    def adapter(self) -> tuple[dict[str, np.ndarray], str]:
        """Adapter state and digest after all commits, from the first replica that answers."""
        found: list[tuple[dict[str, np.ndarray], str]] = []
        asked: Member | None = None
        while not found:
            self._await_enough()
            if asked is None or asked.call is None or self.members.connected.get(asked.name) is not asked:
                asked = next(iter(self.members.idle), None)
                if asked is not None:
                    commits = self._unsent(asked)
                    self.members.ask(asked, "adapter", commits, then=lambda _, answer: found.append(answer))
            self.members.pump(1.0)
        return found[0]

    def close(self) -> None:
        """End the replicas and everything started for them."""
        self.members.close()

    def _await_enough(self) -> None:
        """Wait until there are `cluster.min_replicas`; as long as it takes, while one of them loads or replays.

        Raises:
            ReplicaLost: no replica connected in time.
            KeyboardInterrupt: the run should stop.
        """
        members, cluster = self.members, self.members.cluster
        least = min(cluster.min_replicas, len(members.names))
        began, said = time.monotonic(), -math.inf
        while len(members.ready) < least:
            now = time.monotonic()
            there = f"{len(members.ready)} of at least {least} replicas"
            if self.stopping():
                members.say(f"stopped while waiting for replicas ({there}); the run can be resumed")
                raise KeyboardInterrupt
            if any(not member.ready for member in members.connected.values()):
                began = now
            elif now - said >= REMIND_SECONDS:
                said = now
                members.say(f"waiting at step {len(self.commits)}: {there}, for {cluster.wait_timeout_s:g} s at most")
            if now - began > cluster.wait_timeout_s:
                raise ReplicaLost(
                    f"expected {least} replicas (cluster.min_replicas) again within {cluster.wait_timeout_s:g} s "
                    f"(cluster.wait_timeout_s); got {len(members.ready)}. The last loss: {members.lost[-1:]}. The run "
                    "can be resumed"
                )
            members.pump(1.0)

    def _hand_out(self, work: Round) -> None:
        """Give the missing tiles to idle replicas; ask those for a digest and canary that have not been asked."""
        members = self.members
        if work.changed and not work.shares.done:
            idle = {member.name: member.speed for member in members.idle}
            self._slowest = min((m.speed for m in members.ready if m.speed), default=0.0)
            busy = [m.speed for m in members.ready if m.call is not None and not m.late]
            given = work.shares.hand_out(idle, busy)
            for name in idle.keys() - {name for name, _ in given}:  # at its last speed, too slow for so few tiles
                members.connected[name].speed *= FORGIVEN
            for name, share in given:
                self._ask(work, members.connected[name], share)
            work.changed = bool(work.shares.missing())
        if work.digest:
            for member in members.idle:
                if member.name not in work.asked:
                    self._ask(work, member, ())

    def _ask(self, work: Round, member: Member, share: tuple[int, ...]) -> None:
        vital = work.digest and member.name not in work.asked
        if vital:
            work.asked.add(member.name)
        examples, began = len(share) * work.weight, time.monotonic()

        def answered(member: Member, answer: tuple[Scores, str | None, float | None]) -> None:
            member.took(examples, vital, time.monotonic() - began)
            if examples:
                self.members.has_scored(member, examples)
            if work is self._work:
                self._answered(work, member, bool(share), answer)

        what = (work.grid.step, work.grid.split, as_ranges(share), vital, vital and work.canary)
        seconds = self._allowed(member, examples, vital)
        self.members.ask(member, "evaluate", self._unsent(member), *what, then=answered, seconds=seconds)

    def _answered(
        self, work: Round, member: Member, shared: bool, answer: tuple[Scores, str | None, float | None]
    ) -> None:
        scores, digest, canary = answer
        if digest is not None:
            work.digests[member.name] = digest
        if canary is not None:
            work.canaries[member.name] = canary
        if not shared:
            return
        if not work.shares.answer(member.name, scores):
            work.changed = True
        bad = scores.losses == NOT_FINITE if scores.losses.dtype == np.int64 else ~np.isfinite(scores.losses)
        if bad.any() and work.grid.split == "train" and self.size > 1:
            work.digest = work.canary = True  # to tell whether the state or this replica is to blame

    def _allowed(self, member: Member, examples: int, vital: bool) -> float:
        """Seconds until a member is late, by its own speed; before that is known, by the slowest of the others."""
        cluster, speed = self.members.cluster, member.speed or self._slowest
        if not speed or (vital and member.extra is None):
            return math.inf
        expected = examples / speed + (member.extra or 0.0) * vital
        return max(cluster.late_floor_s, cluster.late_factor * expected)

    def _unsent(self, member: Member) -> tuple[Commit, ...]:
        unsent, member.sent = tuple(self.commits[member.sent :]), len(self.commits)
        return unsent

    def _awaited(self, work: Round) -> bool:
        """Whether a replica still owes its digest."""
        return work.digest and any(
            m.call is not None and not m.late and m.name in work.asked and m.name not in work.digests
            for m in self.members.ready
        )

    def _suspects(self, work: Round, clear: bool) -> list[str]:
        """Find replicas that differ from the majority, discard their answers, and rebuild them."""
        members, found = self.members, []
        wrong_state = differing_digests(work.digests)
        sound = {name: score for name, score in work.canaries.items() if name not in wrong_state}
        for name in sorted(wrong_state | differing_scores(sound, self.info.canary_noise)):
            state = name in wrong_state
            what = (
                f"state {work.digests[name]}" if state else f"loss {work.canaries[name]:.6f} of a tile that all score"
            )
            why = f"its {what} is not that of the others"
            found.append(f"{name} ({what})")
            self._strikes[name] += clear
            self.rebuilt += 1
            self._reject(work, name)
            if (member := members.connected.get(name)) is None:
                continue
            if self._strikes[name] >= STRIKES:
                members.lose(member, why)
                members.give_up(name, f"{why}, for the {STRIKES}rd time: look at {member.node}")
            elif state:
                members.say(f"{name}: {why} at step {len(self.commits)}; it is rebuilt from the journal")
                members.rebuild(member)
            else:
                members.lose(member, why, restart=True)
        return found

    def _forget(self, work: Round, name: str) -> None:
        work.digests.pop(name, None)
        work.canaries.pop(name, None)
        work.asked.discard(name)
        work.changed = True

    def _reject(self, work: Round, name: str) -> None:
        """Discard all answers of a replica."""
        work.shares.reject(name)
        self._forget(work, name)

    def _doubted(self, member: Member) -> None:
        self.rebuilt += 1
        if self._work is not None:
            self._reject(self._work, member.name)

    def _lost(self, member: Member) -> None:
        if self._work is not None:
            self._work.shares.drop(member.name)
            self._forget(self._work, member.name)

    def _late(self, member: Member) -> None:
        log.info("%s is late; its tiles go to others as well", member.name)
        if self._work is not None and member.name in self._work.shares.held:
            self._work.shares.late.add(member.name)
            self._work.changed = True

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
