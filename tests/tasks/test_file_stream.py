"""task=file on large files: the same examples as from memory, little memory and time, and no change unnoticed."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import every, write_parquet, write_rows

from zoray.records import ConfigError, Splits
from zoray.tasks.batches import labels_of, part_numbers
from zoray.tasks.file import task as file
from zoray.tasks.file.rows import parquet
from zoray.tasks.file.rows.text import TextFiles
from zoray.tasks.file.stream import Examples
from zoray.tasks.file.task import File

ROOT = Path(__file__).parents[2]
MILLION = 1_000_000

KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "choice": lambda i: {"text": f'ü "quoted", {i}\nand a line', "label": ("no", "yes", "may be")[i % 3]},
    "completion": lambda i: {"prompt": f"What is {i}?", "completion": f"{i}, I think\r\n", "source": "made up"},
    "chat": lambda i: {
        "messages": [{"role": "user", "content": f"Say {i}!"}, {"role": "assistant", "content": str(i)}]
    },
    "preference": lambda i: {"prompt": f"{i}?", "chosen": f"{i}!", "rejected": f"{i}..."},
    "prompt": lambda i: {"prompt": f"{i}?", "wanted": str(i)},
}


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as CSV or TSV, lists as JSON in a cell."""
    with path.open("w", encoding="utf-8-sig", newline="") as target:
        writer = csv.writer(target, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()])
    return str(path)


def written(folder: Path, suffix: str, kind: str, count: int) -> str:
    """Rows of a kind, every tenth twice, in two files; returns a pattern for both."""
    rows = [KINDS[kind](i - (i % 10 == 9)) for i in range(count)]
    write = {".jsonl": write_rows, ".parquet": write_parquet}.get(suffix, table)
    for part, some in enumerate((rows[: count // 3], rows[count // 3 :])):
        write(folder / f"{part}{suffix}", some)
    return f"{folder}/*{suffix}"


@pytest.fixture
def small_limits(tmp_path, monkeypatch) -> None:
    """As if files of more than 100 examples were large."""
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file, "WHOLE", 100)
    monkeypatch.setattr(parquet, "WHOLE", 100)
    monkeypatch.setattr(parquet, "BATCH", 7)


def streamed(task: File) -> tuple[Splits, Examples]:
    """Splits of a large file, and its training examples."""
    splits = task.load()
    assert isinstance(splits.train, Examples) and isinstance(splits.dev, tuple) and isinstance(splits.test, tuple)
    return splits, splits.train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_examples_that_are_read_as_asked_are_those_in_memory(suffix, kind, tmp_path, request):
    task = File(written(tmp_path, suffix, kind, 700), seed=3, chat=kind == "preference")
    whole = task.load()
    assert isinstance(whole.train, tuple) and len(every(whole)) == 630
    request.getfixturevalue("small_limits")
    splits, train = streamed(task)
    assert (splits.dev, splits.test) == (whole.dev, whole.test)
    assert len(train) == len(whole.train) == 504 and tuple(train) == whole.train
    assert train.labels.tolist() == labels_of(whole.train).tolist() == labels_of(train).tolist()
    assert train.labels.dtype == np.int64 and not part_numbers(train).any()
    assert list((tmp_path / "cache").rglob("*")) == [] or suffix == ".parquet"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_they_are_a_sequence_and_travel(suffix, tmp_path, small_limits):
    _, train = streamed(File(written(tmp_path, suffix, "choice", 400)))
    known = list(train)
    assert train[-1] == known[-1] and train[-len(train)] == known[0] and train[np.int64(5)] == known[5]
    assert train[3:9:2] == tuple(known[3:9:2]) and train[:-250] == tuple(known[:-250]) and train[5:5] == ()
    assert train.take([7, 7, 2]) == (known[7], known[7], known[2])
    for outside in (len(train), -len(train) - 1):
        with pytest.raises(IndexError):
            train[outside]
    travelled = pickle.loads(pickle.dumps(train))
    assert list(travelled) == known and travelled.labels.tolist() == train.labels.tolist()
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[11])"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(train), cwd=ROOT, capture_output=True)
    assert done.stdout.decode().strip() == str(known[11])


def test_hub_data_are_read_as_asked_too(monkeypatch, small_limits):
    import datasets

    rows = [KINDS["chat"](i) for i in range(300)]
    data = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda path: data)
        _, train = streamed(File("org/name"))
        patch.setattr(file, "WHOLE", 1000)
        assert tuple(train) == File("org/name").load().train
    assert pickle.loads(pickle.dumps(train))[5] == train[5]


def test_dev_has_at_most_500_and_test_at_most_1000(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": str(i), "label": "xy"[i % 2]} for i in range(22_001)])
    splits = File(path).load()
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [20_501, 500, 1000]
    assert isinstance(splits.train, Examples)
    splits = File(path, train=20_000, dev=2001, test=0).load()
    assert isinstance(splits.train, tuple) and len(splits.dev) == 2001


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_that_changes_is_noticed(suffix, tmp_path, small_limits):
    _, train = streamed(File(written(tmp_path, suffix, "choice", 400)))
    second = tmp_path / f"1{suffix}"
    before, content = second.stat(), second.read_bytes()
    in_second = [i for i in range(len(train)) if str(second) in train._rows.where(int(train._places[i]))]
    assert 0 < len(in_second) < len(train)
    second.write_bytes(content + b" ")
    size = len(content)
    changed = f"1{suffix} has changed since this run began to use it: it had {size:,} bytes and has {size + 1:,}. Put"
    for split in (train, pickle.loads(pickle.dumps(train))):
        with pytest.raises(ConfigError, match=changed.replace(".", r"\.")):
            split[in_second[0]]
        with pytest.raises(ConfigError, match="has changed"):
            tuple(split)
        assert split[next(i for i in range(len(split)) if i not in in_second)]
    second.write_bytes(content)
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ConfigError, match=r"and was written again\. Put it back as it was and resume the run, or"):
        train[in_second[0]]
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert train[in_second[0]]
    second.unlink()
    with pytest.raises(ConfigError, match=f"can't read task.path=.*1{suffix}: No such file"):
        train[in_second[0]]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = Path(write_rows(tmp_path / "a.jsonl", [{"text": str(i), "label": "xy"[i % 2]} for i in range(30)]))
    known = file.scan

    def scan(*arguments: Any) -> Any:
        with path.open("a") as target:
            target.write("\n")
        return known(*arguments)

    monkeypatch.setattr(file, "scan", scan)
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since this run began"):
        File(str(path)).load()
    rows = iter(TextFiles("a.jsonl", [path]))
    next(rows)
    with path.open("a") as target:
        target.write("\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since this run began"):
        list(rows)


def test_a_large_parquet_file_is_copied_once(tmp_path, small_limits):
    path = Path(write_parquet(tmp_path / "a.parquet", [KINDS["prompt"](i) for i in range(300)]))
    _, train = streamed(File(str(path)))
    (copy,) = (tmp_path / "cache").rglob("*.arrow")
    written_at = copy.stat().st_mtime_ns
    assert streamed(File(str(path)))[1][0] == train[0] and copy.stat().st_mtime_ns == written_at
    write_parquet(path, [KINDS["prompt"](i) for i in range(400)])
    assert len(streamed(File(str(path)))[1]) == 320, "a new file is no old copy"
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_many_small_parquet_files_are_a_large_one(tmp_path, small_limits):
    for part in range(5):
        write_parquet(tmp_path / f"{part}.parquet", [KINDS["choice"](i) for i in range(part * 60, part * 60 + 60)])
    _, train = streamed(File(f"{tmp_path}/*.parquet"))
    assert len(list((tmp_path / "cache" / "data").glob("*.arrow"))) == 5 and len(pickle.dumps(train)) < 20_000
    assert {str(example.where.row).split(",")[0][-9:] for example in train} == {f"{k}.parquet" for k in range(5)}


MEASURE = """
import json, sys, time
from zoray.tasks.file.task import File
from zoray.tasks.file.rows.text import TextFiles

def memory(key):
    return int(open("/proc/self/status").read().split(f"{key}:")[1].split()[0]) / 1024

before, start, worked = memory("VmRSS"), time.monotonic(), time.process_time()
splits = File(sys.argv[1]).load()
print(json.dumps({
    "sizes": [len(splits[name]) for name in ("train", "dev", "test")],
    "kept": memory("VmRSS") - before,
    "peak": memory("VmHWM") - before,
    "seconds": time.monotonic() - start,
    "cpu": time.process_time() - worked,
    "labels": splits.train.labels[:100].tolist() == [e.label for e in splits.train[:100]],
}))
"""


@pytest.mark.slow
def test_a_million_lines_start_in_little_memory_and_time(tmp_path):
    """The load alone, in a process of its own: peak memory above what importing takes, and seconds."""
    path = tmp_path / "million.jsonl"
    words = " ".join(f"word{k}" for k in range(20))
    with path.open("w") as target:
        for i in range(0, MILLION, 1000):
            target.writelines(f'{{"text": "{words} {k}", "label": "{"ab"[k % 2]}"}}\n' for k in range(i, i + 1000))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["sizes"] == [998_500, 500, 1000] and measured["labels"]
    assert measured["peak"] < 300 and measured["kept"] < 150, measured
    assert measured["cpu"] < 30, measured
