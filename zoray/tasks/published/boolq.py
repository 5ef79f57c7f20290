"""BoolQ (Clark et al., 2019): yes/no questions that people asked a search engine. As MeZO asks them.

The data are google/boolq, today's name of the data that MeZO loads as "boolq"; SuperGLUE's copy has other columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import ConfigError, Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class BoolQ(HubTask):
    """Does a passage say yes to a question? Options Yes (0) and No (1): MeZO's third template, its default."""

    columns: ClassVar[tuple[str, ...]] = ("question", "passage", "answer")

    path: str = "google/boolq"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The passage, the question with a capital and a question mark, and the answer on the next line."""
        passage, question = texts(row, "passage", "question")
        if not isinstance(row["answer"], bool):
            raise ConfigError(f"the answer must be true or false; got {row['answer']!r}. Take data with answers")
        asked = question if question.endswith("?") else f"{question}?"
        prompt, options = parted(f"{passage} {asked[0].upper()}{asked[1:]}\n", ("Yes", "No"))
        return Example(prompt, options, int(not row["answer"]), calibration="", data={"question": question})
