"""Which replicas are doubted, by digests and by the score of a common tile."""

from __future__ import annotations

import math

import pytest

from zoray.pool.agreement import differing_digests, differing_scores
from zoray.records import JournalError


@pytest.mark.parametrize(
    ("digests", "doubted"),
    [("", ""), ("x", ""), ("xx", ""), ("xy", "ab"), ("xxy", "c"), ("yxxx", "a"), ("xxxyz", "de")],
)
def test_the_minority_is_doubted_and_two_that_differ_both(digests, doubted):
    assert differing_digests(dict(zip("abcde", digests, strict=False))) == set(doubted)


@pytest.mark.parametrize("digests", ["xyz", "xxyy", "xxyzw"])
def test_no_majority_is_no_single_damaged_replica(digests):
    with pytest.raises(JournalError, match=r"most replicas disagree about the state: a x, .*replay"):
        differing_digests(dict(zip("abcde", digests, strict=False)))


@pytest.mark.parametrize(
    ("scores", "doubted"),
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, 1.0 + 1e-6], ""),
        ([1.0, 1.1], "ab"),
        ([1.0, math.nan], "b"),
        ([math.nan, math.nan], ""),  # the state itself
        ([math.nan, math.inf, 1.0], "c"),
        ([1.0, 1.0, 1.5], "c"),
        ([0.5, 1.0, 1.0 + 1e-6, 1.0], "a"),
        ([1.0, 1.0, math.nan], "c"),
    ],
)
def test_scores_of_a_common_tile(scores, doubted):
    assert differing_scores(dict(zip("abcde", scores, strict=False)), 1e-6) == set(doubted)


def test_what_rounding_makes_of_a_score_is_no_difference():
    assert not differing_scores({"a": 1.0, "b": 1.05, "c": 0.97}, noise=8e-3)  # bfloat16
    assert differing_scores({"a": 1.0, "b": 1.5, "c": 0.97}, noise=8e-3) == {"b"}


def test_scores_without_a_majority():
    with pytest.raises(JournalError, match="most replicas disagree about the loss of the same examples"):
        differing_scores({"a": 1.0, "b": 2.0, "c": 3.0}, 1e-6)
