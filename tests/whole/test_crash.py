"""kill -9 at random moments, again and again, with the journal's last line torn now and then: nothing is lost.

Runs of different methods are killed eighteen times together: while they load, step, evaluate, write, and finish. After
every kill the journal holds a prefix of the undisturbed run's, byte for byte; after the last resume it is that journal,
and the state has its digest. The kills meet the main job with its replica in the same process, which starts in a
second; tests/whole/test_chaos.py kills it as a user has it.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

STEPS = 70
METHODS = {
    "two_point-lora": ["estimator=two_point", "space.rank=2", "optimizer.lr=0.01"],
    "evolution-lozo-adaptive": [
        *("space=lozo", "space.interval=7", "estimator=evolution", "estimator.population=4"),
        *("optimizer=adaptive", "optimizer.lr=1e-4", "optimizer.momentum=0.5"),
    ],
}


def main_job(arguments: tuple[str, ...]) -> None:
    """`zoray.launch` in this process, its pool being one replica in the same process."""
    import zoray.run.driver
    from zoray.launch import main
    from zoray.scoring.replica import Replica

    class Inside:
        """A pool without actors; what it owes the driver is the same."""

        size, lost, rebuilt, scored = 1, (), 0, {}

        def __init__(self, spec: Any, cluster: Any, name: str, say: Any, commits: Any, *_: Any) -> None:
            self.spec, self.replica, self.sent, self.commits = spec, Replica(spec), 0, list(commits)
            self.info = self.replica.info

        def __enter__(self) -> Inside:
            return self

        def __exit__(self, *_: object) -> None: ...

        def commit(self, commit: Any) -> None:
            self.commits.append(commit)

        def keep_snapshot(self, path: Path) -> None: ...

        def digest(self) -> str:
            return self.adapter()[1]

        def evaluate(self, grid: Any, digest: bool = False) -> Any:
            first, self.sent = self.sent, len(self.commits)
            return self.replica.evaluate(tuple(self.commits[first:]), grid.tiles, digest, grid.per_example)

        def rewind(self, step: int) -> None:
            self.replica.reset()
            self.sent = 0
            del self.commits[step:]

        def adapter(self) -> Any:
            first, self.sent = self.sent, len(self.commits)
            self.replica.apply(self.commits[first:])
            return self.replica.adapter(), self.replica.engine.digest()

    start_pool: Any = Inside
    zoray.run.driver.tune = partial(zoray.run.driver.tune, start_pool=start_pool)
    from zoray.run.config import compose

    sys.argv = ["zoray.launch", *arguments]
    sys.exit(main(compose("config", list(arguments))))


class Inside:
    """A process forked from one that has imported everything."""

    server = multiprocessing.get_context("forkserver")

    def __init__(self, *arguments: str) -> None:
        self.process = self.server.Process(target=main_job, args=(arguments,))
        self.process.start()

    def ended(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self) -> None:
        self.process.join(240)


def steps_in(path: Path) -> int:
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_until(session: Inside, path: Path, steps: int) -> None:
    """Until the journal holds that many steps."""
    deadline = time.monotonic() + 240
    while steps_in(path) < steps:
        assert session.ended() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.001)


def tear(path: Path, dice: random.Random) -> None:
    """Cut the file in the middle of its last line, as a write that did not come through leaves it."""
    data = path.read_bytes().rstrip(b"\n")
    last = data.rfind(b"\n") + 1
    path.write_bytes(data[: dice.randrange(last + 1, len(data))])


def survive(start: type[Inside], method: str, root: Path, model: Path, data: Path, kills: int, torn: int):
    """A run that is killed, and torn in its last line as often as said, against one that is not."""
    dice = random.Random(method)
    settings = [
        *(f"model.path={model}", "model=hf", "task=file", f"task.path={data}", f"run.folder={root}"),
        *("task.words=[' terrible',' great']", "task.dev=8", "task.test=8", "engine=hf"),
        *(f"run.steps={STEPS}", "run.batch=4", "run.eval_every=7", "run.digest_every=3", "logging.curve=false"),
        *METHODS[method],
    ]
    whole = Inside(*settings, "run.name=whole")
    whole.wait()
    assert whole.ended() == 0
    undisturbed = (root / "whole" / "journal.jsonl").read_bytes()
    assert undisturbed.count(b"\n") == STEPS + 1

    killed = root / "killed" / "journal.jsonl"
    session = start(*settings, "run.name=killed")
    wait_until(session, killed, 1)  # from here on there is something to lose
    moments = ["step"] * torn + [dice.choice(["step", "start"]) for _ in range(kills - torn - 1)]
    dice.shuffle(moments)
    lengths = []
    try:
        for moment in [*moments, "end"]:
            if moment == "step":
                wait_until(session, killed, steps_in(killed) + dice.randint(1, 6))
            elif moment == "end":
                wait_until(session, killed, STEPS)
            time.sleep(dice.uniform(0, 1.5 if moment == "start" else 0.1))
            session.kill()
            if moment == "step" and torn:
                tear(killed, dice)
                torn -= 1
            data_left = killed.read_bytes()
            assert undisturbed.startswith(data_left[: data_left.rfind(b"\n") + 1])
            lengths.append(steps_in(killed))
            session = start(f"run.resume={killed.parent}")
        session.wait()
    finally:
        session.kill()
    assert session.ended() == 0 and not torn
    assert lengths[-1] == STEPS and len(set(lengths)) >= min(kills, 3)
    assert killed.read_bytes() == undisturbed
    summaries = [json.loads((root / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["digest"] == summaries[1]["digest"] and summaries[1]["finished"]


@pytest.fixture(scope="module")
def imported() -> None:
    """Children are forked from a process that has the slow imports behind it."""
    preload = [
        "torch",
        "transformers",
        "zoray.launch",
        "zoray.run.driver",
        "zoray.pool.pool",
        "zoray.engines.hf",
        "hydra",
    ]
    Inside.server.set_forkserver_preload(preload)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", [pytest.param("two_point-lora", marks=pytest.mark.slow), "evolution-lozo-adaptive"])
def test_nine_kills_and_every_resume_gives_the_undisturbed_run(method, tmp_path, tiny_models, labelled_file, imported):
    survive(Inside, method, tmp_path, tiny_models["llama"], labelled_file, kills=9, torn=3)
