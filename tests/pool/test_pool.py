"""The tile grid and its sums; the pool with real Ray actors, and what it does when one dies."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import toy
from loop import tile_grid
from orders import batch_indices, stratified_indices
from ray import cloudpickle

import zoray.pool.on_ray.start
from zoray.engines.hf import Hf
from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, Lozo
from zoray.models.folder import Model, linear_matrices, load_matrices
from zoray.pool.on_ray.cluster import bind_cores
from zoray.pool.on_ray.start import start_pool
from zoray.pool.pool import Pool
from zoray.pool.settings import Cluster
from zoray.records import Commit, ConfigError, Probe, ReplicaLost, Scores, Tile
from zoray.records.tiles import (
    LARGEST,
    MAX_TILE,
    Grid,
    as_ranges,
    join_scores,
    losses_of,
    mean,
    scored,
    summed,
)
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoray.pool.members import Member

PAIR = (Probe(0, 0, 0.1), Probe(0, 0, -0.1))
TWO_PAIRS = (*PAIR, Probe(0, 1, 0.1), Probe(0, 1, -0.1))


def test_grid_covers_every_probe_and_example_once_and_keeps_pairs_together():
    tiles = tile_grid(TWO_PAIRS, 10, 4)
    seen = [(p, i) for tile in tiles for p in tile.probes for i in range(tile.start, tile.stop)]
    assert sorted(seen, key=repr) == sorted(((p, i) for p in TWO_PAIRS for i in range(10)), key=repr)
    assert all(len(tile.probes) == 2 and tile.probes[0].index == tile.probes[1].index for tile in tiles)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_joined_tiles_give_every_probe_its_examples_in_order_whoever_answers_first(order):
    tiles = [Tile(PAIR, 0, 3), Tile(PAIR, 3, 4)]
    flat = [np.array([3.0, 1.0, 2.0, 6.0, 0.0, 0.0]), np.array([5.0, 2.0])]
    answers = [((i,), Scores(flat[i], 3.0 - i, 10 - 6 * i)) for i in order]
    scores = join_scores(tiles, answers, per_example=True)
    assert (scores.score, scores.tokens, scored(tiles)) == (5.0, 14, 8)
    assert losses_of(PAIR, tiles, scores, per_example=True) == ([(3.0, 1.0, 2.0, 5.0), (6.0, 0.0, 0.0, 2.0)], 1)
    answers = [((i,), Scores(summed(tiles[i : i + 1], flat[i]), 0.0, 0)) for i in order]
    assert losses_of(PAIR, tiles, join_scores(tiles, answers, per_example=False)) == ([(2.75,), (2.0,)], 4)


@pytest.mark.parametrize("size", [1, 7, 59, 60])
def test_sums_of_losses_are_exact_however_a_batch_is_cut(size):
    losses = np.random.default_rng(0).uniform(0, 3, 60)
    tiles = [Tile(PAIR[:1], start, min(start + size, 60)) for start in range(0, 60, size)]
    (total,) = summed(tiles, losses)  # eight bytes, whatever the cut
    assert total == summed([Tile(PAIR[:1], 0, 60)], losses)[0]
    assert total / 2**40 == pytest.approx(losses.sum(), abs=60 * 2**-41)
    single = [((i,), Scores(summed([tile], losses[tile.start : tile.stop]), 0.0, 0)) for i, tile in enumerate(tiles)]
    assert join_scores(tiles, single[::-1], per_example=False).losses.tolist() == [total]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 8192.0, -8192.0])
def test_a_loss_that_is_not_finite_spoils_its_own_probe_only(bad):
    tiles = [Tile(PAIR, 0, 2), Tile(PAIR, 2, 4)]
    flat = np.array([1.0, 2.0, bad, 0.5, 3.0, 4.0, 1.0, 0.0])
    (plus, minus), _ = losses_of(PAIR, tiles, Scores(summed(tiles, flat), 0.0, 0))
    assert plus == (2.5,) and math.isnan(minus[0])
    answers = [((i,), Scores(summed([tiles[i]], flat[4 * i : 4 * i + 4]), 0.0, 0)) for i in range(2)]
    assert math.isnan(losses_of(PAIR, tiles, join_scores(tiles, answers, False))[0][1][0])


def test_sums_do_not_wrap_around():
    losses = np.full(MAX_TILE, math.nextafter(LARGEST, 0))
    (total,) = summed([Tile(PAIR[:1], 0, MAX_TILE)], losses)
    assert total / 2**40 == pytest.approx(MAX_TILE * LARGEST, rel=1e-12)
    tiles = [Tile(PAIR[:1], i * MAX_TILE, (i + 1) * MAX_TILE) for i in range(3)]
    ((mean_loss,),), _ = losses_of(PAIR[:1], tiles, Scores(summed(tiles, np.tile(losses, 3)), 0.0, 0))
    assert math.isnan(mean_loss)  # beyond 64 bits: no number is better than a wrong one


def test_ranges_of_tiles():
    assert as_ranges([]) == ()
    assert as_ranges([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 6), (7, 9))


def test_directions_can_share_the_batch_out():
    tiles = tile_grid(TWO_PAIRS, 6, 2, shared=False)
    assert [(t.probes[0].index, t.start, t.stop) for t in tiles] == [(0, 0, 2), (0, 2, 3), (1, 3, 5), (1, 5, 6)]


def test_the_centre_is_a_group_of_its_own():
    centre = Probe(0, 0, 0.0)
    tiles = tile_grid((centre, Probe(0, 0, 0.1), Probe(0, 1, 0.1)), 4, 4)
    assert [tile.probes for tile in tiles] == [(centre,), (Probe(0, 0, 0.1),), (Probe(0, 1, 0.1),)]


def test_means_are_free_of_order_and_say_when_they_are_not_finite():
    values = [1e16, 1.0, -1e16, 3.0]
    assert mean(values) == mean(values[::-1]) == 1.0
    assert all(math.isnan(mean(bad)) for bad in ([1.0, math.nan], [math.inf, -math.inf]))
    assert not math.isfinite(mean([math.inf, 1.0]))


@pytest.mark.parametrize(
    "setting",
    [
        {"replicas": 0},
        {"port": 65536},
        {"replicas": "many"},
        {"address": "ray://host:10001"},
        {"cpus_per_replica": 0},
        {"min_replicas": 0},
        {"late_factor": 0.5},
        {"hang_timeout_s": 0},
    ],
)
def test_bad_cluster_settings(setting):
    with pytest.raises(ConfigError, match="expected"):
        Cluster(**setting)


@pytest.mark.parametrize("index", [0, 1])
def test_cores_are_shared_out_without_overlap(index):
    """In a child, because a process can't widen its own affinity for the other tests."""
    cores = sorted(os.sched_getaffinity(0))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps([bind_cores(index, 1), sorted(os.sched_getaffinity(0))]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    bound, affinity = json.loads(os.read(read, 1000))
    assert bound == affinity == [cores[index % len(cores)]]


@pytest.fixture(scope="module")
def spec(tiny_models, labelled_file) -> ReplicaSpec:
    task = File(str(labelled_file), [" terrible", " great"])
    model, space = Model(str(tiny_models["llama"])), Lora(rank=2, alpha=4)
    pairs = TwoPoint(pairs=2, eps=0.1)
    return ReplicaSpec(model, task, ChoiceNLL(), space, pairs, Hf(), seed=1, data_seed=2, batch=8, tile_examples=2)


@pytest.fixture
def toys(local_ray, monkeypatch) -> Iterator[None]:
    """Pools of replicas that start fast, see toy.py: what is looked at is the pool's."""
    cloudpickle.register_pickle_by_value(toy)
    monkeypatch.setattr(zoray.pool.on_ray.start, "ReplicaActor", toy.Toy)
    yield
    cloudpickle.unregister_pickle_by_value(toy)


@pytest.fixture(scope="module")
def undisturbed(spec) -> tuple[list[list[tuple[float, ...]]], list[str]]:
    """Eight steps without any pool."""
    return toy.by_itself(spec, 8)


@pytest.mark.parametrize("stratify", [False, True])
def test_a_replica_scores_the_examples_of_the_step(stratify, spec):
    """Tile by tile: its scores on the batch are those on the examples that the step sees."""
    replica = Replica(replace(spec, stratify=stratify))
    train, centre = replica.workload.splits.train, Probe(1, 0, 0.0)
    labels = [example.label for example in train]
    chosen = stratified_indices(2, 1, 8, labels) if stratify else batch_indices(2, 1, 8, len(train))
    outcomes = replica.outcomes("train", centre)
    tiles = tile_grid([centre], 8, 3)
    scores, _ = replica.evaluate((Commit(0, (0.0,)),), tiles, per_example=True)
    (losses,), _ = losses_of([centre], tiles, scores, per_example=True)
    assert list(losses) == outcomes.losses[chosen].tolist()
    assert scores.score == sum(outcomes.scores[chosen])
    scores, _ = replica.evaluate((), tiles)
    ((mean_loss,),), examples = losses_of([centre], tiles, scores)
    assert mean_loss == pytest.approx(mean(losses), abs=2**-40) and examples == 8
    assert len(set(losses)) > 4 and (sum(labels[i] for i in chosen) == 4 or not stratify)


def base_weights(spec: ReplicaSpec) -> dict:
    return load_matrices(spec.model.path, linear_matrices(spec.model.path), "float32")


def run_steps(pool: Pool, steps: int, disturb=lambda step: None) -> tuple[list[list[tuple[float, ...]]], list[str]]:
    """The loop with fixed coefficients, up to `steps` steps: (losses of each one, digests before each and at the end).

    It begins where the pool is.
    """
    losses, digests = [], []
    for step in range(len(pool.commits), steps):
        disturb(step)
        grid = Grid.of(pool.spec, step)
        scores, digest = pool.evaluate(grid, digest=True)
        losses.append(losses_of(pool.spec.estimator.ask(step), grid.tiles, scores)[0])
        digests.append(digest or "")
        pool.commit(Commit(step, (0.01, -0.02)))
    return losses, [*digests, pool.adapter()[1]]


def finish(pool: Pool, steps: int, size: int) -> tuple[list[list[tuple[float, ...]]], list[str]]:
    """Up to `steps` steps, when there are as many replicas as said."""
    deadline = time.monotonic() + 120
    while pool.size < size:
        assert time.monotonic() < deadline, pool.members.lost
        pool.members.pump(1.0)
    return run_steps(pool, steps)


def see_lost(pool: Pool) -> None:
    """Wait until the pool has noticed that one replica has ended."""
    deadline = time.monotonic() + 60
    while not pool.lost:
        assert time.monotonic() < deadline
        pool.members.pump(1.0)
    assert len(pool.lost) == 1


def member(pool: Pool, index: int = 0) -> Member:
    return pool.members.ready[index]


@pytest.mark.ray
def test_two_and_dying_replicas_give_the_bits_of_one(toys, spec, undisturbed):
    with start_pool(spec, Cluster(replicas=2), "two") as pool:
        assert run_steps(pool, 2) == (undisturbed[0][:2], undisturbed[1][:3])
        assert pool.size == 2 and not pool.lost
        pid = member(pool).pid
        end = run_steps(pool, 4, lambda step: os.kill(pid, signal.SIGKILL) if step == 3 else None)
        assert end == (undisturbed[0][2:4], undisturbed[1][2:5])
        see_lost(pool)
        assert f"process {pid}" in pool.lost[0]
        assert finish(pool, 8, size=2) == (undisturbed[0][4:], undisturbed[1][4:])  # it came back, and replayed
        assert member(pool).pid != pid and not pool.members.given_up


@pytest.mark.ray
def test_rewind_takes_every_replica_back_and_it_goes_on_as_before(toys, spec):
    """A space that folds into the base weights (after steps 2 and 4 here), so that these must come back as well."""
    spec = replace(spec, space=Lozo(rank=1, interval=2))
    state = spec.space.open(linear_matrices(spec.model.path), spec.seed, weights=base_weights(spec))
    expected = [state.digest()]
    for step in range(5):
        state.apply(Commit(step, (0.01, -0.02)))
        expected.append(state.digest())
    assert len(set(expected)) == 6
    with start_pool(spec, Cluster(replicas=2), "rewind") as pool:
        losses, digests = run_steps(pool, 5)
        assert digests == expected
        assert pool.digest() == expected[5]  # of the commits that have not been sent yet as well
        assert losses == toy.by_itself(spec, 5)[0]
        for step in (3, 2, 0):  # into an interval, onto a fold, to the start
            pool.rewind(step)
            assert len(pool.commits) == step
            assert pool.evaluate(Grid.of(spec, step), digest=True)[1] == expected[step]  # both replicas'
            assert pool.digest() == pool.adapter()[1] == expected[step]
            assert run_steps(pool, 5) == (losses[step:], expected[step:])
        assert not pool.lost and pool.rebuilt == 0
        os.kill(member(pool).pid, signal.SIGKILL)
        pool.rewind(4)
        assert run_steps(pool, 5) == (losses[4:], expected[4:])
        see_lost(pool)  # which the other one may have been too fast for


@pytest.mark.ray
@pytest.mark.slow
def test_deterministic_vllm_gives_the_same_bits_with_any_number_of_replicas(local_ray, spec):
    """One replica with all cores and eight tiles a step, two with half of both: every tile is a forward of its own."""
    vllm = Vllm(slots=4, max_tokens=512, kv_cache_gib=0.25, deterministic=True)
    results = []
    for count in (1, 2):
        with start_pool(replace(spec, engine=vllm), Cluster(replicas=count), f"vllm-{count}") as pool:
            results.append(run_steps(pool, 3))
    assert results[0] == results[1]


@pytest.mark.ray
def test_losing_every_replica_is_survived_and_too_many_times_in_a_row_is_not(toys, spec):
    said: list[str] = []
    with start_pool(spec, Cluster(replicas=1), "last", said.append) as pool:
        first = run_steps(pool, 2)
        os.kill(member(pool).pid, signal.SIGKILL)
        assert len(run_steps(pool, 4)[0]) == 2 and len(pool.lost) == 1
        assert any("waiting at step 2: 0 of at least 1 replicas" in line for line in said)
        assert any("has joined at step 2" in line for line in said) and first
        pool.stopping = lambda: True
        os.kill(member(pool).pid, signal.SIGKILL)
        with pytest.raises(KeyboardInterrupt):
            run_steps(pool, 6)
        assert "stopped while waiting for replicas (0 of at least 1 replicas); the run can be resumed" in said
        pool.stopping = lambda: False

        def dies() -> None:  # whenever it is there
            for found in pool.members.connected.values():
                os.kill(found.pid, signal.SIGKILL)

        with pytest.raises(ReplicaLost, match=r"all replicas are lost.*3 times without scoring anything"):
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline:
                dies()
                pool.members.pump(1.0)


@pytest.mark.ray
def test_the_run_waits_for_its_least_number_of_replicas(toys, spec, monkeypatch):
    with pytest.raises(ConfigError, match=r"cluster.min_replicas of at most cluster.replicas=2; got 3"):
        Cluster(replicas=2, min_replicas=3)
    with start_pool(spec, Cluster(replicas=2, min_replicas=2, wait_timeout_s=0.5), "least") as pool:
        monkeypatch.setattr(pool.members, "_admit", lambda: None)  # Ray may have it back within a second
        os.kill(member(pool).pid, signal.SIGKILL)
        pool.members.pump(1.0)
        with pytest.raises(ReplicaLost, match=r"expected 2 replicas .*wait_timeout_s.*; got 1.* can be resumed"):
            run_steps(pool, 1)


@pytest.mark.ray
def test_a_stopped_replica_is_late_and_its_tiles_go_to_another(toys, spec, undisturbed):
    cluster = Cluster(replicas=2, late_floor_s=0.3, late_factor=2.0, hang_timeout_s=8.0)
    with start_pool(spec, cluster, "late") as pool:
        assert run_steps(pool, 3) == (undisturbed[0][:3], undisturbed[1][:4])
        stopped = member(pool)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert run_steps(pool, 5) == (undisturbed[0][3:5], undisturbed[1][3:6])
        assert stopped.late and not pool.lost
        os.kill(stopped.pid, signal.SIGCONT)
        deadline = time.monotonic() + 30
        while stopped.late:  # its answers to what others have done meanwhile count for nothing
            pool.members.pump(1.0)
            assert time.monotonic() < deadline
        assert run_steps(pool, 6) == (undisturbed[0][5:6], undisturbed[1][5:7])
        os.kill(stopped.pid, signal.SIGSTOP)  # and now for good
        assert run_steps(pool, 7) == (undisturbed[0][6:7], undisturbed[1][6:8])
        deadline = time.monotonic() + 30
        while not pool.lost:
            pool.members.pump(1.0)
            assert time.monotonic() < deadline
        assert "no answer for 8 s (cluster.hang_timeout_s)" in pool.lost[0]
        assert finish(pool, 8, size=2) == (undisturbed[0][7:], undisturbed[1][7:])


@pytest.mark.ray
def test_what_a_replica_raises_reaches_the_driver_unless_another_one_does_better(toys, spec):
    def fail(found: Member) -> None:
        pool.members.ask(found, "kill", then=lambda *_: None)

    with start_pool(spec, Cluster(replicas=1), "raises") as pool:
        fail(member(pool))
        with pytest.raises(ValueError, match="expected one of load, evaluate") as raised:
            pool.members.pump(30.0)
        assert "raised in a replica (process" in raised.value.__notes__[0] and "Traceback" in raised.value.__notes__[0]
        assert len(pool.adapter()[1]) == 16  # and it is still there
    with start_pool(spec, Cluster(replicas=2), "survives") as pool:
        fail(member(pool))
        while not pool.lost:
            pool.members.pump(30.0)
        assert "ValueError: expected one of load" in pool.lost[0] and pool.size == 1
        assert len(run_steps(pool, 2)[0]) == 2


@pytest.mark.ray
def test_a_replica_that_drifts_is_rebuilt_and_what_it_said_does_not_count(toys, spec, undisturbed):
    said: list[str] = []
    with start_pool(spec, Cluster(replicas=2), "drift", said.append) as pool:
        run_steps(pool, 1)
        pool.digest()
        wrong = (Commit(1, (0.5, 0.5)),)  # behind its back
        pool.members.ask(member(pool, 1), "catch_up", wrong, False, then=lambda *_: None)
        pool.members.pump(30.0)
        rest = finish(pool, 8, size=2)
        assert rest == (undisturbed[0][1:], undisturbed[1][1:])
        assert pool.rebuilt >= 1 and not pool.lost
        assert any("is not that of the others at step 1; it is rebuilt from the journal" in line for line in said)


@pytest.mark.ray
def test_more_replicas_than_the_cluster_has_room_for(local_ray, spec):
    with pytest.raises(ConfigError, match=r"expected room for 3 replicas .* the cluster has 2 CPU"):
        start_pool(spec, Cluster(replicas=3), "big")


@pytest.mark.ray
def test_a_bad_config_in_a_replica_reaches_the_driver_as_itself(local_ray, spec, tmp_path):
    with pytest.raises(ConfigError, match="is not there"):
        start_pool(replace(spec, model=Model(str(tmp_path / "gone"))), Cluster(replicas=1), "bad")
