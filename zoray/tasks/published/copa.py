"""COPA (Roemmele et al., 2011; SuperGLUE): which of two things is the cause, or the effect? As MeZO asks it.

MeZO trains it on the right choice alone, not on the two against each other: that is objective=answer_nll.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import ConfigError, Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts

JOINTS = {"effect": "so", "cause": "because"}


@dataclass(frozen=True)
class COPA(HubTask):
    """Which choice continues the premise after "so" or "because"?

    There are 400 labelled rows and 100 for the test, so dev is 100 and train is the rest, as in MeZO's script.
    """

    config: ClassVar[str | None] = "copa"
    columns: ClassVar[tuple[str, ...]] = ("premise", "choice1", "choice2", "question", "label")
    labels: ClassVar[tuple[str, ...]] = ("choice1", "choice2")

    train: int | None = None
    dev: int = 100
    test: int | None = None
    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The premise without its full stop, "so" or "because", and a choice that begins in lower case."""
        premise, *choices = texts(row, "premise", "choice1", "choice2")
        if row["question"] not in JOINTS:
            raise ConfigError(f"the question must be cause or effect; got {row['question']!r}. Remove the row")
        joint = JOINTS[row["question"]]
        before = f"{premise.rstrip().removesuffix('.')} {joint} "
        prompt, options = parted(before, map(_uncapitalised, choices))
        data = {"premise": premise, "question": row["question"], "choices": choices}
        return Example(prompt, options, self.label(row), calibration=joint, data=data)


def _uncapitalised(choice: str) -> str:
    """The first word in lower case, unless it is I."""
    first, *others = choice.split(" ")
    return " ".join([first if first == "I" else first.lower(), *others])
