"""task=file: what a file is taken for, and what each kind of row becomes; test_file_errors.py has wrong ones."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows import ROWS, WORDS, every, write_parquet, write_rows

from zoray.records import ConfigError, Example, Message, Sampling, Splits
from zoray.tasks.file.columns import infer
from zoray.tasks.file.task import File

PINNED_FILE = "9544fc7aa8436845"  # must never change: a run's journal names examples by their position in a split
ROOT = Path(__file__).parents[2]

Write = Callable[[str, Any], str]


def digest(splits: Splits) -> str:
    """A hash of all examples in order, to pin a split."""
    rows = [(e.prompt, e.options, e.label) for name in ("train", "dev", "test") for e in splits[name]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function: writes a file (rows as JSON lines) and returns its path."""
    return lambda name, content: write_rows(tmp_path / name, content)


# text and label


def test_labelled_file_splits_80_10_10(write):
    path = write("a.jsonl", ROWS)
    splits = File(path, WORDS).load()
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [40, 5, 5]
    assert len(every(splits)) == 50
    assert all(isinstance(splits[name], tuple) for name in ("train", "dev", "test"))
    assert digest(splits) == PINNED_FILE
    example = splits.train[0]
    number = int(str(example.prompt).split()[1])
    assert example == Example(f"text {number} It was", (" terrible", " great"), number % 2)
    sizes = File(path, WORDS, train=7, test=0).load()
    assert [len(sizes[name]) for name in ("train", "dev", "test")] == [7, 5, 0]
    with pytest.raises(ConfigError, match=r"a\.jsonl has 50 usable rows; asked for 5 \+ 5 \+ 45 = 55"):
        File(path, WORDS, train=45).load()
    task = File(path, WORDS, stop=["\n"])  # type: ignore
    task.load()
    assert pickle.loads(pickle.dumps(task)) == task == File(path, WORDS, stop=("\n",))


def test_labelled_file_formats_agree(write):
    rows = [("a, b", "0"), ('say "hi"', "1"), ("two\nlines", "0"), ("tab\there", "1"), ("übel", "0"), ("last", "1")]
    jsonl = "".join(json.dumps({"t": text, "l": int(label)}) + "\n\n" for text, label in rows)
    quoted = [(text.replace('"', '""'), label) for text, label in rows]
    csv = "\ufeffid,t,l\r\n" + "".join(f'{i},"{text}",{label}\r\n' for i, (text, label) in enumerate(quoted))
    tsv = "t\tl\n" + "".join(f'"{text}"\t{label}\n' for text, label in quoted)
    old = "t,l\r" + "".join(f'"{text}",{label}\r' for text, label in quoted)
    european = '\n"t";l\n' + "".join(f'"{text}";{label}\n' for text, label in quoted)
    files = {"a.jsonl": "\ufeff" + jsonl, "a.CSV": csv, "a.tsv": tsv, "old.csv": old, "european.csv": european.strip()}
    loaded = [File(write(n, c), [" no", " yes"], "t", "l", "{text}:").load() for n, c in files.items()]
    assert all(splits == loaded[0] for splits in loaded)
    assert {e.prompt for e in every(loaded[0])} == {f"{text}:" for text, _ in rows}


def test_labels_may_be_numbers_or_truth_values(write):
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}, {"text": "c", "label": True}]
    splits = File(write("a.jsonl", rows), {False: " no", "true": " yes"}).load()  # type: ignore
    assert {e.prompt[0]: e.label for e in every(splits)} == {"a": 1, "b": 0, "c": 1}
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}]
    splits = File(write("b.jsonl", rows), [" no", " yes"]).load()
    assert {e.prompt[0]: e.label for e in every(splits)} == {"a": 1, "b": 0, "c": 1}
    big = 2**53
    splits = File(write("c.csv", f"text,label\na,{big}\nb,{big + 1}\n"), {big: " no", big + 1: " yes"}, test=0).load()  # type: ignore
    assert {e.prompt[0]: e.label for e in every(splits)} == {"a": 0, "b": 1}


def test_repeated_texts_are_used_once(write):
    task = File(write("a.jsonl", ROWS + ROWS), WORDS)
    splits = task.load()
    assert len(every(splits)) == 50 and digest(splits) == PINNED_FILE
    assert "left out, since an earlier row has the same prompt: 50 rows" in task.describe()


def test_labels_become_words_in_alphabetical_order(write):
    splits = File(write("a.jsonl", list(reversed(ROWS)))).load()
    assert {e.options for e in every(splits)} == {(" negative", " positive")}
    assert {(int(str(e.prompt).split()[1]) % 2, e.label) for e in every(splits)} == {(0, 0), (1, 1)}


def test_twenty_labels_are_words_and_more_with_words_given(write):
    rows = [{"text": f"text {i}", "label": f"l{i % 20}"} for i in range(40)]
    assert len(every(File(write("a.jsonl", rows)).load())[0].options) == 20
    rows = [{"text": f"text {i}", "label": i} for i in range(40)]
    assert len(every(File(write("b.jsonl", rows), [f" w{i}" for i in range(40)]).load())[0].options) == 40


def test_a_template_names_columns(write):
    rows = [{"Title": f"t{i} {{Body}}", "Body": f" b{i} ", "label": "xy"[i % 2], "n": 3} for i in range(20)]
    path = write("a.jsonl", rows)
    for template, column in (("{Title}: {text} {}{ }", "Body"), ("{Title}: {Body} {}{ }", None)):
        found = every(File(path, template=template, text_column=column).load())
        assert {e.prompt for e in found} == {f"t{i} {{Body}}: b{i} {{}}{{ }}" for i in range(20)}
    with pytest.raises(ConfigError, match=r"in the braces of task\.template; got \{body\}; .* Did you mean Body"):
        File(path, template="{Title} {body}").load()
    with pytest.raises(ConfigError, match=r"expected \{text\} in task\.template, since task\.text_column=Body"):
        File(path, template="{Title} It is", text_column="Body").load()
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: column 'n' must hold text; got 3"):
        File(path, template="{Title} {n}").load()
    with pytest.raises(ConfigError, match=r"expected a column in braces in task\.template, such as '\{text\} It was'"):
        File(path, template="{1 2} It is", text_column="Body").load()


def test_a_chat_model_sees_its_template(write):
    task = File(write("a.jsonl", ROWS), WORDS, chat=True, train=1)
    (example,) = task.load().train
    (message,) = example.prompt
    assert message == Message("user", message.content) and str(message.content).endswith(" It was")  # type: ignore


# prompt and completion, chats, preferences, prompts alone


TURNS = [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi "}]
MORE = [{"role": "assistant", "content": " Hello \n"}, {"role": "user", "content": "Bye"}]
SAID = (Message("system", "Be kind. "), Message("user", "Hi "))
ALSO = (Message("assistant", "Hello"), Message("user", "Bye"))
LAST = [{"role": "assistant", "content": " Bye!"}]


@pytest.mark.parametrize(
    ("row", "settings", "becomes"),
    [
        ({"prompt": "Q: a", "completion": "b "}, {}, Example("Q: a", answers=(" b ",))),
        ({"prompt": "Q: a\n", "completion": "b"}, {}, Example("Q: a\n", answers=("b",))),
        ({"prompt": "Q: a", "completion": "\nb"}, {}, Example("Q: a", answers=("\nb",))),
        ({"prompt": "Q: a", "completion": ["b", " c"]}, {}, Example("Q: a", answers=(" b", " c"))),
        ({"prompt": "Q: a", "completion": '["b"]'}, {}, Example("Q: a", answers=(' ["b"]',))),
        ({"prompt": "a", "completion": "b"}, {"chat": True}, Example((Message("user", "a"),), answers=("b",))),
        ({"prompt": TURNS, "completion": "b"}, {}, Example(SAID, answers=("b",))),
        ({"prompt": "a", "completion": LAST}, {}, Example((Message("user", "a"),), answers=("Bye!",))),
        (
            {"question": "a", "answers": ["b"], "n": 1.5, "c": None},
            {"template": "Q: {question}\nA:", "completion_column": "answers"},
            Example("Q: a\nA:", answers=(" b",)),
        ),
        ({"messages": TURNS + MORE + LAST}, {}, Example(SAID + ALSO, answers=("Bye!",))),
        ({"messages": json.dumps(TURNS + LAST)}, {}, Example(SAID, answers=("Bye!",))),
        ({"prompt": "a", "chosen": "b", "rejected": " c"}, {}, Example("a", (" b", " c"))),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"chat": True},
            Example((Message("user", "a"),), ("b", "c")),
        ),
        ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, {}, Example(SAID, ("b", "c"))),
        (
            {"prompt": TURNS, "chosen": TURNS + LAST, "rejected": [*TURNS, MORE[0]]},
            {},
            Example(SAID, ("Bye!", "Hello")),
        ),
        ({"prompt": TURNS, "chosen": LAST, "rejected": MORE[:1]}, {}, Example(SAID, ("Bye!", "Hello"))),
        ({"prompt": "Hi", "chosen": TURNS + LAST, "rejected": [*TURNS, MORE[0]]}, {}, Example(SAID, ("Bye!", "Hello"))),
        (
            {"prompt": "a", "chosen": LAST, "rejected": MORE[:1]},
            {},
            Example((Message("user", "a"),), ("Bye!", "Hello")),
        ),
        ({"chosen": TURNS + LAST, "rejected": [*TURNS, MORE[0]]}, {}, Example(SAID, ("Bye!", "Hello"))),
        ({"prompt": " a ", "n": [1, {"x": None}]}, {}, Example(" a ")),
        ({"prompt": TURNS}, {}, Example(SAID)),
        ({"task": "a"}, {"template": "Do {task}!"}, Example("Do a!")),
        ({"prompt": "a", "label": 3}, {"kind": "prompt"}, Example("a")),
        ({"prompt": "a", "label": 3, "completion": "b"}, {"kind": "completion"}, Example("a", answers=(" b",))),
        (
            {"prompt": "a", "completion": "b", "messages": TURNS + LAST},
            {"kind": "chat"},
            Example(SAID, answers=("Bye!",)),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "messages": TURNS + LAST},
            {"chosen_column": "chosen"},
            Example("a", (" b", " c")),
        ),
    ],
)
def test_what_a_row_becomes(row, settings, becomes, write):
    """A file of one row has it in train, as dev is taken from a second one."""
    task = File(write("a.jsonl", [row]), **settings, dev=1, test=0)
    with pytest.raises(ConfigError, match="has 1 usable row;"):
        task.load()
    other = json.loads(
        json.dumps(row).replace('"a"', '"z"').replace("Hi", "Ho").replace(" a", " z").replace(": a", ": z")
    )
    task = File(write("b.jsonl", [row, other]), **settings, dev=1, test=0)
    (found,) = [example for example in every(task.load()) if example.prompt == becomes.prompt]
    assert {**vars(found), "data": {}} == vars(becomes)
    kept = not becomes.options and "messages" not in row
    assert found.data == (row if kept else {})


def test_cells_of_a_table_hold_json(write):
    def quoted(value: Any) -> str:
        return '"' + (value if isinstance(value, str) else json.dumps(value)).replace('"', '""') + '"'

    def first(header: str, *cells: Any) -> Example:
        row = ",".join(map(quoted, cells))
        other = row.replace("Hi", "Ho").replace("Q: a", "Q: z")
        found = every(File(write("a.csv", f"{header}\n{row}\n{other}\n"), dev=1, test=0).load())
        (example,) = [e for e in found if e.prompt in ("Q: a", SAID, (Message("user", "Q: a"),))]
        return example

    assert first("prompt,completion", "Q: a", ["b", "c"]).answers == (" b", " c")
    assert first("prompt,completion", "Q: a", "[1] b").answers == (" [1] b",)
    assert first("prompt,completion", "Q: a", "[1, 2]").answers == (" [1, 2]",)
    assert first("prompt,completion", "Q: a", LAST).prompt == (Message("user", "Q: a"),)
    assert first("prompt,completion", TURNS, "b").prompt == SAID
    assert first("messages", TURNS + LAST) == Example(SAID, answers=("Bye!",))
    pair = first("prompt,chosen,rejected", TURNS, LAST, [MORE[0]])
    assert pair == Example(SAID, ("Bye!", "Hello"))
    assert first("prompt,n", "Q: a", "1").data == {"prompt": "Q: a", "n": "1"}


def test_pairs_and_answers_with_one_prompt_are_used_once(write):
    rows = [{"prompt": f"a{i % 10}", "chosen": f"b{i}", "rejected": "c"} for i in range(20)]
    found = every(File(write("a.jsonl", rows)).load())
    assert sorted(e.options[0] for e in found) == sorted(f" b{i}" for i in range(10))


# which columns


@pytest.mark.parametrize(
    ("present", "given", "kind", "template", "found"),
    [
        ("text label", {}, None, None, ("choice", {"text": "text", "label": "label"})),
        ("id Text LABEL", {}, None, None, ("choice", {"text": "Text", "label": "LABEL"})),
        ("a b", {"text": "a", "label": "b"}, None, None, ("choice", {"text": "a", "label": "b"})),
        ("title label", {}, None, "{title}", ("choice", {"label": "label"})),
        ("prompt completion id", {}, None, None, ("completion", {"prompt": "prompt", "completion": "completion"})),
        ("q completion", {}, None, "{q}", ("completion", {"completion": "completion"})),
        ("q a", {"prompt": "q", "completion": "a"}, None, None, ("completion", {"prompt": "q", "completion": "a"})),
        ("messages x", {}, None, None, ("chat", {"messages": "messages"})),
        ("x", {"messages": "x"}, None, None, ("chat", {"messages": "x"})),
        ("chosen rejected", {}, None, None, ("preference", {"chosen": "chosen", "rejected": "rejected"})),
        ("prompt answer", {}, None, None, ("prompt", {"prompt": "prompt"})),
        ("prompt label", {"text": "prompt"}, None, None, ("choice", {"text": "prompt", "label": "label"})),
        ("prompt label", {}, "prompt", None, ("prompt", {"prompt": "prompt"})),
        ("prompt label", {}, "choice", "{prompt}?", ("choice", {"label": "label"})),
    ],
)
def test_columns_say_what_a_file_is(present, given, kind, template, found):
    schema = infer(present.split(), given, kind, template, "a.csv, line 1")
    assert (schema.kind, schema.columns) == found


def test_answers_are_sampled_as_the_task_says():
    task = File("a.csv", metric="f1", max_tokens=7, stop=["\n"])  # type: ignore
    assert task.sampling == Sampling(max_tokens=7, stop=("\n",)) and task.metric == "f1"
    assert File("a.csv").metric is None


# several files, folders, nothing


def test_patterns_take_files_in_order_of_their_names(write, tmp_path):
    for k, part in enumerate((ROWS[30:], ROWS[:30])):
        write(f"data/part-{1 - k}.jsonl", part)
    whole = File(write("whole.jsonl", ROWS), WORDS).load()
    assert File(f"{tmp_path}/data/*.jsonl", WORDS).load() == whole == File(f"{tmp_path}/d*/part-[01]*", WORDS).load()
    assert File(write("data/a [1].jsonl", ROWS), WORDS).load() == whole, "a file's own name is no pattern"


# Parquet, and the Hub


def test_parquet_is_read_as_jsonl_is(write, tmp_path):
    import datetime

    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=7)
    assert digest(File(path, WORDS).load()) == PINNED_FILE
    chats = [{"messages": [*TURNS[:1], {"role": "user", "content": f"{i}"}, *LAST]} for i in range(20)]
    found = File(write_parquet(tmp_path / "b.parquet", chats)).load()
    assert found == File(write("b.jsonl", chats)).load()
    day = datetime.date(2026, 11, 23)
    rows = [{"prompt": f"{i}", "day": day, "raw": b"x", "n": [1.5]} for i in range(3)]
    found = every(File(write_parquet(tmp_path / "c.parquet", rows)).load())
    assert found[0].data == {"prompt": found[0].prompt, "day": "2026-11-23", "n": [1.5]}
    numbered = [{"text": f"{i}", "label": i % 2} for i in range(20)]
    found = every(File(write_parquet(tmp_path / "d.parquet", numbered, ["bad", "good"])).load())
    assert found[0].options == (" bad", " good") and {e.label for e in found} == {0, 1}


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})

    def rows(prefix: str, count: int, label: int | None = None) -> Dataset:
        labels = [i % 2 if label is None else label for i in range(count)]
        return Dataset.from_dict({"text": [f"{prefix} {i}" for i in range(count)], "label": labels}, features=features)

    hub = DatasetDict({"train": rows("a", 30), "validation": rows("b", 5), "test": rows("a", 3, label=-1)})
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *path: asked.append(path) or hub)
    with pytest.raises(ConfigError, match=r"org/name \(test\), row 0 \(from 0\): label '-1' has no word"):
        File("org/name").load()
    splits = File("org/name:some", test=0).load()
    assert asked == [("org/name",), ("org/name", "some")]
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [30, 5, 0]
    assert splits.train[0].options == (" bad", " good") and {e.label for e in splits.train} == {0, 1}
    assert {str(e.prompt)[0] for e in splits.dev} == {"b"} and pickle.loads(pickle.dumps(splits)) == splits
    hub["test"] = rows("a", 3)
    splits = File("org/name", dev=2).load()
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [27, 2, 3]
    assert len(every(splits)) == 32, "what is in test as well is left out of train"
    with pytest.raises(ConfigError, match=r"org/name \(dev\) has 5 usable rows; asked for 6"):
        File("org/name", dev=6).load()
    del hub["validation"], hub["test"]
    splits = File("org/name", {0: " no", 1: " yes"}).load()  # type: ignore
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [24, 3, 3]
    assert splits.train[0].options == (" no", " yes")
    del hub["train"]
    with pytest.raises(ConfigError, match=r"org/name must have a split train; got \[\]"):
        File("org/name").load()


# examples/


def test_the_examples_are_what_their_script_writes_and_load(tmp_path):
    spec = importlib.util.spec_from_file_location("make", ROOT / "examples" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in ("mail.csv", "preferences.jsonl"):
        assert (ROOT / "examples" / name).read_bytes() == (tmp_path / name).read_bytes()
    mails, pairs = (File(str(tmp_path / name)).load() for name in ("mail.csv", "preferences.jsonl"))
    assert [len(mails[name]) for name in ("train", "dev", "test")] == [160, 20, 20]
    assert mails.train[0].options == (" private", " urgent")
    assert 0.4 < sum(e.label for e in mails.train) / 160 < 0.6
    assert [len(pairs[name]) for name in ("train", "dev", "test")] == [96, 12, 12]
    assert all(len(e.options[0]) < len(e.options[1]) for e in every(pairs))


def test_too_few_rows_say_how_many_were_left_out_as_repeats(write):
    rows = [{"prompt": "x", "completion": f"a{i}"} for i in range(40)]
    says = r"a\.jsonl, less 39 rows with the prompt of an earlier one, has 1 usable row; asked for 0 \+ 1 \+ 1 = 2"
    with pytest.raises(ConfigError, match=says):
        File(write("a.jsonl", rows), dev=1, test=0).load()
