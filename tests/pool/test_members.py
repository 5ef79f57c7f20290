"""The pool without Ray: replicas are threads that answer as they are told to, over the real sockets."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zoray.methods import snapshots
from zoray.methods.estimators import TwoPoint
from zoray.pool.members import Members
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.pool.sockets import Listener, connect
from zoray.records import Commit, ConfigError, JournalError, ReplicaLost, Scores
from zoray.records.tiles import NOT_FINITE, Grid, losses_of, scored, summed
from zoray.scoring.replica import ReplicaInfo

INFO = ReplicaInfo("0" * 16, "w", "fake", "float32", 1e-6, ())


class Fake:
    """A replica: its state is the number of its steps, a loss the number of its example. Settings are of its kind."""

    def __init__(
        self, wrong: int = 0, drifts: int = 0, poison: float = 0.0, seconds: float = 0.0, info: ReplicaInfo = INFO
    ) -> None:
        self.wrong, self.drifts, self.poison, self.seconds, self.info = wrong, drifts, poison, seconds, info
        self.hangs = False
        self.moved = 0  # its state, by itself; a reset mends that
        self.step, self.calls = 0, []

    def digest(self) -> str:
        return f"{self.step + self.moved + self.wrong * (self.step > 0):016x}"

    def call(self, spec: Any, method: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append((method, len(arguments[0]) if method in ("catch_up", "evaluate") else None))
        if method == "load":
            return self.info
        if method == "reset":
            self.step = self.moved = 0
        elif method == "restore":
            self.step = arguments[1]
            return self.digest()
        elif method == "snapshot":
            from safetensors.numpy import save

            return save({"x": np.array([self.step])}, {"step": str(self.step), "digest": self.digest()})
        elif method == "catch_up":
            self.step += len(arguments[0])
            return self.digest() if arguments[1] else None
        elif method == "evaluate":
            commits, step, split, share, digest, canary = arguments
            self.step += len(commits)
            assert self.step == step
            grid = Grid.of(spec, step, split)
            tiles = [grid[i] for first, end in share for i in range(first, end)]
            while self.hangs and tiles:
                time.sleep(0.1)
            time.sleep(self.seconds * len(tiles))
            losses = [
                i + 0.1 * k for tile in tiles for k in range(len(tile.probes)) for i in range(tile.start, tile.stop)
            ]
            answer = Scores(summed(tiles, np.array(losses) + self.poison), 0.0, 0)
            self.step += self.drifts
            found = self.digest()
            self.step -= self.drifts
            return answer, found if digest else None, 1.0 + self.poison if canary else None
        return None


class Host:
    """Starts replicas as threads, and anew when they are gone; `kinds` are the settings of each, by its number."""

    def __init__(self, spec: Any, kinds: dict[int, dict[str, Any]], count: int) -> None:
        self.listener, self.spec, self.kinds = Listener("127.0.0.1", 0), spec, kinds
        self.names = [f"replica-{i}" for i in range(count)]
        self.fakes: dict[str, Fake] = {}
        self.connections: dict[str, Any] = {}
        self.starts = 0
        self.gone: set[str] = set()
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        self.starts += 1
        fake = self.fakes[name] = Fake(**self.kinds.get(int(name[-1]), {}))
        threading.Thread(target=self.run, args=(name, fake, self.starts), daemon=True).start()

    def run(self, name: str, fake: Fake, pid: int) -> None:
        connection = self.connections[name] = connect(self.listener.address, self.listener.key)
        connection.send_bytes(pickle.dumps((name, "here", name, pid)))
        try:
            while True:
                number, method, arguments = pickle.loads(connection.recv_bytes())
                connection.send_bytes(pickle.dumps((number, None, fake.call(self.spec, method, arguments))))
        except (EOFError, OSError):
            self.gone.add(name)

    def cut(self, name: str) -> None:
        """A replica is gone, as where its process dies."""
        with socket.socket(fileno=os.dup(self.connections[name].fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)

    def resources(self) -> str:
        return ""

    def without_room(self) -> set[str]:
        return set()

    def ended(self, names: list[str]) -> dict[str, tuple[Exception | None, bool]]:
        for name in set(names) & self.gone:
            self.gone.discard(name)
            self.start(name)
        return {}

    def serve(self, name: str) -> None: ...

    def restart(self, node_id: str, pid: int) -> None:
        self.gone.add(node_id)

    def let_go(self, name: str) -> None: ...

    def close(self) -> None:
        self.listener.close()


def members_of(count: int, kinds: dict[int, dict[str, Any]] | None = None, **settings: Any) -> Members:
    spec: Any = SimpleNamespace(estimator=TwoPoint(pairs=4), batch=4, tile_examples=1, shared=True)
    host = Host(spec, kinds or {}, count)
    return Members(host.names, host, spec, Cluster(replicas=count, **settings))


def pool_of(count: int, kinds: dict[int, dict[str, Any]] | None = None, **settings: Any) -> Pool:
    return Pool(members_of(count, kinds, **settings))


def step(pool: Pool, digest: bool = True) -> list[tuple[float, ...]]:
    grid = Grid.of(pool.spec, len(pool.commits))
    scores, found = pool.evaluate(grid, digest)
    assert found == (f"{len(pool.commits):016x}" if digest else None)
    pool.commit(Commit(len(pool.commits), (0.1,) * 4))
    return losses_of(pool.spec.estimator.ask(grid.step), grid.tiles, scores)[0]


RIGHT = [(pytest.approx(1.5 + 0.1 * (k % 2)),) for k in range(8)]


def test_who_differs_from_a_majority_again_and_again_is_given_up():
    with pool_of(3, {1: {"drifts": 7}}) as pool:
        pool.gather()
        for _ in range(12):
            assert step(pool) == RIGHT
            until(pool, lambda: pool.size == 3 or pool.members.given_up)
        assert list(pool.members.given_up) == ["replica-1"] and "for the 3rd time" in pool.members.given_up["replica-1"]
        assert pool.size == 2 and not any("replica-0" in line for line in pool.lost)


@pytest.mark.parametrize("poison", [0.01, float("nan")])
def test_a_poisoned_replica_is_started_anew_and_nothing_it_said_counts(poison):
    with pool_of(3, {2: {"poison": poison}}) as pool:
        pool.gather()
        pool.members.host.kinds = {}  # type: ignore[attr-defined]
        digests = poison == poison  # losses that are not finite are looked into without
        assert step(pool, digests) == RIGHT
        assert pool.rebuilt == 1 and "replica-2" in pool.lost[0] and "of a tile that all score" in pool.lost[0]
        until(pool, lambda: pool.size == 3)
        assert step(pool) == RIGHT and pool.rebuilt == 1


def test_a_state_that_has_diverged_is_nobodys_fault():
    with pool_of(2, {0: {"poison": float("nan")}, 1: {"poison": float("nan")}}) as pool:
        pool.gather()
        grid = Grid.of(pool.spec, 0)
        scores, _ = pool.evaluate(grid)
        assert set(scores.losses.tolist()) == {NOT_FINITE} and not pool.lost


def until(pool: Pool, true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        pool.members.pump(0.2)
        assert time.monotonic() < deadline, pool.lost


@pytest.mark.parametrize("sound", [True, False])
def test_a_late_one_joins_from_a_snapshot_and_without_one_that_is_sound(sound, tmp_path):
    with pool_of(2) as pool:
        pool.gather()
        for _ in range(300):
            step(pool, digest=False)
        pool.digest()
        pool.keep_snapshot(tmp_path / snapshots.FILE_NAME)
        until(pool, lambda: pool.members.snapshot is not None)
        assert pool.members.snapshot is not None and pool.members.snapshot.step == 300
        for _ in range(20):
            step(pool)
        host: Any = pool.members.host
        host.kinds = {} if sound else {0: {"wrong": 1}}
        host.cut("replica-0")
        until(pool, lambda: pool.lost)
        until(pool, lambda: "replica-0" in pool.members.connected)
        if not sound:
            until(pool, lambda: ("reset", None) in host.fakes["replica-0"].calls)
            host.fakes["replica-0"].wrong = 0
        until(pool, lambda: pool.size == 2)
        methods = [method for method, _ in host.fakes["replica-0"].calls]
        assert methods[:2] == ["load", "restore"] and ("reset" in methods) == (not sound)
        replayed = sum(n for method, n in host.fakes["replica-0"].calls if method == "catch_up")
        assert replayed <= 20 if sound else 300 <= replayed <= 320
        assert step(pool) == RIGHT


def test_a_replay_that_ends_elsewhere_does_not_join():
    with pool_of(2) as pool:
        pool.gather()
        for _ in range(5):
            step(pool)
        host: Any = pool.members.host
        host.kinds = {0: {"wrong": 3}}
        host.cut("replica-0")
        until(pool, lambda: "replica-0" in pool.members.given_up)
        assert "gives replica-0 the state" in pool.lost[-1] and len(pool.lost) == 3 and pool.size == 1
        assert step(pool) == RIGHT


def test_a_replay_is_believed_where_one_replica_alone_has_said_otherwise():
    with pool_of(2) as pool:
        pool.gather()
        for _ in range(3):
            step(pool)
        host: Any = pool.members.host
        host.fakes["replica-0"].moved = 5
        host.cut("replica-1")
        until(pool, lambda: pool.lost)
        assert pool.digest() == f"{8:016x}"  # nobody was there to compare with
        until(pool, lambda: pool.size == 2 and pool.rebuilt)
        assert not pool.members.given_up and len(pool.lost) == pool.rebuilt == 1
        assert ("reset", None) in host.fakes["replica-0"].calls
        assert step(pool) == RIGHT and pool.rebuilt == 1


def test_a_replay_that_is_not_what_the_journal_notes_ends_the_run_and_says_so():
    commits, known = [Commit(k, (0.1,) * 4) for k in range(5)], [(2, "not read"), (4, "beef")]
    expected = r"replay of 4 steps gives replica-\d the state 0{15}4, and so did .*has beef.*zoray.replay` names"
    with pytest.raises(JournalError, match=expected):
        Pool.gathered(members_of(2), commits, known)
    with pytest.raises(JournalError, match=expected):  # by the same one, started again
        Pool.gathered(members_of(1), commits, known)
    with Pool.gathered(members_of(2), commits, [(4, f"{4:016x}")]) as pool:
        assert pool.size == 2 and pool.digest() == f"{5:016x}"


def test_one_that_hangs_is_ended_and_others_do_its_tiles():
    with pool_of(3, late_floor_s=0.1, hang_timeout_s=1.5) as pool:
        pool.gather()
        for _ in range(3):
            step(pool)
        host: Any = pool.members.host
        host.fakes["replica-1"].hangs = True
        began = time.monotonic()
        assert step(pool) == RIGHT and time.monotonic() - began < 1.4
        until(pool, lambda: pool.lost)
        assert "no answer for" in pool.lost[0]
        host.fakes["replica-1"].hangs = False
        until(pool, lambda: pool.size == 3)
        assert step(pool) == RIGHT


def test_the_slow_get_fewer_tiles():
    with pool_of(3, {1: {"seconds": 0.02}, 0: {"seconds": 0.005}, 2: {"seconds": 0.005}}) as pool:
        pool.gather()
        for _ in range(8):
            assert step(pool, digest=False) == RIGHT
        done = {m.name: m.scored for m in pool.members.ready}
        assert done["replica-1"] < 0.6 * min(done["replica-0"], done["replica-2"]) and done["replica-1"] > 0


def test_other_weights_are_refused_at_the_start_and_left_out_later():
    other = ReplicaInfo("0" * 16, "other", "fake", "float32", 1e-6, ())
    with (
        pool_of(2, {1: {"info": other}}) as pool,
        pytest.raises(ConfigError, match="expected the same weights on every node"),
    ):
        pool.gather()
    with pool_of(2) as pool:
        pool.gather()
        host: Any = pool.members.host
        host.kinds = {0: {"info": other}}
        host.cut("replica-0")
        until(pool, lambda: "replica-0" in pool.members.given_up)
        assert step(pool) == RIGHT and scored([Grid.of(pool.spec, 0)[0]]) == 2
        host.cut("replica-1")
        host.kinds = {1: {"info": other}}
        with pytest.raises(ReplicaLost, match="all replicas are lost"):
            until(pool, lambda: False)
