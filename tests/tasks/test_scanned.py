"""A large file is read through once on a machine; what was found is used as long as nothing has changed."""

import os
from dataclasses import replace

import pytest
from rows import write_parquet, write_rows

from zoray.records import ConfigError
from zoray.tasks.file import stream
from zoray.tasks.file import task as file
from zoray.tasks.file.rows import parquet
from zoray.tasks.file.task import File


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """How often files have been read through."""
    done: list[str] = []
    scan = file.scan
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stream, "LARGE", 0)
    monkeypatch.setattr(file, "scan", lambda rows, *a: done.append(rows.name) or scan(rows, *a))
    return done


def written(path, content):
    """A file of the format that its name says."""
    if path.suffix == ".parquet":
        return write_parquet(path, content)
    if path.suffix == ".csv":
        return write_rows(path, "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in content))
    return write_rows(path, content)


def rows(count, first=0):
    return [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(first, first + count)]


@pytest.mark.parametrize(("suffix", "times"), [(".jsonl", 1), (".csv", 1), (".parquet", 2)])
@pytest.mark.parametrize("whole", [10, 1000])
def test_the_second_time_no_text_file_is_read_through(scans, tmp_path, monkeypatch, suffix, times, whole):
    monkeypatch.setattr(file, "WHOLE", whole)
    task = File(written(tmp_path / f"a{suffix}", rows(100)))
    first = task.load()
    again = replace(task)
    second = again.load()
    assert len(scans) == times and again.describe() == task.describe()
    kept = [path.read_bytes() for path in (tmp_path / "cache" / "scans").glob("*")]
    assert len(kept) == (times == 1) and not any(b"text 7" in data for data in kept)
    for split in ("train", "dev", "test"):
        assert list(first[split]) == list(second[split])
    assert isinstance(second.train, tuple) is (whole == 1000)


def test_nor_is_a_large_parquet_file_whose_copy_may_be_deleted(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(file, "WHOLE", 10)
    monkeypatch.setattr(parquet, "WHOLE", 10)
    task = File(written(tmp_path / "a.parquet", rows(100)))
    expected = list(task.load().train)
    (copy,) = (tmp_path / "cache" / "data").iterdir()
    whole = copy.read_bytes()
    for left in (None, whole[:-100], b""):
        copy.unlink() if left is None else copy.write_bytes(left)
        assert list(replace(task).load().train) == expected and copy.read_bytes() == whole
    (kept,) = (tmp_path / "cache" / "scans").iterdir()
    assert len(scans) == 1 and b"text 7" not in kept.read_bytes()


def test_a_cache_that_nothing_can_be_written_to_is_no_trouble(scans, tmp_path):
    write_rows(tmp_path / "cache", "a file in the place of the folder")
    task = File(write_rows(tmp_path / "a.jsonl", rows(100)))
    assert task.load() == replace(task).load() and len(scans) == 2


def test_several_files_keep_their_own_headers(scans, tmp_path):
    written(tmp_path / "a.csv", rows(50))
    other = "".join(f"{row['text']};{row['label']}\n" for row in rows(50, first=50))
    write_rows(tmp_path / "b.csv", "text;label\n" + other)
    task = File(str(tmp_path / "*.csv"))
    expected = task.load()
    assert replace(task).load().train == expected.train and len(scans) == 1


def test_another_file_other_settings_and_a_broken_cache_are_noticed(scans, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(100))
    task = File(path)
    task.load()
    replace(task, seed=1).load()
    assert len(scans) == 2
    write_rows(tmp_path / "a.jsonl", rows(101))
    assert sum(len(task.load()[split]) for split in ("train", "dev", "test")) == 101 and len(scans) == 3
    os.utime(path, (1, 1))
    task.load()
    assert len(scans) == 4
    for kept in (tmp_path / "cache" / "scans").glob("*.pickle"):
        kept.write_bytes(kept.read_bytes()[:100])
    task.load()
    assert len(scans) == 5
    with open(path, "a") as target:
        target.write('{"text": 1')
    with pytest.raises(ConfigError, match="line 102"):
        task.load()


def test_few_are_kept_and_small_files_not_at_all(scans, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", rows(100))
    for seed in range(stream.KEPT + 3):
        File(path, seed=seed).load()
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == stream.KEPT
    monkeypatch.setattr(stream, "LARGE", 1 << 24)
    File(path, seed=99).load()
    File(path, seed=99).load()
    assert len(scans) == stream.KEPT + 5
