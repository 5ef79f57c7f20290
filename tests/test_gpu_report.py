"""The GPU report in its small form, on the CPU: everything holds, a second call goes on, a failure is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_report import __main__ as gpu_report
from benchmarks.gpu_report import checks

ROOT = Path(__file__).parent.parent


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


def items(out: Path) -> dict[str, dict]:
    return {item["name"]: item for item in json.loads((out / "report.json").read_text())["items"]}


def test_everything_holds_and_is_measured(out):
    found = items(out)
    assert len(found) == 9 and all(item["holds"] and item["measured"] for item in found.values())
    for name in ("opt-tiny", "llama-tiny"):
        exact, rough = (found[f"correctness:engine-{name}-{dtype}"]["measured"] for dtype in ("float32", "bfloat16"))
        for kind in ("base", "centre", "plus", "minus"):
            assert 0 < exact[f"{kind} error"] < 1e-4 < rough[f"{kind} error"] < rough["tolerance"]
    assert all(found[f"correctness:run-{space}"]["measured"]["replayed on cpu"] == "equal" for space in checks.SPACES)
    page = (out / "report.md").read_text()
    assert page.count("| yes |") == 9 and "torch: " in page and "not run yet" not in page


def test_what_is_there_is_not_run_again_and_what_failed_is(out, monkeypatch, capsys):
    stored = out / "items" / "correctness:directions.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "holds": False, "why": "it was late"}))
    ran = []
    monkeypatch.setattr(checks, "directions", lambda place: ran.append(place.device) or {"again": 1})
    assert gpu_report.main([f"out={out}", "--device", "cpu", "--tiny", "--minutes", "2"]) == 0
    assert ran == ["cpu"] and "9 hold, 0 fail" in capsys.readouterr().out
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
    assert "| **no** |" in page and page.count("not run yet") == 8


def test_out_of_time_nothing_new_is_begun(tmp_path, capsys):
    assert gpu_report.main([f"out={tmp_path}", "--device", "cpu", "--tiny", "--minutes", "0"]) == 0
    assert "0 hold, 0 fail, 9 not run yet" in capsys.readouterr().out


def test_an_item_has_a_process_of_its_own_whose_crash_is_told(tmp_path):
    arguments = [f"out={tmp_path}", "--device", "cpu", "--only", "correctness:directions"]
    assert gpu_report.main(arguments) == 0
    assert items(tmp_path)["correctness:directions"]["measured"]["elements compared"] > 10_000
    lost = gpu_report.in_process(arguments, tmp_path / "items", "correctness:none", 60)
    assert not lost["holds"] and "KeyError" in lost["why"]
    late = gpu_report.in_process(arguments, tmp_path / "items", "correctness:states", 0.01)
    assert late["why"] == "not done after 0 s"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: out"),
        (["DIR"], "expected out=DIR; got 'DIR'"),
        (["out=DIR"], "expected a CUDA device; there is none. The small form: --device cpu --tiny"),
        (["out=DIR", "--device", "cpu", "--only", "speed?"], "expected --only to be one of correctness, or an item"),
    ],
    ids=str,
)
def test_a_wrong_call_is_answered_before_anything_runs(arguments, says, tmp_path):
    done = command(*(argument.replace("DIR", str(tmp_path)) if "=" in argument else argument for argument in arguments))
    assert done.returncode != 0 and says in done.stderr
