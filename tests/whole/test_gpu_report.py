"""The GPU report in its small form, on the CPU: everything holds, a second call goes on, a failure is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu_report import __main__ as gpu_report
from benchmarks.gpu_report import checks
from benchmarks.gpu_report.checks import Place
from benchmarks.gpu_report.items import PARTS, all_items, cases
from benchmarks.shapes import with_weights

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, "-m", "benchmarks.gpu_report", *arguments]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of everything."""
    folder = tmp_path_factory.mktemp("report")
    done = command(f"out={folder}", "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 fail, 0 not run yet" in done.stdout
    return folder


COUNT = 21  # items of the small form


def items(out: Path) -> dict[str, dict]:
    return {item["name"]: item for item in json.loads((out / "report.json").read_text())["items"]}


@pytest.mark.slow
def test_everything_holds_and_is_measured(out):
    found = items(out)
    assert len(found) == COUNT and all(item["holds"] and item["measured"] for item in found.values())
    assert {name.partition(":")[0] for name in found} == set(PARTS)
    for name in ("opt-tiny", "llama-tiny"):
        exact, rough = (found[f"correctness:engine-{name}-{dtype}"]["measured"] for dtype in ("float32", "bfloat16"))
        for kind in ("base", "centre", "plus", "minus"):
            assert 0 < exact[f"{kind} error"] < 1e-4 < rough[f"{kind} error"] < rough["tolerance"]
        exact, rough = (found[f"correctness:feedback-{name}-{dtype}"]["measured"] for dtype in ("float32", "bfloat16"))
        assert 0 < exact["error"] < 1e-3 < rough["error"] < rough["tolerance"]
    assert all(found[f"correctness:run-{space}"]["measured"]["replayed on cpu"] == "equal" for space in checks.SPACES)
    page = (out / "report.md").read_text()
    assert page.count("| yes |") == COUNT and "torch: " in page and "not run yet" not in page
    assert all(f"## {name}" in page for name, item in found.items() if "rows" in item["measured"])
    assert "| opt-tiny | " in page.partition("What parts are of a step")[2]
    for picture in ("speed.png", "signal.png"):
        assert (out / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_speed_is_told_of_every_contender_and_batch_size(out):
    found = items(out)
    one, four = (found[f"speed:opt-tiny{name}"]["measured"] for name in ("", "-lozo-4-pairs"))
    assert [row["batch"] for row in one["rows"]] == [row["batch"] for row in four["rows"]] == [2, 4]
    for name in ("zoray", "bare", "request", "lozo", "mezo"):
        assert all(row[f"{name} ms"] > 0 for row in one["rows"]), name
    assert "compiled lozo ms" in one["rows"][0] and "lozo ms" not in four["rows"][0]
    assert four["rows"][0]["tokens"] > 3 * one["rows"][0]["tokens"]
    for row in (*one["rows"], *four["rows"]):
        assert row["zo_tax"] > 0.5 and 0 < row["busy"] <= 1 and 0 < row["of matmul rate"] < 1
    fed = found["speed:opt-tiny-feedback"]["measured"]
    assert all(fed[f"{task}_tax"]["median"] > 0 and fed[f"{task}_rows"] > 0 for task in ("choice", "text"))
    assert found["memory:opt-tiny"]["measured"]["ratio"] > 0.5


def test_what_matters_most_comes_first():
    """Correctness, then the smallest and the largest model; everything that the report promises is there."""
    names = list(all_items(Place("cuda", False, Path())))
    parts = [name.partition(":")[0] for name in names]
    assert parts[:17] == ["correctness"] * 17 and set(parts) == set(PARTS)
    assert names[17:20] == ["speed:device", "speed:opt-1.3b", "speed:opt-13b"]
    assert names[20:22] == ["speed:opt-1.3b-feedback", "speed:llama-3-8b-feedback"]
    for model in ("opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "llama-3-8b", "qwen3-4b"):
        assert {f"speed:{model}", f"speed:{model}-4-pairs"} <= set(names)
    for dtype in ("float32", "float16", "bfloat16"):
        assert {f"signal:opt-125m-{dtype}", f"correctness:engine-llama-125m-{dtype}"} <= set(names)
    for case in cases(Place("cuda", False, Path())):
        assert case.batches == (16, 32, 128) and (case.loops == ("lozo", "mezo")) == (case.pairs == 1)


def test_on_a_card_checks_run_together_and_timings_alone(tmp_path, monkeypatch, capsys):
    together: set[str] = set()
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def fake(arguments, items, name, seconds):
        with lock:
            together.add(name)
            seen[name] = len(together)
        time.sleep(0.05)
        with lock:
            seen[name] = max(seen[name], len(together))
            together.remove(name)
        return {"name": name, "holds": True, "why": "", "seconds": 1, "measured": {"ms a step": 1.0}}

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "machine", lambda device: {"device": device})
    monkeypatch.setattr(gpu_report, "in_process", fake)
    assert gpu_report.main([f"out={tmp_path}"]) == 0
    assert "0 fail, 0 not run yet" in capsys.readouterr().out
    checks = {name: most for name, most in seen.items() if name.startswith(("correctness:", "signal:"))}
    assert max(checks.values()) == gpu_report.AT_ONCE and {seen[name] for name in seen.keys() - checks.keys()} == {1}


def test_a_model_that_several_processes_want_is_written_once(tmp_path):
    """A folder has all of a model, whoever makes it first."""
    before = with_weights("opt-tiny", tmp_path / "a")
    kept = (before / "model.safetensors").read_bytes()
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: with_weights("opt-tiny", tmp_path / "b"), range(3)))
    assert set(folders) == {tmp_path / "b"} and (tmp_path / "b" / "model.safetensors").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
def test_what_is_there_is_not_run_again_and_what_failed_is(out, monkeypatch, capsys):
    stored = out / "items" / "correctness:directions.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "holds": False, "why": "it was late"}))
    ran = []
    monkeypatch.setattr(checks, "directions", lambda place: ran.append(place.device) or {"again": 1})
    assert gpu_report.main([f"out={out}", "--device", "cpu", "--tiny", "--minutes", "2"]) == 0
    assert ran == ["cpu"] and f"{COUNT} hold, 0 fail" in capsys.readouterr().out
    assert items(out)["correctness:directions"]["measured"] == {"again": 1}


def test_a_check_that_fails_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def wrong(place):
        raise AssertionError("other bits\nand more")

    monkeypatch.setattr(checks, "directions", wrong)
    arguments = [f"out={tmp_path}", "--device", "cpu", "--tiny", "--only", "correctness:directions"]
    assert gpu_report.main(arguments) == 1
    assert "FAILS: AssertionError: other bits" in capsys.readouterr().out
    failed = items(tmp_path)["correctness:directions"]
    assert not failed["holds"] and "in wrong" in failed["traceback"]
    page = (tmp_path / "report.md").read_text()
    assert "| **no** |" in page and page.count("not run yet") == COUNT - 1


def test_out_of_time_nothing_new_is_begun(tmp_path, capsys):
    assert gpu_report.main([f"out={tmp_path}", "--device", "cpu", "--tiny", "--minutes", "0"]) == 0
    assert f"0 hold, 0 fail, {COUNT} not run yet" in capsys.readouterr().out


def test_an_item_has_a_process_of_its_own_whose_crash_is_told(tmp_path):
    arguments = [f"out={tmp_path}", "--device", "cpu", "--only", "correctness:directions"]
    assert gpu_report.main(arguments) == 0
    assert items(tmp_path)["correctness:directions"]["measured"]["elements compared"] > 10_000
    lost = gpu_report.in_process(arguments, tmp_path / "items", "correctness:none", 60)
    assert not lost["holds"] and "KeyError" in lost["why"]
    assert gpu_report.in_process(arguments, tmp_path / "items", "correctness:states", 0.01) is None  # no time left
    assert gpu_report.stored(tmp_path / "items", "correctness:states") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: out"),
        (["DIR"], "expected out=DIR; got 'DIR'"),
        (["out=DIR"], "expected a CUDA device; there is none. The small form: --device cpu --tiny"),
        (["out=DIR", "--device", "cpu", "--only", "speed?"], "expected --only to be one of correctness, signal"),
    ],
    ids=str,
)
def test_a_wrong_call_is_answered_before_anything_runs(arguments, says, tmp_path):
    done = command(*(argument.replace("DIR", str(tmp_path)) if "=" in argument else argument for argument in arguments))
    assert done.returncode != 0 and says in done.stderr
