"""What may be asked of a model over the network: OpenAI's fields within bounds; other fields are left out, not refused.

Guarantees: no field has a request cost more than its tokens do; what is a picture, a sound or an address to be fetched
is refused, and so are schemas whose grammar could grow beyond its text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16  # of a prompt
MOST_PROMPTS = 32
MOST_ALTERNATIVES = 20  # tokens beside the one that was chosen
MOST_SCHEMA = 16_384  # characters
DEEPEST = 12  # levels of a schema
PLAIN = {  # keywords of JSON schema whose grammar is no larger than what is written; all others are refused
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "title", "description",
}  # fmt: skip

Text = Annotated[str, Field(max_length=2_000_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Asked(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=200, description="The base model, a version, or live (default).")
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
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
        """What is passed on to the engine."""
        return self.model_dump(exclude_none=True, by_alias=True)


class Streaming(BaseModel):
    """What a stream has besides."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class Part(BaseModel):
    """A piece of a message: text only."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: Text


class Said(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=100, fail_fast=True)]
    name: str | None = Field(default=None, max_length=100)


class Shape(BaseModel):
    """A JSON schema that an answer is to follow."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=64)
    description: str | None = Field(default=None, max_length=1000)
    shape: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Shape:
        if len(json.dumps(self.shape)) > MOST_SCHEMA:
            raise ValueError(f"expected a schema of at most {MOST_SCHEMA:,} characters")
        _check_schema(self.shape, 1)
        return self


class Format(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Shape | None = None

    @model_validator(mode="after")
    def _whole(self) -> Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema with type=json_schema, and only there")
        return self


class Chat(Asked):
    """A request for the next message of a chat."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    response_format: Format | None = None

    @model_validator(mode="after")
    def _fits(self) -> Chat:
        if self.max_tokens == 0:
            raise ValueError("expected max_tokens of at least 1")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("expected top_logprobs only with logprobs=true")
        return self


class Completion(Asked):
    """A request for what follows a text."""

    prompt: (
        Annotated[str, Field(min_length=1, max_length=2_000_000)]
        | Annotated[list[Token], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)

    @model_validator(mode="after")
    def _fits(self) -> Completion:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("expected max_tokens of at least 1, or echo=true")
        if self.echo and self.stream and self.logprobs is not None:  # vLLM fails at that where n > 1
            raise ValueError("expected echo with logprobs only without stream")
        prompts = (
            self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]
        )
        if (self.n or 1) * len(prompts) > 2 * MOST_PROMPTS:
            raise ValueError(f"expected at most {2 * MOST_PROMPTS} completions; got {(self.n or 1) * len(prompts)}")
        return self


def _check_schema(schema: Any, depth: int) -> None:
    """Raise ValueError unless a schema is of PLAIN keywords."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict) or depth > DEEPEST:
        raise ValueError(f"expected schemas that are objects, at most {DEEPEST} levels deep")
    if foreign := sorted(set(schema) - PLAIN):
        raise ValueError(f"expected a schema of {', '.join(sorted(PLAIN))}; got {foreign[0][:50]!r}")
    properties, choices = schema.get("properties", {}), schema.get("anyOf", [])
    if not isinstance(properties, dict) or not isinstance(choices, list):
        raise ValueError("expected properties to be an object, and anyOf a list")
    for inner in (
        *properties.values(),
        *choices,
        *(schema[name] for name in ("items", "additionalProperties") if name in schema),
    ):
        _check_schema(inner, depth + 1)


Asked.model_rebuild()
