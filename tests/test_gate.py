"""The promotion gate: better by a margin on held-out rows, and nothing forgotten."""

import math
from dataclasses import replace

import pytest

from zoray.records import ConfigError
from zoray.serving.gate import Gate, Measured

LIVE = Measured(score=0.70, loss=0.60, perplexity=20.0, metric="accuracy")
GATE = Gate(margin=0.02, max_forgetting=0.05)


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


def test_forgetting_is_measured_against_the_base_and_not_the_live_version():
    drifted = replace(LIVE, perplexity=20.9)  # each step a little: the sum of them is what counts
    assert not GATE.judge(replace(drifted, score=0.9, perplexity=21.5), drifted, 20.0).promote


def test_a_margin_of_nothing_still_asks_for_something_better():
    assert not Gate(margin=0.0).judge(LIVE, LIVE, 20.0).promote
    assert Gate(margin=0.0).judge(replace(LIVE, score=0.7001), LIVE, 20.0).promote


@pytest.mark.parametrize("wrong", [{"margin": -0.1}, {"max_forgetting": 0.0}, {"automatic": 1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"gate.{next(iter(wrong))}"):
        Gate(**wrong)
