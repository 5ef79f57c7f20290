"""ReCoRD (Zhang et al., 2018; SuperGLUE): which entity of a news article is missing from a sentence about it?

As MeZO and GPT-3 ask it: the options are the sentence with each of the entities filled in, and follow the article's
highlights as one more of them. MeZO trains on the right one alone, not on all against each other: that is
objective=answer_nll.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoray.records import ConfigError, Example
from zoray.tasks.base import parted
from zoray.tasks.published.hub import HubTask, texts


@dataclass(frozen=True)
class ReCoRD(HubTask):
    """Which entity fits? The label is the first answer's; one entity may have several names, all right."""

    config: ClassVar[str | None] = "record"
    columns: ClassVar[tuple[str, ...]] = ("passage", "query", "entities", "answers")

    path: str = "aps/super_glue"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The article with its highlights as a list, and the query as the list's last item."""
        passage, query = texts(row, "passage", "query")
        entities, answers = row["entities"], row["answers"]
        if "@placeholder" not in query:
            raise ConfigError(f"the query must have @placeholder in it; got {query!r}. Remove the row")
        right = [entities.index(answer) for answer in answers if answer in entities]
        if not right:
            raise ConfigError(
                f"expected an answer out of the entities {entities}; got {answers} (none are hidden answers). "
                "Take data with answers"
            )
        listed = passage.replace("@highlight\n", "- ")
        prompt, options = parted(f"{listed}\n- ", (query.replace("@placeholder", entity) for entity in entities))
        data = {"query": query, "answers": answers}
        return Example(prompt, options, right[0], tuple(right[1:]), calibration="-", data=data)
