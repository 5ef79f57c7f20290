"""The replicas of a run as the driver sees them: connecting, loading, catching up, scoring, late, hanging, or lost.

One thread, woken by sockets. A member has at most one call under way; its answer goes to the function that came with
the call. Guarantees: a member is ready only when its weights and its state at journal index 0 match the others', it has
applied all commits so far, and its state has had the known digest; a member that fails starts again from the beginning.
"""

from __future__ import annotations

import logging
import math
import pickle
import selectors
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zoray.pool import sockets as channel
from zoray.records import ConfigError, JournalError, ReplicaLost

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from zoray.methods.snapshots import Snapshot
    from zoray.pool.settings import Cluster
    from zoray.pool.sockets import Listener
    from zoray.records import Commit
    from zoray.scoring.replica import ReplicaInfo
    from zoray.scoring.workload import ReplicaSpec

log = logging.getLogger(__name__)

CHUNK = 256  # commits per message to a member that catches up, while the others go on stepping
NEAR = 16  # commits behind: few enough to come with the next tiles
FAILURES = 3  # failures of a member in a row, with no share scored in between, before it is given up
PATIENCE = 10.0  # a call that takes this many times its limit, or its usual time, counts as hung
WATCH_SECONDS = 1.0  # between looks at what Ray says about members that are not connected


class Host(Protocol):
    """What keeps the members' processes: placement.Placement, a server's, or a test's own."""

    listener: Listener

    def resources(self) -> str: ...

    def without_room(self) -> set[str]: ...

    def ended(self, names: list[str]) -> dict[str, tuple[Exception | None, bool]]: ...

    def serve(self, name: str) -> None: ...

    def restart(self, node_id: str, pid: int) -> None: ...

    def let_go(self, name: str) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Call:
    """A request to a member that has not been answered yet. Times are of time.monotonic()."""

    number: int
    method: str
    then: Callable[[Member, Any], None]
    began: float
    deadline: float  # when it is late
    hangs: float  # when it counts as hung


class Known(NamedTuple):
    """The digest that a replay must reach at a step."""

    step: int  # the digest is that of the state before this step
    digest: str
    said_by: frozenset[str] = frozenset()  # names of members; empty: from the journal


class Phase(Enum):
    """What a member is doing."""

    JOINING = "loads, and catches up for the first time"
    READY = "can score"
    LATE = "can score, but has not answered in time"
    STALE = "will be rebuilt once its call is answered"
    REBUILT = "catches up again, from journal index 0"


@dataclass(eq=False)
class Member:
    """A connected replica."""

    name: str
    connection: Connection
    address: str  # of its node
    node_id: str  # Ray's
    pid: int
    place: int = 0  # among the members of its node; decides which cores it gets
    sent: int = 0  # commits sent to it so far
    phase: Phase = Phase.JOINING
    call: Call | None = None
    speed: float = 0.0  # examples scored a second; 0 if unknown
    extra: float | None = None  # seconds for a digest and the tile that all members score
    asked: int = 0
    scored: int = 0  # examples

    @property
    def ready(self) -> bool:
        """Whether it can score."""
        return self.phase in (Phase.READY, Phase.LATE)

    @property
    def late(self) -> bool:
        """Whether its call is taking longer than expected."""
        return self.phase is Phase.LATE

    @property
    def node(self) -> str:
        """Its node, for messages."""
        return f"{self.address} ({self.node_id[:8]})"

    def took(self, examples: int, vital: bool, seconds: float) -> None:
        """Learn the member's speed from a call; `vital`: whether the call asked for a digest too."""
        if examples and not (vital and self.speed):
            speed = examples / max(seconds, 1e-9)
            self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        elif vital:
            extra = max(0.0, seconds - (examples / self.speed if examples else 0.0))
            self.extra = extra if self.extra is None else 0.7 * self.extra + 0.3 * extra


@dataclass
class Members:
    """All replicas of a run. `names`: the replicas requested; the other settings are the run's."""

    names: list[str]
    host: Host
    spec: ReplicaSpec
    cluster: Cluster
    cores: int | None = None  # how many each member is bound to; None binds none
    say: Callable[[str], None] = log.info
    pack: Callable[[Any, int], bytes] = pickle.dumps  # for the spec, which may hold a script's own classes
    on_lost: Callable[[Member], None] = lambda member: None
    on_late: Callable[[Member], None] = lambda member: None
    on_doubt: Callable[[Member], None] = lambda member: None  # its answers no longer count
    commits: list[Commit] = field(default_factory=list)
    known: Known | None = None
    snapshot: Snapshot | None = None  # where a replay starts
    connected: dict[str, Member] = field(default_factory=dict)
    info: ReplicaInfo | None = None  # from the first member that has loaded
    lost: list[str] = field(default_factory=list)  # name and reason of each loss
    scored: Counter[str] = field(default_factory=Counter)  # examples, by node
    given_up: dict[str, str] = field(default_factory=dict)  # name -> why

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.host.listener, selectors.EVENT_READ, None)
        self._failures: Counter[str] = Counter()
        self._has_raised = False  # whether a replica has raised in the current evaluation
        self._replayed: Counter[str] = Counter()  # digests of replays that differ from the journal's
        self._condemned: dict[tuple[str, int], Connection | None] = {}  # processes about to end, and their connections
        self._next_deadline = math.inf
        self._next_watch = 0.0
        self.running = False  # once the run has started, a member's failure no longer ends it

    @property
    def ready(self) -> list[Member]:
        """Members that can score, in the order of `names`."""
        return [member for name in self.names if (member := self.connected.get(name)) and member.ready]

    @property
    def idle(self) -> list[Member]:
        """Members that can score and have no call under way."""
        return [member for member in self.ready if member.call is None]

    def ask(
        self,
        member: Member,
        method: str,
        *arguments: Any,
        then: Callable[[Member, Any], None],
        seconds: float = math.inf,
    ) -> None:
        """Call a method of the actor; `then(member, result)` runs in `pump`. The call is late after `seconds`."""
        pack = self.pack if method == "load" else pickle.dumps
        member.asked += 1
        began = time.monotonic()
        limit = self.cluster.hang_timeout_s
        known = max(limit, PATIENCE * seconds) if math.isfinite(seconds) else PATIENCE * limit
        hangs = math.inf if method == "load" else began + known
        member.call = Call(member.asked, method, then, began, min(began + seconds, hangs), hangs)
        self._next_deadline = min(self._next_deadline, member.call.deadline)
        message = pack((member.asked, method, arguments), pickle.HIGHEST_PROTOCOL)
        try:
            member.connection.send_bytes(message)
        except OSError:  # lost, as the next read will show; or stopped, with half a message
            member.call.hangs = self._next_deadline = began + channel.STUCK_SECONDS
            member.call.deadline = min(member.call.deadline, member.call.hangs)

    def pump(self, seconds: float) -> None:
        """Wait at most `seconds` for events, and handle those that have come.

        Raises:
            ConfigError, ReplicaLost: the first replica does not start, or none is left that could come back.
            Exception: raised by a replica's own code, see `_raised`.
        """
        now = time.monotonic()
        until = min(now + seconds, self._next_deadline, self._next_watch if self._absent() else math.inf)
        for key, _ in self._selector.select(max(0.0, until - now)):
            if key.data is None:
                self._admit()
            elif self.connected.get(key.data.name) is key.data:
                self._read(key.data)
        now = time.monotonic()
        if now >= self._next_deadline:
            self._look_at_deadlines(now)
        if now >= self._next_watch and self._absent():
            self._next_watch = now + WATCH_SECONDS
            self._watch()

    def rebuild(self, member: Member) -> None:
        """Take a member's state back to journal index 0, base weights included, and let it catch up again."""
        if member.call is not None:
            if member.call.method != "load":  # a load ends at index 0 anyway
                member.phase = Phase.STALE
            return
        member.phase, member.sent = Phase.REBUILT, 0
        self.ask(member, "reset", then=lambda member, _: self._advance(member))

    def lose(self, member: Member, why: str, restart: bool = False) -> None:
        """Remove a member. `restart`: its process may still exist, and is ended."""
        self._selector.unregister(member.connection)
        member.connection.close()
        del self.connected[member.name]
        self.lost.append(f"{member.name}: {why}")
        self._failures[member.name] += 1
        self.on_lost(member)
        if not self.running and self.info is None:
            raise ReplicaLost(f"a replica died while it loaded the model (out of memory?): {member.name}, {why}")
        left = f"{len(self.ready)} of {len(self.names)} replicas go on"
        if self._failures[member.name] >= FAILURES:
            self.give_up(member.name, f"{why}, {FAILURES} times without scoring anything in between")
        else:
            self.say(f"lost {member.name} ({why}); {left}, and it is restarted")
            if restart:
                self._condemned[member.node_id, member.pid] = None
                self.host.restart(member.node_id, member.pid)

    def give_up(self, name: str, why: str) -> None:
        """Continue without a replica from now on."""
        self.given_up[name] = why
        self.say(f"{name} is given up: {why}")
        self.host.let_go(name)
        if len(self.given_up) == len(self.names):
            raise ReplicaLost(f"all replicas are lost; the last one, {name}: {why}. The run can be resumed")

    def has_scored(self, member: Member, examples: int) -> None:
        """Count examples that a member has scored, and forget its earlier failures."""
        self._failures.pop(member.name, None)
        member.scored += examples
        self.scored[member.node] += examples

    def loading(self) -> bool:
        """Whether a member that has room is starting, loading or catching up."""
        waiting = self._absent()
        return any(not member.ready for member in self.connected.values()) or bool(
            set(waiting) - (self.host.without_room() if waiting else set())
        )

    def close(self) -> None:
        """End all members."""
        for member in self.connected.values():
            member.connection.close()
        self.connected.clear()
        self._selector.close()
        self.host.close()

    def _absent(self) -> list[str]:
        if len(self.connected) + len(self.given_up) == len(self.names):
            return []
        return [name for name in self.names if name not in self.connected and name not in self.given_up]

    def _admit(self) -> None:
        for connection, hello in self.host.listener.arrivals():
            name, address, node_id, pid = pickle.loads(hello)
            if name in self.given_up or name not in self.names:
                connection.close()
                continue
            if (node_id, pid) in self._condemned:  # about to be ended; it waits until then
                self._condemned[node_id, pid] = connection
                continue
            if name in self.connected:  # it noticed before the driver that the old connection is broken
                self.lose(self.connected[name], "connected again")
            taken = {member.place for member in self.connected.values() if member.node_id == node_id}
            place = next(i for i in range(len(taken) + 1) if i not in taken)
            member = self.connected[name] = Member(name, connection, address, node_id, pid, place)
            self._selector.register(connection, selectors.EVENT_READ, member)
            cores = None if self.cores is None else (place, self.cores)
            self.ask(member, "load", self.spec, cores, then=self._loaded)

    def _read(self, member: Member) -> None:
        try:
            number, error, value = pickle.loads(member.connection.recv_bytes())
        except (EOFError, OSError) as gone:
            self.lose(
                member,
                f"process {member.pid} on {member.node} has died or is cut off{f': {gone}' if str(gone) else ''}",
            )
            return
        call = member.call
        if call is None or number != call.number:
            return
        member.call = None
        if member.phase is Phase.LATE:
            member.phase = Phase.READY
        if error is not None:
            self._raised(member, call, error)
        elif member.phase is Phase.STALE:
            self.rebuild(member)
        else:
            call.then(member, value)

    def _raised(self, member: Member, call: Call, error: Exception) -> None:
        """Handle an error in a replica's own code. If it was the device's fault, another replica may succeed; once."""
        others = [other for other in self.ready if other is not member]
        if self.info is None or (call.method != "load" and (not others or self._has_raised)):
            raise error
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, ConfigError):  # it would fail the same way each time
            self.lose(member, text)
            self.give_up(member.name, text)
            return
        self._has_raised |= call.method == "evaluate"
        self.lose(member, text, restart=True)

    def evaluated(self) -> None:
        """An evaluation is complete: others succeeded where one replica failed."""
        self._has_raised = False

    def _loaded(self, member: Member, info: ReplicaInfo) -> None:
        first = self.info = self.info or info
        for what in ("weights", "dtype", "digest"):
            mine, theirs = getattr(info, what), getattr(first, what)
            if mine != theirs:
                found = sorted((mine, theirs))
                why = f"expected the same {what} on every node; got {found}: model files differ between nodes"
                if not self.running:
                    raise ConfigError(why)
                self.lose(member, why)
                self.give_up(member.name, why)
                return
        found = self.snapshot
        if found is None or not 0 < found.step <= len(self.commits):
            self._advance(member)
            return
        try:
            data = found.path.read_bytes()
        except OSError as gone:
            self.say(f"{found.path} can't be read ({gone.strerror}): {member.name} replays the journal from its start")
            self._advance(member)
            return
        self.ask(member, "restore", data, found.step, then=partial(self._restored, snapshot=found))

    def _restored(self, member: Member, digest: str, snapshot: Snapshot) -> None:
        if digest == snapshot.digest:
            member.sent = snapshot.step
            self._advance(member)
            return
        self.say(
            f"{snapshot.path} gives {member.name} the state {digest}, not {snapshot.digest}: it replays the journal"
        )
        self.snapshot = None
        self.rebuild(member)

    def _advance(self, member: Member, digest: str | None = None, expected: Known | None = None) -> None:
        """Let a member apply the commits it has not seen, in chunks, until it is close enough to join."""
        if expected is not None and digest != expected.digest and not self._believed(member, str(digest), expected):
            return
        end = len(self.commits)
        known = self.known if self.known is not None and self.known.step > member.sent else None
        if known is None and end - member.sent <= NEAR:
            joins, member.phase = member.phase is Phase.JOINING, Phase.READY
            if self.running and joins:
                self.say(f"{member.name} has joined at step {end}: {len(self.ready)} of {len(self.names)} replicas")
            return
        stop = min(end, member.sent + CHUNK, known.step if known is not None else end)
        some = tuple(self.commits[member.sent : stop])
        member.sent = stop
        expected = known if known is not None and stop == known.step else None
        self.ask(member, "catch_up", some, expected is not None, then=partial(self._advance, expected=expected))

    def _believed(self, member: Member, digest: str, expected: Known) -> bool:
        """Whether a replay whose digest differs from the known one may go on.

        It may if the known digest came from a single replica: either may be wrong, and a replay of the journal is the
        better witness, so that replica is rebuilt as well. A digest from several replicas or from the journal stands.

        Raises:
            JournalError: a second replay has reached the same digest, which is not the journal's.
        """
        found = f"replay of {member.sent} steps gives {member.name} the state {digest}"
        if len(expected.said_by) == 1:
            if self.known is expected:
                self.known = None
                self.say(f"{found}; {expected.digest} was that of {', '.join(expected.said_by)} alone; it is rebuilt")
                for other in self.ready:
                    self.on_doubt(other)
                    self.rebuild(other)
            return True
        if not expected.said_by:
            self._replayed[digest] += 1
            if self._replayed[digest] > 1:
                raise JournalError(
                    f"{found}, and so did another replay; the journal has {expected.digest}. Either zoray or its "
                    "libraries have changed since the run was made, or the replica that gave the digest was damaged: "
                    "`python -m zoray.replay` names the first step that differs"
                )
        self.lose(member, f"{found}; the others' was {expected.digest}", restart=True)
        return False

    def _look_at_deadlines(self, now: float) -> None:
        self._next_deadline = math.inf
        for member in list(self.connected.values()):
            call = member.call
            if call is None:
                continue
            if now >= call.hangs:
                self.lose(member, f"no answer for {now - call.began:.0f} s (cluster.hang_timeout_s)", restart=True)
                continue
            if now >= call.deadline and member.phase is Phase.READY:
                member.phase = Phase.LATE
                self.on_late(member)
            self._next_deadline = min(self._next_deadline, call.hangs if member.late else call.deadline)

    def _watch(self) -> None:
        """Ask Ray about members that are not connected."""
        for name, (error, final) in self.host.ended(self._absent()).items():
            if error is None:  # it lost the connection and did not reconnect
                self.host.serve(name)
                continue
            if not self.running and self.info is None:
                raise (
                    error
                    if isinstance(error, ConfigError)
                    else ReplicaLost(f"a replica ended before it was connected: {error}")
                ) from error
            self._failures[name] += 1
            if final or self._failures[name] >= FAILURES:
                self.give_up(name, str(error).split("\n")[0])
            else:
                self.host.serve(name)
