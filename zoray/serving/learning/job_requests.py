"""Requests for jobs and ratings over the network: plain values within bounds, nothing that names code or paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from zoray.serving.http.fields import only, wrong
from zoray.tasks.file.columns import names_in

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "task:"  # before a task's name, in a field meant for a file's id
Word = Annotated[str, Field(max_length=200)]
Column = Field(default=None, min_length=1, max_length=200)
MOST_COLUMNS = 10  # of a template: each may hold a long text
MOST_STEPS, MOST_RATE = 1_000_000, 100  # of a job; a learning rate must be below
UPLOAD = re.compile(r"[^\s'\"]*/files/(?P<number>file-[0-9a-f]{24})/data\.\w+")  # an upload's path on the server


class Plain(BaseModel):
    """Known fields only; all others are refused."""

    model_config = ConfigDict(extra="forbid")


class Use(Plain):
    """How a file is used; fields not given follow from its columns (docs/your-data.md)."""

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


def _automatic(value: Any) -> Any:
    return None if value == "auto" else value


Auto = BeforeValidator(_automatic)  # OpenAI's word for the server's choice


class Else(str):
    """The server's setting that replaces a number not given."""


class Hyperparameters(Plain):
    """Numbers of a job; the server's where not given, or "auto"."""

    steps: Annotated[int | None, Auto, Else("steps")] = Field(default=None, ge=1, le=MOST_STEPS)
    batch_size: Annotated[int | None, Auto, Else("batch")] = Field(default=None, ge=1, le=4096)
    learning_rate: Annotated[float | None, Auto, Else("optimizer.lr")] = Field(default=None, gt=0, lt=MOST_RATE)
    n_epochs: Annotated[int | None, Auto] = Field(default=None, ge=1, le=1000)
    learning_rate_multiplier: Annotated[float | None, Auto] = Field(default=None, gt=0, le=1e6)
    beta: Annotated[float | None, Auto] = Field(default=None, gt=0, le=1000)

    @model_validator(mode="after")
    def _once(self) -> Hyperparameters:
        for one, other in (("steps", "n_epochs"), ("learning_rate", "learning_rate_multiplier")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise wrong(f"expected {one} or {other}; got both")
        return self


class Way(Plain):
    """A method's own part."""

    hyperparameters: Hyperparameters | None = None


def _likelihood(kind: Any) -> Any:
    if kind == "reinforcement":
        raise wrong(
            "rewards are code, which does not come over a network: expected supervised or dpo. Run "
            "python -m zoray.launch objective=reward (docs/rewards.md)"
        )
    return kind


class Method(Plain):
    """How a job learns. The rows decide; this can only confirm it."""

    type: Annotated[Literal["supervised", "dpo"], BeforeValidator(_likelihood)]
    supervised: Way | None = None
    dpo: Way | None = None

    @model_validator(mode="after")
    def _own(self) -> Method:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise wrong(f"expected {self.type} beside type {self.type}; got {other}")
        return self


class NewJob(Plain):
    """A tuning job in the form of OpenAI's API, plus zoray's settings.

    It learns from an upload, or from a task that comes with zoray: `task`, or `training_file` as "task:NAME".
    """

    training_file: str | None = Field(default=None, min_length=1, max_length=64)
    validation_file: str | None = Field(default=None, min_length=1, max_length=64)
    task: str | None = Field(default=None, min_length=1, max_length=64)
    model: str | None = Field(default=None, max_length=200)
    suffix: str | None = Field(default=None, max_length=40)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    metadata: dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(default=None, max_length=16)
    )
    integrations: Annotated[Any, only([], why="this server sends numbers nowhere (GET .../metrics has them)")] = Field(
        default=None, exclude=True
    )
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
        if self.validation_file is not None and (self.training_file is None or self.validation_file.startswith(PREFIX)):
            raise wrong(
                "expected validation_file beside a training_file, both uploads: a task has held-out rows of its own"
            )
        if self.validation_file is not None and self.validation_file == self.training_file:
            raise wrong("expected validation_file to differ from training_file; leave it out for a tenth of the rows")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> NewJob:
        """Move the method's hyperparameters to the job's own field, where OpenAI's older API has them."""
        way = self.method and (self.method.supervised or self.method.dpo)
        if self.method is None or way is None or way.hyperparameters is None:
            return self
        own = way.hyperparameters.model_dump(exclude_none=True)
        given = self.hyperparameters.model_dump(exclude_none=True) if self.hyperparameters else {}
        if twice := sorted(own.keys() & given.keys()):
            raise wrong(f"expected {twice[0]} once; got it in hyperparameters and in method.{self.method.type}")
        self.hyperparameters, self.method = Hyperparameters(**own, **given), Method(type=self.method.type)
        return self

    @classmethod
    def stored(cls, request: dict[str, Any]) -> NewJob:
        """A request from the server's record, without the fields that the server has added."""
        return cls(**{key: value for key, value in request.items() if key in cls.model_fields})

    @property
    def source(self) -> str:
        """The source of its rows: a file's id, or task:NAME."""
        return self.training_file or f"{PREFIX}{self.task}"


class Wish(Plain):
    """Whether active learning should be on."""

    on: bool


class Turn(Plain):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=100_000)


class Rated(Plain):
    """A conversation with the rating of its last answer."""

    messages: list[Turn] = Field(min_length=2, max_length=200)
    up: bool
    model: str = Field(default="", max_length=200)
    id: str | None = Field(default=None, max_length=64)


def plainly(text: str, name_of: Callable[[str], str] = lambda number: "the file") -> str:
    """A command-line message for users of a server: with its names of settings, and files by their own names."""
    text = re.sub(r"'task\.ignore=\[([^\]]*)\]'", r"use.ignore=[\1]", text)  # of what is in `use`, a list
    return UPLOAD.sub(lambda found: name_of(found["number"]), re.sub(r"\btask\.(?=[a-z_]+\b)", "", text))
