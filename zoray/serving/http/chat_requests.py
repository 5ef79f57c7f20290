"""Requests to a model over the network: OpenAI's fields within bounds; other fields are ignored, not refused.

Guarantees: no field makes a request cost more than its tokens do; pictures, sounds and addresses to fetch are refused,
and so are schemas that the grammar does not enforce (grammar.py). An OpenAI field that would change the answer, and has
no effect here, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, model_validator

from zoray.serving.http.fields import LIST, LISTS, TEXT, TEXTS, TOKENS, by_type, only, wrong
from zoray.serving.http.grammar import enforced

MOST_CHOICES = 16  # of a prompt
MOST_PROMPTS = 32
MOST_STOPS = 4  # as in OpenAI's API and vLLM
MOST_ALTERNATIVES = 20  # tokens besides the chosen one
NO_TOOLS = "this server has no tools"

Text = Annotated[str, Field(max_length=2_000_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    Annotated[Stop, Tag(TEXT)] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag(LIST)],
    by_type("a text, or a list of texts"),
]


def _prompts(value: Any) -> str | None:
    """A prompt's kind, by its first item."""
    if not isinstance(value, list):
        return TEXT if isinstance(value, str) else None
    first = type(value[0]) if value else str
    return {int: TOKENS, list: LISTS}.get(first, TEXTS)


Prompts = Annotated[
    Annotated[str, Field(min_length=1, max_length=2_000_000), Tag(TEXT)]
    | Annotated[list[Token], Field(min_length=1, fail_fast=True), Tag(TOKENS)]
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True), Tag(TEXTS)]
    | Annotated[
        list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
        Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
        Tag(LISTS),
    ],
    by_type("a text, a list of texts, a list of token numbers, or a list of such lists", _prompts),
]


class Asked(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=200, description="The base model, a version, or live (default).")
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(default=None, max_length=1024)
    stream: bool | None = None
    stream_options: Streaming | None = None
    user: str | None = Field(default=None, max_length=512)

    @model_validator(mode="after")
    def _streams(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("expected stream_options only with stream=true")
        return self

    @property
    def body(self) -> dict[str, Any]:
        """The fields for the engine."""
        return self.model_dump(exclude_none=True, by_alias=True)


class Streaming(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


def _text_only(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise wrong(f"this server reads text parts only; got one of type {kind[:50]!r}")
    return kind


class TextPart(BaseModel):
    """A piece of a message: text only."""

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: Text


Content = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[list[TextPart], Field(min_length=1, max_length=100, fail_fast=True), Tag(LIST)],
    by_type("a text, or a list of text parts"),
]


def _speaker(role: Any) -> Any:
    if role in ("tool", "function"):
        raise wrong(f"{NO_TOOLS}, and reads no turn of role {role!r}. Say it in a turn of the user")
    return role


CALLS = f"{NO_TOOLS}, and reads no calls to them. Leave the turn out, or say in its content what was called"


class Said(BaseModel):
    """A message of a chat."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_speaker)]
    tool_calls: Annotated[Any, only([], why=CALLS)] = Field(default=None, exclude=True)
    function_call: Annotated[Any, only(why=CALLS)] = Field(default=None, exclude=True)
    audio: Annotated[Any, only(why="this server reads texts only")] = Field(default=None, exclude=True)
    content: Content
    name: str | None = Field(default=None, max_length=100)


class Shape(BaseModel):
    """A JSON schema that an answer must follow."""

    name: str = Field(max_length=64)
    description: str | None = Field(default=None, max_length=1000)
    shape: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _enforced(self) -> Shape:
        found = enforced(self.shape)
        if found is False:
            raise ValueError("expected a schema that some answer fits")
        self.shape = {} if found is True else found
        return self


class Format(BaseModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Shape | None = None
    schema_beside: Annotated[Any, only(why="a schema is read as json_schema={name, schema}, with type=json_schema")] = (
        Field(default=None, alias="schema", exclude=True)
    )

    @model_validator(mode="after")
    def _whole(self) -> Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema with type=json_schema, and only there")
        return self


def _choice(choice: Any) -> None:
    """Accept only none and auto: there are no tools to call."""
    mode = choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools")
        mode = inner.get("mode") if isinstance(inner, dict) else choice.get("mode")
    if mode not in (None, "none", "auto"):
        raise wrong(
            f"{NO_TOOLS}: no answer calls one, so expected none or auto. For an answer of a given form take "
            "response_format of type json_schema"
        )


Choice = Annotated[Any, BeforeValidator(_choice)]
Unread = Annotated[Any, Field(exclude=True)]


class Chat(Asked):
    """A request for the next message of a chat."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    response_format: Format | None = None
    tools: Unread = Field(default=None, description="Not read: no answer calls any.")
    functions: Unread = None
    tool_choice: Choice = Field(default=None, exclude=True)
    function_call: Choice = Field(default=None, exclude=True)
    modalities: Annotated[Any, only(["text"], why="this server writes texts only")] = Field(default=None, exclude=True)
    audio: Annotated[Any, only(why="this server writes texts only")] = Field(default=None, exclude=True)
    web_search_options: Annotated[Any, only(why="this server searches nothing")] = Field(default=None, exclude=True)
    reasoning_effort: Annotated[Any, only("none", why="this server has no say in how long a model reasons")] = Field(
        default=None, exclude=True
    )
    verbosity: Annotated[Any, only("medium", why="this server has no say in it; say it in a message")] = Field(
        default=None, exclude=True
    )
    store: Annotated[Any, only(False, why="this server keeps no answers")] = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _fits(self) -> Chat:
        if self.max_tokens == 0:
            raise ValueError("expected max_tokens of at least 1")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("expected one of max_completion_tokens and max_tokens, its former name; got two numbers")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("expected top_logprobs only with logprobs=true")
        return self


class Completion(Asked):
    """A request for what follows a text."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    suffix: Annotated[Any, only("", why="this server writes what follows a prompt, and nothing in between")] = Field(
        default=None, exclude=True
    )

    @model_validator(mode="after")
    def _fits(self) -> Completion:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("expected max_tokens of at least 1, or echo=true")
        if self.echo and self.stream and self.logprobs is not None:  # vLLM fails at this if n > 1
            raise ValueError("expected echo with logprobs only without stream")
        prompts = (
            self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]
        )
        if (self.n or 1) * len(prompts) > 2 * MOST_PROMPTS:
            raise ValueError(f"expected at most {2 * MOST_PROMPTS} completions; got {(self.n or 1) * len(prompts)}")
        return self


Asked.model_rebuild()
