"""Schemas as clients write them: what the engine's grammar is given, what is refused, and that it holds to the rest."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import time
import uuid
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel, Field

from zoray.serving.http.grammar import MOST_LENGTHS, enforced
from zoray.serving.http.patterns import MOST_TIMES, check_pattern


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Level(enum.IntEnum):
    low = 1
    high = 2


class Address(BaseModel):
    """Where somebody lives."""

    street: str = Field(description="with its number", examples=["Main St 1"], max_length=80)
    zip: str = Field(pattern=r"^\d{5}$")


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=40, title="Full name")
    age: int = Field(ge=0, le=130)
    share: float = Field(gt=0, lt=1)
    color: Color = Color.red
    level: Level = Level.low
    address: Address = Field(description="now")
    before: list[Address] = Field(default_factory=list, min_length=1, max_length=3)
    born: datetime.date
    seen: datetime.datetime
    wait: datetime.timedelta
    other: int | None = None
    second: Address | None = Field(None, description="if any")
    counts: dict[str, int] = {}
    letter: Literal["a", "b", 3] = "a"
    pet: Cat | Dog = Field(discriminator="kind")
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]
    price: decimal.Decimal
    id: uuid.UUID
    pair: tuple[int, str]
    anything: Any = None
    old: str = Field("x", deprecated=True)


class Tree(BaseModel):
    children: list[Tree] = []


class Forest(BaseModel):
    trees: dict[str, Tree]


PERSON = {
    "name": "Ada",
    "age": 36,
    "share": 0.5,
    "color": "blue",
    "level": 2,
    "address": {"street": "A 1", "zip": "12345"},
    "before": [{"street": "B 2", "zip": "54321"}],
    "born": "1815-12-10",
    "seen": "1852-11-27T10:00:00Z",
    "wait": "P1D",
    "other": None,
    "second": None,
    "counts": {"a": 1},
    "letter": 3,
    "pet": {"kind": "cat", "lives": 7},
    "pets": [{"kind": "dog", "name": "Rex"}],
    "price": 1.5,
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "pair": [1, "x"],
    "anything": [1, {"a": None}],
    "old": "x",
}


def accepts(schema, text):
    """Whether the grammar of the engine accepts a text."""
    xgrammar = pytest.importorskip("xgrammar")
    tokens = [bytes([byte]) for byte in range(256)] + ["</s>"]
    about = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(about, max_threads=1).compile_json_schema(json.dumps(schema))
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


def by_openai(model):
    return type_to_response_format_param(model)["json_schema"]["schema"]


@pytest.mark.parametrize("schema_of", [lambda model: model.model_json_schema(), by_openai])
def test_pydantics_models_are_enforced(schema_of):
    schema = enforced(schema_of(Person))
    text = json.dumps(schema)
    for word in (
        "$ref",
        "$defs",
        "default",
        "title",
        "description",
        "examples",
        "deprecated",
        "discriminator",
        "oneOf",
    ):
        assert f'"{word}"' not in text
    properties = schema["properties"]
    assert properties["name"] == {"type": "string", "pattern": "^.{1,40}$"}
    assert properties["age"] == {"type": "integer", "minimum": 0, "maximum": 130}
    assert properties["share"] == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    assert properties["color"] == {"enum": ["red", "blue"]} and properties["level"] == {"enum": [1, 2]}
    assert properties["born"] == {"type": "string", "format": "date"}
    assert properties["other"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert properties["address"]["properties"]["zip"] == {"type": "string", "pattern": r"^\d{5}$"}
    assert [one["properties"]["kind"] for one in properties["pet"]["anyOf"]] == [{"enum": ["cat"]}, {"enum": ["dog"]}]
    Person.model_validate(PERSON)
    for change, right in (
        ({}, True),
        ({"age": 131}, False),
        ({"age": "x"}, False),
        ({"name": ""}, False),
        ({"name": "x" * 41}, False),
        ({"share": 1}, False),
        ({"color": "green"}, False),
        ({"level": 3}, False),
        ({"before": []}, False),
        ({"before": [PERSON["address"]] * 4}, False),
        ({"born": "10.12.1815"}, False),
        ({"other": 5}, True),
        ({"second": PERSON["address"]}, True),
        ({"counts": {"a": "b"}}, False),
        ({"letter": "c"}, False),
        ({"pet": {"kind": "dog", "lives": 7}}, False),
        ({"pet": {"kind": "cat", "lives": 10}}, False),
        ({"address": {"street": "A", "zip": "1234"}}, False),
        ({"id": "1"}, False),
        ({"pair": [1]}, False),
    ):
        assert accepts(schema, json.dumps(PERSON | change)) == right, change


@pytest.mark.parametrize("model", [Tree, Forest])
@pytest.mark.parametrize("schema_of", [lambda model: model.model_json_schema(), by_openai])
def test_recursion_is_refused_with_that_reason(model, schema_of):
    with pytest.raises(ValueError, match=r"'#/\$defs/Tree' refers to itself: a recursive schema"):
        enforced(schema_of(model))
    with pytest.raises(ValueError, match="refers to itself"):
        enforced({"type": "object", "properties": {"a": {"$ref": "#"}}})


WHOLE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        (WHOLE, WHOLE),
        ({"allOf": [WHOLE], "description": "x", "default": {}}, WHOLE),
        ({"allOf": [{"type": "integer"}], "maximum": 5}, {"type": "integer", "maximum": 5}),
        ({"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "null"}}}, {"type": "null"}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": True}}, {}),
        (
            {"type": "object", "properties": {"title": {"type": "string"}, "default": {"type": "null"}}},
            {"type": "object", "properties": {"title": {"type": "string"}, "default": {"type": "null"}}},
        ),
        ({"type": "array"}, {"type": "array", "items": {}}),
        (
            {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
            {"type": "array", "items": {"type": "null"}},
        ),
        ({"type": "object", "required": ["a"]}, {"type": "object", "required": ["a"], "properties": {"a": {}}}),
        ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, {"type": "integer", "minimum": 1, "maximum": 2}),
        ({"type": "integer", "enum": [1, "a", 2.0, True]}, {"enum": [1, 2.0]}),
        ({"type": "string", "maximum": 5}, {"type": "string"}),
        ({"type": "string", "format": "password", "x-note": 1}, {"type": "string"}),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (
            {"type": "string", "anyOf": [{"const": "a"}, {"maxLength": 3}]},
            {"anyOf": [{"enum": ["a"]}, {"type": "string", "pattern": "^.{0,3}$"}]},
        ),
        (
            {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]},
            {"type": "number"},
        ),
    ],
)
def test_what_the_grammar_is_given(schema, given):
    assert enforced(schema) == given


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not enforced here; take a list"),
        ({"type": "integer", "multipleOf": 5}, "'multipleOf' is not enforced here"),
        ({"not": {}}, "'not' is not enforced"),
        ({"type": "string", "minimun": 5}, "'minimun' is not enforced here; leave it out"),
        ({"type": "string", "nullable": True}, 'take {"anyOf"'),
        ({"type": "object", "patternProperties": {}}, "'patternProperties' is not enforced here; name the properties"),
        ({"allOf": [WHOLE, WHOLE]}, "an allOf of several"),
        ({"$ref": "http://evil.example"}, "expected \\$ref to a part of the schema itself .*http://evil.example"),
        ({"$ref": "#/$defs/A"}, "there is no '#/\\$defs/A'"),
        ({"$ref": 5}, "expected \\$ref to a part"),
        ({"minimum": 3}, "expected a type beside minimum"),
        ({"type": "text"}, 'expected a type of string, .* got "text"'),
        ({"type": "string", "format": "ipv4network"}, '"ipv4network" is not enforced here; expected one of date'),
        ({"type": "string", "format": "date", "maxLength": 10}, "maxLength is not enforced beside format"),
        (
            {"type": "string", "pattern": "^a*$", "minLength": 1},
            "minLength is not enforced beside pattern; say it in the",
        ),
        ({"type": "string", "minLength": 10**9}, "minLength to be a whole number of at most 10,000; got 1000000000"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength to be at most maxLength; got 5 and 3"),
        ({"type": "array", "minItems": -1}, "minItems to be a whole number"),
        ({"type": "array", "maxItems": True}, "maxItems to be a whole number"),
        ({"type": "integer", "minimum": 10**30}, "expected minimum to be a number"),
        ({"type": "integer", "exclusiveMinimum": True}, "expected exclusiveMinimum to be a number"),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "to leave a number between them"),
        ({"type": "string", "enum": [1]}, "a value of its type"),
        ({"enum": [1, 5], "minimum": 3}, "minimum is not enforced beside enum"),
        ({"oneOf": [WHOLE, {"type": "object"}]}, "a oneOf whose schemas may fit the same answer"),
        ({"oneOf": [{"properties": ["a"], "required": ["a"]}] * 2}, "a oneOf whose"),
        ({"$ref": "#/$defs/A", "maximum": 5, "$defs": {"A": {"type": "integer", "maximum": 3}}}, "maximum comes twice"),
        (
            {"type": "object", "properties": {"a": {"items": {"type": "string", "uniqueItems": True}}}},
            r"in a\[\]: 'uniqueI",
        ),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is not"),
        ({"type": "object", "additionalProperties": False, "required": ["a"]}, "'a' is not"),
        ({"anyOf": []}, "expected anyOf to be a list"),
        ({"type": "object", "required": [1]}, "required to be a list of names"),
        ({"type": "object", "properties": WHOLE["properties"], "minProperties": 1}, "not enforced beside properties"),
        ({"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(99)}}, "at most 32 of"),
    ],
)
def test_what_is_not_enforced_is_named(schema, said):
    with pytest.raises(ValueError, match=said):
        enforced(schema)


def test_what_refs_stand_for_counts_and_is_bounded():
    """A schema of a kilobyte that would be gigabytes."""
    laughs: dict[str, Any] = {"0": {"type": "string", "enum": ["x" * 50]}}
    for i in range(1, 10):
        one = {"$ref": f"#/$defs/{i - 1}"}
        laughs[str(i)] = {"type": "object", "properties": {name: one for name in "abcdefgh"}}
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"at most 16,384 characters, with .ref replaced"):
        enforced({"$ref": "#/$defs/9", "$defs": laughs})
    deep = {str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i - 1}"}} for i in range(1, 13)}
    with pytest.raises(ValueError, match="at most 12 levels"):
        enforced({"$ref": "#/$defs/12", "$defs": {**deep, "0": {"type": "null"}}})
    assert enforced({"$ref": "#/$defs/11", "$defs": {**deep, "0": {"type": "null"}}})["type"] == "array"
    lengths = {f"k{i}": {"type": "string", "maxLength": 10 + i} for i in range(MOST_LENGTHS + 1)}
    with pytest.raises(ValueError, match="different lengths and patterns"):
        enforced({"type": "object", "properties": lengths})
    same = {f"k{i}": {"type": "string", "maxLength": 10} for i in range(100)}
    assert len(enforced({"type": "object", "properties": same})["properties"]) == 100
    assert time.monotonic() - begin < 5


PATTERNS = (  # that a grammar holds to, and texts of which some fit
    (r"^\d{5}$", ("12345", "1234", "a")),
    (r"^[A-Z]{2}-\d{4}$", ("AB-1234", "AB1234")),
    (r"^[\w.+-]+@\w+(\.\w+)+$", ("a.b@c.de", "a@b")),
    (r"^([A-F0-9]{2}:){5}[A-F0-9]{2}$", ("00:1A:2B:3C:4D:5E", "00:1A")),
    (r"^(?:red|green|blue)$", ("red", "redgreen")),
    (r"^\+?[\d ()-]{5,20}$", ("+49 (30) 123", "1")),
    (r"^\d{1,3}(,\d{3})*(\.\d{1,2})?$", ("1,234.50", "1,23")),
    (r"^[^\r\n\"]*$", ("a b", "")),
    (r"^\u00e9\x41$", ("éA", "eA")),
    ("ab", ("ab", "a")),
)


@pytest.mark.parametrize(("pattern", "texts"), PATTERNS)
def test_patterns_that_are_taken_are_held_to(pattern, texts):
    check_pattern(pattern)
    schema = {"type": "string", "pattern": pattern}
    assert enforced(schema) == schema
    for text in texts:
        assert accepts(schema, json.dumps(text, ensure_ascii=False)) == Draft202012Validator(schema).is_valid(text), (
            text
        )


@pytest.mark.parametrize("bounds", [{"maxLength": 4}, {"minLength": 1}, {"minLength": 3, "maxLength": 128}])
def test_text_of_bounded_length_has_no_control_characters(bounds):
    taken = enforced({"type": "string", **bounds})
    for text in ("abc", "äöü", "abcde", "", "\U0001d11e" * 4):
        fits = Draft202012Validator(bounds).is_valid(text)
        assert accepts(taken, json.dumps(text, ensure_ascii=False)) == fits, text
    for code in range(0x20):
        assert not accepts(taken, f'"ab{chr(code)}c"'), code


def test_the_largest_count_of_a_pattern_can_be_prepared():
    for pattern in (f"^[a-z]{{{MOST_TIMES}}}$", f"^[a-z]{{{MOST_TIMES},}}$"):
        check_pattern(pattern)
        assert accepts({"type": "string", "pattern": pattern}, json.dumps("a" * MOST_TIMES))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|b)*a(a|b){30}",
        "^([a-z]{1,14}){1,14}$",
        "^(.{0,10}){0,20}$",
        "^.{0,100}.{0,100}$",
        "^(a+){2}$",
        "^[a-z]{1,999}$",
        "^[a-z]{129}$",
        "^[a-z]{129,}$",
        "^(?!x)a$",
        "(?<=a)b",
        r"^a\b$",
        r"^(a)\1$",
        r"^\p{L}$",
        "(?i)a",
        "^a{,3}$",
        "^a{3,1}$",
        "^[z-a]$",
        "[",
        "(",
        ")",
        "*",
        "a**",
        "a+?",
        "a++",
        "^a|b$",
        "a^b",
        '^"$',
        r"^\\$",
        "^a\nb$",
        r"^\ud83d$",
        "",
        5,
        None,
        "^(?P<a>b)$",
    ],
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


BOUNDS = [
    {"type": "integer", "minimum": 3, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 17},
    {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 0.3},
    {"type": "number", "exclusiveMinimum": 0.001, "maximum": 12345.678},
    {"type": ["integer", "string", "null"], "minimum": 3, "maxLength": 2},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "maxItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 1},
    {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["b"],
        "additionalProperties": {"type": "null"},
    },
    {"type": "string", "format": "date"},
    {"type": "integer", "enum": [3, "aa"]},
    {"type": "string", "anyOf": [{"enum": ["aa", 17]}, {"minLength": 3}]},
]
VALUES = [
    -(2**60),
    -3,
    -2.6,
    -2.5,
    -1,
    0,
    0.1,
    0.3,
    0.31,
    1,
    2,
    3,
    4,
    16,
    17,
    18,
    12345.678,
    12346,
    2**60,
    None,
    True,
    "",
    "a",
    "aa",
    "aaa",
    "aaaa",
    "2024-12-01",
    "1.12.24",
    [],
    [1],
    [1, 2],
    [1, 2, 3],
    [1, "a"],
    ["a"],
    [1, "a", "b"],
    {},
    {"a": 1},
    {"a": 1, "b": 2},
    {"a": "x"},
    {"a": "x", "b": None},
    {"b": None},
    {"a": "x", "b": 1},
    {"a": "x", "b": None, "c": 1},
]


@pytest.mark.parametrize("schema", BOUNDS, ids=json.dumps)
def test_bounds_are_held_to(schema):
    """What the grammar accepts fits the schema, and something is accepted."""
    right, given = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER), enforced(schema)
    found = [value for value in VALUES if accepts(given, json.dumps(value))]
    assert found and all(right.is_valid(value) for value in found)
