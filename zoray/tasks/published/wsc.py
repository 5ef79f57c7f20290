"""The Winograd Schema Challenge (Levesque et al., 2012; SuperGLUE, with its spans corrected): what does a pronoun mean?

As MeZO asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class WSC(HubTask):
    """Does a pronoun refer to a noun? Options No (0) and Yes (1).

    MeZO's script takes 500 of the 554 labelled rows for dev, which leaves 54 to learn from; a smaller dev leaves more.
    """

    config: ClassVar[str | None] = "wsc.fixed"
    columns: ClassVar[tuple[str, ...]] = ("text", "span1_text", "span2_text", "label")
    labels: ClassVar[tuple[str, ...]] = ("False", "True")

    train: int | None = None
    test: int | None = None
    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The text, the question on a line of its own, and the answer on the next."""
        text, noun, pronoun = texts(row, "text", "span1_text", "span2_text")
        asked = f'In the previous sentence, does the pronoun "{pronoun.lower()}" refer to {noun}? Yes or No?'
        prompt, options = parted(f"{text}\n{asked}\n", ("No", "Yes"))
        return Example(prompt, options, self.label(row), calibration="", data={"noun": noun, "pronoun": pronoun})
