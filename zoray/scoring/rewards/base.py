"""What the built-in rewards share: the columns of an example, and how much of a completion is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoray.records import ConfigError

LIMIT = 20_000  # characters of a completion that are read; no model writes that many on purpose


def column(example: Mapping[str, Any], name: str, reward: str) -> Any:
    """The example's value in a column; raises ConfigError without it."""
    if name not in example:
        has = ", ".join(map(str, example)) or "nothing"
        raise ConfigError(f"expected examples with {name!r} for the reward {reward}; got one with {has}")
    return example[name]


def answers_of(example: Mapping[str, Any], reward: str) -> list[str]:
    """The right answers, at least one."""
    answers = column(example, "answers", reward)
    texts = [answers] if isinstance(answers, str) else answers
    if not isinstance(texts, list | tuple) or not texts:
        raise ConfigError(f"expected examples with a list of answers for the reward {reward}; got {answers!r}")
    return [str(text) for text in texts]
