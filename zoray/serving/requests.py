"""What may be asked for over the network: plain values within bounds, and nothing that names code or paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from zoray.objectives import AnswerNLL, ChoiceNLL, Preference
from zoray.records import ConfigError
from zoray.serving.presets import PREFIX, SIZES, preset
from zoray.tasks.columns import names_in
from zoray.tasks.file import File

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zoray.objectives.base import Objective
    from zoray.tasks.base import Task

Word = Annotated[str, Field(max_length=200)]
Column = Field(default=None, min_length=1, max_length=200)
MOST_COLUMNS = 10  # of a template: each may hold a long text
UPLOAD = re.compile(r"[^\s'\"]*/files/(?P<number>file-[0-9a-f]{24})/data\.\w+")  # where one lies on the server


class Use(BaseModel):
    """How a file is used; what is not said follows from its columns (docs/your-data.md)."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["choice", "completion", "chat", "preference"] | None = None
    template: str | None = Field(default=None, min_length=1, max_length=4000)
    words: dict[Word, Word] | None = Field(default=None, max_length=20)
    text_column: str | None = Column
    label_column: str | None = Column
    prompt_column: str | None = Column
    completion_column: str | None = Column
    messages_column: str | None = Column
    chosen_column: str | None = Column
    rejected_column: str | None = Column
    chat: bool = False
    space: bool | None = None
    control_tokens: bool | None = None
    turns: Literal["all", "last"] | None = None
    ignore: list[Annotated[str, Field(min_length=1, max_length=100)]] | None = Field(default=None, max_length=20)
    train: int | None = Field(default=None, ge=1, le=1_000_000)
    dev: int | None = Field(default=None, ge=1, le=1000)
    test: int | None = Field(default=None, ge=0, le=1000)

    @field_validator("template")
    @classmethod
    def _few_columns(cls, template: str | None) -> str | None:
        if template is not None and len(names_in(template)) > MOST_COLUMNS:
            raise ValueError(f"expected at most {MOST_COLUMNS} columns in braces")
        return template

    def task(self, data: Path) -> File:
        """The task of an upload's data.

        Raises:
            ConfigError: the settings contradict each other.
        """
        return Upload(path=str(data), **self.model_dump(exclude_none=True))


class Upload(File):
    """A file of the server's own, of which nothing is kept elsewhere: what people delete is gone."""

    cached: ClassVar[bool] = False


class NewJob(BaseModel):
    """A tuning job, as OpenAI's API has it, with zoray's settings beside.

    It learns from an upload, or from a task that zoray brings along: `task`, or `training_file` as "task:NAME".
    """

    model_config = ConfigDict(extra="forbid")

    training_file: str | None = Field(default=None, min_length=1, max_length=64)
    task: str | None = Field(default=None, min_length=1, max_length=64)
    model: str | None = Field(default=None, max_length=200)
    suffix: str | None = Field(default=None, max_length=40)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    hyperparameters: Hyperparameters | None = None
    use: Use = Field(default_factory=Use)

    @model_validator(mode="after")
    def _check_source(self) -> NewJob:
        if self.training_file is not None and self.training_file.startswith(PREFIX):
            if self.task is not None:
                raise PydanticCustomError("source", "expected one task; got training_file and task")
            self.training_file, self.task = None, self.training_file.removeprefix(PREFIX)
        if (self.training_file is None) == (self.task is None):
            got = "neither" if self.task is None else "both"
            raise PydanticCustomError("source", "expected training_file or task; got {got}", {"got": got})
        return self

    @property
    def source(self) -> str:
        """What it learns from, in the place of a file's id: that, or task:NAME."""
        return self.training_file or f"{PREFIX}{self.task}"

    def lessons(self, data_path: Callable[[str], Path]) -> tuple[Task, Objective]:
        """The task and the likelihood that suits it; `data_path` tells where the data of an upload lie.

        Raises:
            ConfigError: there is no such upload or task, or a setting does not suit it.
        """
        source = self.source
        if source.startswith(PREFIX):
            if other := self.use.model_dump(exclude_defaults=True).keys() - set(SIZES):
                raise ConfigError(
                    f"expected use of a task to have {', '.join(SIZES)} only; got {', '.join(sorted(other))}. Upload "
                    "your own data to say how they are read"
                )
            return preset(source.removeprefix(PREFIX), self.use.model_dump(include=set(SIZES)))
        task = self.use.task(data_path(source))
        return task, objective_of(task)


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


def plainly(text: str, name_of: Callable[[str], str] = lambda number: "the file") -> str:
    """The command line's messages for those who use a server: settings as named here, and files by their own names."""
    return UPLOAD.sub(lambda found: name_of(found["number"]), re.sub(r"\btask\.(?=[a-z_]+\b)", "", text))


def objective_of(task: File) -> Objective:
    """The likelihood that suits a file's kind of rows."""
    kinds = {"choice": ChoiceNLL, "completion": AnswerNLL, "chat": AnswerNLL, "preference": Preference}
    if (kind := task.kind_found) not in kinds:
        raise ConfigError("expected rows with a label, a completion, a chat or a preference; got prompts only")
    return kinds[kind]()
