"""Tasks that make their problems up: solvable, all different, the same everywhere; and what rewards make of them."""

from __future__ import annotations

import hashlib
import json
import pickle
from itertools import permutations

import jsonschema
import pytest

from zoray.records import ConfigError, Example, Message, Splits
from zoray.scoring import rewards
from zoray.scoring.rewards.json_object import SCHEMAS
from zoray.tasks.made_up.countdown import Countdown
from zoray.tasks.made_up.questions import QUESTIONS, Questions
from zoray.tasks.made_up.structured import AGES, CITIES, JOBS, KEYS, NAMES, Structured

# Splits that must never change: a run's journal names examples by their position in them.
PINNED = {"Countdown": "df9d22b7d752b76a", "Structured": "2941cae34bb7ed83", "Questions": "ae990b8c0f62482a"}


def digest(splits: Splits) -> str:
    rows = [([turn[:2] for turn in e.prompt], e.answers, e.data) for e in everything(splits)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def everything(splits: Splits) -> list[Example]:
    return [*splits.train, *splits.dev, *splits.test]


def solution(numbers: list[tuple[float, str]], target: int) -> str | None:
    """An equation by brute force: join any two of those left in any way."""
    if len(numbers) == 1:
        return numbers[0][1] if abs(numbers[0][0] - target) < 1e-9 else None
    for (a, x), (b, y), *rest in permutations(numbers):
        joined = [(a + b, f"({x} + {y})"), (a - b, f"({x} - {y})"), (a * b, f"({x} * {y})")]
        joined += [(a / b, f"({x} / {y})")] if b else []
        for pair in joined:
            found = solution([pair, *rest], target)
            if found:
                return found
    return None


@pytest.mark.parametrize("task", [Countdown(), Structured(), Questions()], ids=lambda task: type(task).__name__)
def test_splits_are_pinned_disjoint_and_of_the_sizes_asked_for(task):
    splits = task.load()
    assert digest(splits) == PINNED[type(task).__name__]
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [task.train, task.dev, task.test]
    assert len({e.prompt for e in everything(splits)}) == task.train + task.dev + task.test
    assert pickle.loads(pickle.dumps(splits)) == splits and task.metric == "reward"
    kind = type(task)
    assert kind(train=3, dev=2, test=task.test).load().test == splits.test  # does not change with train and dev
    assert kind(seed=1).load() != splits
    chat, plain = splits.dev[0], kind(chat=False).load().dev[0]
    (message,) = chat.prompt
    assert isinstance(message, Message) and message.role == "user" and chat.data == plain.data
    assert isinstance(plain.prompt, str) and message.content in plain.prompt and plain.prompt[-1] == ":"
    assert json.loads(json.dumps(chat.data)) == chat.data


@pytest.mark.parametrize("kind", [Countdown, Structured, Questions])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": 0}, "train must be a whole number of at least 1; got 0"),
        ({"dev": 0}, "dev must be"),
        ({"test": -1}, "test must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_bad_sizes_are_refused(kind, settings, says):
    with pytest.raises(ConfigError, match=says):
        kind(**settings)


# countdown


def test_every_problem_has_a_solution_that_is_worth_1():
    splits = Countdown(train=60, dev=20, test=20).load()
    for example in everything(splits):
        numbers, target = example.data["numbers"], example.data["target"]
        assert len(numbers) in (3, 4) and all(1 <= n <= 99 for n in numbers) and 1 <= target <= 999
        found = solution([(n, str(n)) for n in numbers], target)
        assert found, example.data
        assert rewards.countdown("", f"<answer>{found}</answer>", example.data) == 1.0
        assert rewards.countdown("", "<answer>1</answer>", example.data) == 0.1
    assert {len(e.data["numbers"]) for e in everything(splits)} == {3, 4}


def test_no_problem_comes_twice():
    found = everything(Countdown(train=3000, dev=300, test=300, largest=20, highest=50).load())
    assert len({(*sorted(e.data["numbers"]), e.data["target"]) for e in found}) == 3600
    assert all(max(e.data["numbers"]) <= 20 and e.data["target"] <= 50 for e in found)


def test_countdown_asks_as_it_is_told():
    splits = Countdown(template="{target} of {numbers}?", counts=[3], chat=False).load()
    data = splits.dev[0].data
    assert splits.dev[0].prompt == f"{data['target']} of {', '.join(map(str, data['numbers']))}?\nAnswer:"
    assert {len(e.data["numbers"]) for e in everything(splits)} == {3}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"counts": []}, "counts to be a list of 3 and 4"),
        ({"counts": [2]}, "counts to be a list of 3 and 4"),
        ({"largest": 0}, "largest to be a whole number of at least 1; got 0"),
        ({"highest": True}, "highest to be a whole number"),
        ({"template": "{numbers}"}, "template to be text with {numbers} and {target}"),
    ],
)
def test_bad_settings_of_countdown_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Countdown(**settings)


def test_more_problems_than_there_are_are_refused():
    with pytest.raises(ConfigError, match=r"train \+ dev \+ test to be at most \d+, .* got 1300"):
        Countdown(largest=2).load()


# structured


def test_structured_says_all_that_it_asks_for():
    schema = json.loads((SCHEMAS / "person.json").read_text())
    for example in everything(Structured(train=200).load()):
        text = example.prompt[0].content
        assert list(example.data) == list(KEYS) == schema["required"]
        assert all(str(value) in text for value in example.data.values()) and "{" not in text
        jsonschema.Draft202012Validator(schema).validate(example.data)
        assert rewards.json_schema("", json.dumps(example.data), example.data, "person", values=True) == 1.0


def test_every_person_can_come_up():
    assert all(len(set(words)) == len(words) for words in (NAMES, JOBS, CITIES))
    people = everything(Structured(train=5000).load())
    for key, values in zip(KEYS, (NAMES, AGES, JOBS, CITIES), strict=True):
        assert {example.data[key] for example in people} == set(values)


def test_too_many_people_and_a_wrong_template_are_refused():
    with pytest.raises(ConfigError, match="to be at most"):
        Structured(train=10_000_000).load()
    with pytest.raises(ConfigError, match=r"template to be text with \{sentence\}"):
        Structured(template="JSON:")


# questions


def test_questions_have_short_answers_of_full_reward():
    assert len(QUESTIONS) >= 120
    for question, answer in QUESTIONS.items():
        assert question[-1] == "?" and answer[-1] == "." and 2 <= len(answer) <= 60
        assert rewards.length("", answer, {"answer": answer}, most=200, target_column="answer") == 1.0
    with pytest.raises(ConfigError, match="task=questions has 124 usable rows"):
        Questions(train=200).load()
