"""What may be asked for over the network: plain values within bounds, and nothing that names code or paths."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from zoray.objectives import AnswerNLL, ChoiceNLL, Preference
from zoray.records import ConfigError
from zoray.tasks.file import File

if TYPE_CHECKING:
    from pathlib import Path

    from zoray.objectives.base import Objective

Column = Field(default=None, min_length=1, max_length=200)
WORDS = 120  # of a piece of plain text
GIVEN = 3  # a piece's first third is given, the rest is to be written


class Use(BaseModel):
    """How a file is used; what is not said follows from its columns (docs/your-data.md)."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["choice", "completion", "chat", "preference"] | None = None
    template: str | None = Field(default=None, min_length=1, max_length=4000)
    words: dict[str, str] | None = Field(default=None, max_length=20)
    text_column: str | None = Column
    label_column: str | None = Column
    prompt_column: str | None = Column
    completion_column: str | None = Column
    messages_column: str | None = Column
    chosen_column: str | None = Column
    rejected_column: str | None = Column
    chat: bool = False
    dev: int | None = Field(default=None, ge=1, le=1000)
    test: int | None = Field(default=None, ge=0, le=1000)

    def task(self, data: Path) -> File:
        """The task of an upload's data.

        Raises:
            ConfigError: the settings contradict each other.
        """
        path = plain_text(data) if data.suffix == ".txt" else data
        return File(path=str(path), **self.model_dump())


class NewJob(BaseModel):
    """A tuning job, as OpenAI's API has it, with zoray's settings beside."""

    model_config = ConfigDict(extra="forbid")

    training_file: str = Field(max_length=64)
    model: str | None = Field(default=None, max_length=200)
    suffix: str | None = Field(default=None, max_length=40)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    hyperparameters: Hyperparameters | None = None
    use: Use = Field(default_factory=Use)


class Hyperparameters(BaseModel):
    """Numbers of a job; what is not given is the server's."""

    model_config = ConfigDict(extra="forbid")

    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    batch_size: int | None = Field(default=None, ge=1, le=4096)
    learning_rate: float | None = Field(default=None, gt=0, lt=100)


NewJob.model_rebuild()


class Wish(BaseModel):
    """Whether active learning is to be on."""

    model_config = ConfigDict(extra="forbid")

    on: bool


class Turn(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=100_000)


class Rated(BaseModel):
    """A conversation with the rating of its last answer."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Turn] = Field(min_length=2, max_length=200)
    up: bool
    model: str = Field(default="", max_length=200)
    id: str | None = Field(default=None, max_length=64)


def objective_of(task: File) -> Objective:
    """The likelihood that suits a file's kind of rows."""
    kinds = {"choice": ChoiceNLL, "completion": AnswerNLL, "chat": AnswerNLL, "preference": Preference}
    if (kind := task.kind_found) not in kinds:
        raise ConfigError("expected rows with a label, a completion, a chat or a preference; got prompts only")
    return kinds[kind]()


def plain_text(path: Path) -> Path:
    """A text as rows to learn from, beside it: of each piece the first part is given, the rest is to be written.

    Raises:
        ConfigError: too little text, or none in UTF-8.
    """
    rows = path.with_name("rows.jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected a text in UTF-8; byte {error.start} is not. Save it as UTF-8") from None
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        pieces += [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    pieces = [piece for piece in pieces if len(piece) >= 2 * GIVEN]
    if len(pieces) < 10:
        raise ConfigError(
            f"expected at least 10 paragraphs of {2 * GIVEN} words or more; got {len(pieces)}. Give more text, or rows "
            "with questions and answers (CSV with columns prompt and completion)"
        )
    lines = []
    for piece in pieces:
        cut = len(piece) // GIVEN
        lines.append(json.dumps({"prompt": " ".join(piece[:cut]), "completion": " " + " ".join(piece[cut:])}))
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows
