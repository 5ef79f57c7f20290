"""Monitoring: what is written can be read back, and no sink that fails ever reaches the run."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from zoray.records import ConfigError, Evaluation, JournalError, StepResult
from zoray.run.reports.history import read_metrics, table
from zoray.run.reports.monitor import Console, Logging, Monitor, Sink, Wandb
from zoray.run.reports.plots import draw_curve, label

QUIET = Logging(progress=False, curve=False)


def a_step(step: int, loss: float = 0.5, seconds: float = 0.1) -> StepResult:
    silent = {"dropped": 1, "ties": 2, "buried": 3}
    return StepResult(step=step, loss=loss, score=0.6, lr=1e-4, tokens=100, seconds=seconds, **silent)


def an_evaluation(step: int, split: str = "dev", accuracy: float = 0.7, loss: float = 0.6) -> Evaluation:
    return Evaluation(step, split, loss=loss, score=accuracy, count=500, tokens=9000, seconds=1.5, digest="ab")


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_and_evaluation_is_a_line_at_once(tmp_path: Path) -> None:
    with Monitor(tmp_path, QUIET, "run", {}, steps=2) as monitor:
        monitor.evaluation(an_evaluation(0))
        monitor.step(a_step(1))
        monitor.step(a_step(2, loss=math.nan))
        lines = lines_of(tmp_path)  # before close
    assert [line["kind"] for line in lines] == ["evaluation", "step", "step"]
    assert lines[1]["loss"] == 0.5 and lines[1]["time"] > 1e9
    assert [lines[1][name] for name in ("dropped", "ties", "buried")] == [1, 2, 3]
    assert lines[2]["loss"] is None  # strict JSON has no NaN
    steps, evaluations = read_metrics(tmp_path)
    assert steps[0] == a_step(1) and math.isnan(steps[1].loss)
    assert evaluations == [an_evaluation(0)]


def test_resume_cuts_a_torn_line_and_takes_back_later_steps(tmp_path: Path) -> None:
    with Monitor(tmp_path, QUIET, "run", {}, steps=6) as monitor:
        for step in range(1, 5):
            monitor.step(a_step(step, loss=1.0))
        monitor.evaluation(an_evaluation(2))
        monitor.evaluation(an_evaluation(4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "step", "st')
    assert len(read_metrics(tmp_path)[0]) == 4  # a torn last line is no error
    with Monitor(tmp_path, QUIET, "run", {}, steps=6, start_step=2) as monitor:
        monitor.step(a_step(3, loss=2.0))
        assert [s.step for s in monitor.history.steps] == [1, 2, 3]
    assert path.read_bytes().startswith(whole)  # append-only
    assert lines_of(tmp_path)[6]["kind"] == "resume"
    steps, evaluations = read_metrics(tmp_path)
    assert [(s.step, s.loss) for s in steps] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [e.step for e in evaluations] == [2]


def test_a_damaged_middle_line_is_named_and_does_not_stop_a_resume(tmp_path: Path, caplog) -> None:
    with Monitor(tmp_path, QUIET, "run", {}, steps=3) as monitor:
        monitor.step(a_step(1))
        monitor.step(a_step(2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", b"#", 1))
    with pytest.raises(JournalError, match="line 1"):
        read_metrics(tmp_path)
    with Monitor(tmp_path, QUIET, "run", {}, steps=3, start_step=2) as monitor:
        monitor.step(a_step(3))
    assert "without earlier metrics" in caplog.text


class Broken(Sink):
    def __init__(self) -> None:
        self.calls = 0

    def step(self, result: StepResult) -> None:
        self.calls += 1
        raise OSError("server is away")


def test_a_sink_that_raises_is_switched_off_with_one_warning(tmp_path: Path, caplog) -> None:
    broken = Broken()
    with caplog.at_level(logging.WARNING), Monitor(tmp_path, QUIET, "run", {}, steps=3) as monitor:
        monitor.sinks["broken"] = broken
        for step in (1, 2, 3):
            monitor.step(a_step(step))
        monitor.finish({"steps": 3})
    assert broken.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "monitoring goes on without broken: OSError: server is away"
    ]
    assert len(read_metrics(tmp_path)[0]) == 3 and (tmp_path / "summary.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_run(tmp_path: Path, caplog, monkeypatch) -> None:
    with Monitor(tmp_path, Logging(progress=False), "run", {}, steps=2) as monitor:
        monitor.sinks["metrics.jsonl"].file = open("/dev/full", "ab", buffering=0)  # type: ignore[attr-defined]  # noqa: SIM115
        monkeypatch.setattr(
            "zoray.run.reports.monitor.draw_curve", lambda *a: (_ for _ in ()).throw(OSError("no space"))
        )
        monitor.step(a_step(1))
        monitor.step(a_step(2))
        monitor.finish({"steps": 2})
    text = caplog.text
    assert text.count("without metrics.jsonl") == 1 and text.count("without curve.png") == 1
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 2}


def test_summary_is_strict_json(tmp_path: Path) -> None:
    import numpy as np

    with Monitor(tmp_path, QUIET, "run", {}, steps=0) as monitor:
        monitor.finish({"loss": math.inf, "n": np.int64(3), "of": [np.float32(0.5)], "path": Path("a")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None, "n": 3, "of": [0.5], "path": "a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


RUN = [
    an_evaluation(0, accuracy=0.552, loss=0.6931),
    an_evaluation(100, accuracy=0.731, loss=0.55),
    an_evaluation(200, accuracy=0.728, loss=0.5211),
    an_evaluation(200, "test", accuracy=0.722, loss=0.5302),
]


@pytest.mark.parametrize("selected", [None, 100])
def test_finish_prints_the_table(selected: int | None, tmp_path: Path, capsys) -> None:
    with Monitor(tmp_path, QUIET, "run", {}, steps=200) as monitor:
        for evaluation in RUN:
            monitor.evaluation(evaluation)
        monitor.message("hello")
        monitor.finish({} if selected is None else {"selected": selected})
    out = capsys.readouterr().out
    assert out == f"hello\n{table(RUN, selected)}\n"
    assert table(RUN) != table(RUN, 100)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Wandb(mode="on"), "disabled, offline, online"),
        (lambda: Wandb(project=""), "logging.wandb.project"),
        (lambda: Wandb(tags="smoke"), r"\[smoke\]"),  # type: ignore[arg-type]
        (lambda: Logging(progress="yes"), "logging.progress"),  # type: ignore[arg-type]
        (lambda: Logging(wandb={"mod": "offline"}), "mod"),
        (lambda: Logging(wandb=None), "logging.wandb"),  # type: ignore[arg-type]
    ],
)
def test_bad_config_is_refused(build, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_config_takes_plain_values() -> None:
    assert Logging(wandb={"mode": "offline", "tags": ["a", "b"]}).wandb == Wandb(mode="offline", tags=("a", "b"))


def in_a_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run in a fresh interpreter without anyone's W&B login and without a network to look for one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    clean |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    clean |= {"PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder / "run")],
        env=clean, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


RUN_WITH = """
import sys, pathlib
from zoray.run.reports.monitor import Logging, Monitor
from zoray.records import ConfigError, Evaluation, StepResult
folder = pathlib.Path(sys.argv[1])
with Monitor(folder, Logging(progress=False, curve=False, wandb={"mode": MODE}), "a run", {"model": "m"}, 2) as monitor:
    monitor.step(StepResult(1, 0.5, 0.5, 1e-4, 10, 0.1))
    monitor.evaluation(Evaluation(1, "dev", float("nan"), 0.5, 10, 10, 0.1))
    monitor.finish({"steps": 1})
print(sorted({name.split(".")[0] for name in sys.modules} & {"wandb", "matplotlib", "torch", "ray", "vllm", "hydra"}))
"""


def test_disabled_imports_nothing_heavy(tmp_path: Path) -> None:
    done = in_a_process(RUN_WITH.replace("MODE", "'disabled'"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_wandb_offline_writes_into_the_run_folder_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = in_a_process(RUN_WITH.replace("MODE", "'offline'"), tmp_path)
    assert done.returncode == 0, done.stderr
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0
    assert "W&B: offline in" in done.stdout and "goes on without" not in done.stderr


def test_wandb_online_without_a_login_is_a_config_error_and_no_prompt(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = in_a_process(RUN_WITH.replace("MODE", "'online'"), tmp_path)
    assert done.returncode == 1
    assert "ConfigError" in done.stderr and "WANDB_API_KEY, or logging.wandb.mode=offline" in done.stderr
    assert not (tmp_path / "run").exists()  # nothing in the way of a second try


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


CURVES = {
    "normal": ([a_step(k, 0.7 - 0.001 * k) for k in range(1, 201)], RUN),
    "empty": ([], []),
    "one step": ([a_step(1)], [an_evaluation(0), an_evaluation(1)]),
    "nan": ([a_step(k, math.nan) for k in range(1, 20)], [an_evaluation(0, accuracy=math.nan, loss=math.nan)]),
    "no evaluations": ([a_step(k, math.inf if k == 3 else 0.5) for k in range(1, 20)], []),
    "same step twice": ([a_step(k) for k in range(1, 5)], [an_evaluation(4, accuracy=0.1), an_evaluation(4), RUN[-1]]),
}


@pytest.mark.parametrize("name", CURVES)
def test_curve_is_drawn_from_whatever_there_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw_curve(path, *CURVES[name], title="run $x_1 of a very long name " * 5, subtitle=name)
    assert png_size(path) == (1200, 960)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_a_run_left_early_still_gets_its_curve(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Monitor(tmp_path, Logging(progress=False), "run", {}, steps=9) as monitor:
        monitor.step(a_step(1))
        raise KeyboardInterrupt
    assert png_size(tmp_path / "curve.png") == (1200, 960)
    assert not (tmp_path / "summary.json").exists()


def test_labels_are_short_names() -> None:
    assert label({"path": "org/Model-1.5B/"}) == "Model-1.5B"
    assert label({"_target_": "zoray.methods.Lora"}) == "Lora"
    assert label("sst2") == "sst2" and label(None) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_console(stream: io.StringIO, steps: int, seconds: float, start: int = 0) -> Console:
    console = Console(True, steps, start, stream)
    now = [0.0]
    console.clock = lambda: now[0]
    for step in range(start + 1, steps + 1):
        now[0] += seconds
        console.step(a_step(step, loss=math.nan if step == 2 else 0.5, seconds=seconds))
        if step == steps // 2:
            console.evaluation(an_evaluation(step))
    console.close()
    return console


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"), [(1000, 0.01, 2), (1000, 10.0, 11), (4, 60.0, 4), (1, 1.0, 1)]
)
def test_a_log_file_gets_few_lines(steps: int, seconds: float, expected: int) -> None:
    stream = io.StringIO()
    run_console(stream, steps, seconds)
    lines = stream.getvalue().splitlines()
    assert expected - 1 <= len(lines) <= expected + 1 and "\r" not in stream.getvalue()
    assert lines[-1].startswith(f"step {steps}/{steps}: loss 0.5000") and lines[-1].endswith("0m 00s left")


def test_log_lines_tell_the_time_left_and_the_last_dev_accuracy() -> None:
    stream = io.StringIO()
    run_console(stream, 1000, 10.0, start=500)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 501/1000: loss 0.5000, lr 0.0001, 10 s/step, 1h 23m left"
    stream = io.StringIO()
    run_console(stream, 1000, 10.0)
    assert "dev accuracy 0.700, lr 0.0001, 10 s/step" in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_that_messages_do_not_break(capsys) -> None:
    stream = Terminal()
    run_console(stream, 20, 1.0)
    assert "\r" in stream.getvalue() and "20/20, loss 0.5000, dev accuracy 0.700" in stream.getvalue()
    assert capsys.readouterr().out == "step 10: dev accuracy 0.700, loss 0.6000 (500 examples)\n"


def test_the_shipped_config_spells_every_parameter() -> None:
    yaml = pytest.importorskip("yaml")
    import dataclasses

    shipped = yaml.safe_load((Path(__file__).parents[2] / "conf" / "logging" / "default.yaml").read_text())
    wandb = shipped["wandb"]
    assert shipped.pop("_target_") == "zoray.run.Logging" and wandb.pop("_target_") == "zoray.run.Wandb"
    assert set(shipped) == {f.name for f in dataclasses.fields(Logging)}
    assert set(wandb) == {f.name for f in dataclasses.fields(Wandb)}
    assert Logging(**shipped) == Logging()
