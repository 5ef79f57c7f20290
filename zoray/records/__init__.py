"""What crosses files and processes: frozen records of plain values, and zoray's three errors.

Imports none of zoray's other rooms, nor torch, vLLM or Ray. Every process has it: driver, replicas, server, and an
engine's workers.
"""

from zoray.records.errors import ConfigError, JournalError, ReplicaLost, SettingError, is_finite, require
from zoray.records.examples import (
    WHOLE,
    Example,
    Facts,
    Marked,
    Message,
    ReadAsItGoes,
    Sampling,
    Splits,
    TokenSequence,
    settled,
)
from zoray.records.steps import Commit, Evaluation, Probe, Scores, StepResult, Tile

__all__ = [
    "WHOLE",
    "Commit",
    "ConfigError",
    "Evaluation",
    "Example",
    "Facts",
    "JournalError",
    "Marked",
    "Message",
    "Probe",
    "ReadAsItGoes",
    "ReplicaLost",
    "Sampling",
    "Scores",
    "SettingError",
    "Splits",
    "StepResult",
    "Tile",
    "TokenSequence",
    "is_finite",
    "require",
    "settled",
]
