"""Built-in rewards: cases worked out by hand, any text whatsoever, and what is refused by name."""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import jsonschema
import pytest

from zoray.records import ConfigError
from zoray.scoring import rewards
from zoray.scoring.rewards.json_object import SCHEMAS, has_pattern
from zoray.scoring.rewards.judging.functions import absolute, load_function
from zoray.scoring.rewards.numbers import stated_number

PERSON = {"name": "Maria", "age": 34, "job": "nurse", "city": "Lisbon"}
WHOLE = json.dumps(PERSON)
PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}


# answers


@pytest.mark.parametrize(
    ("completion", "answers", "value"),
    [
        (" The  Eiffel Tower!", ["eiffel tower"], 1.0),
        ("a cat", ["dog", "Cat."], 1.0),
        ("cats", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("theatre", ["atre"], 0.0),  # articles are whole words
        ("1,000", ["1000"], 1.0),
        ("x", "x", 1.0),
    ],
)
def test_exact_match(completion, answers, value):
    assert rewards.exact_match("", completion, {"answers": answers}) == value


@pytest.mark.parametrize(
    ("completion", "answers", "value"),
    [
        ("the red house", ["red house"], 1.0),
        ("a big red house", ["red house"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # P 2/3, R 1
        ("red", ["big red house", "red car"], 2 * 1 * (1 / 2) / (1 + 1 / 2)),  # the second: P 1, R 1/2
        ("red red", ["red"], 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # each word counts once
        ("blue", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("the", ["the"], 0.0),  # nothing is left of either
        ("CANNOTANSWER", ["CANNOTANSWER"], 1.0),
        ("No answer.", ["no answer", "something"], 1.0),
        ("something", ["no answer", "something"], 0.0),  # the first decides
        ("no", ["no answer"], 0.0),  # no credit for half of it
    ],
)
def test_f1(completion, answers, value):
    assert rewards.f1("", completion, {"answers": answers}) == pytest.approx(value, abs=1e-12)


# numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", 7),
        ("It costs $1,234.50.", Fraction("1234.5")),
        ("1,2345", 2345),
        ("1,234,567 people", 1_234_567),
        ("12% of them", 12),
        ("-5", -5),
        ("\u22125", -5),
        ("a loss of -$3.50", Fraction("-3.5")),
        ("10-5", 5),
        ("(3)-4", 4),
        (".5", Fraction(1, 2)),
        ("3.", 3),
        ("2e3", 2000),
        ("7km", 7),
        ("that is 3/4", Fraction(3, 4)),
        ("5/0", None),
        ("no number", None),
        ("", None),
        ("9" * 1000, None),
        ("5 apples\n#### 12 apples\nor 13", 12),
        ("#### 1,000", 1000),
        ("#### 3\n#### 4", 4),
        ("#### Solution\nIt is 8", 8),
        (r"\boxed{42} and 7", 42),
        (r"\boxed{1} then \boxed{2}", 2),
        (r"#### 5 \boxed{6}", 6),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{\frac12}", Fraction(1, 2)),
        (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
        (r"\boxed{-1 \frac{1}{2}}", Fraction(-3, 2)),
        (r"\boxed{x = 1{,}250 \text{ m}^2}", 1250),
        (r"\boxed{1\,250}", 1250),
        (r"\boxed{\$50\%}", 50),
        (r"\boxed{\text{42 apples}}", 42),
        (r"\boxed{3 \text{ in \{a, b\}}}", 3),
        (r"\boxed{no}", None),
        (r"\boxed{12", 12),  # never closed: the last number
    ],
)
def test_the_number_that_a_text_states(text, number):
    assert stated_number(text) == number


def test_numeric():
    for answer in ("18", 18, 18.0, "9 * 2 = <<9*2=18>>18\n#### 18", "$18.00"):
        assert rewards.numeric("", "She makes $18 a day.", {"answer": answer}) == 1.0
        assert rewards.numeric("", "She makes 17 or so.", {"answer": answer}) == 0.0
    assert rewards.numeric("", r"\boxed{\frac{1}{2}}", {"answers": ["0.5"]}) == 1.0
    assert rewards.numeric("", "0.33", {"answer": "1/3"}) == 0.0
    with pytest.raises(ConfigError, match=r"a number as their answer for the reward numeric; got 'none'"):
        rewards.numeric("", "1", {"answer": "none"})


# shape


def test_format():
    digits, example = r"\d+", {}
    assert rewards.format("", " 12\n", example, digits) == 1.0
    assert rewards.format("", "12 apples", example, digits) == 0.0
    assert rewards.format("", "12 apples", example, digits, mode="contains") == 1.0
    assert rewards.format("", "<a>\n1\n</a>", example, "<a>.*</a>") == 1.0
    with pytest.raises(ConfigError, match="pattern to be a regular expression; got '\\('"):
        rewards.format("", "", example, "(")
    with pytest.raises(ConfigError, match="mode to be full or contains; got 'some'"):
        rewards.format("", "", example, "x", mode="some")


@pytest.mark.parametrize(
    ("completion", "arguments", "value"),
    [
        ("x" * 10, {"least": 10, "most": 20}, 1.0),
        ("x" * 15, {"least": 10, "most": 20}, 0.5),
        ("x" * 20, {"least": 10, "most": 20}, 0.0),
        ("x" * 99, {"least": 10, "most": 20}, 0.0),
        (" \n", {"least": 10, "most": 20}, 0.0),
        ("  x  ", {"most": 4}, 0.75),
        ("one two three", {"most": 4, "unit": "words"}, 0.25),
        ("Paris.", {"most": 10, "target_column": "answer"}, 1.0),
        ("It is Paris.", {"most": 10, "target_column": "answer"}, 0.4),
        ("P", {"most": 10, "target_column": "answer"}, 0.5),
        ("", {"most": 10, "target_column": "answer"}, 0.0),
        ("In Paris", {"most": 2, "unit": "words", "target_column": "answer"}, 0.5),
        ("Paris, of course.", {"least": 5, "most": 15, "target_column": "answer"}, 0.4),
    ],
)
def test_length(completion, arguments, value):
    assert rewards.length("", completion, {"answer": "Paris."}, **arguments) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"most": 5, "least": 5}, "0 <= least < most"),
        ({"most": 5, "least": -1}, "0 <= least < most"),
        ({"most": "5"}, "0 <= least < most"),
        ({"most": 5, "unit": "tokens"}, "unit to be characters or words; got 'tokens'"),
        ({"most": 5, "target_column": "reference"}, "expected examples with 'reference' for the reward length"),
    ],
)
def test_length_refuses_at_any_completion(arguments, says):
    for completion in ("", "text"):
        with pytest.raises(ConfigError, match=says):
            rewards.length("", completion, {"answer": "x"}, **arguments)


# countdown


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<answer>(1 + 2) * 3</answer>", 1.0),
        ("<answer>\n 3 * (2 + 1)\n</answer> done", 1.0),
        ("<answer>1</answer> no: <answer>(1+2)*3</answer>", 1.0),
        ("<answer>(1+2)*3</answer> no: <answer>1</answer>", 0.1),
        ("<answer>3 - -(2 * 3)</answer>", 0.1),  # 3 twice, no 1
        ("<answer>-(1 - 2 * 2) * 3</answer>", 0.1),  # 2 twice
        ("<answer>(1 + 2) * 3 = 9</answer>", 0.1),
        ("<answer>1 + 2 + 3</answer>", 0.1),
        ("<answer>3 ** 2 * 1</answer>", 0.1),
        ("<answer>9 // 1</answer>", 0.1),
        ("<answer>3 / (2 - 1 - 1)</answer>", 0.1),
        ("<answer>2 / (3 - 3)</answer>", 0.1),
        ("<answer>123</answer>", 0.1),
        ("<answer>__import__('os').abort()</answer>", 0.1),
        ("<answer>(1 + 2) * 3.0</answer>", 0.1),
        ("<answer>(1 + 2) * 03</answer>", 0.1),
        ("<answer>" + "(" * 99 + "(1 + 2) * 3" + ")" * 99 + "</answer>", 0.1),
        ("<answer> </answer>", 0.0),
        ("<answer>(1 + 2) * 3", 0.0),
        ("(1 + 2) * 3</answer>", 0.0),
        ("(1 + 2) * 3", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(completion, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the parser's own, at "1 (2)"
        assert rewards.countdown("", completion, {"numbers": [3, 1, 2], "target": 9}) == value
        assert rewards.countdown("", "<answer>1 (2) 3</answer>", {"numbers": [3, 1, 2], "target": 9}) == 0.1


def test_countdown_is_exact_and_takes_signs():
    assert rewards.countdown("", "<answer>6 / (1 - 3 / 4)</answer>", {"numbers": [1, 3, 4, 6], "target": 24}) == 1.0
    assert rewards.countdown("", "<answer>-2 + 5</answer>", {"numbers": [2, 5], "target": 3}) == 1.0
    assert rewards.countdown("", "<answer>5 + 5</answer>", {"numbers": [5], "target": 10}) == 0.1
    for data in ({"numbers": [1, 2.5], "target": 3}, {"numbers": "12", "target": 3}, {"numbers": [1], "target": True}):
        with pytest.raises(ConfigError, match="expected whole numbers and target"):
            rewards.countdown("", "", data)


# json_schema


@pytest.mark.parametrize(
    ("completion", "strict", "lax"),
    [
        ("", 0.0, 0.0),
        ("name: Maria", 0.0, 0.0),
        ("{name: Maria}", 0.0, 0.0),
        ('{"a": 1', 0.1, 0.1),
        ('{"a": 1, "b": NaN}', 0.1, 0.1),
        ('{"a": 1, "b": 1e999}', 0.1, 0.1),
        ("{}", 0.4, 0.4),
        ("Here: { }", 0.3, 0.4),
        ('{"a": 1}', 0.65, 0.65),
        ('Sure! {"a": 1}', 0.55, 0.65),
        ('{"a": "1", "b": "x"}', 0.65, 0.65),
        ('{"a": true, "b": "x"}', 0.65, 0.65),  # true is no whole number
        ('{"a": 1, "b": "x"}', 1.0, 1.0),
        (' {"a": 1, "b": "x", "c": null}\n', 1.0, 1.0),
        ('```json\n{"a": 1, "b": "x"}\n```', 0.8, 1.0),
        ('{"a" {"a": 1, "b": "x"}', 0.8, 1.0),
        ('{"a": 1, "b": "x"}}', 0.8, 1.0),
        ('[{"a": 1, "b": "x"}]', 0.8, 1.0),
        ('{"c": {"a": 1, "b": "x"}}', 0.4, 0.4),  # the first object is the outer one
    ],
)
def test_json_schema(completion, strict, lax):
    assert rewards.json_schema("", completion, {}, PAIR) == pytest.approx(strict, abs=1e-12)
    assert rewards.json_schema("", completion, {}, PAIR, strict=False) == pytest.approx(lax, abs=1e-12)


def test_json_schema_gives_all_only_for_what_validates():
    narrow = {**PAIR, "additionalProperties": False}
    assert rewards.json_schema("", '{"a": 1, "b": "x", "c": 2}', {}, narrow) == pytest.approx(0.9)
    deep = {**PAIR, "properties": {**PAIR["properties"], "a": {"type": "integer", "multipleOf": 0.5, "minimum": 5}}}
    assert rewards.json_schema("", '{"a": 4, "b": "x"}', {}, deep) == pytest.approx(0.9)
    assert rewards.json_schema("", '{"a": %s, "b": "x"}' % ("9" * 4000), {}, deep) in (pytest.approx(0.9), 1.0)
    open_ended = {"properties": {"a": {}}}  # nothing is required: the properties count
    assert [rewards.json_schema("", text, {}, open_ended) for text in ("{}", '{"a": 1}')] == [pytest.approx(0.4), 1.0]


def test_json_schema_with_values():
    def score(completion: str) -> float:
        return rewards.json_schema("", completion, PERSON, "person", values=True)

    assert score(WHOLE) == 1.0
    assert score(json.dumps({**PERSON, "age": 35})) == pytest.approx(0.4 + 0.5 * 3 / 4)
    assert rewards.json_schema("", json.dumps({**PERSON, "age": 35}), PERSON, "person") == 1.0
    with pytest.raises(ConfigError, match="examples with 'name' for the reward json_schema; got one with nothing"):
        rewards.json_schema("", "", {}, "person", values=True)


def test_schemas_that_come_along_are_valid_and_found(tmp_path):
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        assert rewards.json_schema("", WHOLE, {}, path.stem) == rewards.json_schema("", WHOLE, {}, schema) == 1.0
        assert rewards.json_schema("", WHOLE, {}, str(path)) == 1.0
    assert not has_pattern("person") and has_pattern({"properties": {"a": {"pattern": "x"}}})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("persn", "a .json file or one of: person; got 'persn'"),
        ("missing.json", "got 'missing.json'"),
        ({"type": "strin"}, "expected schema to be a JSON schema"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "expected schema to be a JSON schema"),
        ({"type": "array"}, "expected schema to describe an object"),
        ({"properties": {"a": {"$ref": "http://localhost:1/x"}}}, "refer to nothing but parts of itself"),
        ({"a": {1, 2}}, "plain JSON values"),
    ],
)
def test_bad_schemas_are_refused(schema, says):
    with pytest.raises(ConfigError, match=says):
        rewards.json_schema("", "", {}, schema)


# all

EXAMPLE = {"answers": ["a cat"], "answer": "12", "numbers": [1, 2, 3], "target": 6, **PERSON}
ARGUMENTS = {
    "format": {"pattern": "[a-z ]+", "mode": "contains"},
    "length": {"most": 50, "least": 5},
    "json_schema": {"schema": "person", "values": True},
}
PIECES = (
    *("<answer>", "</answer>", "{", "}", '"', ":", ",", "\\boxed{", "\\frac", "####", "\n", " ", "-", "(", ")", "+"),
    *(
        "*",
        "/",
        "1",
        "2",
        "3",
        "0",
        ".",
        "1,000",
        "e9",
        "%",
        "$",
        "[",
        "]",
        "\\",
        "null",
        '{"name": ',
        '"age": 34',
        "a",
    ),
    *(
        "the ",
        "\x00",
        "\ud800",
        "\U0001f600",
        "\u0663",
        "\u00bd",
        "\u2212",
        "\u202e",
        "é",
        "_",
        "=",
        "NaN",
        "#",
        "(1+2)",
    ),
    *("9" * 50, WHOLE),
)


def score(name: str, completion: str) -> float:
    return getattr(rewards, name)("a prompt", completion, EXAMPLE, **ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", rewards.__all__)
def test_any_text_is_worth_something_from_0_to_1(name):
    draw = random.Random(name)
    for _ in range(3000):
        completion = "".join(draw.choice(PIECES) for _ in range(draw.randrange(30)))
        value = score(name, completion)
        assert type(value) is float and 0 <= value <= 1, completion
        assert score(name, completion) == value
    for _ in range(300):
        completion = "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(100)))
        assert 0 <= score(name, completion) <= 1


@pytest.mark.parametrize("name", rewards.__all__)
def test_no_text_takes_long(name):
    many = 50_000
    texts = [piece * many for piece in PIECES[:-2]]
    texts += [
        piece * many for piece in ("{ ", '{"', '{"a', '{"a":', "111,", "<answer>1", "\\frac{1}{", "a ", "1 ", "-1")
    ]
    texts += ["(" * many + ")" * many, "[" * many, '{"a":' * many + "1" + "}" * many, "1," + "111," * many + "1111"]
    for text in texts:
        start = time.process_time()
        assert 0 <= score(name, text) <= 1
        assert time.process_time() - start < 1, text[:20]


@pytest.mark.parametrize("name", ["exact_match", "f1", "numeric", "countdown"])
def test_an_example_without_what_is_compared_is_refused(name):
    with pytest.raises(ConfigError, match=f"for the reward {name}; got one with prompt"):
        getattr(rewards, name)("", "", {"prompt": "x"})


# functions


def written(folder: Path, text: str, name: str = "my_reward.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_functions_are_loaded_by_name_and_by_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_function("f1") is rewards.f1
    path = written(tmp_path, "from neighbour import X\ndef reward(prompt, completion, example, k=1): return X * k\n")
    (tmp_path / "neighbour.py").write_text("X = 3\n")
    assert load_function(f"{path}:reward", {"k": 2})("", "", {}, k=2) == 6
    monkeypatch.chdir(tmp_path)
    assert load_function("my_reward.py:reward")("", "", {}) == 3
    assert absolute("my_reward.py:reward") == f"{path}:reward" and absolute("a.b:c") == "a.b:c"
    written(tmp_path, "def reward(*given, **more): return len(given) + len(more)\n")
    assert load_function("my_reward.py:reward", {"any": 1})("", "", {}, any=1) == 4  # read anew


@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("reward", {}, "as package.module:function or path/to/file.py:function; got 'reward'"),
        (":reward", {}, "got ':reward'"),
        ("my_reward.py:", {}, "got 'my_reward.py:'"),
        ("my_reward.py:a b", {}, "got 'my_reward.py:a b'"),
        (None, {}, "got None"),
        ("__main__:reward", {}, "in a file of its own"),
        ("nowhere.py:reward", {}, "there is no .*nowhere.py"),
        ("no_such_package.x:reward", {}, "there is no no_such_package"),
        ("zoray.no_such:reward", {}, "there is no zoray.no_such"),
        ("my_reward.py:rewrd", {}, "to have a function rewrd; it has none. Did you mean reward"),
        ("my_reward.py:K", {}, "to be a plain function; got 3"),
        ("my_reward.py:later", {}, "to be a plain function; got an async one"),
        ("my_reward.py:two", {}, r"to take prompt, completion and example; its parameters are \(prompt, completion\)"),
        (
            "my_reward.py:reward",
            {"kk": 1, "must": 1},
            "unknown argument 'kk' of my_reward.py:reward; it takes k, must. D",
        ),
        ("my_reward.py:reward", {"prompt": 1, "must": 1}, "unknown argument 'prompt'"),
        ("my_reward.py:reward", {}, "missing argument 'must' of my_reward.py:reward"),
        ("my_reward.py:four", {}, "missing argument 'more'"),
        ("format", {}, "missing argument 'pattern' of format"),
        ("f2", {}, "expected a built-in reward .*; got 'f2'"),
        ("broken.py:reward", {}, r"importing .*raised ZeroDivisionError: division by zero \(.*broken.py, line 2\)"),
        ("ends.py:reward", {}, "raised SystemExit: 3"),
        ("lacks.py:reward", {}, "raised ModuleNotFoundError: No module named 'surely_not_there'"),
        ("wrong.py:reward", {}, "raised SyntaxError"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(tmp_path, monkeypatch, path, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = (
        "K = 3\ndef reward(prompt, completion, example, *, k=1, must): return 1.0\ndef two(prompt, completion): ...\n"
    )
    written(tmp_path, text + "async def later(prompt, completion, example): ...\ndef four(a, b, c, more): ...\n")
    written(tmp_path, "\n1 / 0\n", "broken.py")
    written(tmp_path, "import sys\nsys.exit(3)\n", "ends.py")
    written(tmp_path, "import surely_not_there\n", "lacks.py")
    written(tmp_path, "def\n", "wrong.py")
    with pytest.raises(ConfigError, match=says):
        load_function(path, arguments)
