"""MeZO's eleven tasks and GSM8K on copies of the Hub's files: every string by hand, sizes, refusals, the Hub."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import hub as copies
import pyarrow.parquet as parquet
import pytest
from hub import SCHEMAS, copy, plain, write

from zoray.records import ConfigError, Example, Sampling, Splits
from zoray.run.config import build, compose
from zoray.tasks.base import parted
from zoray.tasks.published import hub
from zoray.tasks.published.boolq import BoolQ
from zoray.tasks.published.cb import CB
from zoray.tasks.published.copa import COPA
from zoray.tasks.published.drop import DROP
from zoray.tasks.published.gsm8k import GSM8K
from zoray.tasks.published.multirc import MultiRC
from zoray.tasks.published.record import ReCoRD
from zoray.tasks.published.rte import RTE
from zoray.tasks.published.squad import SQuAD
from zoray.tasks.published.sst2 import SST2
from zoray.tasks.published.wic import WiC
from zoray.tasks.published.wsc import WSC

TASKS: dict[str, Any] = {
    "sst2": SST2,
    "rte": RTE,
    "cb": CB,
    "boolq": BoolQ,
    "wsc": WSC,
    "wic": WiC,
    "multirc": MultiRC,
    "copa": COPA,
    "record": ReCoRD,
    "squad": SQuAD,
    "drop": DROP,
    "gsm8k": GSM8K,
}
NAMES = list(TASKS)
LABELLED = [name for name in NAMES if "label" in SCHEMAS[name][1]]


def asked(splits: Splits, split: str) -> list[tuple[object, ...]]:
    return [(example.prompt, example.options) for example in splits[split]]


def only(tmp_path: Path, name: str, **row: Any) -> Example:
    """The example of one row, through a file and back; the other splits have plain rows."""
    rows = [plain(name, 0) | row]
    path = write(tmp_path, name, train=[plain(name, i) for i in (1, 2)], held_out=rows)
    (example,) = TASKS[name](train=1, dev=1, test=1, path=path).load().test
    return example


# prompts and options, as MeZO's templates write them


RTE_PREMISE = "No Weapons of Mass Destruction Found in Iraq Yet."
CB_PREMISE = "It was a complex language. Not written down but handed down. One might say it was peeled down."
BOOLQ_PASSAGE = "Persian language -- Persian, also known by its endonym Farsi, is one of the Western Iranian languages."
WSC_TEXT = (
    "Mark told Pete many lies about himself, which Pete included in his book. He should have been more skeptical."
)
RECORD_PASSAGE = (
    "Arlington, Virginia (CNN) Tracy McGrady is back home.\n"
    "@highlight\nMcGrady retired in 2013\n@highlight\nHe played for Houston"
)
NATALIA = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)

WRITTEN: list[tuple[str, dict[str, Any], Example]] = [
    (
        "sst2",
        {"sentence": "hide new secretions from the parental units ", "label": 0},
        Example(
            "hide new secretions from the parental units It was",
            (" terrible", " great"),
            0,
            calibration="It was",
        ),
    ),
    (
        "sst2",
        {"sentence": " a smile on your face", "label": 1},
        Example("a smile on your face It was", (" terrible", " great"), 1, calibration="It was"),
    ),
    (
        "rte",
        {"premise": RTE_PREMISE, "hypothesis": "Weapons of Mass Destruction Found in Iraq.", "label": 1},
        Example(
            "No Weapons of Mass Destruction Found in Iraq Yet.\n"
            'Does this mean that "Weapons of Mass Destruction Found in Iraq." is true? Yes or No?\n',
            ("Yes", "No"),
            1,
            calibration="",
            data={"premise": RTE_PREMISE, "hypothesis": "Weapons of Mass Destruction Found in Iraq."},
        ),
    ),
    (
        "rte",
        {"premise": "  Cats purr. ", "hypothesis": " Some cats make a noise ", "label": 0},
        Example(
            'Cats purr. \nDoes this mean that " Some cats make a noise " is true? Yes or No?\n',
            ("Yes", "No"),
            0,
            calibration="",
            data={"premise": "  Cats purr. ", "hypothesis": " Some cats make a noise "},
        ),
    ),
    *(
        (
            "cb",
            {"premise": CB_PREMISE, "hypothesis": "the language was peeled down", "label": label},
            Example(
                "Suppose It was a complex language. Not written down but handed down. One might say it was peeled "
                'down. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\n',
                ("Yes", "No", "Maybe"),
                label,
                calibration="",
                data={"premise": CB_PREMISE, "hypothesis": "the language was peeled down"},
            ),
        )
        for label in (0, 1, 2)
    ),
    (
        "boolq",
        {"question": "do iran and afghanistan speak the same language", "passage": BOOLQ_PASSAGE, "answer": True},
        Example(
            "Persian language -- Persian, also known by its endonym Farsi, is one of the Western Iranian languages. "
            "Do iran and afghanistan speak the same language?\n",
            ("Yes", "No"),
            0,
            calibration="",
            data={"question": "do iran and afghanistan speak the same language"},
        ),
    ),
    (
        "boolq",
        {"question": "Is it so?", "passage": " It is not. ", "answer": False},
        Example("It is not.  Is it so?\n", ("Yes", "No"), 1, calibration="", data={"question": "Is it so?"}),
    ),
    *(
        (
            "wsc",
            {"text": WSC_TEXT, "span1_text": "Mark", "span2_text": "He", "label": label},
            Example(
                "Mark told Pete many lies about himself, which Pete included in his book. He should have been more "
                'skeptical.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
                ("No", "Yes"),
                label,
                calibration="",
                data={"noun": "Mark", "pronoun": "He"},
            ),
        )
        for label in (0, 1)
    ),
    *(
        (
            "wic",
            {
                "word": "place",
                "sentence1": "Do you want to come over to my place later?",
                "sentence2": "A political system with no place for the less prominent groups.",
                "label": label,
            },
            Example(
                'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
                "Do you want to come over to my place later?\n"
                "A political system with no place for the less prominent groups.\n",
                ("No", "Yes"),
                label,
                calibration="",
                data={"word": "place"},
            ),
        )
        for label in (0, 1)
    ),
    *(
        (
            "multirc",
            {
                "paragraph": "While this process moved along, diplomacy continued.",
                "question": "What did the high-level effort to persuade Pakistan include?",
                "answer": answer,
                "label": label,
            },
            Example(
                "While this process moved along, diplomacy continued.\n"
                "Question: What did the high-level effort to persuade Pakistan include?\n"
                f'I found this answer "{answer}". Is that correct? Yes or No?\n',
                ("No", "Yes"),
                label,
                calibration="",
                data={
                    "question": "What did the high-level effort to persuade Pakistan include?",
                    "answer": answer,
                },
            ),
        )
        for answer, label in (("Children, Gerd, or Dorian Popa", 0), ("", 1))
    ),
    (
        "copa",
        {
            "premise": "My body cast a shadow over the grass.",
            "choice1": "The sun was rising.",
            "choice2": "The grass was cut.",
            "question": "cause",
            "label": 0,
        },
        Example(
            "My body cast a shadow over the grass because",
            (" the sun was rising.", " the grass was cut."),
            0,
            calibration="because",
            data={
                "premise": "My body cast a shadow over the grass.",
                "question": "cause",
                "choices": ["The sun was rising.", "The grass was cut."],
            },
        ),
    ),
    (
        "copa",
        {
            "premise": "The physician misdiagnosed the patient. ",
            "choice1": "I Filed a lawsuit. ",
            "choice2": "I'm Fine",
            "question": "effect",
            "label": 1,
        },
        Example(
            "The physician misdiagnosed the patient so",
            (" I Filed a lawsuit.", " i'm Fine"),
            1,
            calibration="so",
            data={
                "premise": "The physician misdiagnosed the patient. ",
                "question": "effect",
                "choices": ["I Filed a lawsuit. ", "I'm Fine"],
            },
        ),
    ),
    (
        "record",
        {
            "passage": RECORD_PASSAGE,
            "query": "@placeholder said that Houston was home to @placeholder ",
            "entities": ["Arlington", "CNN", "Houston", "McGrady", "Tracy McGrady"],
            "answers": ["Tracy McGrady", "McGrady"],
        },
        Example(
            "Arlington, Virginia (CNN) Tracy McGrady is back home.\n"
            "- McGrady retired in 2013\n- He played for Houston\n-",
            (
                " Arlington said that Houston was home to Arlington",
                " CNN said that Houston was home to CNN",
                " Houston said that Houston was home to Houston",
                " McGrady said that Houston was home to McGrady",
                " Tracy McGrady said that Houston was home to Tracy McGrady",
            ),
            4,
            (3,),
            calibration="-",
            data={
                "query": "@placeholder said that Houston was home to @placeholder ",
                "answers": ["Tracy McGrady", "McGrady"],
            },
        ),
    ),
    (
        "squad",
        {
            "title": "University_of_Notre_Dame",
            "context": "Atop the Main Building's gold dome is a golden statue of the Virgin Mary.",
            "question": " What sits on top of the Main Building? ",
            "answers": {
                "text": ["a golden statue", "a golden statue of the Virgin Mary", "a golden statue"],
                "answer_start": [36, 36, 36],
            },
        },
        Example(
            "Title: University_of_Notre_Dame\n"
            "Context: Atop the Main Building's gold dome is a golden statue of the Virgin Mary.\n"
            "Question: What sits on top of the Main Building?\nAnswer:",
            answers=(" a golden statue\n", " a golden statue of the Virgin Mary\n"),
            data={
                "question": "What sits on top of the Main Building?",
                "answers": ["a golden statue", "a golden statue of the Virgin Mary"],
            },
        ),
    ),
    (
        "drop",
        {
            "passage": "To start the season, the Lions traveled south to Tampa, Florida.",
            "question": "How many points did the buccaneers need to tie in the first?",
            "answers_spans": {"spans": ["3", "Tampa", "3"], "types": ["number", "span", "number"]},
        },
        Example(
            "Passage: To start the season, the Lions traveled south to Tampa, Florida.\n"
            "Question: How many points did the buccaneers need to tie in the first?\nAnswer:",
            answers=(" 3\n", " Tampa\n"),
            data={
                "question": "How many points did the buccaneers need to tie in the first?",
                "answers": ["3", "Tampa"],
            },
        ),
    ),
    (
        "gsm8k",
        {
            "question": NATALIA,
            "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
        },
        Example(
            "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
            "How many clips did Natalia sell altogether in April and May?\nAnswer:",
            answers=(
                " Natalia sold 48/2 = 24 clips in May.\n"
                "Natalia sold 48+24 = 72 clips altogether in April and May.\n#### 72\nQuestion:",
            ),
            data={"question": NATALIA, "answer": "72"},
        ),
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), WRITTEN, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRITTEN)])
def test_strings_are_mezos(tmp_path, name, row, expected):
    made = only(tmp_path, name, **row)
    for field in dataclasses.fields(Example):
        assert getattr(made, field.name) == getattr(expected, field.name), field.name


def test_every_label_of_every_task_is_written_out():
    seen = {(name, expected.label) for name, _, expected in WRITTEN if expected.options}
    classes = {name: 2 for name in ("sst2", "rte", "boolq", "wsc", "wic", "multirc", "copa")} | {"cb": 3}
    assert seen == {(name, label) for name, count in classes.items() for label in range(count)} | {("record", 4)}
    assert {name for name, _, _ in WRITTEN} == set(TASKS)


def test_spaces_between_prompt_and_option_go_to_the_option():
    assert parted("  \n a b  ", ("c", "d ", " e")) == ("a b", ("  c", "  d", "   e"))
    assert parted("a\n", ("b",)) == ("a\n", ("b",))
    assert parted("a \n", ("b\n",)) == ("a \n", ("b\n",))


@pytest.mark.parametrize(
    ("answer", "number"),
    [("#### 1,250,000", "1250000"), ("#### -3", "-3"), ("#### 0.5", "0.5"), ("a\n####7.", "7"), ("#### $5", None)],
)
def test_numbers_of_gsm8k(tmp_path, answer, number):
    if number is None:
        with pytest.raises(ConfigError, match=r"\(test\), row 0: the answer must end in '#### NUMBER'; got '#### \$5'"):
            only(tmp_path, "gsm8k", answer=answer)
    else:
        assert only(tmp_path, "gsm8k", answer=answer).data["answer"] == number


def test_answers_that_are_no_entities_are_left_out(tmp_path):
    made = only(tmp_path, "record", entities=["A", "B", "C"], answers=["X", "C", "A"])
    assert (made.label, made.also) == (2, (0,))


def test_metrics_and_sampling():
    assert {name: task.metric for name, task in TASKS.items()} == {
        **dict.fromkeys(NAMES, "accuracy"),
        **{"squad": "f1", "drop": "f1", "gsm8k": "numeric"},
    }
    assert SQuAD.sampling == DROP.sampling == Sampling(max_tokens=50, temperature=0.0, stop=("\n",))
    assert GSM8K.sampling == Sampling(max_tokens=256, temperature=0.0, stop=("\nQuestion:",))
    for name, _, made in WRITTEN:  # what is trained on ends as a completion does
        assert all(answer.endswith(TASKS[name].sampling.stop[0]) for answer in made.answers)


# splits


@pytest.mark.parametrize("name", NAMES)
def test_splits_have_their_sizes_and_share_nothing(tmp_path, name):
    path = copy(tmp_path, name, 40, 12)
    splits = TASKS[name](train=20, dev=10, test=8, path=path).load()
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [20, 10, 8]
    questions = [question for split in ("train", "dev", "test") for question in asked(splits, split)]
    assert len(set(questions)) == 38
    everything = TASKS[name](train=30, dev=10, test=12, path=path).load()
    assert everything.dev == splits.dev and everything.train[:20] == splits.train and everything.test[:8] == splits.test
    held_out = set(asked(everything, "test"))
    assert len(held_out) == 12 and not held_out & set(questions[:30])
    assert TASKS[name](train=20, dev=10, test=8, seed=1, path=path).load().dev != splits.dev
    assert TASKS[name](train=20, dev=10, test=0, path=path).load().test == ()
    assert pickle.loads(pickle.dumps(splits)) == splits
    json.dumps([dict(example.data) for example in splits.train])  # plain values


def test_drawn_splits_are_pinned(tmp_path):
    """A run's journal names examples by their position in a split."""
    splits = WiC(train=4, dev=3, test=2, path=copy(tmp_path, "wic", 10, 5)).load()
    numbers = [[int(e.data["word"].split()[1]) for e in splits[split]] for split in ("dev", "train", "test")]
    assert numbers == [[7, 4, 9], [3, 8, 2, 6], [14, 13]]  # of the rows, those from 10 on are held out


# rows of the Hub's train and held-out splits -> what the task's defaults make of them: train, dev, test
REAL = {
    "sst2": (67349, 872, (1000, 500, 872)),
    "rte": (2490, 277, (1000, 500, 277)),
    "cb": (250, 56, (150, 100, 56)),
    "boolq": (9427, 3270, (1000, 500, 1000)),
    "wsc": (554, 104, (54, 500, 104)),
    "wic": (5428, 638, (1000, 500, 638)),
    "multirc": (27243, 4848, (1000, 500, 1000)),
    "copa": (400, 100, (300, 100, 100)),
    "record": (100730, 10000, (1000, 500, 1000)),
    "squad": (87599, 10570, (1000, 500, 1000)),
    "drop": (77400, 9535, (1000, 500, 1000)),
    "gsm8k": (7473, 1319, (1000, 200, 1319)),
}


@pytest.mark.parametrize("name", NAMES)
def test_default_sizes_fit_the_hubs_data(tmp_path, name):
    """With as many rows as the Hub has; of the largest, with as many as can matter."""
    train, held_out, sizes = REAL[name]
    splits = TASKS[name](path=copy(tmp_path, name, min(train, 3000), min(held_out, 1500))).load()
    assert tuple(len(splits[split]) for split in ("train", "dev", "test")) == sizes


@pytest.mark.parametrize(("name", "train"), [("cb", 20), ("copa", 20), ("wsc", 20)])
def test_null_takes_what_is_left_of_smaller_data(tmp_path, name, train):
    dev = TASKS[name]().dev
    splits = TASKS[name](path=copy(tmp_path, name, dev + train, 7)).load()
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [train, dev, 7]


@pytest.mark.parametrize("name", NAMES)
def test_null_takes_at_most_a_thousand(tmp_path, name):
    assert hub.MOST == 1000
    path = copy(tmp_path, name, 1013, 1001)
    splits = TASKS[name](train=None, dev=12, test=None, path=path).load()
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [1000, 12, 1000]


@pytest.mark.parametrize("name", NAMES)
def test_an_explicit_number_above_what_is_there_is_an_error(tmp_path, name):
    path, held_out = copy(tmp_path, name, 40, 12), SCHEMAS[name][2]
    with pytest.raises(ConfigError, match=r"\(train\) has 40 usable rows; asked for 10 \+ 31 = 41\. Ask for fewer"):
        TASKS[name](train=31, dev=10, test=8, path=path).load()
    with pytest.raises(ConfigError, match=rf"\({held_out}.*\) has 12 usable rows; asked for 13"):
        TASKS[name](train=20, dev=10, test=13, path=path).load()
    with pytest.raises(ConfigError, match=r"\(train\) has 40 usable rows; asked for 40 \+ 1 = 41"):
        TASKS[name](train=None, dev=40, test=8, path=path).load()


def test_no_question_is_in_two_splits(tmp_path):
    """Also where the Hub has a row twice, or in both splits."""
    rows = [plain("rte", i) for i in range(6)]
    path = write(tmp_path, "rte", train=rows + rows[:3], held_out=[plain("rte", 6), rows[5], plain("rte", 6)])
    splits = RTE(train=4, dev=1, test=2, path=path).load()
    questions = [question for split in ("train", "dev", "test") for question in asked(splits, split)]
    assert len(set(questions)) == 7
    with pytest.raises(ConfigError, match=r"\(train\) has 5 usable rows; asked for 1 \+ 5"):
        RTE(train=5, dev=1, test=2, path=path).load()


def test_queries_on_one_article_are_different_questions(tmp_path):
    rows = [plain("record", i) | {"passage": "The same article."} for i in range(6)]
    splits = ReCoRD(train=3, dev=1, test=2, path=write(tmp_path, "record", train=rows[:4], held_out=rows[4:])).load()
    assert {e.prompt for split in ("train", "dev", "test") for e in splits[split]} == {"The same article.\n-"}


def test_examples_are_made_of_drawn_rows_only(tmp_path, monkeypatch):
    path, made = copy(tmp_path, "record", 3000, 1000), []
    example = ReCoRD.example
    monkeypatch.setattr(ReCoRD, "example", lambda self, row: made.append(row) or example(self, row))
    ReCoRD(train=5, dev=4, test=3, path=path).load()
    assert len(made) == 12


# refusals


@pytest.mark.parametrize("name", NAMES)
def test_missing_columns_are_named(tmp_path, name):
    path = copy(tmp_path, name, 4, 2)
    for column in TASKS[name].columns:
        file = tmp_path / SCHEMAS[name][0] / "train-00000-of-00001.parquet"
        kept = file.read_bytes()
        table = parquet.read_table(file)
        parquet.write_table(table.drop_columns([column]).replace_schema_metadata(None), file)
        with pytest.raises(ConfigError, match=rf"\(train\) must have the columns .*{column}.*; got .*as on the Hub"):
            TASKS[name](train=1, dev=1, test=1, path=path).load()
        file.write_bytes(kept)
    assert set(TASKS[name].columns) <= set(SCHEMAS[name][1])


@pytest.mark.parametrize("name", LABELLED)
def test_hidden_labels_are_refused(tmp_path, name):
    known = "0, 1 or 2" if name == "cb" else "0 or 1"
    with pytest.raises(ConfigError, match=rf"\(validation\), row 0: label must be {known}; got -1 \(-1 is a hidden"):
        only(tmp_path, name, label=-1)
    with pytest.raises(ConfigError, match=rf"row 0: label must be {known}; got None"):
        only(tmp_path, name, label=None)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_mean_something_else_are_refused(tmp_path, name, monkeypatch):
    folder, columns, held_out = SCHEMAS[name]
    turned = datasets.ClassLabel(names=columns["label"].names[::-1])
    monkeypatch.setitem(SCHEMAS, name, (folder, columns | {"label": turned}, held_out))
    with pytest.raises(ConfigError, match=r"\(train\) must have the labels .*in this order; got "):
        TASKS[name](train=1, dev=1, test=1, path=copy(tmp_path, name, 2, 1)).load()
    monkeypatch.setitem(SCHEMAS, name, (folder, columns | {"label": datasets.Value("int64")}, held_out))
    assert len(TASKS[name](train=1, dev=1, test=1, path=copy(tmp_path, name, 2, 1)).load().train) == 1


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("boolq", {"answer": None}, "the answer must be true or false; got None"),
        ("boolq", {"question": " "}, "the question is empty"),
        ("copa", {"question": "why"}, "the question must be cause or effect; got 'why'"),
        ("copa", {"choice2": ""}, "the choice2 is empty"),
        ("rte", {"hypothesis": None}, "the hypothesis must be text; got None"),
        ("wsc", {"span1_text": ""}, "the span1_text is empty"),
        ("multirc", {"answer": None}, "the answer must be text; got None"),
        ("record", {"answers": []}, r"expected an answer out of the entities \['A0', 'B0', 'C'\]; got \[\]"),
        ("record", {"answers": ["X"]}, "expected an answer out of the entities"),
        ("record", {"query": "Who?"}, "the query must have @placeholder in it; got 'Who"),
        ("squad", {"answers": {"text": [], "answer_start": []}}, "expected an answer; got none"),
        ("squad", {"answers": {"text": [" "], "answer_start": [0]}}, "expected an answer; got none"),
        ("drop", {"answers_spans": {"spans": [], "types": []}}, "expected an answer; got none"),
        ("gsm8k", {"answer": "It is 42."}, "the answer must end in '#### NUMBER'; got 'It is 42"),
        ("gsm8k", {"question": ""}, "the question is empty"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, row, says):
    config, held_out = TASKS[name].config, SCHEMAS[name][2]
    where = rf"{tmp_path}{f'/{config}' if config else ''} \({held_out}\), row 0: "
    with pytest.raises(ConfigError, match=where + says):
        only(tmp_path, name, **row)


@pytest.mark.parametrize("name", NAMES)
def test_incomplete_folders_are_refused(tmp_path, name):
    folder, _, held_out = SCHEMAS[name]
    layout = rf"task\.path=/path/to/folder with {folder}/train-\*\.parquet and {folder}/{held_out}-\*\.parquet"
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no {folder}/train-\*\.parquet.*{layout}"):
        TASKS[name](path=str(tmp_path)).load()
    write(tmp_path, name, train=[plain(name, 0)])
    with pytest.raises(ConfigError, match=rf"has no {folder}/{held_out}-\*\.parquet"):
        TASKS[name](path=str(tmp_path)).load()
    (tmp_path / folder / f"{held_out}-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=rf"can't read .*{held_out}-0\.parquet as Parquet"):
        TASKS[name](path=str(tmp_path)).load()
    with pytest.raises(ConfigError, match=rf"task\.path=\./gone has no {folder}/train"):
        TASKS[name](path="./gone").load()


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_refused(name):
    for settings, says in [
        ({"train": 0}, "train must be a whole number of at least 1; got 0"),
        ({"dev": None}, "dev must be a whole number of at least 1; got None"),
        ({"test": -1}, "test must be a whole number of at least 0; got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"path": ""}, "task.path must be a Hub id or a local folder.*; got ''"),
        ({"path": 3}, "task.path must be a Hub id or a local folder.*; got 3"),
    ]:
        with pytest.raises(ConfigError, match=says):
            TASKS[name](**settings)


def test_files_of_older_versions_of_datasets_are_read(tmp_path):
    """The Hub's files were written when a sequence of records was a type of its own."""
    path, said = copy(tmp_path, "squad", 4, 2), {"dtype": "string", "_type": "Value"}
    number = {"dtype": "int32", "_type": "Value"}
    features = {name: said for name in ("id", "title", "context", "question")}
    features["answers"] = {"feature": {"text": said, "answer_start": number}, "_type": "Sequence"}  # type: ignore
    for file in (tmp_path / "plain_text").iterdir():
        table = parquet.read_table(file)
        old = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(table.replace_schema_metadata(old), file)
    splits = SQuAD(train=2, dev=2, test=2, path=path).load()
    assert {e.answers for e in (*splits.train, *splits.dev)} == {(f" answer {i}\n",) for i in range(4)}


def test_several_files_of_a_split_are_one(tmp_path):
    path = write(tmp_path, "gsm8k", train=[plain("gsm8k", i) for i in range(3)], held_out=[plain("gsm8k", 9)])
    first = tmp_path / "main" / "train-00000-of-00001.parquet"
    first.rename(tmp_path / "main" / "train-00000-of-00002.parquet")
    write(tmp_path / "more", "gsm8k", train=[plain("gsm8k", i) for i in range(3, 7)])
    (tmp_path / "more/main" / first.name).rename(tmp_path / "main" / "train-00001-of-00002.parquet")
    splits = GSM8K(train=5, dev=2, test=1, path=path).load()
    assert {e.data["answer"] for e in (*splits.train, *splits.dev)} == {str(i + 1) for i in range(7)}


# the Hub


def branch(tmp_path: Path) -> Path:
    """The Hub's branch of Parquet copies: CONFIG/SPLIT/0000.parquet, all configs in one."""
    for name in ("rte", "cb", "sst2", "gsm8k"):
        copy(tmp_path / "as-is", name, 4, 2)
        folder = SCHEMAS[name][0]
        for split in ("train", SCHEMAS[name][2]):
            into = tmp_path / "branch" / ("default" if folder == "data" else folder) / split
            into.mkdir(parents=True)
            (tmp_path / "as-is" / folder / f"{split}-00000-of-00001.parquet").rename(into / "0000.parquet")
    return tmp_path / "branch"


@pytest.mark.parametrize("name", ["rte", "sst2", "gsm8k"])
def test_repositories_of_scripts_are_read_from_their_parquet_branch(tmp_path, monkeypatch, name):
    load_dataset, files, calls = datasets.load_dataset, branch(tmp_path), []

    def stand_in(path: str, config: str | None = None, data_files: Any = None, revision: str = "main") -> Any:
        calls.append((path, config, revision))
        if revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        found = {split: str(files / pattern) for split, pattern in data_files.items()}
        return load_dataset("parquet", data_files=found, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    splits = TASKS[name](train=3, dev=1, test=2, path="org/name").load()
    assert calls == [("org/name", TASKS[name].config, "main"), ("org/name", None, "refs/convert/parquet")]
    parts = [plain(name, i) for i in range(6)]
    made = [TASKS[name]().example(row) for row in parts]
    assert {e.prompt for e in (*splits.train, *splits.dev)} == {e.prompt for e in made[:4]}
    assert {e.prompt for e in splits.test} == {e.prompt for e in made[4:]}


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_is_asked_for_the_right_data(tmp_path, monkeypatch, name):
    folder, _, held_out = SCHEMAS[name]
    path, calls = copy(tmp_path, name, 6, 2), []
    files = {split: f"{path}/{folder}/{split}-00000-of-00001.parquet" for split in ("train", held_out)}
    data = datasets.DatasetDict({s: datasets.Dataset(parquet.read_table(file)) for s, file in files.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: calls.append(args) or data)
    task = TASKS[name](train=4, dev=2, test=2)
    local = dataclasses.replace(task, path=path)
    assert task.load() == local.load()
    assert calls == [
        {
            "sst2": ("stanfordnlp/sst2",),
            "boolq": ("google/boolq",),
            "squad": ("rajpurkar/squad", "plain_text"),
            "drop": ("ucinlp/drop",),
            "gsm8k": ("openai/gsm8k", "main"),
            "wsc": ("aps/super_glue", "wsc.fixed"),
        }.get(name, ("aps/super_glue", name))
    ]
    del data[held_out]
    with pytest.raises(ConfigError, match=rf"must have the splits train and {held_out}; got \['train'\]"):
        task.load()


def test_failures_of_the_hub_say_what_to_do(monkeypatch):
    def failing(*errors: Exception) -> None:
        rest = list(errors)

        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise rest.pop(0)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    failing(ConnectionError("Couldn't reach 'aps/super_glue' on the Hub"))
    with pytest.raises(ConfigError, match=r"aps/super_glue could not be loaded .*ConnectionError.*with cb/train-\*"):
        CB().load()
    script = RuntimeError("Dataset scripts are no longer supported, but found x.py")
    failing(script, FileNotFoundError("Revision 'refs/convert/parquet' doesn't exist"))
    with pytest.raises(ConfigError, match="FileNotFoundError: Revision 'refs/convert/parquet' doesn't exist"):
        CB().load()
    failing(RuntimeError("out of patience"))
    with pytest.raises(RuntimeError, match="out of patience"):  # a defect keeps its traceback
        CB().load()


# conf/


@pytest.mark.parametrize("name", NAMES)
def test_config_files_load_their_data_and_spell_out_every_default(tmp_path, name):
    settings = [f"task.path={copy(tmp_path, name, 8, 3)}", "task.train=4", "task.dev=2", "task.test=3"]
    task = build(compose("config", [f"task={name}", *settings]).task, "task")
    assert type(task) is TASKS[name]
    splits = task.load()
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [4, 2, 3]
    config = compose("config", [f"task={name}"]).task
    assert build(config, "task") == TASKS[name]()
    assert [key for key in config if key != "_target_"] == [field.name for field in dataclasses.fields(TASKS[name])]
    fields = {field.name: getattr(TASKS[name](), field.name) for field in dataclasses.fields(TASKS[name])}
    assert {key: tuple(v) if key == "words" else v for key, v in config.items() if key != "_target_"} == fields


def test_every_copy_has_a_task():
    assert set(copies.SCHEMAS) == set(TASKS)
