"""docs/your-data.md: its commands compose, its rows load as what they are said to be, and its errors come."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rows import every, write_rows
from tiny import tiny_tokenizer

from zoray.models.tokens import Encoder
from zoray.records import ConfigError
from zoray.run.config import build, compose
from zoray.tasks.file.task import File
from zoray.tasks.preview import preview

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "your-data.md").read_text()
ROWS = re.compile(r"^### [^\n]*: `(\w+)`\n\n```(csv|jsonl)\n(.*?)```", re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Arguments of every command that is spelled out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [
        shlex.split(line)[3:]
        for line in lines
        if re.match(r"\.venv/bin/python -m zoray\.(launch|plan) task=file", line)
    ]


@pytest.mark.parametrize("text", [DOC, (ROOT / "README.md").read_text()], ids=["docs", "README"])
def test_commands_have_settings_that_exist(text):
    found = commands(text)
    assert found
    for arguments in found:
        settings = [argument for argument in arguments if not argument.startswith("objective=")]
        task = build(compose("config", settings).task, "task")
        if task.path.startswith("examples/"):
            splits = File(**{**vars(task), "path": str(ROOT / task.path)}).load()
            assert len(splits.train) > 90


def test_what_is_shown_of_the_example_is_what_comes(monkeypatch):
    monkeypatch.chdir(ROOT)
    task = File("examples/mail.csv", template="{subject}: {text} This is")
    lines = preview(task, task.load(), Encoder(tiny_tokenizer()))
    block = next(block for block in DOC.split("```") if "200 rows, choice" in block).strip().splitlines()
    assert lines[: len(block)] == block and len(block) > 5
    assert "\n".join(Path("examples/mail.csv").read_text().splitlines()[:3]) in DOC


def test_rows_load_as_what_they_are_said_to_be(tmp_path):
    found = ROWS.findall(DOC)
    assert [kind for kind, _, _ in found] == ["choice", "completion", "chat", "preference", "prompt"]
    for kind, suffix, content in found:
        task = File(write_rows(tmp_path / f"{kind}.{suffix}", content), dev=1, test=0)
        assert len(every(task.load())) == 2
        assert task.describe()[0].endswith(f"2 rows, {kind}")


SAYS: list[tuple[str, Any, dict[str, Any]]] = [
    ("mail.csv", "body,category\na,b\n", {}),
    ("mail.csv", "text,label,messages\na,b,c\n", {}),
    ("mail.csv", "text,label\na,no\nb, c,yes\n", {}),
    ("mail.csv", 'text,label\na,no\n"b,yes\n', {}),
    ("mail.csv", b"text,label\na,no\nOl\xe9\xe9,yes\n", {}),
    ("mail.csv", "text,label\na,no\n,yes\n,yes\na,no\nb,no\n,yes\nc,no\n,yes\n,yes\n,no\n", {}),
    ("mail.tsv", 'text\tlabel\n"a, he said\tno\nthe end"\tyes\n', {}),
    ("mail.csv", "text,label\na,no\nb,meh\n", {"words": {"no": " no", "yes": " yes"}}),
    ("mail.csv", "text,label\na,0\nb,1\n", {}),
    ("mail.csv", "text,label\na,Urgent\nb,urgent\nc,private\n", {}),
    (
        "chat.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": }\n',
        {},
    ),
    ("chat.jsonl", '\n{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}\n', {}),
    ("chat.jsonl", '\n{"messages": [{"role": "user", "content": "a"}]}\n', {}),
    ("mail.xlsx", "", {}),
]


def test_errors_are_those_that_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoted = DOC.split("## Mistakes")[1].split("```")[1].strip().splitlines()
    assert len(quoted) == len(SAYS)
    for (name, content, settings), expected in zip(SAYS, quoted, strict=True):
        write_rows(Path(name), content)
        with pytest.raises(ConfigError) as error:
            File(name, **settings).load()
        assert str(error.value) == expected
