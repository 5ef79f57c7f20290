"""The promotion gate: better by a margin on held-out rows, and nothing forgotten."""

import math
from dataclasses import replace

import pytest

from zoray.records import ConfigError
from zoray.serving.gate import Gate, Measured, confidence

HITS = (1.0,) * 70 + (0.0,) * 30
LIVE = Measured(score=0.70, loss=0.60, perplexity=20.0, metric="accuracy", rows=HITS)
GATE = Gate(margin=0.02, confidence=0.5, max_forgetting=0.05)


@pytest.mark.parametrize(
    "new, promote, says",
    [
        (replace(LIVE, score=0.73), True, "accuracy 0.730, live 0.700"),
        (replace(LIVE, score=0.715), False, "not better by the margin of 0.02"),
        (replace(LIVE, score=0.60, loss=0.1), False, "not better"),  # the metric counts, where there is one
        (replace(LIVE, score=0.90, perplexity=20.9), True, "at most 21.00"),
        (replace(LIVE, score=0.90, perplexity=21.1), False, "it forgets"),
        (replace(LIVE, score=0.90, perplexity=math.nan), False, "it forgets"),
        (replace(LIVE, score=math.nan, loss=0.50), True, "loss 0.5000, live 0.6000"),
        (replace(LIVE, score=math.nan, loss=0.595), False, "margin of 0.012"),
        (replace(LIVE, score=math.nan, loss=math.nan), False, "not better"),
    ],
)
def test_a_version_passes_if_it_is_better_and_forgets_little(new, promote, says):
    verdict = GATE.judge(new, LIVE, 20.0)
    assert verdict.promote is promote and says in verdict.reason


def worth(won, lost, rows=100):
    """What rows are worth under two versions, of which the first has won some and lost some."""
    same = (1.0,) * (rows - won - lost)
    return (1.0,) * won + (0.0,) * lost + same, (0.0,) * won + (1.0,) * lost + same


@pytest.mark.parametrize(
    "won, lost, sure",
    [(0, 0, 0.5), (1, 0, 0.8413), (2, 0, 0.9214), (5, 5, 0.5), (12, 8, 0.8145), (14, 6, 0.9632), (6, 14, 0.0368)],
)
def test_confidence_is_mcnemars_for_accuracy(won, lost, sure):
    new, live = worth(won, lost)
    assert confidence(new, live) == pytest.approx(sure, abs=1e-4)
    assert confidence(live, new) == pytest.approx(1 - sure, abs=1e-4)


def test_confidence_of_losses_grows_with_rows_and_knows_no_nan():
    few, many = ([-0.5 + 0.1 * (k % 3) for k in range(n)] for n in (3, 30))
    base = [-0.5] * 30
    assert 0.5 < confidence(few, base[:3]) < confidence(many, base) < 1
    assert confidence([math.nan, 1.0], [0.0, 0.0]) == 0.5
    assert confidence([math.inf, 1.0], [0.0, 0.0]) == 0.5
    assert confidence([], []) == 0.5


@pytest.mark.parametrize("won, lost, promote", [(1, 0, False), (2, 0, True), (7, 5, False), (9, 3, True)])
def test_what_may_be_luck_of_the_rows_does_not_pass(won, lost, promote):
    new, live = worth(won, lost, rows=20)
    scores = [replace(LIVE, score=sum(rows) / 20, rows=rows) for rows in (new, live)]
    verdict = replace(GATE, confidence=0.9).judge(*scores, 20.0)
    assert verdict.promote is promote
    assert ("20 held-out rows that may be chance" in verdict.reason) is not promote
    assert GATE.judge(*scores, 20.0).promote


def test_nothing_is_said_to_be_quite_sure():
    new, live = worth(20, 0)
    verdict = Gate().judge(replace(LIVE, score=1.0, rows=new), replace(LIVE, rows=live), 20.0)
    assert verdict.promote and "(over 99% sure on 100 rows)" in verdict.reason


def test_forgetting_is_measured_against_the_base_and_not_the_live_version():
    drifted = replace(LIVE, perplexity=20.9)  # each step a little: the sum of them is what counts
    assert not GATE.judge(replace(drifted, score=0.9, perplexity=21.5), drifted, 20.0).promote


def test_a_margin_of_nothing_still_asks_for_something_better():
    assert not Gate(margin=0.0).judge(LIVE, LIVE, 20.0).promote
    assert Gate(margin=0.0, confidence=0.5).judge(replace(LIVE, score=0.7001), LIVE, 20.0).promote


@pytest.mark.parametrize(
    "wrong", [{"margin": -0.1}, {"confidence": 0.4}, {"confidence": 1.0}, {"max_forgetting": 0.0}, {"automatic": 1}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"gate.{next(iter(wrong))}"):
        Gate(**wrong)
