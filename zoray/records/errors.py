"""The three errors of zoray, and the check that most settings go through."""

from __future__ import annotations

import math
from numbers import Real


class ConfigError(ValueError):
    """The user asked for something that can't be done: what was expected, what came, what to do instead."""


class SettingError(ConfigError):
    """A setting is wrong, whatever the examples are."""


class JournalError(ValueError):
    """A journal is damaged, or does not belong to what it is applied to."""


class ReplicaLost(RuntimeError):
    """A replica is lost, or too few are left to go on; the run can be resumed."""


def require(condition: bool, expected: str, got: object, instead: str = "") -> None:
    """Raise ConfigError with the three things a user needs: what was expected, what came, what to do."""
    if not condition:
        raise ConfigError(f"expected {expected}; got {got!r}" + (f". {instead}" if instead else ""))


def is_finite(value: object) -> bool:
    """True for a number that may enter an update; false for inf, nan, and anything else (a config's text)."""
    return isinstance(value, Real) and math.isfinite(value)
