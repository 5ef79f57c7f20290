"""GSM8K (Cobbe et al., 2021): sums for grade school, each with a worked solution that ends in "#### NUMBER"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import ConfigError, Example, Sampling
from zoray.tasks.published.hub import HubTask, texts

STOP = "\nQuestion:"
CALCULATION = re.compile(r"<<[^<>]*>>")  # 48/2=<<48/2=24>>24: a note for a calculator that is not there
NUMBER = re.compile(r"####\s*(-?[\d.,]*\d)")


@dataclass(frozen=True)
class GSM8K(HubTask):
    """The model writes a solution, whose number is compared with the right one.

    Training takes the worked solution without its calculator notes, followed by the text that ends a completion, so
    that a tuned model stops.
    """

    metric: ClassVar[str | None] = "numeric"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=256, stop=(STOP,))
    config: ClassVar[str | None] = "main"
    held_out: ClassVar[str] = "test"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")

    dev: int = 200
    test: int | None = 1319
    path: str = "openai/gsm8k"

    def example(self, row: Mapping[str, Any]) -> Example:
        """A line with the question, and the solution from the next line on."""
        question, answer = (text.strip() for text in texts(row, "question", "answer"))
        number = NUMBER.search(answer)
        if number is None:
            raise ConfigError(f"the answer must end in '#### NUMBER'; got {answer[-40:]!r}. Remove the row")
        data = {"question": question, "answer": number[1].replace(",", "")}
        solution = f" {CALCULATION.sub('', answer)}{STOP}"
        return Example(f"Question: {question}\nAnswer:", answers=(solution,), data=data)
