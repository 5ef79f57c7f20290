"""Two-point estimates: unbiased, convergent on a quadratic, and what becomes of losses that are not finite or tie."""

import math

import numpy as np
import pytest

from zoray.directions import direction_numpy
from zoray.estimators import Estimate, TwoPoint
from zoray.optimizers import Sgd
from zoray.records import ConfigError, Probe

DISTRIBUTIONS = ["rademacher", "gaussian"]
SIZE = 16
CURVATURE = np.linspace(0.2, 2.0, SIZE)
MINIMUM = np.linspace(-1.0, 2.0, SIZE)
NAN, INF = math.nan, math.inf


def quadratic(x: np.ndarray) -> float:
    return float(0.5 * (CURVATURE * (x - MINIMUM) ** 2).sum())


def gradient(x: np.ndarray) -> np.ndarray:
    return CURVATURE * (x - MINIMUM)


def direction(probe: Probe, distribution: str, seed: int = 1) -> np.ndarray:
    return direction_numpy(seed, probe.step, probe.index, "x", 0, SIZE, distribution).astype(np.float64)


def test_ask_gives_plus_and_minus_of_each_pair_in_order():
    assert TwoPoint(pairs=2, eps=0.5).ask(7) == (
        Probe(7, 0, 0.5),
        Probe(7, 0, -0.5),
        Probe(7, 1, 0.5),
        Probe(7, 1, -0.5),
    )
    assert TwoPoint(pairs=3).directions == 3 and len(TwoPoint(pairs=3).ask(0)) == 6


def test_tell_is_the_central_difference_averaged_over_pairs():
    estimator = TwoPoint(pairs=4, eps=0.25)
    estimate = estimator.tell(estimator.ask(0), [1.5, 1.0, 2.0, 3.0, 1.0, 1.0, 0.0, 0.5])
    assert estimate == Estimate((0.25, -0.5, 0.0, -0.25), loss=1.25, dropped=0, ties=1)
    single = TwoPoint(eps=0.25)
    assert single.tell(single.ask(0), [1.5, 1.0]) == Estimate((1.0,), loss=1.25)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_of_the_estimate_is_the_gradient(distribution):
    """Over 10,000 directions, within 4.5 standard errors in each of 16 places; central differences are exact here."""
    count, x = 10_000, np.linspace(1.0, -1.0, SIZE)
    estimator = TwoPoint(pairs=count, eps=1e-3)
    probes = estimator.ask(0)
    z = np.stack([direction(probe, distribution) for probe in probes[::2]])
    losses = [quadratic(x + sign * estimator.eps * row) for row in z for sign in (+1, -1)]
    estimate = estimator.tell(probes, losses)
    weights = np.array(estimate.weights)
    samples = weights[:, None] * z * count
    errors = samples.std(0) / math.sqrt(count)
    deviation = (weights @ z - gradient(x)) / errors
    assert np.abs(deviation).max() < 4.5
    assert (errors < 0.015 * np.linalg.norm(gradient(x))).all()  # the test is sharp enough to tell
    assert estimate.loss == pytest.approx(quadratic(x), rel=1e-3)
    assert estimate.dropped == 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("pairs", "steps"), [(1, 400), (8, 60)])
def test_converges_on_a_quadratic(pairs, steps, distribution):
    estimator = TwoPoint(pairs=pairs, eps=1e-3)
    optimizer = Sgd(lr={1: 0.04, 8: 0.25}[pairs], schedule="linear")
    x = np.zeros(SIZE)
    first = quadratic(x)
    for step in range(steps):
        probes = estimator.ask(step)
        losses = [quadratic(x + probe.scale * direction(probe, distribution)) for probe in probes]
        commit = optimizer.commit(step, steps, estimator.tell(probes, losses).weights)
        for probe, coefficient in zip(probes[::2], commit.coefficients, strict=True):
            x += coefficient * direction(probe, distribution)
    assert first > 3
    assert quadratic(x) < 0.02 * first


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 1])
def test_a_pair_that_is_not_finite_is_dropped_and_the_others_averaged(bad, where):
    estimator = TwoPoint(pairs=3, eps=0.5)
    losses = [2.0, 1.0, 5.0, 7.0, 4.0, 1.0]
    losses[2 + where] = bad
    kept = TwoPoint(pairs=2, eps=0.5)
    expected = kept.tell(kept.ask(0), [2.0, 1.0, 4.0, 1.0])
    found = estimator.tell(estimator.ask(0), losses)
    assert found.weights == (expected.weights[0], 0.0, expected.weights[1])
    assert (found.dropped, found.ties) == (1, 0)
    finite = [loss for loss in losses if loss != bad and not math.isnan(loss)]
    assert found.loss == pytest.approx(sum(finite) / 5)


def test_equal_infinities_are_dropped_and_no_tie():
    estimator = TwoPoint(pairs=2, eps=0.5)
    assert estimator.tell(estimator.ask(0), [INF, INF, 2.0, 1.0]) == Estimate((0.0, 1.0), loss=1.5, dropped=1)


def test_ties_are_counted():
    estimator = TwoPoint(pairs=3, eps=0.5)
    estimate = estimator.tell(estimator.ask(0), [0.5, 0.5, 0.25, 0.25, 1.0, 0.5])
    assert estimate.ties == 2 and estimate.weights[:2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("max_dropped", "pairs", "bad", "fails"),
    [(0.5, 4, 2, False), (0.5, 4, 3, True), (0.5, 1, 1, True), (0.0, 10, 1, True), (0.99, 4, 3, False)],
)
def test_too_many_dropped_pairs_fail_the_step(max_dropped, pairs, bad, fails):
    estimator = TwoPoint(pairs=pairs, max_dropped=max_dropped)
    losses = [NAN, 1.0] * bad + [2.0, 1.0] * (pairs - bad)
    if fails:
        with pytest.raises(FloatingPointError, match=rf"step 17: {bad} of {pairs} pairs .*nan.*lower optimizer\.lr"):
            estimator.tell(estimator.ask(17), losses)
    else:
        assert estimator.tell(estimator.ask(17), losses).dropped == bad


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"pairs": 0}, r"expected estimator\.pairs to be at least 1; got 0"),
        ({"pairs": 1.5}, "got 1.5"),
        ({"eps": 0.0}, r"expected estimator\.eps to be a positive number; got 0.0"),
        ({"eps": -1e-3}, "got -0.001"),
        ({"eps": NAN}, "got nan"),
        ({"eps": INF}, "got inf"),
        ({"eps": "small"}, "got 'small'"),
        ({"max_dropped": 1.0}, r"expected estimator\.max_dropped to be a share in \[0, 1\); got 1.0"),
        ({"max_dropped": -0.1}, "got -0.1"),
        ({"max_dropped": None}, "got None"),
    ],
)
def test_bad_parameters_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        TwoPoint(**kwargs)
