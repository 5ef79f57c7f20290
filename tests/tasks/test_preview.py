"""What is shown of a task before a run: its schema, and examples as the model reads them, with marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from rows import ROWS, write_rows
from tiny import tiny_tokenizer

from zoray.models.tokens import Encoder
from zoray.records import ConfigError, Example, Message, Splits
from zoray.tasks.file import task as file
from zoray.tasks.file.task import File
from zoray.tasks.preview import LONGEST, preview, rendered, shortened

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = (Message("system", "Be kind."), Message("user", "Hi"))
MORE = (*ASKED, Message("assistant", "Hello!"), Message("user", "Bye"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer)


@pytest.mark.parametrize(
    ("example", "lines"),
    [
        (Example("a film It was", (" bad", " good"), 1), ["a film It was» good«", "or, wrong: » bad«"]),
        (
            Example("one\ntwo:", (" a", " b", " c"), 2, also=(0,)),
            ["one", "two:» c«", "or, right: » a«", "or, wrong: » b«"],
        ),
        (
            Example("a", tuple(f" {k}" for k in range(9))),
            ["a» 0«", *(f"or, wrong: » {k}«" for k in range(1, 6)), "or one of 3 others"],
        ),
        (
            Example(ASKED, ("Yes", "No")),
            ["<system>Be kind.</s>", "<user>Hi</s>", "<assistant>»Yes</s>«", "or, wrong: »No</s>«"],
        ),
        (Example("Q: a\nA:", answers=(" b",)), ["Q: a", "A:» b«"]),
        (Example("Q:", answers=(" b", " c\n")), ["Q:» b«", "or, also right: ' c\\n'"]),
        (Example(ASKED, answers=("Yes",)), ["<system>Be kind.</s>", "<user>Hi</s>", "<assistant>»Yes</s>«"]),
        (
            Example(MORE, answers=(" Ciao\n",)),
            [
                "<system>Be kind.</s>",
                "<user>Hi</s>",
                "<assistant>»Hello!</s>«",
                "<user>Bye</s>",
                "<assistant>»Ciao</s>«",
            ],
        ),
        (Example("Tell me", data={"n": 1}), ["Tell me", "» the model goes on here «"]),
        (Example(ASKED), ["<system>Be kind.</s>", "<user>Hi</s>", "<assistant>", "» the model goes on here «"]),
    ],
)
def test_every_kind_of_example_is_shown_with_marks(example, lines, encoder):
    assert rendered(example, encoder) == lines


def test_what_is_marked_is_what_is_trained(encoder):
    """The marks of a chat stand around the very characters whose tokens the encoder asks for."""
    whole, spans = encoder.assistant_spans((*MORE, Message("assistant", "Ciao")))
    shown = "\n".join(rendered(Example(MORE, answers=("Ciao",)), encoder))
    assert shown.replace("»", "").replace("«", "") == whole.rstrip("\n")
    assert [part.split("«")[0] for part in shown.split("»")[1:]] == [whole[a:b] for a, b in spans]


def test_long_texts_lose_their_middle(encoder):
    text = "x" * LONGEST + "y" * LONGEST
    assert shortened("x" * LONGEST) == "x" * LONGEST
    assert shortened(text) == f"{'x' * 300} [... 600 characters ...] {'y' * 300}"
    for example in (
        Example(text, (" a" + text, " b")),
        Example(text, answers=(text, text)),
        Example(text),
        Example((Message("user", text), Message("assistant", text), Message("user", text)), answers=(text,)),
    ):
        lines = rendered(example, encoder)
        assert all(len(line) < 3 * LONGEST for line in lines) and " characters ...]" in " ".join(lines)
        assert sum(line.count("»") for line in lines) == sum(line.count("«") for line in lines) >= 1


def test_long_chats_lose_their_middle(encoder):
    turns = tuple(Message("user" if k % 2 == 0 else "assistant", str(k)) for k in range(99))
    lines = preview(None, Splits((Example(turns, answers=("end",)),), ()), encoder)
    assert len(lines) < 50 and lines[-1] == "    <assistant>»end</s>«" and "    [... 60 lines ...]" in lines


def shown(tmp_path: Any, rows: list[dict[str, Any]], encoder: Encoder, **settings: Any) -> list[str]:
    task = File(write_rows(tmp_path / "a.jsonl", rows), **settings)
    lines = preview(task, task.load(), encoder)
    assert lines[0].startswith(str(tmp_path))
    return [lines[0].removeprefix(f"{tmp_path}/"), *lines[1:]]


def test_a_choice_with_its_labels(tmp_path, encoder):
    lines = shown(tmp_path, ROWS + ROWS[:3], encoder)
    assert lines[:7] == [
        "a.jsonl: 53 rows, choice",
        "columns: 'text' is the text, 'label' is the label",
        "prompt: '{text} It was'",
        "labels: 'negative' as ' negative' (25), 'positive' as ' positive' (25)",
        "left out, since an earlier row has the same prompt: 3 rows",
        "examples: 40 train, 5 dev, 5 test",
        "",
    ]
    titles = [line for line in lines if line.startswith("training example")]
    assert titles == [f"training example {k}, as the model reads it:" for k in range(3)]
    assert "    text 37 It was» positive«" in lines and "    or, wrong: » negative«" in lines


def test_examples_of_all_labels_are_shown(tmp_path, encoder):
    rows = [{"text": f"text {i}", "label": "rare" if i in (3, 60) else "often"} for i in range(200)]
    lines = shown(tmp_path, rows, encoder, dev=1, test=0)
    assert sum(" rare«" in line and "or, " not in line for line in lines) == 1
    assert sum(line.startswith("training example") for line in lines) == 3


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        (
            {"prompt": "Q{i}", "completion": "A{i}"},
            {},
            ["a.jsonl: 20 rows, completion", "columns: 'prompt' is the prompt, 'completion' is the completion"],
        ),
        (
            {"prompt": "Q{i}", "completion": "A{i}"},
            {"chat": True},
            ["prompt: '{prompt}', as one message of a user", "    <assistant>»A0</s>«", "    <user>Q0</s>"],
        ),
        (
            {"messages": [{"role": "user", "content": "Q{i}"}, {"role": "assistant", "content": "A{i}"}]},
            {},
            ["a.jsonl: 20 rows, chat", "columns: 'messages' is the messages", "    <assistant>»A0</s>«"],
        ),
        (
            {"prompt": "Q{i}", "chosen": "A{i}", "rejected": "B{i}"},
            {},
            ["a.jsonl: 20 rows, preference", "    Q0» A0«", "    or, wrong: » B0«"],
        ),
        ({"prompt": "Q{i}"}, {}, ["a.jsonl: 20 rows, prompt", "    Q0", "    » the model goes on here «"]),
        ({"q": "Q{i}"}, {"template": "{q}?"}, ["a.jsonl: 20 rows, prompt", "prompt: '{q}?'", "    Q0?"]),
    ],
)
def test_files_of_the_other_kinds(row, settings, expected, tmp_path, encoder, monkeypatch):
    import json

    rows = [json.loads(json.dumps(row).replace("{i}", str(i))) for i in range(20)]
    monkeypatch.setattr("zoray.tasks.preview.EXAMPLES", 20)
    for limit in (20_000, 5):  # in memory, and read as asked
        monkeypatch.setattr(file, "WHOLE", limit)
        lines = shown(tmp_path, rows, encoder, **settings)
        assert [line for line in expected if line not in lines] == []
        assert "examples: 16 train, 2 dev, 2 test" in lines and "columns: " not in lines


def test_any_task_can_be_shown(encoder):
    @dataclass(frozen=True)
    class Plain:
        name: str = "x"

    examples = (Example("a", ("b", "c")), Example("d", ("b", "c")), Example("e", answers=("f",), part=1))
    lines = preview(Plain(), Splits(examples, examples[:1]), encoder)
    assert lines[:2] == ["task: plain", "examples: 3 train, 1 dev, 0 test"]
    assert [line for line in lines if line.startswith("    ") and "or" not in line] == [
        "    a»b«",
        "    d»b«",
        "    e»f«",
    ]
    lines = preview(Plain(), Splits(examples[:1], ()), encoder)
    assert sum(line.startswith("training") for line in lines) == 1


def test_a_chat_needs_a_chat_template():
    with pytest.raises(ConfigError, match="a chat template"):
        rendered(Example(ASKED), Encoder(tiny_tokenizer()))
