"""Settings against a component's signature: what fits, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from zoray.records import ConfigError
from zoray.records.signatures import check_signature, did_you_mean


@dataclass(frozen=True)
class Inner:
    flag: bool = True


@dataclass(frozen=True)
class Outer:
    count: int = 1
    share: float = 0.5
    name: str = "x"
    limit: int | None = None
    either: int | str = "auto"
    tags: tuple[str, ...] = ()
    words: Mapping[str, str] | Sequence[str] = ()
    inner: Inner | dict = field(default_factory=Inner)
    free: Any = None


OUTER, INNER = f"{__name__}.Outer", f"{__name__}.Inner"


def check(**settings: Any) -> None:
    check_signature({"_target_": OUTER, **settings}, "part")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"count": 3, "share": 1, "name": "", "limit": None, "either": 2, "tags": ["a"], "free": object()},
        {"share": float("nan"), "limit": 7, "either": "all", "tags": [], "words": ["a", "b"]},
        {"words": {"no": "a", 1: "b"}, "inner": {"flag": True}},
        {"inner": {"_target_": INNER, "flag": False}},
    ],
)
def test_what_fits_passes(settings):
    check(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": "abc"}, "expected part.count to be a whole number; got 'abc'"),
        ({"count": 2.5}, "part.count to be a whole number; got 2.5"),
        ({"count": True}, "part.count to be a whole number; got True"),
        ({"count": None}, "part.count to be a whole number; got None"),
        ({"share": "1e-3x"}, "part.share to be a number"),
        ({"share": [1]}, "part.share to be a number"),
        ({"name": None}, "part.name to be text; got None"),
        ({"name": 5}, "part.name to be text; got 5. Write 'part.name=\"5\"' for text"),
        ({"limit": "x"}, "part.limit to be a whole number or null"),
        ({"either": 1.5}, "part.either to be a whole number or text"),
        ({"tags": "a"}, "part.tags to be a list, each item text; got 'a'"),
        ({"tags": [1]}, "part.tags to be a list, each item text; got [1]"),
        ({"words": "ab"}, "part.words to be a mapping {key: value} or a list, each item text; got 'ab'"),
        ({"cuont": 1}, "unknown config key 'part.cuont'; part has count, share, name"),
        ({"cuont": 1}, "Did you mean count?"),
        ({"inner": {"_target_": INNER, "flag": "yes"}}, "part.inner.flag to be true or false; got 'yes'"),
        ({"inner": {"_target_": INNER, "flg": True}}, "unknown config key 'part.inner.flg'; part.inner has flag"),
        (
            {"_target_": "zoray.methods.Nothing"},
            "part._target_ to name a class; got zoray.methods.Nothing",
        ),
        ({"_target_": "zoray.nowhere.Lora"}, "part._target_ to name a class"),
        ({"_target_": "Lora"}, "part._target_ to name a class"),
    ],
)
def test_what_does_not_fit_is_named(settings, says):
    with pytest.raises(ConfigError) as error:
        check(**settings)
    assert says in str(error.value)


@pytest.mark.parametrize("settings", [3, None, "lora", {"rank": 3}, ["lora"]])
def test_a_component_is_a_block_with_a_target(settings):
    with pytest.raises(ConfigError, match="expected space to be a component's settings; got"):
        check_signature(settings, "space")


def test_only_near_words_are_suggested():
    assert did_you_mean("rnak", ["rank", "alpha"]) == ". Did you mean rank?"
    assert did_you_mean("null", ["hf", "vllm"]) == ""
