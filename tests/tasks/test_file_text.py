"""task=file: what a file means in its finer points: labels, spaces, quotes, names, empty cells, and how it says so."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows import every, write_parquet, write_rows

from zoray.records import ConfigError, Message
from zoray.tasks.file.cells.spacing import gap
from zoray.tasks.file.columns import Template
from zoray.tasks.file.task import File

Write = Callable[[str, Any], str]
HALF = "\\ud83d"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function: writes a file (rows as JSON lines) and returns its path."""
    return lambda name, content: write_rows(tmp_path / name, content)


def error_of(path: str, **settings: Any) -> str:
    """What loading a file is refused with."""
    with pytest.raises(ConfigError) as error:
        File(path, **settings).load()
    return str(error.value)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    """Rows as CSV, as Python writes it."""
    target = io.StringIO()
    writer = csv.DictWriter(target, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def in_all(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """A file of each format with the same rows."""
    return [
        write_rows(tmp_path / "r.jsonl", rows),
        write_rows(tmp_path / "r.csv", table(rows)),
        write_rows(tmp_path / "r.tsv", table(rows, "\t")),
        write_parquet(tmp_path / "r.parquet", rows),
    ]


# half characters, long cells


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": HALF, "label": "a"}, "text"),
        ({"text": "a", "label": HALF}, "label"),
        ({"prompt": HALF, "completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": HALF}, "completion"),
        ({"prompt": "a", "completion": ["b", HALF]}, "completion"),
        ({"prompt": "a", "wanted": {"x": [HALF]}}, "wanted"),
        ({"prompt": "a", "wanted": {HALF: 1}}, "wanted"),
        ({"prompt": "a", "chosen": HALF, "rejected": "b"}, "chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": HALF}, "rejected"),
        ({"instruction": "a", "input": HALF, "output": "b"}, "input"),
        ({"instruction": "a", "output": "b", "system": HALF}, "system"),
        *(
            (
                {"messages": [{"role": role, "content": HALF if k == at else "x"} for k, role in enumerate(roles)]},
                "messages",
            )
            for roles in (("system", "user", "assistant"),)
            for at in range(3)
        ),
    ],
)
def test_half_a_character_is_named_in_every_column(row, column, write):
    good = json.dumps(row).replace("\\" + HALF, "z")
    bad = json.dumps(row).replace("\\" + HALF, HALF)
    says = error_of(write("a.jsonl", f"{good}\n{bad}\n{bad}\n"))
    assert f"a.jsonl, line 2: column {column!r} holds half a character, '\\ud83d'" in says
    assert "(and 1 more: line 3)" in says


def test_half_a_character_is_named_in_the_json_of_a_cell(write):
    for column, cell in (("completion", ["b", HALF]), ("completion", [{"role": "assistant", "content": HALF}])):
        text = json.dumps(cell).replace("\\" + HALF, HALF).replace('"', '""')
        says = error_of(write("a.csv", f'prompt,{column}\na,b\nc,"{text}"\n'))
        assert f"a.csv, line 3: column {column!r} holds half a character, '\\ud83d'" in says


def test_bad_bytes_of_parquet_are_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    bad = pyarrow.array([b"fine", b"\xff\xfe", b"good \xed\xa0\xbd", b"x"]).cast(pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(4, bad.buffers()[1], bad.buffers()[2])
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c", "d"], "label": text}), tmp_path / "a.parquet")
    says = error_of(str(tmp_path / "a.parquet"))
    assert "a.parquet, row 1 (from 0): column 'label' must hold text in UTF-8; got the byte 0xff" in says
    assert says.endswith("(and 1 more: row 2 (from 0))")


def test_a_cell_may_be_long(write, monkeypatch):
    from zoray.tasks.file import task as file

    long = "great " * 30_000
    rows = [{"text": f"{long}{i}", "label": "ab"[i % 2]} for i in range(12)]
    paths = [write("a.jsonl", rows), write("a.csv", table(rows)), write("a.tsv", table(rows, "\t"))]
    found = [File(path).load() for path in paths]
    assert found[0] == found[1] == found[2]
    monkeypatch.setattr(file, "WHOLE", 2)
    assert tuple(File(paths[1]).load().train) == found[0].train


# labels


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ({False: " no", True: " yes"}, (False, True)),
        ({"False": " no", "True": " yes"}, (False, True)),
        ({"false": " no", "TRUE": " yes"}, (False, True)),
        ([" no", " yes"], (0, 1)),
        ({0.0: " no", 1.0: " yes"}, (0, 1)),
        ({"0": " no", "1": " yes"}, (0.0, 1.0)),
        ({-1: " no", 2.5: " yes"}, (-1.0, 2.5)),
        ({1e5: " no", "+2": " yes"}, ("100000", "2")),
        ({None: " no", "nan": " yes"}, ("null", "NaN")),
        ('{"None": " no", "it\'s: {x}": " yes"}', ("None", "it's: {x}")),
        ("{no: ' no', 'on': ' yes'}", ("no", "on")),
        ({"caf\u00e9": " no", "\u65e5": " yes"}, ("caf\u00e9", "\u65e5")),
    ],
)
def test_every_label_may_have_a_word_and_is_the_same_in_each_format(words, labels, tmp_path):
    rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(12)]
    found = [File(path, words).load() for path in in_all(tmp_path, rows)]
    assert all(splits == found[0] for splits in found)
    assert {(int(str(e.prompt)[1:].split()[0]) % 2, e.options[e.label]) for e in every(found[0])} == {
        (0, " no"),
        (1, " yes"),
    }


def test_a_label_of_its_own_spelling_comes_first(write):
    path = write("a.csv", "text,label\na,True\nb,true\nc,TRUE\n")
    words = {"True": " x", "true": " y"}
    found = every(File(path, words, dev=1, test=0).load())
    assert {e.prompt: e.options[e.label] for e in found} == {"a It was": " x", "b It was": " y", "c It was": " x"}
    with pytest.raises(ConfigError, match="words must have each label once"):
        File(path, {1: " x", "1": " y", "2": " z"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("yes", "ye\u200bs"),
        ("yes", "yes\ufeff"),
        ("a b", "a\xa0b"),
        ("a b", "a  b"),
        ("\uff41", "a"),
        ("x\ufe0f", "x"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_labels_that_look_alike_are_refused(one, other, tmp_path):
    rows = [{"text": f"t{i}", "label": (one, other, "z")[i % 3]} for i in range(12)]
    for path in in_all(tmp_path, rows):
        says = error_of(path)
        assert "expected labels that" in says and ascii(one) in says and ascii(other) in says, says
        assert "Write them alike, or give " in says
    says = error_of(path, words={one: " a", "z": " b"})
    assert f"label {other!a} has no word; words has {one!a}, " in says


@pytest.mark.parametrize("labels", [("cafe", "caf\u00e9"), ("\u0939\u0948", "\u0939"), ("\u0e01", "\u0e01\u0e48")])
def test_labels_that_differ_in_an_accent_are_two(labels, write):
    rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(12)]
    assert len(every(File(write("a.jsonl", rows)).load())[0].options) == 2


# spaces


@pytest.mark.parametrize(
    ("before", "after", "put"),
    [
        ("Q: a", "b", " "),
        ("Answer:", "Paris", " "),
        ("____", "Paris", " "),
        ("a ", "b", ""),
        ("a", "\nb", ""),
        ("a\u3000", "b", ""),
        ("\u9996\u90fd0\u306f", "\u6771\u4eac", ""),
        ("\u9996\u90fd?", "Paris", ""),
        ("\u7b54\u3048\uff1a", "Paris", ""),
        ("A:", "\u6771\u4eac", ""),
        ("It was", "\u826f\u3044", " "),
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07", "\u0e01\u0e23\u0e38\u0e07", ""),
        ("\uc218\ub3c4\ub294", "\uc11c\uc6b8", " "),
        ("\u0441\u0442\u043e\u043b\u0438\u0446\u0430", "\u041c\u043e\u0441\u043a\u0432\u0430", " "),
        ("def f(", "x):", ""),
        ("f(x", "):", ""),
        ("2 + 2 =", "4", " "),
        ("", "\u826f\u3044", ""),
        ("", "good", " "),
    ],
)
def test_a_space_is_put_where_the_script_has_one(before, after, put):
    assert gap(before, after) == put
    bare = not before[-1:].isspace() and not after[:1].isspace()
    assert gap(before, after, True) == " " * bare and gap(before, after, False) == ""


def test_the_setting_for_spaces_reaches_every_kind(tmp_path):
    same = {"completion": "c", "chosen": "x", "rejected": "y"}
    rows = [{"prompt": f"p{i}", "text": f"t{i}", "label": "ab"[i % 2], **same} for i in range(12)]
    for path in in_all(tmp_path, rows):
        for space, before in ((None, " "), (True, " "), (False, "")):
            options = {"space": space}
            assert {e.answers for e in every(File(path, kind="completion", **options).load())} == {(f"{before}c",)}
            chosen = every(File(path, kind="preference", **options).load())
            assert {e.options for e in chosen} == {(f"{before}x", f"{before}y")}
            found = every(File(path, kind="choice", **options).load())
            assert {e.options for e in found} == {(f"{before}a", f"{before}b")}
    lines = File(path, kind="completion").describe()
    assert "a space is put before the completions, which have none (task.space=false for none)" in lines
    assert not any("a space is" in line for line in File(path, kind="completion", space=False).describe())


def test_labels_of_a_script_without_spaces_have_none(tmp_path, write):
    rows = [{"text": f"t{i}", "label": ("\u826f\u3044", "\u60aa\u3044")[i % 2]} for i in range(12)]
    for path in in_all(tmp_path, rows):
        assert every(File(path, template="{text}\u3053\u308c\u306f").load())[0].options == (
            "\u60aa\u3044",
            "\u826f\u3044",
        )
        assert every(File(path).load())[0].options == (" \u60aa\u3044", " \u826f\u3044")


# instructions, optional columns


def test_instruction_data_sets_are_read_as_they_are(tmp_path):
    rows = [{"instruction": f"Do {i}", "input": "" if i % 3 else f"with {i}", "output": "done"} for i in range(12)]
    loaded = [File(path).load() for path in in_all(tmp_path, rows)]
    assert all(splits == loaded[0] for splits in loaded)
    found = every(loaded[0])
    assert {e.prompt for e in found} == {f"Do {i}\n" if i % 3 else f"Do {i}\nwith {i}\n" for i in range(12)}
    assert {e.answers for e in found} == {("done",)}
    chat = every(File(str(tmp_path / "r.csv"), chat=True).load())
    assert {e.prompt[0].content for e in chat if len(e.prompt) == 1} == {str(e.prompt).rstrip("\n") for e in found}
    lines = File(str(tmp_path / "r.csv")).describe()
    assert "prompt: '{instruction}\\n{input?}\\n'" in lines and "columns: 'output' is the completion" in lines
    bare = [{"Instruction": row["instruction"], "Output": "done"} for row in rows]
    assert "Do 1\n" in {e.prompt for e in every(File(write_rows(tmp_path / "b.jsonl", bare)).load())}


def test_instructions_may_have_a_system_text_and_earlier_turns(tmp_path):
    rows = [
        {
            "instruction": f"Do {i}",
            "output": "done",
            "system": "Be kind." if i else None,
            "history": [["a", "b "]] * (i % 2),
        }
        for i in range(12)
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = {e.prompt[-1].content: e.prompt for e in every(File(path, chat=True).load())}
    said = (Message("user", "a"), Message("assistant", "b"))
    assert found["Do 1"] == (Message("system", "Be kind."), *said, Message("user", "Do 1"))
    assert found["Do 2"] == (Message("system", "Be kind."), Message("user", "Do 2"))
    assert found["Do 0"] == (Message("user", "Do 0"),)
    assert "line 2: column 'history' holds earlier turns, which a plain text has no place for. Set task.chat=true" in (
        error_of(path)
    )
    cells = [{**row, "system": row["system"] or "", "history": json.dumps(row["history"])} for row in rows]
    table_path = write_rows(tmp_path / "a.csv", table(cells))
    assert {e.prompt[-1].content: e.prompt for e in every(File(table_path, chat=True).load())} == found
    plain = [{**row, "history": []} for row in rows]
    prompts = {e.prompt for e in every(File(write_rows(tmp_path / "b.jsonl", plain)).load())}
    assert {"Do 0\n", "Be kind.\n\nDo 1\n"} <= prompts
    wrong = [{**row, "history": "hello"} for row in rows]
    assert "must hold pairs of texts, [[asked, answered], ...]; got 'hello'" in (
        error_of(write_rows(tmp_path / "c.jsonl", wrong), chat=True)
    )


@pytest.mark.parametrize(
    ("template", "whole", "without"),
    [
        ("{a}\n{b?}\n", "A\nB\n", "A\n"),
        ("{a}\n\n{b?}\n\nAnswer:", "A\n\nB\n\nAnswer:", "A\n\nAnswer:"),
        ("In: {a}\nWith: {b?}\nOut:", "In: A\nWith: B\nOut:", "In: A\nOut:"),
        ("{b?}\n\n{a}", "B\n\nA", "A"),
        ("{a} {b?}: ", "A B: ", "A: "),
        ("{a}{b?}", "AB", "A"),
    ],
)
def test_an_optional_column_may_be_empty(template, whole, without, tmp_path):
    rows = [{"a": f"A{i}", "b": "" if i % 2 else f"B{i}", "label": "xy"[i % 3 > 0]} for i in range(12)]
    for path in in_all(tmp_path, rows):
        found = {e.prompt for e in every(File(path, template=template).load())}
        meant = {(without if i % 2 else whole).replace("A", f"A{i}", 1) for i in range(12)}
        assert found == {text.replace("B", f"B{i}") if (i := _number(text)) % 2 == 0 else text for text in meant}
    missing = [{key: value for key, value in row.items() if value} for row in rows]
    assert {e.prompt for e in every(File(write_rows(tmp_path / "m.jsonl", missing), template=template).load())} == found
    says = error_of(path, template="{a}{b}")
    assert "column 'b' must hold text; got ''. Remove the row, or write {b?} in task.template" in says
    assert "(and 5 more: " in says and " and 2 others)" in says
    assert "expected a column in task.template that may not be empty" in error_of(path, template="{b?}")
    assert "got {c?}; the columns are 'a', 'b', 'label'" in error_of(path, template="{a} {c?}")


def _number(text: str) -> int:
    return int("".join(filter(str.isdigit, text)))


def test_values_are_no_templates():
    template = Template(("", "\n", ""), ("a", "b"), (False, True))
    assert template.fill(["{b?}\n", ""]) == "{b?}" and template.fill(["x\n", "y"]) == "x\n\ny"


def test_the_advice_for_instructions_keeps_their_input(write):
    says = error_of(write("a.csv", "instruction,context,response\na,b,c\n"))
    assert (
        "'task.template=\"{instruction}\\n{context?}\\n\"' task.completion_column=response makes it completion" in says
    )


# quotes


SWALLOWED = '"It was great, he said\tyes\nthe film\tno\nthe plot is dull\tno\nthe end"\tyes\nx\tno\n'


def test_a_quote_swallows_no_rows(write):
    says = error_of(write("a.tsv", f"text\tlabel\n{SWALLOWED}"))
    assert "a.tsv, line 2: a cell that begins with a quote goes on over 4 lines, each of which has 2 cells. " in says
    says = error_of(write("a.csv", f"text,label\na,yes\nb,no\n{SWALLOWED.replace(', ', ' ').replace(chr(9), ',')}"))
    assert (
        "a.csv, line 4: a cell that begins with a quote goes on over 4 lines, each of which has a label in column 'l"
        in says
    )
    quoted = SWALLOWED.replace('"It', '"""It').replace("said\t", 'said"\t').replace('the end"', '"the end"""')
    found = every(File(write("b.tsv", f"text\tlabel\n{quoted}"), dev=1, test=0).load())
    assert {e.prompt for e in found} >= {'"It was great, he said It was', 'the end" It was'} and len(found) == 5


def test_lines_that_could_be_rows_are_mentioned(write):
    path = write("a.csv", 'prompt,completion\n"Dear Ann, hello\nyours Ben",x\n"a\nb",y\nc,z\n')
    lines = File(path, dev=1, test=0).describe()
    assert any(
        line.startswith(
            f"cells go on over several lines in 2 rows, first in {path}, line 2. Of 1 of them each line could be a row"
        )
        for line in lines
    )
    assert lines[0].endswith("3 rows, completion")


@pytest.mark.parametrize("sign", [";", "|", "\t", ","])
def test_a_spreadsheet_may_name_its_separator(sign, write):
    path = write("a.csv", f"sep={sign}\r\ntext{sign}label\r\na{sign}x\r\nb{sign}y\r\n")
    assert {e.prompt for e in every(File(path, dev=1, test=0).load())} == {"a It was", "b It was"}


def test_rows_without_anything_are_counted(write):
    path = write("a.csv", "text,label\na,x\n,\n\n  \nb,y\n , \n")
    assert "left out, since all their cells are empty: 2 rows" in File(path, dev=1, test=0).describe()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", "text,label\na,b\n", "columns are separated by commas, call it .csv"),
        ("a.csv", "text\tlabel\na\tb\n", "columns are separated by tabs, call it .tsv"),
        ("a.csv", "text|label\na|b\n", "If columns are separated by '|', separate them by commas"),
        ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "a.csv, line 1: not UTF-8 (UTF-16, it seems)"),
        ("a.csv", b"text,label\n\xe9,a\nb,c\n\xe9\xe9,d\n", "line 2: not UTF-8 at character 1"),
        ("a.csv", b"text,label\n\xe9,a\nb,c\n\xe9\xe9,d\n", "(and 1 more: line 4)"),
        ("a.csv", "text,label\na\nb,x\nc,d,e\n", "(and 1 more: line 4)"),
        ("a.csv", 'text,label\na,"b\n', "the quote at character 3 is not closed"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{\n{"text": 1, "label": "x"}\n[]\n}\n', "(and 1 more: line 5)"),
        ("a.jsonl", '{"prompt": "a", "wanted": ' + "[" * 150 + "]" * 150 + "}", "'wanted' holds more than 100 lists"),
    ],
)  # fmt: skip
def test_what_a_file_may_be_wrong_in_otherwise(name, content, says, write):
    assert says in error_of(write(name, content))


# names that come twice


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a", "label": "x", "text": "b"}', "line 2: expected each key once; got 'text' twice"),
        ('{"text": "a", "label": "x", "m": [{"n": {"k": 1, "k" : 1}}]}', "line 2: expected each key once; got 'k'"),
        ('{"text":"\\":","label":"x","label":"x"}', "got 'label' twice"),
        ('{"text": "a", "label": "x", " text": "b"}', "line 2: expected each column once; got 'text' and ' text'"),
        ('{"text": "a", "Text": "b", "TEXT": "c", "label": "x"}', "called text; got 'text' and 'Text' and 'TEXT'. Re"),
    ],
)  # fmt: skip
def test_keys_that_come_twice_are_refused(line, says, write):
    assert says in error_of(write("a.jsonl", f'{{"text": "z", "label": "y"}}\n{line}\n'))


def test_keys_that_come_twice_in_a_cell_are_refused(write):
    turns = (
        '[{""role"": ""user"", ""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]'
    )
    for name in ("messages", "prompt"):
        says = error_of(write("a.csv", f'{name}\n"{turns}"\n'))
        assert f"line 2: column '{name}'" in says and "expected each key once; got 'role' twice" in says


def test_a_colon_in_a_text_is_no_key(write):
    rows = [{"text": f'say "{i}": "x" : y', "label": "xy"[i % 2], "m": [{"k": 1}, {"k": 1}]} for i in range(12)]
    assert len(every(File(write("a.jsonl", rows)).load())) == 12


def test_columns_that_come_twice_are_refused_everywhere(tmp_path, write):
    import pyarrow
    from pyarrow import parquet

    for names, says in (
        (("text", "text", "label"), "expected each column once; got 'text' twice"),
        (("text", " text", "label"), "expected each column once; got "),
        (("Text", "TEXT", "label"), "expected one column called text; got 'Text' and 'TEXT'"),
    ):
        parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a", "b"])] * 3, names), tmp_path / "a.parquet")
        assert says in error_of(str(tmp_path / "a.parquet"))
        assert says in error_of(write("a.csv", f"{','.join(names)}\na,b,c\n"))
    path = write("b.csv", "Text,TEXT,label\na,b,x\nc,d,y\n")
    assert {e.prompt for e in every(File(path, text_column="TEXT", dev=1, test=0).load())} == {"b It was", "d It was"}


def test_a_column_is_found_however_its_name_is_composed(write):
    path = write("a.csv", "cafe\u0301, label \na,x\nb,y\n")
    assert len(every(File(path, text_column="caf\u00e9", dev=1, test=0).load())) == 2


# the first row


def test_all_rows_say_what_columns_there_are(write):
    full = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)]
    bare = [{"prompt": f"q{i}"} for i in range(3)]
    says = error_of(write("a.jsonl", bare[:1] + full + bare[1:]))
    assert "a.jsonl, line 1: no value for column 'completion'; the row has ['prompt']" in says
    assert "(and 2 more: line 14, line 15)" in says
    path = write("b.jsonl", [*full, {"prompt": "r", "messages": []}])
    assert "b.jsonl, line 1 ('messages' from line 13 on): the columns 'prompt', 'completion', 'messages'" in error_of(
        path
    )


def test_a_column_that_comes_late_counts_as_well(write, monkeypatch):
    from zoray.tasks.file import task as file

    monkeypatch.setattr(file, "LOOK", 3)
    rows = [{"prompt": f"p{i}"} for i in range(12)] + [{"prompt": "q", "completion": "c"}]
    assert "a.jsonl, line 1: no value for column 'completion'" in error_of(write("a.jsonl", rows))
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)] + [{"prompt": "q", "completion": "c", "id": 1}]
    assert len(every(File(write("b.jsonl", rows)).load())) == 13
