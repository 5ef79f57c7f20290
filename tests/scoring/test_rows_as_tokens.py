"""Rows of files as tokens of a model: what is refused while they are made, where it stands, and what a run records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chatty import TEMPLATE, experiment
from rows import write_parquet, write_rows
from tiny import tiny_llama

from zoray.records import ConfigError, JournalError
from zoray.run import journal
from zoray.run.journal import make_header, read_journal
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Preference, Reward
from zoray.scoring.workload import load_workload
from zoray.tasks.file.task import File
from zoray.tasks.preview import preview

NOSYS = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + TEMPLATE
DATED = "<s>{{ strftime_now('%d %b %Y') }}</s>\n" + TEMPLATE
LONG = "great " * 300


def model(folder: Path, template: str | None = TEMPLATE, **special: str) -> Path:
    from transformers import AutoTokenizer

    tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if special:  # tokens that the model has no embedding for
        tokenizer.add_tokens([f"<filler{i}>" for i in range(512 - len(tokenizer))])
        tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
        tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, task: File, objective, tmp_path: Path, **settings):
    e = experiment(folder, task, objective, tmp_path / "runs", batch=1, **settings)
    return e, load_workload(e.spec)


def chat(text: str, answer: str = "great", system: bool = False) -> dict:
    first = [{"role": "system", "content": "be brief"}] if system else []
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": first + turns}


def written(tmp_path: Path, suffix: str, rows: list[dict]) -> str:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        return write_parquet(path, rows)
    if suffix == "jsonl":
        return write_rows(path, rows)
    lines = [",".join('"' + json.dumps(row["messages"]).replace('"', '""') + '"' for _ in "1") for row in rows]
    return write_rows(path, "messages\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("suffix", "place"), [("jsonl", "line 6"), ("csv", "line 7"), ("parquet", r"row 5 \(from 0\)")]
)
def test_a_chat_that_the_template_refuses_is_named_by_its_place(suffix, place, tmp_path):
    rows = [chat(f"x{i}", system=i in (5, 7, 8)) for i in range(10)]
    task = File(written(tmp_path, suffix, rows), dev=1, test=0)
    says = rf"a\.{suffix}, {place}, column 'messages': .*No system\. Change them\. 2 more rows are refused as well"
    with pytest.raises(ConfigError, match=says):
        loaded(model(tmp_path / "m", NOSYS), task, AnswerNLL(), tmp_path)


@pytest.mark.parametrize("objective", [AnswerNLL(), Reward("length", {"most": 20}, max_tokens=4)])
def test_what_is_too_long_is_named_by_its_place(objective, tmp_path):
    if isinstance(objective, AnswerNLL):  # the prompt is not at fault where another cell is
        rows = [{"prompt": f"x{i}", "completion": f"great {LONG if i == 2 else ''}"} for i in range(8)]
        task = File(write_rows(tmp_path / "b.jsonl", rows), dev=1, test=0)
        with pytest.raises(ConfigError, match=r"b\.jsonl, line 3: expected sequences of at most 256 tokens"):
            loaded(model(tmp_path / "m"), task, objective, tmp_path)
    rows = [{"prompt": f"x{i} {LONG if i in (2, 5) else ''}", "completion": "great"} for i in range(8)]
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0)
    says = (
        r"a\.jsonl, line 3, column 'prompt': expected sequences of at most 256 tokens.* 1 more row is refused as well"
    )
    with pytest.raises(ConfigError, match=says):
        loaded(model(tmp_path / "m"), task, objective, tmp_path)


@pytest.mark.parametrize(
    ("rows", "settings", "objective", "place"),
    [
        ([chat(f"x{i}") for i in range(3)], {}, AnswerNLL(), "line 1, column 'messages'"),
        ([{"prompt": f"<end> {i}", "completion": "a"} for i in range(3)], {}, AnswerNLL(), "line 1, column 'prompt'"),
        ([{"prompt": f"x{i}", "completion": "a <end>"} for i in range(3)], {}, AnswerNLL(), "line 1"),
        (
            [{"text": f"x{i}", "label": ["no", "yes"][i % 2]} for i in range(4)],
            {"words": {"no": " <end>", "yes": " great"}},
            ChoiceNLL(),
            "line 1",
        ),
        (
            [{"prompt": f"x{i}", "chosen": "a<end>", "rejected": "b"} for i in range(3)],
            {},
            Preference(),
            "line 1",
        ),
    ],
)
def test_a_token_that_the_model_does_not_know_is_named(rows, settings, objective, place, tmp_path):
    folder = model(tmp_path / "m", TEMPLATE.replace("</s>", "<end>"), end="<end>")
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0, **settings)
    says = rf"a\.jsonl, {place}: the tokenizer and the weights of .* token '<end>' has id 512, .* 512 embeddings"
    with pytest.raises(ConfigError, match=says):
        loaded(folder, task, objective, tmp_path)


def test_rows_with_control_tokens_are_read_as_text_and_counted(tmp_path):
    rows = [
        {"text": text, "label": label} for text, label in [("I <s>hate</s> it", "no"), ("b", "yes"), ("c<pad>", "no")]
    ]
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0)
    e, workload = loaded(model(tmp_path / "m"), task, ChoiceNLL(), tmp_path)
    tokens = [token for some in workload.encoded.values() for two in some for s in two for token in s.tokens.tolist()]
    assert not {1, 2, 3} & set(tokens)
    lines = "\n".join(preview(e.task, workload.splits, workload.encoder))
    assert (
        "2 examples have control tokens ('</s>', '<pad>', '<s>') as text" in lines
        and "task.control_tokens=true" in lines
    )
    e, workload = loaded(tmp_path / "m", replace(task, control_tokens=True), ChoiceNLL(), tmp_path)
    assert {1, 2} <= {t for some in workload.encoded.values() for two in some for s in two for t in s.tokens.tolist()}
    assert "control tokens" not in "\n".join(preview(e.task, workload.splits, workload.encoder))


def test_the_template_of_a_task_may_have_control_tokens(tmp_path):
    rows = [{"text": f"a</s>{i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0, template="<s>{text}</s> It was")
    _, workload = loaded(model(tmp_path / "m"), task, ChoiceNLL(), tmp_path)
    for sequence in workload.encoded["train"][0]:
        assert (sequence.tokens == 1).sum() == 1 and (sequence.tokens == 2).sum() == 1


def test_text_prompts_run_with_a_template_that_asks_otherwise_than_it_answers(tmp_path):
    """All that a run would find wrong after the model has loaded is found before; here nothing is."""
    folder = model(tmp_path / "m", TEMPLATE.replace("<s>assistant\n{% endif", "<s>assistant\n<think>{% endif"))
    rows = [{"prompt": text, "completion": "great"} for text in ("It was", "the film", "the plot", "the music")]
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0, metric="f1", max_tokens=4)
    _, workload = loaded(folder, task, AnswerNLL(), tmp_path)
    assert workload.encoder is not None and workload.encoder.stop_ids(()) == {2}
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: .*does not begin an answer"):
        loaded(folder, replace(task, chat=True), AnswerNLL(), tmp_path)


def test_a_run_keeps_its_date(tmp_path, monkeypatch):
    folder = model(tmp_path / "m", DATED)
    task = File(write_rows(tmp_path / "a.jsonl", [chat(f"x{i}") for i in range(4)]), dev=1, test=0)
    headers = []
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        monkeypatch.setenv("TZ", zone)
        headers.append(make_header(*loaded(folder, task, AnswerNLL(), tmp_path, date="2024-02-29")))
    assert headers[0] == headers[1] and headers[0]["run"]["date"] == "2024-02-29"
    e, workload = loaded(folder, task, AnswerNLL(), tmp_path)
    assert e.run.date and e.spec.date == e.run.date  # the day of the run, which its config.yaml has
    other = make_header(e, workload)
    assert other["run"]["examples"] != headers[0]["run"]["examples"]
    path = tmp_path / "journal.jsonl"
    journal.Journal.create(path, headers[0]).close()
    assert read_journal(path, headers[1]) is not None
    with pytest.raises(JournalError, match=r"run=|other examples"):
        read_journal(path, other)


def test_a_resumed_run_wants_the_rows_and_the_tokenizer_that_it_had(tmp_path):
    rows = [{"prompt": f"x{i}", "completion": "great"} for i in range(4)]
    task = File(write_rows(tmp_path / "a.jsonl", rows), dev=1, test=0)
    header = make_header(*loaded(model(tmp_path / "m"), task, AnswerNLL(), tmp_path))
    path = tmp_path / "journal.jsonl"
    journal.Journal.create(path, {**header, "run": {k: v for k, v in header["run"].items() if k != "date"}}).close()
    assert read_journal(path, header) is not None  # a journal that an earlier version wrote has no date
    write_rows(tmp_path / "a.jsonl", [{**row, "completion": "dull"} for row in rows])
    with pytest.raises(JournalError, match="was made with other examples"):
        read_journal(path, make_header(*loaded(tmp_path / "m", task, AnswerNLL(), tmp_path)))
