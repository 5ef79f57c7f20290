"""The rewards that come with zoray: functions `reward(prompt, completion, example, **arguments) -> float`.

Each returns a float from 0 to 1 for any completion. Wrong arguments, or an example that lacks what the reward compares
with, raise ConfigError for any completion, even an empty one. docs/rewards.md has the exact scales.
"""

from zoray.scoring.rewards.answers import exact_match, f1
from zoray.scoring.rewards.countdown import countdown
from zoray.scoring.rewards.json_object import json_schema
from zoray.scoring.rewards.numbers import numeric
from zoray.scoring.rewards.shape import format, length

__all__ = ["countdown", "exact_match", "f1", "format", "json_schema", "length", "numeric"]
