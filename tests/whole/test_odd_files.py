"""Odd files, made from a seed: whatever is in one, it ends in a run or in one line that says what is wrong.

Guarantees: no traceback; no row goes missing unsaid; what two formats can both say is read alike from both.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from local_pool import LocalPool
from rows import every, write_parquet, write_rows

import zoray.scoring.workload
from zoray import launch, plan
from zoray.records import ConfigError, Splits
from zoray.run import driver
from zoray.run.config import compose, guarded
from zoray.serving.learning.experiments import lessons
from zoray.serving.learning.job_requests import NewJob
from zoray.serving.store import Store
from zoray.tasks.file.task import File

PIECES = (
    *(
        "a",
        "good",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\r",
        '"',
        '""',
        "'",
        ",",
        ";",
        "|",
        "\\",
        "\\n",
        "{text}",
        "{",
        "[",
        "]",
    ),
    *(":", "é", "e\u0301", "東京", "ไทย", "😀", "\u200b", "\ufeff", "\xa0", "\u2028", "\x0b", "\x00", "<s>", "</s>"),
    *("null", "1", "-"),
)
LABELS = (
    ("no", "yes"),
    (0, 1),
    (False, True),
    ("1.0", 2.5),
    ("None", "nan"),
    ("é", "e\u0301"),
    ("Yes", "yes"),
    ("良い", "悪い"),
    ("a b", "it's"),
    ("", "x"),
)
INSERTED = (b'"', b'"', b"'", b",", b"\t", b";", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\\",
            b"\xed\xa0\xbd", b"{", b"}", b"]", b"\\ud83d", b'","', b'"\n"', b'"label": 1, ')  # fmt: skip
KINDS = ("choice", "completion", "preference", "prompt", "chat", "instruction")


class Odd:
    """A source of odd rows and files; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self) -> str:
        """Odd text; now and then nothing."""
        draw = self._random
        if draw.random() < 0.02:
            return "word " * 30_000
        return "".join(draw.choice(PIECES) for _ in range(draw.choice((0, 1, 1, 2, 3, 5, 8))))

    def rows(self, odd: float = 0.5) -> list[dict[str, Any]]:
        """Rows of one kind, each with a number of its own in its prompt."""
        draw = self._random
        kind, labels = draw.choice(KINDS), draw.choice(LABELS)
        return [self._row(kind, labels, number, odd) for number in range(draw.choice((1, 5, 9, 9)))]

    def _row(self, kind: str, labels: tuple[Any, ...], number: int, odd: float) -> dict[str, Any]:
        def text(plain: str) -> str:
            return self.text() if self._random.random() < odd else plain

        asked = f"<{number}> {text('a film')}"
        if kind == "choice":
            return {"text": asked, "label": labels[number % 2]}
        if kind == "completion":
            return {"prompt": asked, "completion": text("it is").lstrip("[")}
        if kind == "preference":
            return {"prompt": asked, "chosen": text("good"), "rejected": text("bad")}
        if kind == "instruction":
            return {"instruction": asked, "input": text(""), "output": text("it is").lstrip("[")}
        if kind == "chat":
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text("it is")}]
            return {"messages": json.dumps(turns)}
        return {"prompt": asked, "wanted": text("x")}

    def broken(self, content: bytes) -> bytes:
        """A file with something put into it, or in another encoding, or without its end."""
        draw = self._random
        way = draw.random()
        if way < 0.05:
            return content.decode(errors="replace").encode(draw.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32")))
        if way < 0.1:
            return content[: draw.randrange(len(content))]
        for _ in range(draw.choice((1, 1, 2, 3))):
            place = draw.randrange(len(content) + 1)
            if draw.random() < 0.6:  # where a cell begins or ends
                edges = [found.start() + draw.randrange(2) for found in re.finditer(rb"[\t\n,;]", content)]
                place = draw.choice(edges or [place])
            content = content[:place] + draw.choice(INSERTED) + content[place:]
        return content

    def value(self, depth: int = 0) -> Any:
        """A value that JSON can say."""
        draw = self._random
        kind = draw.randrange(8 if depth < 4 else 6)
        if kind < 6:
            return (self.text(), draw.choice((0, -1, 2.5, 1e300, 10**30)), None, True, "\ud83d", [])[kind]
        names = ("role", "content", "text", "label", "prompt", "completion", "a")
        if kind == 6:
            return {draw.choice(names): self.value(depth + 1) for _ in range(draw.randrange(4))}
        return [self.value(depth + 1) for _ in range(draw.randrange(4))]

    def nested(self) -> list[Any]:
        """Lines of JSON that are rows in most places and anything in some."""
        return [self.value() if self._random.random() < 0.1 else {**row, **self._more()} for row in self.rows(0.1)]

    def _more(self) -> dict[str, Any]:
        draw = self._random
        names = ("text", "label", "prompt", "completion", "messages", "chosen", "history", "Text", " text", "x")
        return {draw.choice(names): self.value()} if draw.random() < 0.2 else {}


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    """Rows as CSV or TSV, as Python writes it."""
    target = io.StringIO()
    writer = csv.DictWriter(target, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().encode()


def outcome(path: str, **settings: Any) -> tuple[Splits | None, str]:
    """The splits of a file and what is said of it; or what it is refused with, in one line."""
    task = File(path, **{"dev": 1, "test": 0} | settings)
    try:
        return task.load(), "\n".join(task.describe())
    except ConfigError as error:
        said = str(error)
        assert len(said) > 10 and "\n" not in said, said
        return None, said


def numbers(splits: Splits) -> list[set[str]]:
    """Which numbers of rows are in each prompt."""
    return [set(re.findall(r"<\d+>", str(example.prompt))) for example in every(splits)]


def check_no_row_is_lost(content: bytes, path: str) -> None:
    """Every number that the file has is in a prompt of its own, or it is said that it may not be."""
    splits, said = outcome(path)
    if splits is None:
        assert Path(path).name in said or "task." in said or "usable rows" in said, said
        return
    found = numbers(splits)
    missing = set(re.findall(r"<\d+>", content.decode())) - set().union(*found)
    assert not missing or "left out" in said or "over several lines" in said, (missing, said)
    if any(len(some) > 1 for some in found):
        assert "over several lines" in said, (found, said)


def odd_formats(seed: int, folder: Path) -> None:
    """The same rows in four formats."""
    rows = Odd(seed).rows()
    found = [
        outcome(write_rows(folder / "a.jsonl", rows)),
        outcome(write_rows(folder / "a.csv", table(rows, ","))),
        outcome(write_rows(folder / "a.tsv", table(rows, "\t"))),
    ]
    if len({type(row.get("label")) for row in rows}) == 1:
        found.append(outcome(write_parquet(folder / "a.parquet", rows)))
    if any(isinstance(row.get("label"), bool) for row in rows):
        found = [outcome(str(path), words={False: " no", True: " yes"}) for path in sorted(folder.glob("a.*"))]
    if all(splits is None for splits, _ in found) or any("a quote goes on over" in said for _, said in found):
        return
    first = found[0][0]
    for splits, said in found:
        assert splits is not None and first is not None, (seed, rows, [said for _, said in found])
        assert (splits.train, splits.dev) == (first.train, first.dev), (seed, said)


def odd_bytes(seed: int, folder: Path) -> None:
    """Files of text with something put into them, and lines of JSON that are no rows."""
    odd = Odd(seed)
    rows = odd.rows(0.1)
    whole = {
        "a.jsonl": b"".join(json.dumps(row, ensure_ascii=bool(seed % 2)).encode() + b"\n" for row in rows),
        "a.csv": table(rows, ","),
        "b.csv": table(rows, ";"),
        "a.tsv": table(rows, "\t"),
    }
    for name, content in whole.items():
        broken = odd.broken(content)
        check_no_row_is_lost(broken, write_rows(folder / name, broken)) if _is_utf8(broken) else outcome(
            write_rows(folder / name, broken)
        )
    lines = "".join(json.dumps(value) + "\n" for value in odd.nested())
    outcome(write_rows(folder / "n.jsonl", lines))
    outcome(write_rows(folder / "n.jsonl", lines), template="{text}{x?}", chat=True, space=False)


def _is_utf8(content: bytes) -> bool:
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def odd_parquet(seed: int, folder: Path) -> None:
    """Parquet of odd types, and Parquet with something put into it."""
    odd = Odd(seed)
    rows = [row for row in odd.nested() if isinstance(row, dict)]
    path = folder / "a.parquet"
    try:
        write_parquet(path, rows)
    except Exception:  # a column of several types, which Parquet can't say
        write_parquet(path, [{key: str(value) for key, value in row.items()} for row in odd.rows()])
    outcome(str(path))
    content = odd.broken(path.read_bytes())
    path.write_bytes(content)
    outcome(str(path))


def uploads(seed: int) -> dict[str, bytes]:
    """Names and contents of odd files."""
    odd = Odd(seed)
    rows = odd.rows(0.2)
    contents = {
        "a.csv": table(rows, ","),
        "a.tsv": table(rows, "\t"),
        "a.jsonl": json.dumps(odd.value()).encode(),
        "a.txt": odd.text().encode(),
    }
    return {name: odd.broken(content) if seed % 3 and content else content for name, content in contents.items()}


def odd_uploads(seed: int, folder: Path) -> None:
    """The same on a server: kept, and made a task of, or refused."""
    store = Store(folder / "server")
    for name, content in uploads(seed).items():
        try:
            number = store.add_file(name, content)["id"]
            task, _ = lessons(NewJob(training_file=number, use={"dev": 1, "test": 0}), store.data_path)
            task.load()
        except ConfigError:
            pass


PARTS = {"formats": odd_formats, "bytes": odd_bytes, "parquet": odd_parquet, "uploads": odd_uploads}


@pytest.mark.parametrize("part", PARTS)
def test_odd_files_end_in_examples_or_in_one_message(part, tmp_path):
    for seed in range(60):
        PARTS[part](seed, tmp_path)
        for path in tmp_path.glob("a.*"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_thousands_of_odd_files_end_in_examples_or_in_one_message(part, tmp_path):
    for seed in range(1000, 4000):
        PARTS[part](seed, tmp_path)
        for path in tmp_path.glob("a.*"):
            path.unlink()


def test_odd_uploads_over_http_are_jobs_or_refused(client, monkeypatch):
    monkeypatch.setattr(
        "zoray.scoring.workload.load_tokenizer", cache(zoray.scoring.workload.load_tokenizer)
    )  # else it takes most of the time
    seen = set()
    for seed in range(24):
        for name, content in uploads(seed).items():
            kept = client.upload(content, name)
            answers = [kept]
            if kept.status_code == 200:
                body = {"training_file": kept.json()["id"], "use": {"dev": 1, "test": 0}}
                answers.append(client.post("/v1/fine_tuning/jobs", json=body))
            for answer in answers:
                seen.add(answer.status_code)
                assert answer.status_code == 200 or 400 <= answer.status_code < 500, (seed, name, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"].count("\n") == 0, answer.text
    assert {200, 400} <= seen


OBJECTIVES = {"choice": "choice_nll", "completion": "answer_nll", "preference": "preference"}


def ends(program: Any, settings: list[str], monkeypatch: Any, capsys: Any) -> int:
    """The exit status of a main; what it says if it is 2 is one line."""
    monkeypatch.setattr(sys, "argv", ["zoray", *settings])
    capsys.readouterr()
    status = guarded(lambda: program.main(compose("config", settings)))
    said = capsys.readouterr().err.strip().splitlines()
    assert status in (0, 2), said
    assert status == 0 or [line.startswith("error: ") for line in said] == [True], said
    return status


def run_odd(seeds: range, tiny_models: Any, folder: Path, monkeypatch: Any, capsys: Any) -> list[int]:
    """Odd files through plan and launch on the reference engine; the exit statuses."""
    monkeypatch.setattr(driver, "tune", partial(driver.tune, start_pool=LocalPool))  # without Ray
    here = ["model=hf", f"model.path={tiny_models['llama']}", "engine=hf", "task=file", "task.dev=1", "task.test=0"]
    here += [
        f"run.folder={folder}",
        "run.steps=1",
        "run.batch=1",
        "run.stratify=false",
        "run.too_long=cut",
        "run.test=false",
    ]
    here += ["logging.curve=false", "logging.progress=false"]
    found = []
    for seed in seeds:
        odd = Odd(seed)
        rows, suffix = odd.rows(0.3), (".jsonl", ".csv", ".tsv", ".parquet")[seed % 4]
        path = folder / f"{seed}{suffix}"
        if suffix == ".parquet":
            write_parquet(path, [{key: str(value) for key, value in row.items()} for row in rows])
        else:
            content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
            content = content if suffix == ".jsonl" else table(rows, "\t" if suffix == ".tsv" else ",")
            path.write_bytes(odd.broken(content) if seed % 3 == 0 else content)
        kind = next(
            (kind for kind, name in (("choice", "label"), ("preference", "chosen")) if name in rows[0]), "completion"
        )
        settings = [*here, f"task.path={path}", f"objective={OBJECTIVES[kind]}", f"run.name=r{seed}"]
        statuses = [ends(program, settings, monkeypatch, capsys) for program in (plan, launch)]
        assert statuses[0] == statuses[1], f"seed {seed}: a plan and its run end in {statuses}"
        found.append(statuses[0])
    return found


def test_odd_files_end_in_a_run_or_in_one_line(tiny_models, tmp_path, monkeypatch, capsys):
    statuses = run_odd(range(16), tiny_models, tmp_path, monkeypatch, capsys)
    assert {0, 2} <= set(statuses)


@pytest.mark.slow
def test_hundreds_of_odd_files_end_in_a_run_or_in_one_line(tiny_models, tmp_path, monkeypatch, capsys):
    run_odd(range(100, 400), tiny_models, tmp_path, monkeypatch, capsys)
