"""MultiRC (Khashabi et al., 2018; SuperGLUE): is this an answer to a question on a paragraph? As MeZO asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class MultiRC(HubTask):
    """Is an answer right? Options No (0) and Yes (1). An example is one answer; a question has several."""

    config: ClassVar[str | None] = "multirc"
    columns: ClassVar[tuple[str, ...]] = ("paragraph", "question", "answer", "label")
    labels: ClassVar[tuple[str, ...]] = ("False", "True")

    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The paragraph, the question, whether the answer is right, and the verdict, a line each."""
        (paragraph, question), (answer,) = texts(row, "paragraph", "question"), texts(row, "answer", blank=True)
        asked = f'Question: {question}\nI found this answer "{answer}". Is that correct? Yes or No?'
        prompt, options = parted(f"{paragraph}\n{asked}\n", ("No", "Yes"))
        data = {"question": question, "answer": answer}
        return Example(prompt, options, self.label(row), calibration="", data=data)
