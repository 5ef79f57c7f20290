"""CommitmentBank (De Marneffe et al., 2019; SuperGLUE): does a text commit its writer to something? As MeZO asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class CB(HubTask):
    """Can a hypothesis be inferred? Options Yes (entailment), No (contradiction) and Maybe (neutral).

    There are 250 labelled rows and 56 for the test, so dev is 100 and train is the rest, as in MeZO's script.
    """

    config: ClassVar[str | None] = "cb"
    columns: ClassVar[tuple[str, ...]] = ("premise", "hypothesis", "label")
    labels: ClassVar[tuple[str, ...]] = ("entailment", "contradiction", "neutral")

    train: int | None = None
    dev: int = 100
    test: int | None = None
    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Suppose the premise: can we infer the hypothesis? The answer is on the next line."""
        premise, hypothesis = texts(row, "premise", "hypothesis")
        question = f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
        prompt, options = parted(question, ("Yes", "No", "Maybe"))
        data = {"premise": premise, "hypothesis": hypothesis}
        return Example(prompt, options, self.label(row), calibration="", data=data)
