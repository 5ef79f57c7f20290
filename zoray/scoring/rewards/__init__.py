"""Rewards: functions `reward(prompt, completion, example, **arguments) -> float`. Here are those that come with zoray.

Each gives a float from 0 to 1 for any completion whatsoever. Wrong arguments, and an example without what a reward
compares with, are a ConfigError at any completion, the empty one too. docs/rewards.md has the exact scales.
"""

from zoray.scoring.rewards.answers import exact_match, f1
from zoray.scoring.rewards.countdown import countdown
from zoray.scoring.rewards.json_object import json_schema
from zoray.scoring.rewards.numbers import numeric
from zoray.scoring.rewards.shape import format, length

__all__ = ["countdown", "exact_match", "f1", "format", "json_schema", "length", "numeric"]
