"""kill -9 at random moments, again and again, with the journal's last line torn now and then: nothing is lost.

Two runs of different methods are killed five times each. After every kill the journal holds a prefix of the undisturbed
run's, byte for byte; after the last resume it is that journal, and the state has its digest.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
STEPS, KILLS = 90, 5
METHODS = {
    "two_point-lora": ["space.rank=2", "optimizer.lr=0.01"],
    "evolution-lozo-adaptive": [
        *("space=lozo", "space.interval=7", "estimator=evolution", "estimator.population=4"),
        *("optimizer=adaptive", "optimizer.lr=1e-4", "optimizer.momentum=0.5"),
    ],
}


def start(*arguments: str) -> subprocess.Popen[str]:
    """The main job in a process group of its own, on the shared Ray."""
    cluster = ["cluster.address=auto", "cluster.cpus_per_replica=1", "cluster.dashboard=false"]
    command = [sys.executable, "-m", "zoray.launch", *arguments, *cluster]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out


def kill_after(process: subprocess.Popen[str], path: Path, lines: int, delay: float) -> None:
    """SIGKILL once the journal has grown by some lines, and a moment more has passed."""
    before, deadline = path.read_bytes().count(b"\n") if path.exists() else 0, time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < before + lines:
        assert process.poll() is None, f"the run ended before it was killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def tear(path: Path, dice: random.Random) -> None:
    """Cut the file in the middle of its last line, as a write that did not come through leaves it."""
    data = path.read_bytes().rstrip(b"\n")
    last = data.rfind(b"\n") + 1
    path.write_bytes(data[: dice.randrange(last + 1, len(data))])


def survive(method: str, root: Path, model: Path, data: Path) -> None:
    """A run that is killed KILLS times, against one that is not."""
    dice = random.Random(method)
    settings = [
        *(f"model.path={model}", "model=hf", "task=file", f"task.path={data}", f"run.folder={root}"),
        *("task.words=[' terrible',' great']", "task.dev=8", "task.test=8", "engine=hf", "run.test=false"),
        *(f"run.steps={STEPS}", "run.batch=4", "run.eval_every=0", "run.digest_every=3", "logging.curve=false"),
        *METHODS[method],
    ]
    finish(start(*settings, "run.name=whole"))
    undisturbed = (root / "whole" / "journal.jsonl").read_bytes()
    assert undisturbed.count(b"\n") == STEPS + 1

    killed = root / "killed" / "journal.jsonl"
    session = start(*settings, "run.name=killed")
    torn, lengths = 0, []
    for round_ in range(KILLS):
        kill_after(session, killed, dice.randint(1, 5), dice.uniform(0, 0.06))
        if dice.random() < 0.4 or (torn < 2 and KILLS - round_ <= 2 - torn):
            tear(killed, dice)
            torn += 1
        data_left = killed.read_bytes()
        assert undisturbed.startswith(data_left[: data_left.rfind(b"\n") + 1])
        lengths.append(data_left.count(b"\n") - 1)
        session = start(f"run.resume={killed.parent}")
    finish(session)
    assert torn >= 2 and max(lengths) < STEPS and len(set(lengths)) > 2
    assert killed.read_bytes() == undisturbed
    summaries = [json.loads((root / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["digest"] == summaries[1]["digest"] and summaries[1]["finished"]


def test_every_resume_gives_the_undisturbed_run(tmp_path, tiny_models, labelled_file, local_ray):
    with ThreadPoolExecutor(len(METHODS)) as both:
        for done in [both.submit(survive, m, tmp_path / m, tiny_models["llama"], labelled_file) for m in METHODS]:
            done.result()
