"""Word in Context (Pilehvar and Camacho-Collados, 2019; SuperGLUE): one word, one meaning? As MeZO asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class WiC(HubTask):
    """Does a word have the same meaning in two sentences? Options No (0) and Yes (1)."""

    config: ClassVar[str | None] = "wic"
    columns: ClassVar[tuple[str, ...]] = ("word", "sentence1", "sentence2", "label")
    labels: ClassVar[tuple[str, ...]] = ("False", "True")

    test: int | None = None
    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The question, the two sentences and the answer, a line each."""
        word, first, second = texts(row, "word", "sentence1", "sentence2")
        asked = f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?'
        prompt, options = parted(f"{asked}\n{first}\n{second}\n", ("No", "Yes"))
        return Example(prompt, options, self.label(row), calibration="", data={"word": word})
