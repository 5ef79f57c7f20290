"""task=file: every wrong file, column and cell is named, with what was expected and what to do instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows import ROWS, WORDS, write_parquet, write_rows

from zoray.records import ConfigError
from zoray.tasks.file.task import File

Write = Callable[[str, Any], str]
TURNS = [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi "}]
MORE = [{"role": "assistant", "content": " Hello \n"}, {"role": "user", "content": "Bye"}]
LAST = [{"role": "assistant", "content": " Bye!"}]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function: writes a file (rows as JSON lines) and returns its path."""
    return lambda name, content: write_rows(tmp_path / name, content)


# labels


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["0", "1", "0"], r"words; .*a\.csv has the numbers 0, 1\. .*: 'task\.words=\{0: \" no\", 1: \" yes\"\}'"),
        (["1", "-2.5", "1"], "has the numbers -2.5, 1"),
        (["spam", "spam", "spam"], r"at least two labels in .*a\.csv; got only 'spam'"),
        (["Urgent", "urgent", "private"], "differ in more than capitals; .*has 'Urgent' and 'urgent'"),
        (["a", " ", "b"], r"a\.csv, line 3: column 'label' must hold a label; got ' '"),
        ([f"l{i}" for i in range(21)], r"a\.csv, line 22: expected at most 20 labels .*; 'l20' is one more"),
    ],
)
def test_labels_that_can_not_be_words(labels, says, write):
    content = "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    with pytest.raises(ConfigError, match=says):
        File(write("a.csv", content)).load()


# which columns


@pytest.mark.parametrize(
    ("present", "settings", "says"),
    [
        (
            "body,category",
            {},
            r"a\.csv, line 1: expected the columns of one kind of data: text and label \(choice\); .*; prompt "
            r"\(prompt\); the columns are 'body', 'category'\. task\.text_column=body "
            r"task\.label_column=category makes it choice",
        ),
        ("Question,Answer", {}, r"task\.prompt_column=Question task\.completion_column=Answer makes it completion"),
        ("a,b", {}, r"the columns are 'a', 'b'\. Name yours, such as task\.text_column=body"),
        ("text,b", {}, r"the columns are 'text', 'b'\. Name yours"),
        ("text,b", {"text_column": "text"}, r"are 'text', 'b', and task\.text_column=text is given\. Name yours"),
        (
            "text,b",
            {"words": WORDS},
            r"no column 'label'; choice needs text and label, and the columns are 'text', 'b'",
        ),
        ("text,topic", {"kind": "choice"}, r"no column 'label'; .* Name it, task\.label_column=topic, or rename it"),
        ("text,label", {"label_column": "lable"}, r"the column 'lable', which task\.label_column names; .*mean label"),
        (
            "text,label,messages",
            {},
            r"the columns 'text', 'label', 'messages' make more than one kind of data: text and label \(choice\); "
            r"messages \(chat\)\. Set task\.kind=choice or task\.kind=chat",
        ),
        ("prompt,completion,chosen,rejected", {}, r"Set task\.kind=completion or task\.kind=preference"),
        ("prompt,completion,label", {}, r"or 'label' says which completions are good\. Set task\.kind=completion"),
        ("prompt,label", {}, r"Set task\.kind=prompt to leave 'label' out, or set task\.text_column=prompt for that"),
        ("prompt,label", {"template": "{prompt}?"}, r"Set task\.kind=choice or task\.kind=prompt"),
        ("text,label", {"kind": "chat"}, r"no column 'messages'; chat needs messages"),
        ("messages,text", {"kind": "chat", "template": "{text}"}, r"expected no task\.template for chat"),
        ("messages,text", {"kind": "chat", "text_column": "text"}, r"expected no task\.text_column for chat"),
        ("prompt,completion", {"words": WORDS, "kind": "completion"}, r"expected no task\.words for completion"),
        ("text,label", {"metric": "exact_match"}, r"task\.metric to be null, accuracy or f1 for choice; got 'exact_ma"),
        ("prompt,completion", {"metric": "accuracy"}, r"f1, exact_match or another of answers for completion; got"),
        ("text,label,text", {}, r"a\.csv, line 1: expected each column once; got 'text' twice"),
    ],
)
def test_columns_that_do_not_say_what_a_file_is(present, settings, says, write):
    cells = ",".join("[]" for _ in present.split(","))
    with pytest.raises(ConfigError, match=says):
        File(write("a.csv", f"{present}\n{cells}\n"), **settings).load()


# wrong files


GOOD = '{"text": "a", "label": "positive"}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD + "{no\n", r"a\.jsonl, line 2: not JSON at character 2, Expecting property name"),
        ("a.jsonl", GOOD + "[1]\n", r"a\.jsonl, line 2: expected a JSON object; got list"),
        ("a.jsonl", GOOD + "[" * 100_000, r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", GOOD + '\n{"text": "b"}\n', r"line 3: no value for column 'label'; the row has \['text'\]"),
        ("a.jsonl", '{"text": "b", "label": null}\n', r"a\.jsonl, line 1: no value for column 'label'"),
        ("a.jsonl", '{"text": "b"}\n', r"a\.jsonl, line 1: no column 'label'; choice needs text and label"),
        ("a.jsonl", GOOD + '{"text": "b", "label": NaN}\n', r"line 2: no value for column 'label'"),
        ("a.jsonl", GOOD + '{"text": "b", "label": [1]}\n', r"line 2: column 'label' must hold a label; got \[1\]"),
        ("a.jsonl", GOOD + '{"text": "b", "label": "meh"}', r"line 2: label 'meh' has no word; words has \['negative'"),
        ("a.jsonl", GOOD + '{"text": " ", "label": "positive"}', r"a\.jsonl, line 2: column 'text' must hold text"),
        ("a.jsonl", GOOD + '{"text": 3, "label": "positive"}', r"line 2: column 'text' must hold text; got 3"),
        ("a.jsonl", GOOD + '{"text": "\\ud83d", "label": "positive"}', r"line 2: column 'text' holds half a character"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xe9"}', r"a\.jsonl, line 2: not UTF-8 at character 11 \(byte 0xe9"),
        ("a.csv", "text,label\na,positive\n".encode("utf-16"), r"a\.csv, line 1: not UTF-8 at character 1 \(UTF-16"),
        ("a.jsonl", "", r"a\.jsonl has no rows"),
        ("a.jsonl", "\ufeff\n \n", r"a\.jsonl has no rows"),
        ("a.csv", "", r"a\.csv has no rows"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        (
            "a.csv",
            "text,sentiment\na,positive\n",
            r"a\.csv, line 1: no column 'label'; .* 'text', 'sentiment'\. Name it",
        ),
        ("a.csv", "text,label\na,positive\nb\n", r"line 3: expected 2 cells .*; got 1; column 'label' has none"),
        ("a.csv", "text, label\na,positive\ntext, label\n", r"a\.csv, line 3: .*got the header line again\. Delete"),
        ("a.csv", "text,label\na, b,positive\n", r"a\.csv, line 2: expected 2 cells .*; got 3\. Quote"),
        ("a.csv", 'text,label\n"a\nb",positive\nc,meh\n', r"a\.csv, line 4: label 'meh'"),
        (
            "a.csv",
            'text,label\na,positive\n"b,positive\nc,positive\n',
            r"a\.csv, line 3: unexpected end of data: the quote at character 1 is not closed",
        ),
        (
            "a.csv",
            'text,label\n"a" b,positive\n',
            r"line 2: ',' expected after '\"' at character 3 of the row's line 1",
        ),
        ("a.csv", 'text,label\n"a\nb"" ""c",positive\n"a\nb"c,x\n', r"line 4: .* at character 2 of the row's line 2"),
        ("a.csv", "text,label\n ,positive\n", r"a\.csv, line 2: column 'text' must hold text"),
        ("a.tsv", "text\tlabel\na\tpositive\nb\tmeh\n", r"a\.tsv, line 3: label 'meh'"),
        ("a.tsv", b"text\tlabel\na\tpositive\n\xff\tpositive\n", r"a\.tsv, line 3: not UTF-8 at character 1 "),
    ],
)
def test_malformed_files_name_file_and_line(write, name, content, says):
    with pytest.raises(ConfigError, match=says):
        File(write(name, content), WORDS).load()


def turns(*pairs: str) -> str:
    return json.dumps({"messages": [dict(zip(("role", "content"), pair.split(":"), strict=True)) for pair in pairs]})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (turns("user:a"), r"column 'messages' must end in a message of the assistant; got one of the user"),
        (turns("assistant:a"), r"column 'messages' begins with its answer\. Put a question first"),
        (turns("user:a", "bot:b"), r"column 'messages', message 2: role must be system, user, assistant; got 'bot'"),
        (turns("user:a", "assistant: "), r"message 2: content must be text; got ' '"),
        ('{"messages": []}', r"column 'messages' must hold a list of messages; got \[\]"),
        ('{"messages": {"a": 1}}', r"must hold a list of messages; got \{'a': 1\}"),
        (
            '{"messages": "[{"}',
            r"column 'messages' must hold a JSON list of messages; got '\[\{', which is no JSON at ch",
        ),
        (
            '{"messages": [{"from": "human", "value": "a"}]}',
            r"message 1 must have role and content; got the keys 'from', 'v",
        ),
        ('{"messages": ["a"]}', r"message 1 must have role and content; got 'a'"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"message 1: content must be text; got \[1\]"),
        ('{"messages": null}', r"no value for column 'messages'"),
        ('{"prompt": "a", "completion": 42}', r"column 'completion' must hold text, .*; got 42\. .*numbers in quotes"),
        ('{"prompt": "a", "completion": []}', r"column 'completion' must hold text, or a list"),
        ('{"prompt": "a", "completion": ["b", ""]}', r"column 'completion' must hold text, or a list"),
        (
            json.dumps({"prompt": "a", "completion": TURNS + LAST}),
            r"column 'completion' must hold one message of the assistant's; got 3",
        ),
        (
            json.dumps({"prompt": TURNS[:1]}),
            r"column 'prompt' must end in a message of the user; got one of the system",
        ),
        ('{"prompt": {"a": 1}}', r"column 'prompt' must hold text; got \{'a': 1\}"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', r"column 'rejected' must hold text or messages; got 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b "}', r"columns 'chosen' and 'rejected' hold the same text"),
        ('{"chosen": "b", "rejected": "c"}', r"no prompt: no column has it, and column 'chosen' holds no messages"),
        (
            json.dumps({"prompt": "Ha", "chosen": TURNS + LAST, "rejected": [*TURNS, MORE[0]]}),
            r"messages of column 'chosen' before the answer must be the prompt's; got 'Hi ' for 'Ha'",
        ),
        (
            json.dumps({"prompt": "Hi", "chosen": TURNS + LAST, "rejected": [TURNS[1], MORE[0]]}),
            r"columns 'chosen' and 'rejected' must be answers to the same messages",
        ),
        (
            json.dumps({"chosen": [TURNS[0], *LAST], "rejected": [TURNS[0], MORE[0]]}),
            r"column 'chosen' must end in a message of the user",
        ),
    ],
)
def test_malformed_cells_name_line_and_column(row, says, write):
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 2: .*{says}"):
        File(write("a.jsonl", f"\n{row}\n")).load()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (
            {"path": "a.xml"},
            r"must end in \.jsonl, .*, \.parquet, \.txt, \.md; got 'a\.xml'\. Convert the file",
        ),
        ({"path": "data/a.xlsx"}, r"got 'data/a\.xlsx'\. In the spreadsheet: Save as, CSV UTF-8"),
        ({"path": "a.json"}, r"Write one JSON object a line, and call it \.jsonl"),
        ({"path": "a.jsonl.gz"}, "Unpack it"),
        ({"path": "mail"}, "or give org/name for a data set on the Hub"),
        ({"path": ""}, "must end in"),
        ({"words": " great"}, "words must map labels"),
        ({"words": {"a": " great"}}, "words must be two or more"),
        ({"words": {"a": " great", "b": " great"}}, "words must be two or more different"),
        ({"words": [" great", 3]}, "words must be two or more"),
        ({"template": "x"}, "template must be"),
        ({"train": 0}, "train must be"),
        ({"text_column": ""}, "text_column must be"),
        ({"kind": "chats"}, r"task\.kind to be one of choice, .* or null; got 'chats'"),
        ({"chat": 1}, r"task\.chat to be true or false; got 1"),
        ({"metric": "exact match"}, r"task\.metric to be null or a metric's name"),
        ({"max_tokens": 0}, "max_tokens to be a whole number of at least 1"),
        ({"stop": "\n"}, "stop to be a list of texts"),
    ],
)
def test_bad_file_settings_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        File(**({"path": "a.csv", "words": WORDS} | kwargs))


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        ({}, "gone.csv", r"can't read task\.path=.*gone\.csv: No such file or directory\. Give an existing file"),
        ({}, "*.csv", r"can't read task\.path=.*\*\.csv: no file matches it\. Look with: ls "),
        (
            {"data/a.csv": "x"},
            "data",
            r"task\.path to be a file; .*data is a folder\. Give its files: 'task\.path=\".*\*\.csv\"'",
        ),
        (
            {"a.csv": "text,label\na,b\n", "b.jsonl": "{}"},
            "*",
            r"of one format .*; got a\.csv and others in \.csv, b\.jsonl",
        ),
        (
            {"a.csv": "text,label\na,b\n", "b.xml": "x"},
            "*",
            r"\.md; got '.*b\.xml \(of task\.path=.*Convert the file",
        ),
        (
            {"a.csv": "text,label\na,b\n", "b.csv": "text,labels\na,b\n"},
            "*",
            r"b\.csv, line 1: expected the columns of a\.csv, \['text', 'label'\]; got \['text', 'labels'\]",
        ),
        (
            {"a.csv": "text,label\na,x\n", "b.csv": "label,text\ny,\n"},
            "*",
            r"b\.csv, line 2: column 'text' must hold text",
        ),
        ({"a.jsonl": "\n", "b.jsonl": " "}, "*", r"has no rows; expected one example a row"),
    ],
)
def test_paths_that_can_not_be_taken(files, path, says, write, tmp_path):
    for name, content in files.items():
        write(name, content)
    with pytest.raises(ConfigError, match=says):
        File(f"{tmp_path}/{path}").load()


def test_wrong_parquet_is_named_by_row(write, tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": None}, {"text": "c", "label": "y"}]
    with pytest.raises(ConfigError, match=r"b\.parquet, row 1 \(from 0\): no value for column 'label'"):
        write_parquet(tmp_path / "a.parquet", rows[:1])
        write_parquet(tmp_path / "b.parquet", rows)
        File(f"{tmp_path}/*.parquet").load()
    with pytest.raises(ConfigError, match=r"e\.parquet: no column 'label'"):
        File(write_parquet(tmp_path / "e.parquet", [{"text": "a"}]), WORDS).load()
    with pytest.raises(ConfigError, match=r"e\.parquet: expected the columns of a\.parquet, \['text', 'label'\]; got"):
        File(f"{tmp_path}/[ae].parquet").load()
    with pytest.raises(ConfigError, match=r"f\.parquet, row 0 .*: column 'label' must hold a label; got b'x'"):
        File(write_parquet(tmp_path / "f.parquet", [{"text": "a", "label": b"x"}]), WORDS).load()
    whole = Path(write_parquet(tmp_path / "c.parquet", ROWS)).read_bytes()
    damaged = {"text": b"text", "cut": whole[: len(whole) // 2], "bits": whole[:8] + bytes(80) + whole[88:]}
    for name, content in damaged.items():
        with pytest.raises(ConfigError, match=rf"can't read .*{name}\.parquet: .*damaged or not a Parquet file\. "):
            File(write(f"{name}.parquet", content), WORDS).load()
    with pytest.raises(ConfigError, match="No such file"):
        File(str(tmp_path / "gone.parquet")).load()


def test_a_hub_that_can_not_be_reached_says_how_to_go_local(monkeypatch):
    import datasets

    def load_dataset(path: str) -> None:
        try:
            raise ConnectionError("Couldn't reach\n  the Hub")
        except ConnectionError as error:
            raise ValueError("failed") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"org/name could not be .*ConnectionError: Couldn't reach the Hub\. .*local"):
        File("org/name").load()
