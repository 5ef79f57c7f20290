"""Tiles of guided steps: which there are, that their sums do not overflow, and what travels between processes."""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from guided import commit

from zoray.methods.estimators.feedback import GROUPS, Feedback, gains, quantised, trusted
from zoray.methods.spaces.signs import ALONG, group_of, packed, pattern
from zoray.records import Probe, Scores, Tile
from zoray.records.tiles import LEVELS, Grid, gives_feedback, join_scores, losses_of, summed

NUMBERS = 80_000


def grid(step: int = 0, pairs: int = 0, batch: int = 16, tile: int = 4, pooled: bool = False) -> Grid:
    spec = SimpleNamespace(estimator=Feedback(pairs=pairs), batch=batch, tile_examples=tile)
    return Grid.of(spec, step, pooled=pooled)


@pytest.mark.parametrize(("batch", "tile", "pieces"), [(16, 4, 4), (16, 16, 1), (16, 100, 1), (7, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("pairs", [0, 1, 5])
def test_the_centre_sees_the_batch_and_each_pair_one_example(batch, tile, pieces, pairs):
    found = grid(3, pairs, batch, tile)
    assert len(found) == len(found.tiles) == pieces + pairs
    centre, others = found.tiles[:pieces], found.tiles[pieces:]
    assert [i for t in centre for i in range(t.start, t.stop)] == list(range(batch))
    assert all(t.probes == (Probe(3, 0, 0.0),) and gives_feedback(t) for t in centre)
    assert max(t.stop - t.start for t in centre) <= tile
    for k, one in enumerate(others):
        assert one.probes == (Probe(3, ALONG + k, 0.01), Probe(3, ALONG + k, -0.01))
        assert one.stop == one.start + 1 <= batch and not gives_feedback(one)
    assert [p for t in (centre[0], *others) for p in t.probes] == list(Feedback(pairs=pairs).ask(3))
    for wrong in (-1, len(found)):
        with pytest.raises(IndexError):
            found[wrong]


@pytest.mark.parametrize(("pairs", "batch"), [(1, 5), (2, 6), (3, 7), (4, 2)])
def test_pairs_take_the_places_of_a_batch_in_turn(pairs, batch):
    """Over the steps each place equally often, one after another."""
    starts = [t.start for step in range(2 * batch) for t in grid(step, pairs, batch, 2).tiles if len(t.probes) == 2]
    assert starts == [k % batch for k in range(2 * batch * pairs)]


def test_other_splits_and_other_estimators_are_not_guided():
    spec = SimpleNamespace(estimator=Feedback(pairs=2), batch=4, tile_examples=2)
    dev = Grid.of(spec, 5, "dev", 40)
    assert [(t.start, t.stop, t.split) for t in dev.tiles] == [(0, 32, "dev"), (32, 40, "dev")]
    assert not any(map(gives_feedback, dev.tiles))
    plain = Grid(0, "train", 2, lambda k: (Probe(0, k, 0.1), Probe(0, k, -0.1)), 8, 4)
    assert len(plain) == 4 and not any(map(gives_feedback, plain.tiles))


@pytest.mark.parametrize("tiles", [1, 2, 3, 16, 60, 127, 128, 400])
def test_sums_over_all_tiles_are_a_byte_and_never_overflow(tiles):
    """All of them at their limit; with more than 127 tiles the sum may take more bytes, and is right as well."""
    found, values = grid(0, 0, 4 * tiles, 4), {"a": np.array([1.0] * 50 + [-1.0] * 49 + [1e30])}
    whole = quantised(values, found.levels, 1.0)
    assert np.abs(whole).max() == found.levels
    extreme = np.full(100, found.levels, np.int8) * np.where(np.arange(100) % 2, 1, -1).astype(np.int8)
    answers = [((k,), Scores(np.zeros(1, np.int64), 0.0, 0, feedback=extreme)) for k in range(tiles)]
    joined = join_scores(found.tiles, answers, False).feedback
    assert joined is not None and np.array_equal(joined, extreme.astype(np.int64) * tiles)
    assert joined.dtype == (np.int8 if tiles * found.levels <= LEVELS else np.int32)
    assert (joined.dtype == np.int8) == (tiles <= LEVELS)


def test_joined_feedback_is_free_of_order_and_of_who_has_added_up():
    rng, found = np.random.default_rng(0), grid(0, 2, 24, 4)
    parts = [rng.integers(-20, 21, 300).astype(np.int8) for _ in range(6)]
    own = [Scores(summed([found[k]], np.ones(4)), 1.0, 5, feedback=parts[k]) for k in range(6)]
    own += [Scores(summed([found[k]], np.array([2.0, 1.0])), 0.0, 1) for k in (6, 7)]  # pairs have none
    expected = np.sum(parts, axis=0, dtype=int)
    for order, cuts in (
        ([*range(8)], (8,)),
        ([7, 2, 5, 0, 1, 6, 4, 3], (1, 4, 8)),
        ([6, 0, 1, 2, 3, 4, 5, 7], (1, 7, 8)),
    ):
        shares, first = [], 0
        for last in cuts:
            share = order[first:last]
            answer = join_scores([found[k] for k in share], [((i,), own[k]) for i, k in enumerate(share)], False)
            shares.append((share, pickle.loads(pickle.dumps(answer))))
            first = last
        joined = join_scores(found.tiles, shares, False)
        assert np.array_equal(joined.feedback, expected) and joined.tokens == 32
        rows, examples = losses_of(Feedback(pairs=2).ask(0), found.tiles, joined)
        assert rows == [(1.0,), (2.0,), (1.0,), (2.0,), (1.0,)] and examples == 24
    only = join_scores(found.tiles[6:], [((0,), own[6]), ((1,), own[7])], False)
    assert only.feedback is None


def test_a_byte_a_number_comes_back_and_a_bit_a_number_goes_out():
    rng = np.random.default_rng(0)
    feedback = quantised({"a": rng.normal(size=NUMBERS)}, LEVELS, 1.0)
    for scores in (
        Scores(np.zeros(1, np.int64), 0.5, 100, feedback=feedback),
        Scores(np.zeros(16), 0.5, 100, None, 64, 3, "Traceback", feedback),
    ):
        sent = pickle.dumps(scores)
        assert len(sent) <= NUMBERS + 1024
        back = pickle.loads(sent)
        assert np.array_equal(back.feedback, feedback) and back.feedback.dtype == np.int8
        for name in ("score", "tokens", "written", "failed", "failure", "columns"):
            assert getattr(back, name) == getattr(scores, name)
        assert np.array_equal(back.losses, scores.losses) and back.losses.dtype == scores.losses.dtype
    wide = Scores(np.zeros(1, np.int64), 0.0, 0, feedback=np.arange(NUMBERS, dtype=np.int32))
    assert np.array_equal(pickle.loads(pickle.dumps(wide)).feedback, wide.feedback)
    signs = packed(feedback, 3)
    one = commit(3, NUMBERS, 60, momentum=0.9, rate=-0.5)
    assert len(signs) == len(one.signs) == NUMBERS / 8
    assert len(pickle.dumps(one)) <= NUMBERS / 8 + 1024 and pickle.loads(pickle.dumps(one)) == one
    plain = Scores(np.zeros(4, np.int64), 0.0, 0)
    assert len(pickle.dumps(plain)) < 200 and pickle.loads(pickle.dumps(plain)).feedback is None


def test_a_tile_of_a_guided_step_is_small():
    tiles = grid(7, 30, 64, 4).tiles
    assert len(pickle.dumps(tiles)) < 80 * len(tiles) and isinstance(tiles[0], Tile)
    assert partial(Feedback(pairs=2).group, 3)(0) == (Probe(3, 0, 0.0),)


# what is known of the guide


def test_patterns_are_of_all_groups_and_not_correlated():
    signs = np.array([pattern(step, ALONG + k) for step in range(200) for k in range(5)])
    assert signs.shape == (1000, GROUPS) and set(signs.flatten()) == {-1.0, 1.0}
    assert np.abs(np.corrcoef(signs.T) - np.eye(GROUPS)).max() < 0.12 and np.abs(signs.mean(0)).max() < 0.12
    assert np.array_equal(pattern(3, ALONG), pattern(3, ALONG)) and {group_of(k, 60) for k in range(60)} == set(
        range(GROUPS)
    )
    assert [group_of(k, 3) for k in range(3)] == [0, 2, 5] and group_of(0, 1) == 0


def test_the_worth_of_each_group_is_found_from_the_losses_alone():
    """A made-up loss along the guide: two groups lead nowhere, one leads up, the others down by nearly the same."""
    estimator, trust = Feedback(pairs=4, eps=0.1), ()
    worth, rng = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, -1.0, 1.0]), np.random.default_rng(0)
    assert estimator.judge((), estimator.ask(0), [(1.0,)] * 9) == ()  # no momentum yet: no difference
    for step in range(1, 150):
        probes = estimator.ask(step)
        losses = [(2.0,)]
        for probe in probes[1:]:
            noise = 0.02 * rng.normal()
            losses.append((2.0 + probe.scale * float(pattern(probe.step, probe.index) @ worth) + noise,))
        trust = estimator.judge(trust, probes, losses)
    assert trust[0] == 149 * 4 and np.abs(np.array(trust[1:]) - worth).max() < 0.5
    found = trusted(trust)
    assert min(found[k] for k in (0, 1, 2, 5, 7)) > 0.6 and max(found[3], found[4]) < 0.5 and found[6] < 0.2
    assert all(0 <= value <= 1 for value in found)
    assert gains(trust, 16) == tuple(found[k // 2] for k in range(16)) and gains((), 5) == (1.0,) * 5


def test_a_loss_that_is_not_finite_says_nothing_of_the_guide():
    estimator, old = Feedback(pairs=2), (3.0, *[0.5] * GROUPS)
    probes = estimator.ask(1)
    assert estimator.judge(old, probes, [(1.0,), (float("nan"),), (1.0,), (2.0,), (2.0,)]) == old
    count, *slopes = estimator.judge(old, probes, [(1.0,), (float("nan"),), (1.0,), (2.0,), (2.5,)])
    assert count == 4.0 and np.isfinite(slopes).all() and slopes != list(old[1:])
    assert trusted((1e9, *[-1.0] * GROUPS)) == pytest.approx((0.0,) * GROUPS, abs=1e-6)
