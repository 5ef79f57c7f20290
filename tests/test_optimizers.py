"""SGD on coefficients: schedules at their ends, and coefficients that are exactly float32."""

import json
import math
import warnings

import numpy as np
import pytest

from zoray.optimizers import SCHEDULES, Sgd, to_float32
from zoray.records import Commit, ConfigError


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [  # learning rates of a run of 8 steps
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        ("linear", 1, [1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("linear", 16, [(k + 1) / 16 for k in range(8)]),  # a warm-up longer than the run never ends
    ],
)
def test_schedules(schedule, warmup, expected):
    optimizer = Sgd(lr=0.5, schedule=schedule, warmup=warmup)
    assert [optimizer.lr_at(step, 8) for step in range(8)] == pytest.approx([0.5 * rate for rate in expected])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
def test_the_learning_rate_is_positive_on_every_step_and_the_peak_is_lr(schedule, warmup, steps):
    rates = [Sgd(lr=2.0, schedule=schedule, warmup=warmup).lr_at(step, steps) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    if steps >= max(warmup, 1):
        assert max(rates) == 2.0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_commit_scales_the_weights_and_rounds_to_float32():
    weights = (1.0, -2.5, 0.0, 1 / 3)
    commit = Sgd(lr=0.1, schedule="linear").commit(5, 10, weights)
    assert commit == Commit(5, (-0.05, 0.125, 0.0, -0.016666668), decay=1.0)
    assert all(float(np.float32(c)) == pytest.approx(c, rel=1e-7) for c in commit.coefficients)
    assert [np.float32(c) for c in commit.coefficients] == [np.float32(-0.05 * weight) for weight in weights]


def test_to_float32_is_the_nearest_float32_in_its_shortest_form():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = [0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x3F800000, 0x33800000, 0x4B800000, 0x80000001, 0x80000000]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    values = values[np.isfinite(values)]
    assert len(values) > 19_000
    for value in values:
        plain = to_float32(float(value))
        assert np.float32(plain).tobytes() == value.tobytes()  # what replicas multiply by has these bits
        assert to_float32(plain) == plain
        assert float(json.loads(json.dumps(plain))) == plain
        digits = repr(plain).split("e")[0].lstrip("-").replace(".", "").strip("0")
        assert len(digits) <= 9
    for value in random.standard_normal(1000):  # not float32 to begin with
        assert np.float32(to_float32(value)) == np.float32(value)
    assert (to_float32(0.1), to_float32(1 / 3), to_float32(16777217.0)) == (0.1, 0.33333334, 16777216.0)


@pytest.mark.parametrize("weight", [1e39, -1e39, math.inf, math.nan])
def test_an_overflow_fails_the_step(weight):
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"step 3: .*overflow.*lower optimizer\.lr"):
        warnings.simplefilter("error")  # said once, by us
        Sgd(lr=1.0, schedule="constant").commit(3, 10, (0.5, weight))


def test_an_underflow_is_a_zero():
    assert Sgd(lr=1e-30, schedule="constant").commit(0, 1, (1e-30, 1e-8)).coefficients == (0.0, -1e-38)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"lr": 0.0}, r"expected optimizer\.lr to be a positive number; got 0.0"),
        ({"lr": -1e-3}, "got -0.001"),
        ({"lr": math.nan}, "got nan"),
        ({"lr": math.inf}, "got inf"),
        ({"lr": "1e-3x"}, "got '1e-3x'"),
        ({"schedule": "step"}, r"expected optimizer\.schedule to be one of constant, linear, cosine; got 'step'"),
        ({"schedule": None}, "got None"),
        ({"warmup": -1}, r"expected optimizer\.warmup to be 0 or more; got -1"),
        ({"warmup": 0.5}, "got 0.5"),
    ],
)
def test_bad_parameters_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Sgd(**kwargs)
