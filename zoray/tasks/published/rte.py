"""RTE (Dagan et al., 2005, and its successors; SuperGLUE): does one text follow from another? As MeZO asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class RTE(HubTask):
    """Is a hypothesis true, given a premise? Options Yes (entailment) and No."""

    config: ClassVar[str | None] = "rte"
    columns: ClassVar[tuple[str, ...]] = ("premise", "hypothesis", "label")
    labels: ClassVar[tuple[str, ...]] = ("entailment", "not_entailment")

    test: int | None = None
    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The premise, the question on a line of its own, and the answer on the next."""
        premise, hypothesis = texts(row, "premise", "hypothesis")
        question = f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
        prompt, options = parted(question, ("Yes", "No"))
        data = {"premise": premise, "hypothesis": hypothesis}
        return Example(prompt, options, self.label(row), calibration="", data=data)
