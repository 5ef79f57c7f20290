"""Runs, exports and evaluations whose disk fills up: what failed, where, how to go on, and nothing done is lost."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from disks import small_disk
from local_pool import LocalPool

import zoray.run.driver
from zoray import evaluate, export, launch
from zoray.models import folder as models
from zoray.records import ConfigError
from zoray.records import disk as module
from zoray.records.process.stopping import children_survive_hangup, stop_requested, stops
from zoray.run.config import compose, guarded
from zoray.run.reports.history import read_metrics

STEPS = 6


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as found:
        yield found


class Pool(LocalPool):
    """Calls `moments[call]()` before that call of it."""

    calls = 0
    moments: dict = {}  # noqa: RUF012

    def evaluate(self, *arguments, **options):
        type(self).calls += 1
        self.moments.get(self.calls, lambda: None)()
        return super().evaluate(*arguments, **options)

    def adapter(self):
        self.moments.get("adapter", lambda: None)()
        return super().adapter()


@pytest.fixture
def start(monkeypatch, tiny_models, labelled_file):
    """`zoray.launch` with its replica in this process; its exit status. `moments`: see Pool."""
    monkeypatch.setattr(zoray.run.driver, "tune", partial(zoray.run.driver.tune, start_pool=Pool))

    def run(*arguments, moments=None):
        Pool.calls, Pool.moments = 0, moments or {}
        monkeypatch.setattr(sys, "argv", ["zoray.launch", *arguments])
        return guarded(lambda: launch.main(compose("config", list(arguments))))

    def settings(folder, name, *more):
        return [
            *(f"model.path={tiny_models['llama']}", "model=hf", "task=file", f"task.path={labelled_file}", "engine=hf"),
            *("task.words=[' terrible',' great']", "task.dev=8", "task.test=8", "estimator=two_point", "run.batch=4"),
            *(f"run.folder={folder}", f"run.name={name}", f"run.steps={STEPS}", "run.eval_every=2", "space.rank=2"),
            *("run.digest_every=2", "optimizer.lr=0.02", *more),
        ]

    run.settings = settings
    return run


@pytest.fixture
def undisturbed(start, tmp_path):
    assert start(*start.settings(tmp_path, "whole")) == 0
    return tmp_path / "whole"


def numbers(folder):
    """What a run has measured, without times."""
    steps, evaluations = read_metrics(folder)
    found = [(s.step, s.loss, s.tokens) for s in steps], [(e.step, e.split, e.score, e.loss) for e in evaluations]
    return found, json.loads((folder / "summary.json").read_text())["digest"]


# Calls of the pool: dev and test before step 1, two steps, dev, two steps, dev, two steps, dev, test.
@pytest.mark.parametrize(
    ("moment", "leave"), [(4, 0), (4, 1), (5, 0), (6, 0), (9, 1), (11, 0), (12, 0), ("adapter", 0), ("adapter", 2)]
)
def test_a_run_goes_on_from_a_full_disk_to_what_it_would_have_been(
    undisturbed, start, disk, capsys, moment, leave, caplog
):
    folder = disk.path / "cut"
    assert start(*start.settings(disk.path, "cut"), moments={moment: partial(disk.fill, leave)}) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "no space left on device" in told[0] and str(folder) in told[0]
    assert "Traceback" not in caplog.text
    assert not list(disk.path.rglob("*.partial"))
    words = shlex.split(told[0].rpartition("go on: ")[2])
    assert words == ["python", "-m", "zoray.launch", f"run.resume={folder}"]
    if leave == 2 and moment == "adapter":  # the summary is the first of what is written at the end
        assert json.loads((folder / "summary.json").read_text())["finished"]
    disk.free()
    assert start(*words[3:]) == 0
    assert (folder / "journal.jsonl").read_bytes() == (undisturbed / "journal.jsonl").read_bytes()
    assert numbers(folder) == numbers(undisturbed)
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_a_run_that_had_measured_nothing_leaves_nothing(start, disk, capsys):
    assert start(*start.settings(disk.path, "new"), moments={1: disk.fill}) == 1
    told = capsys.readouterr().err
    assert "no space left on device" in told and "Then start it again" in told and disk.names() == []
    disk.fill()
    assert start(*start.settings(disk.path, "new")) == 2
    assert "can't make the run folder" in capsys.readouterr().err and disk.names() == []


def test_a_folder_that_is_read_only_or_a_file_is_refused_in_one_line(start, disk, tmp_path, capsys):
    assert start(*start.settings(disk.path, "run")) == 0
    (tmp_path / "file").write_text("")
    with disk.locked():
        assert start(f"run.resume={disk.path / 'run'}") == 1
        assert start(*start.settings(disk.path, "other")) == 2
    assert start(*start.settings(tmp_path / "file", "other")) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "read-only file system" in told[0] and "go on: python -m zoray.launch run.resume=" in told[0]
    assert "Read-only file system" in told[1] and "can't make the run folder" in told[2]


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_is_whole_or_not_there(undisturbed, disk, tmp_path, form, capsys):
    def run(out):
        return guarded(lambda: export.main(compose("export", [f"run={undisturbed}", f"out={out}", f"format={form}"])))

    disk.fill(leave=1)
    assert run(disk.path / "out") == 1
    told = capsys.readouterr().err
    assert f"error: can't write {disk.path / 'out'}: no space left on device" in told and disk.names() == []
    disk.free()
    with disk.locked():
        assert run(disk.path / "out") == 2
    assert run(undisturbed / "summary.json" / "out") == 2
    assert "is a file. Choose another place" in capsys.readouterr().err
    if form == "peft":
        assert run(disk.path / "out") == 0


def test_predictions_that_find_no_room_cost_no_number(undisturbed, disk, capsys):
    file = disk.path / "said.jsonl"
    run = lambda: guarded(  # noqa: E731
        lambda: evaluate.main(compose("evaluate", [f"run={undisturbed}", f"predictions={file}"]))
    )
    disk.fill()
    assert run() == 1
    said = capsys.readouterr()
    assert "dev accuracy" in said.out and f"can't write {file}: no space left on device" in said.err
    assert disk.names() == []
    with disk.locked():
        assert run() == 2
    disk.free()
    assert run() == 0 and len(file.read_text().splitlines()) == 8


def test_output_that_is_cut_short_is_an_error(undisturbed, disk):
    disk.fill()
    command = [sys.executable, "-m", "zoray.replay", f"run={undisturbed}"]
    with (disk.path / "said").open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "output is lost: No space left on device\n")


def test_a_model_that_finds_no_room_is_said_and_a_digest_that_finds_none_is_no_trouble(
    disk, monkeypatch, capsys, tiny_models
):
    def prepare(path, folder):
        (disk.path / "half").write_bytes(b"0" * 8000)

    monkeypatch.setenv("ZORAY_CACHE", str(disk.path))
    monkeypatch.setattr(models, "package_folder", lambda path: disk.path / "models" / "any")
    monkeypatch.setattr(models, "_prepare", prepare)
    disk.fill()
    assert guarded(lambda: models.Model("package:any/any.gguf").resolve() and 0) == 1
    assert f"can't write {disk.path / 'models' / 'any'}: no space left on device" in capsys.readouterr().err
    files = list(tiny_models["llama"].glob("*.safetensors"))
    assert models._cached_digest(files, lambda: "0123") == "0123"
    with disk.locked():
        assert models._cached_digest(files, lambda: "0123") == "0123"
    assert not list(disk.path.rglob("*.tmp"))


def test_what_a_disk_refuses_is_told_from_defects():
    assert module.refuses(OSError(28, "No space left on device")) and module.refuses(OSError(122, "Quota"))
    assert module.refuses(PermissionError(13, "Permission denied", "a"))
    assert not module.refuses(TimeoutError(110, "timed out")) and not module.refuses(FileNotFoundError(2, "no", "a"))
    with pytest.raises(OSError, match=r"No space left on device: 'a'"), module.naming("a"):
        raise Exception("I/O error: No space left on device (os error 28)")
    with pytest.raises(ConfigError, match="is a file"):
        module.check_place(Path(__file__) / "out", "out")


def test_a_closed_terminal_stops_as_sigterm_does_but_not_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_requested() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        with children_survive_hangup():
            command = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"]
            assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        assert signal.SIGHUP not in stops()
        with stop_requested() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
