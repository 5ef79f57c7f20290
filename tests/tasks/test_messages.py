"""What messages may have besides role and content: weights, calls, tools, names, parts."""

from __future__ import annotations

import json

import pytest
from chatty import TEMPLATE
from rows import write_parquet, write_rows
from tiny import tiny_tokenizer

from zoray.models.tokens import Encoder
from zoray.records import ConfigError, Example
from zoray.scoring.objectives import AnswerNLL
from zoray.tasks.file.task import File

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TAKES = (
    "{% if tools %}<s>{{ tools | tojson }}</s>\n{% endif %}{% for m in messages %}<s>{{ m.role }}"
    "{% if m.name %} {{ m.name }}{% endif %}{{ '\n' + m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def encoder(template: str = TEMPLATE) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def said(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def loaded(tmp_path, rows, suffix="jsonl", **settings) -> Example:
    """The example of the first row; a second one is dev."""
    other = json.loads(json.dumps(rows[0]).replace("x0", "x1"))
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        cells = [{key: json.dumps(value).replace('"', '""') for key, value in row.items()} for row in (*rows, other)]
        text = "".join(",".join(f'"{row[key]}"' for key in rows[0]) + "\n" for row in cells)
        write_rows(path, ",".join(rows[0]) + "\n" + text)
    elif suffix == "parquet":
        write_parquet(path, [*rows, other])
    else:
        write_rows(path, [*rows, other])
    splits = File(str(path), dev=1, test=0, **settings).load()
    return next(e for e in (*splits.train, *splits.dev) if "x0" in str(e.prompt))


def trained(example: Example, template: str = TEMPLATE) -> str:
    one = encoder(template)
    (sequence,) = AnswerNLL().encode(example, one)
    return one.tokenizer.decode(sequence.targets.tolist())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("weights", "learnt"),
    [
        ((None, None), "bad</s>good</s>"),
        ((1, 1), "bad</s>good</s>"),
        ((0, 1), "good</s>"),
        ((0, None), "good</s>"),
        ((1, 0), "bad</s>"),
    ],
)
def test_turns_of_weight_0_are_not_learnt(suffix, weights, learnt, tmp_path):
    first, second = ({} if weight is None else {"weight": weight} for weight in weights)
    row = {"messages": [user("x0"), said("bad", **first), user("again"), said("good", **second)]}
    assert trained(loaded(tmp_path, [row], suffix)) == learnt


@pytest.mark.parametrize(("also", "column"), [({}, "completion"), ({"rejected": "bad"}, "chosen")])
def test_an_answer_of_weight_0_is_refused(also, column, tmp_path):
    with pytest.raises(ConfigError, match=rf"line 1: column '{column}': its answer has weight 0"):
        loaded(tmp_path, [{"prompt": [user("x0")], column: [said("good", weight=0)], **also}])


def test_the_last_turn_alone_is_learnt_by_a_setting(tmp_path):
    row = {"messages": [user("x0"), said("bad"), user("again"), said("good")]}
    assert trained(loaded(tmp_path, [row], turns="last")) == "good</s>"
    pair = {"prompt": row["messages"][:3], "completion": [row["messages"][3]]}
    assert trained(loaded(tmp_path, [pair])) == "good</s>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([user("x0"), said("a", weight=0)], "all messages of the assistant have weight 0"),
        ([user("x0"), said("a", weight=0.5)], r"message 2: weight must be 0 \(not learnt\) or 1; got 0\.5"),
        ([user("x0"), said(None)], "message 2: content must be text; got None"),
        ([user([{"type": "image_url", "image_url": {"url": "x0"}}]), said("a")], r"message 1, part 1: expected .*text"),
        ([user([{"type": "text", "text": "x0", "x": 1}]), said("a")], "message 1, part 1"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_with_its_number(messages, says, tmp_path):
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 1: column 'messages'.*{says}"):
        loaded(tmp_path, [{"messages": messages}])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_calls_and_tools_are_what_the_template_writes(suffix, tmp_path):
    row = {"messages": [user("x0"), said("let me see", tool_calls=[CALL])], "tools": TOOLS}
    example = loaded(tmp_path, [row], suffix)
    assert trained(example, TAKES) == 'let me seef{"a": 1}</s>'
    assert encoder(TAKES).text(example.prompt).startswith('<s>[{"type": "function"')
    with pytest.raises(
        ConfigError, match=r"does not write 'tool_calls' and 'tools', which would be lost.*task\.ignore="
    ):
        trained(example)
    assert trained(loaded(tmp_path, [row], suffix, ignore=("tools", "tool_calls"))) == "let me see</s>"


@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_text_that_becomes_a_chat_keeps_its_tools(column, tmp_path):
    row = {column: "x0", "output": "great", "tools": TOOLS}
    named = {"completion_column": "output"} if column == "prompt" else {}
    example = loaded(tmp_path, [row], chat=True, **named)
    assert [message.role for message in example.prompt] == ["tools", "user"]
    with pytest.raises(ConfigError, match="does not write 'tools', which would be lost"):
        trained(example)
    assert trained(loaded(tmp_path, [row], chat=True, ignore=("tools",), **named)) == "great</s>"


def test_an_answer_may_be_a_call_alone(tmp_path):
    row = {"messages": [user("x0"), said(None, tool_calls=[CALL]), {"role": "tool", "content": "7"}, said("seven")]}
    assert trained(loaded(tmp_path, [row]), TAKES) == 'f{"a": 1}</s>seven</s>'
    row = {"messages": [user("x0"), said(None, tool_calls=[CALL])]}
    assert trained(loaded(tmp_path, [row]), TAKES) == 'f{"a": 1}</s>'


@pytest.mark.parametrize("key", ["name", "refusal", "reasoning_content", "audio", "tool_call_id", "id"])
def test_keys_that_the_template_leaves_out_are_refused_by_name(key, tmp_path):
    row = {"messages": [user("x0", **{key: "Ann"}), said("great")]}
    example = loaded(tmp_path, [row])
    with pytest.raises(ConfigError, match=rf"does not write '{key}', .*'task\.ignore=\[{key}\]'"):
        trained(example)
    assert trained(loaded(tmp_path, [row], ignore=(key,))) == "great</s>"
    empty = {"messages": [user("x0", **{key: None}), said("great")]}
    assert trained(loaded(tmp_path, [empty])) == "great</s>"
    if key == "name":
        assert "<s>user Ann\nx0" in encoder(TAKES).text(example.prompt)


def test_a_role_that_the_template_leaves_out_is_refused(tmp_path):
    row = {"messages": [user("x0"), said("a"), {"role": "tool", "content": "7"}, said("seven")]}
    template = "{% for m in messages if m.role != 'tool' %}" + TEMPLATE.split("%}", 1)[1]
    with pytest.raises(ConfigError, match="does not write messages of the role tool"):
        trained(loaded(tmp_path, [row]), template)


def test_parts_of_text_are_lines(tmp_path):
    parts = [{"type": "text", "text": "x0"}, {"type": "text", "text": "b", "image_url": None}]
    example = loaded(tmp_path, [{"messages": [user(parts), said([{"type": "text", "text": "great"}])]}])
    assert example.prompt[0].content == "x0\nb" and trained(example) == "great</s>"
