"""Settings that are printed: pasted into bash and read by Hydra they are the very values that were meant."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rows import write_rows

from zoray.records import ConfigError
from zoray.records.overrides import mapping_of, setting, unescaped
from zoray.records.signatures import check_signature
from zoray.run.config import build, compose
from zoray.tasks.file.task import File

SIGNS = list('ab n\\\\\\""\'$${}{},:=[]()\n\t é日|&!#~`*?<>;-0.\u200b')
TEXTS = ("", "null", "True", "1", "a b", "it's", '"', "\\", "\\n", "\\\\n", "a\\", "${x}", "\\${x}", "a\nb", "$(ls)",
         "`ls`", "café", "日本", "{text}\nIt was", "x\\\n", "~", "*", "-x", "a=b", "#a")  # fmt: skip
PRINTED = re.compile(r"(?:'task\.[a-z_]+=(?:[^']|'\"'\"')*'|task\.[a-z_]+=[^\s',;]+)(?: task\.[a-z_]+=[^\s',;]+)*")


def pasted(*settings: str) -> list[str]:
    """The arguments that bash makes of words that are pasted."""
    show = 'for argument in "$@"; do printf "%s\\0" "$argument"; done'
    script = "".join(f"set -- {words}\n{show}\n" for words in settings)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert not done.stderr, done.stderr
    return done.stdout.decode().split("\0")[:-1]


def values() -> list[Any]:
    """Odd values, the same each time."""
    draw, found = random.Random(1), list[Any](TEXTS)
    for _ in range(300):
        text = "".join(draw.choice(SIGNS) for _ in range(draw.randrange(9)))
        found += [text, [text, "x"], {text or "x": text}]
    return [*found, None, True, False, 3, -2.5, 1e-9, 1e22, {"0": " no", "1": " yes"}, {"True": " a", "true": " b"}]


def test_what_is_printed_can_be_pasted():
    meant = values()
    arguments = pasted(*(setting("task.words", value) for value in meant))
    assert len(arguments) == len(meant)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parser = OverridesParser.create()
    for argument, value in zip(arguments, meant, strict=True):
        read = OmegaConf.to_container(OmegaConf.create({"a": parser.parse_override(argument).value()}), resolve=True)
        got: Any = read["a"]  # type: ignore[index]
        if isinstance(value, dict):
            got = mapping_of(unescaped(got)) if isinstance(got, str) else {str(k): unescaped(v) for k, v in got.items()}
        elif isinstance(value, list):
            got = [unescaped(item) for item in got]
        assert (unescaped(got) if isinstance(got, str) else got) == value, argument


def test_a_line_break_may_be_typed(capsys):
    typed = ['task.template="{text}\\nIt was"', 'task.stop=["\\n\\n", x]', 'task.words={a: "\\ta", b: " b"}']
    task = compose("config", ["task=file", "task.path=a.csv", *typed]).task
    assert (task.template, list(task.stop), dict(task.words)) == (
        "{text}\nIt was",
        ["\n\n", "x"],
        {"a": "\ta", "b": " b"},
    )
    assert "in task.template is read as a line break" in capsys.readouterr().err
    assert compose("config", ["task=file", 'task.template="{text}\\\\nabla"']).task.template == "{text}\\nabla"
    assert compose("config", ["task=file", "task.template='{text}\nIt\\d'"]).task.template == "{text}\nIt\\d"
    assert "note" not in capsys.readouterr().out
    part = "task.parts={mail: {task: file, path: a.csv, template: '{text}\\nIt'}, sst2: 1}"
    assert compose("config", ["task=mixture", part]).task.parts.mail.task.template == "{text}\nIt"


def test_labels_of_every_kind_may_have_words():
    for typed, labels in (
        ('{True: " a", False: " b"}', ["true", "false"]),
        ('{"True": " a", "no": " b"}', ["True", "no"]),
        ('{null: " a", 1.0: " b"}', ["null", "1.0"]),
        ('{null: " a", no: " b"}', ["null", "no"]),
        ('{"a b": " a", 007: " b"}', ["a b", "007"]),
        ('{12:30: " a", 2026-12-01: " b"}', ["12:30", "2026-12-01"]),
        ('{"café": " a", "x: y, z": " b"}', ["café", "x: y, z"]),
        ('"{\\"\\u65e5\\": \\" a\\", \\"b\\": \\" b\\"}"', ["日", "b"]),
        ('[" a", " b"]', ["0", "1"]),
        ("\"{no: ' a', on: ' b'}\"", ["no", "on"]),
    ):
        task = build(compose("config", ["task=file", "task.path=a.csv", f"task.words={typed}"]).task, "task")
        assert task.words == dict(zip(labels, (" a", " b"), strict=True)), typed


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("a.csv", "text,label\na,0\nb,1\nc,0\n", {}),
        ("a.jsonl", [{"text": "a", "label": i} for i in (3, 5, -1)], {}),
        ("a.csv", "text,label\na,Yes\nb,yes\nc,it's\n", {}),
        ("a.csv", "text,label\na,caf\u00e9\nb,cafe\u0301\nc,\u65e5\n", {}),
        ("a.csv", "the body,my label's category\na,b\n", {"kind": "choice"}),
        ("a.csv", "body,category\na,b\n", {}),
        ("a.csv", "Question,Answer\na,b\n", {}),
        ("a.csv", "\u554f,answer\na,b\n", {"prompt_column": "\u554f"}),
        ("a.csv", "instruction,context,response\na,b,c\n", {}),
        ("a.csv", "Text,TEXT,label\na,b,c\n", {}),
        ("it's a folder/x", "", {}),
    ],
)
def test_the_advice_of_errors_can_be_pasted_and_read(name, content, settings, tmp_path):
    path = write_rows(tmp_path / name, content)
    with pytest.raises(ConfigError) as error:
        File(path if content else str(Path(path).parent), **settings).load()
    found = PRINTED.findall(str(error.value)) or (["task.text_column=x"] if settings else [])
    assert found, error.value
    for words in found:
        config = compose("config", ["task=file", "task.path=a.csv", *pasted(words)])
        build(config.task, "task")


def test_values_that_are_no_text_say_how_to_write_one():
    settings = {"_target_": "zoray.tasks.File", "path": "a.csv"}
    for value, typed in (({"text": None}, "{text}"), (3, "3"), (True, "True")):
        with pytest.raises(ConfigError) as error:
            check_signature({**settings, "template": value}, "task")
        (argument,) = pasted(str(error.value).split("Write ")[1].removesuffix(" for text"))
        assert compose("config", ["task=file", argument]).task.template == typed


def test_what_is_no_mapping_is_said_to_be_none():
    assert mapping_of("{a: [1]}") is None and mapping_of("x") is None and mapping_of("{") is None
    assert mapping_of(json.dumps({"a": "\n"})) == {"a": "\n"}
    for override, says in (
        ("task.template=\udce9{text}", "task.template holds half a character, '\\\\udce9'"),
        ('task.words="[a"', "words must map labels"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(compose("config", ["task=file", "task.path=a.csv", override]).task, "task")
