"""SQuAD 1.1 (Rajpurkar et al., 2016): questions on Wikipedia, answered in the article's words. As MeZO asks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example, Sampling
from zoray.tasks.published.hub import HubTask, answers, texts


@dataclass(frozen=True)
class SQuAD(HubTask):
    """The model writes the answer; its score is F1 with the nearest of the reference answers."""

    metric: ClassVar[str | None] = "f1"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=50, stop=("\n",))
    config: ClassVar[str | None] = "plain_text"
    columns: ClassVar[tuple[str, ...]] = ("title", "context", "question", "answers")

    path: str = "rajpurkar/squad"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Title, context, question and answer, a line each."""
        title, context, question = texts(row, "title", "context", "question")
        prompt = f"Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:"
        known = answers(row["answers"]["text"])
        data = {"question": question.strip(), "answers": list(known)}
        return Example(prompt, answers=tuple(f" {answer}\n" for answer in known), data=data)
