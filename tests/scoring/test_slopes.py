"""What feedback begins with: the slope of each objective's loss in every log-probability, and its doubts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from zoray.records import ConfigError, Example
from zoray.scoring.objectives import AnswerNLL, ChoiceMetric, ChoiceNLL, Metric, Preference, Reward, Sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoray.scoring.objectives import Objective

STEP = 1e-5
OPTIONS = np.array([2, 3, 2, 4, 3])  # of each example
LABELS = np.array([1, 2, 0, 3, 0])
ALSO = ((), (0,), (), (1, 2), ())  # further options that are right


def batch(objective: Objective, seed: int = 0, size: float = 2.0) -> Sums:
    """Sums of five examples with some options of one token and some of several, as an objective takes them."""
    rng = np.random.default_rng(seed)
    if isinstance(objective, Preference | AnswerNLL):
        options = np.full(5, 2 if objective.reference else 1)
        labels, also = np.zeros(5, int), ((),) * 5
    else:
        options, labels, also = OPTIONS, LABELS, ALSO
    calibrated = getattr(objective, "calibration", "none") == "sfc"
    outputs = options * (1 + calibrated)
    right = np.zeros(int(outputs.sum()), bool)
    for first, label, others in zip(np.cumsum(outputs) - outputs, labels, also, strict=True):
        right[[first + k for k in (label, *others)]] = True
    counts = rng.integers(1, 5, len(right))
    sums = -size * rng.uniform(0.1, 1.0, len(right)) * counts
    reference = sums + rng.normal(size=len(sums)) if objective.reference else None
    return Sums(sums, counts, outputs, labels, right, reference)


def differences(total: Callable[[Sums], float], at: Sums) -> np.ndarray:
    """Central finite differences of a number in each sum."""
    found = []
    for k in range(len(at.sums)):
        step = np.where(np.arange(len(at.sums)) == k, STEP, 0.0)
        plus, minus = (total(replace(at, sums=at.sums + sign * step)) for sign in (1, -1))
        found.append((plus - minus) / (2 * STEP))
    return np.array(found)


SMOOTH = [
    ChoiceNLL(),
    ChoiceNLL(calibration="sfc"),
    AnswerNLL(),
    Preference(),
    Preference(beta=0.7),
]
POLICIES = [
    ChoiceMetric(),
    ChoiceMetric(name="f1"),
    ChoiceMetric(calibration="sfc"),
    ChoiceMetric(calibration="sfc", name="f1"),
]


def of(objective: Objective) -> str:
    return str(objective).replace(" ", "")


@pytest.mark.parametrize("objective", SMOOTH, ids=of)
@pytest.mark.parametrize("size", [0.5, 4.0])
def test_slopes_are_those_of_the_sum_of_the_losses(objective, size):
    for seed in range(4):
        at = batch(objective, seed, size)
        found = objective.slopes(at)
        expected = differences(lambda sums: float(objective.reduce(sums).losses.sum()), at)
        assert found.shape == at.sums.shape and np.abs(expected).max() > 1e-3
        assert found == pytest.approx(expected, abs=1e-8, rel=1e-6)


def missed(objective: ChoiceMetric, at: Sums) -> float:
    """1 - the chance that an option drawn from the softmax is right, over all examples; written out one by one."""
    total, first = 0.0, 0
    for outputs in at.outputs.tolist():
        sums, counts = at.sums[first : first + outputs], at.counts[first : first + outputs]
        right = at.right[first : first + outputs]
        if objective.calibration == "sfc":
            half = outputs // 2
            logits, right = sums[:half] - sums[half:], right[:half]
        else:
            logits = sums / counts
        chances = np.exp(logits) / np.exp(logits).sum()
        total += 1.0 - chances[right].sum()
        first += outputs
    return total


@pytest.mark.parametrize("objective", POLICIES, ids=of)
def test_slopes_of_a_metric_are_those_of_its_expected_loss(objective):
    """Also: all options that are right count, not only the label."""
    for seed in range(4):
        at = batch(objective, seed)
        expected = differences(lambda sums: missed(objective, sums), at)
        assert objective.slopes(at) == pytest.approx(expected, abs=1e-8, rel=1e-6)
        assert np.abs(expected).max() > 1e-3


def test_a_metric_that_is_bound_to_a_task_of_options_has_slopes():
    class Task:
        metric = "f1"

    bound = Metric().bind(Task(), Example("a", (" b", " c"), 1))
    assert bound == ChoiceMetric(name="f1") and len(bound.slopes(batch(bound))) == OPTIONS.sum()


@pytest.mark.parametrize("objective", [*SMOOTH, *POLICIES], ids=of)
@pytest.mark.parametrize("size", [0.01, 2.0, 300.0])
def test_doubts_are_between_0_and_1(objective, size):
    """Also where options of several tokens are compared by sums; and not all small, unless every softmax is a step."""
    largest = 0.0
    for seed in range(8):
        at = batch(objective, seed, size)
        doubts = objective.doubts(at, objective.slopes(at))
        assert doubts.shape == at.outputs.shape
        assert doubts.min() >= 0.0 and doubts.max() <= 1.0 + 1e-9
        largest = max(largest, float(doubts.max()))
    assert largest > 0.05 or size == 300.0


@pytest.mark.parametrize("objective", [ChoiceNLL(), ChoiceNLL(calibration="sfc"), Preference(beta=1.0)], ids=of)
def test_a_model_that_is_right_is_not_in_doubt_and_one_that_is_wrong_is(objective):
    at = batch(objective, 0)
    first = at.first + (0 if isinstance(objective, Preference) else at.labels)
    options = np.zeros(len(at.sums))
    options[first] = 100.0  # of the right one
    for sign, expected in ((1.0, 0.0), (-1.0, 1.0)):
        now = replace(at, sums=at.sums + sign * options * at.counts)
        doubts = objective.doubts(now, objective.slopes(now))
        assert doubts == pytest.approx(np.full(len(doubts), expected), abs=1e-3)


@pytest.mark.parametrize("objective", [ChoiceNLL(), ChoiceMetric(), Preference()], ids=of)
def test_slopes_of_extreme_sums_are_finite(objective):
    at = batch(objective, 0)
    wild = replace(at, sums=np.where(np.arange(len(at.sums)) % 2, -1e6, -1.0))
    assert np.isfinite(objective.slopes(wild)).all()


def test_what_is_about_completions_has_no_slopes():
    with pytest.raises(ConfigError, match="reward has no gradient at the log-probabilities"):
        Reward("exact_match").slopes(batch(ChoiceNLL()))
