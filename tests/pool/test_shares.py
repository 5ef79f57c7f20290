"""Who scores what: every tile is counted once, whatever is late, lost, doubled or rejected; shares follow speed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from zoray.pool.shares import Shares, cut
from zoray.records import Scores


def scores(tiles) -> Scores:
    """Distinct for every set of tiles, and adding up: tile t is worth 2**t."""
    return Scores(np.array([sum(1 << tile for tile in tiles)]), 0.0, len(tiles))


def total(shares: Shares) -> int:
    return sum(int(answer.losses[0]) for _, answer in shares.answers.values())


@pytest.mark.parametrize(
    ("speeds", "sizes"),
    [
        ([0, 0, 0], [4, 4, 4]),
        ([1.0, 1.1, 0.9], [4, 4, 4]),  # measured speeds of equal replicas
        ([3.0, 1.0, 0], [6, 2, 4]),  # unknown is the mean of the others
        ([10.0, 1.0], [11, 1]),
        ([100.0, 1.0], [12, 0]),
    ],
)
def test_runs_follow_the_speeds(speeds, sizes):
    runs = cut(range(12), speeds)
    assert [len(run) for run in runs] == sizes
    assert [tile for run in runs for tile in run] == list(range(12))


def test_proportional_runs_end_together():
    dice = np.random.default_rng(0)
    for _ in range(50):
        speeds = dice.uniform(0.2, 5, 6).tolist()
        runs = cut(range(200), speeds)
        ends = [len(run) / speed for run, speed in zip(runs, speeds, strict=True)]
        assert max(ends) <= 200 / sum(speeds) + 1 / min(speeds)


def test_a_lost_share_goes_to_those_who_are_idle_and_leaves_some_for_those_who_will_be():
    shares = Shares(8)
    assert shares.hand_out({"a": 0, "b": 0}) == [("a", (0, 1, 2, 3)), ("b", (4, 5, 6, 7))]
    assert not shares.missing() and shares.hand_out({"c": 0}) == []
    shares.drop("a")
    assert shares.hand_out({"c": 0}, [0]) == [("c", (0, 1))]  # b will be free soon
    assert shares.answer("b", scores(range(4, 8))) and not shares.done
    assert shares.hand_out({"b": 0}) == [("b", (2, 3))]
    assert shares.answer("c", scores((0, 1))) and shares.answer("b", scores((2, 3)))
    assert shares.done and total(shares) == 255


def test_the_first_answer_to_a_late_share_counts():
    shares = Shares(4)
    shares.hand_out({"slow": 0})
    shares.late.add("slow")
    assert shares.hand_out({"fast": 0}) == [("fast", (0, 1, 2, 3))]
    assert shares.answer("fast", scores(range(4))) and shares.done
    assert not shares.answer("slow", scores(range(4))) and total(shares) == 15


def test_an_answer_does_not_count_where_one_of_its_tiles_has_one():
    shares = Shares(6)
    shares.hand_out({"slow": 0, "b": 0})  # 0 1 2 | 3 4 5
    shares.late.add("slow")
    assert shares.hand_out({"c": 0}, [0]) == [("c", (0, 1))]
    assert shares.answer("c", scores((0, 1)))
    assert not shares.answer("slow", scores((0, 1, 2)))  # a sum can't be divided
    assert shares.missing() == [2] and not shares.done
    assert shares.answer("b", scores((3, 4, 5))) and shares.hand_out({"slow": 0}) == [("slow", (2,))]
    assert shares.answer("slow", scores((2,))) and total(shares) == 63


def test_a_rejected_worker_has_said_nothing():
    shares = Shares(4)
    shares.hand_out({"a": 0, "b": 0})
    shares.answer("a", scores((0, 1)))
    shares.answer("b", scores((2, 3)))
    assert shares.done
    shares.reject("a")
    assert not shares.done and shares.missing() == [0, 1]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_tile_counts_once(seed):
    dice = random.Random(seed)
    shares, speeds = Shares(dice.randint(1, 40)), {f"w{i}": dice.choice([0.0, 1.0, 5.0]) for i in range(5)}
    for _ in range(2000):
        if shares.done:
            break
        idle = {name: speed for name, speed in speeds.items() if name not in shares.held}
        busy = [speeds[name] for name in shares.held if name not in shares.late]
        shares.hand_out(idle, busy)
        assert shares.held, "somebody has to work on it"
        name = dice.choice(sorted(shares.held))
        match dice.random():
            case x if x < 0.5:
                shares.answer(name, scores(shares.held[name]))
            case x if x < 0.7:
                shares.late.add(name)
            case x if x < 0.9:
                shares.drop(name)
            case _:
                shares.reject(name)
    assert shares.done and total(shares) == (1 << shares.count) - 1
