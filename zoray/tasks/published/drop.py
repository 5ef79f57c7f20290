"""DROP (Dua et al., 2019): questions on a passage that take counting, sorting or sums. As MeZO asks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example, Sampling
from zoray.tasks.published.hub import HubTask, answers, texts


@dataclass(frozen=True)
class DROP(HubTask):
    """The model writes the answer; its score is F1 with the nearest of the reference answers.

    If an answer has several spans, each of them counts as an answer, as in MeZO. DROP's own F1 wants all of them.
    """

    metric: ClassVar[str | None] = "f1"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=50, stop=("\n",))
    columns: ClassVar[tuple[str, ...]] = ("passage", "question", "answers_spans")

    path: str = "ucinlp/drop"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Passage, question and answer, a line each."""
        passage, question = texts(row, "passage", "question")
        prompt = f"Passage: {passage}\nQuestion: {question.strip()}\nAnswer:"
        known = answers(row["answers_spans"]["spans"])
        data = {"question": question.strip(), "answers": list(known)}
        return Example(prompt, answers=tuple(f" {answer}\n" for answer in known), data=data)
