"""The judge: whatever a reward function does is a value or a failure of that call alone, and no process is left."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from zoray.records import ConfigError
from zoray.scoring.rewards.judging import judge as judge_module
from zoray.scoring.rewards.judging.judge import Judge
from zoray.scoring.rewards.judging.worker import Judged

REWARDS = """
import ctypes, fractions, itertools, os, signal, subprocess, sys, threading, time
import numpy as np
from zoray.records import ConfigError

class Odd(Exception):
    def __init__(self): self.lock = threading.Lock()
    def __str__(self): raise ValueError("can't be shown")

class Mute:
    def __repr__(self): raise ValueError("can't be shown")

def deep(n): return deep(n + 1)

def reward(prompt, completion, example, scale=1.0):
    return scale * len(completion)

def do(prompt, completion, example):
    return {
        "raise": lambda: 1 / 0, "odd": odd, "config": config, "exit": lambda: sys.exit(3), "interrupt": interrupt,
        "recurse": lambda: deep(0), "memory": lambda: bytearray(1 << 60),
        "nan": lambda: float("nan"), "inf": lambda: -float("inf"), "huge": lambda: 10**400,
        "text": lambda: "x", "none": lambda: None, "list": lambda: [1.0], "array": lambda: np.ones(2), "mute": Mute,
        "true": lambda: True, "single": lambda: np.float32(0.5), "half": lambda: fractions.Fraction(1, 2),
        "die": lambda: os._exit(0), "kill": lambda: os.kill(os.getpid(), 9), "close": lambda: os.closerange(3, 64),
        "sleep": lambda: time.sleep(1000), "busy": lambda: sum(itertools.repeat(1)), "deaf": deaf,
        "child": lambda: child(prompt),
        "doze": lambda: time.sleep(0.3) or 1.0, "pid": os.getpid, "stdin": lambda: len(sys.stdin.read()), "print": say,
    }[completion]()

def odd(): raise Odd
def interrupt(): raise KeyboardInterrupt
def config(): raise ConfigError("expected this; got that")

def say():
    print("from the reward")
    os.write(1, b"from below\\n")
    return 1.0

def deaf():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
    while True: time.sleep(1)

def child(folder):
    open(f"{folder}/child.pid", "w").write(str(subprocess.Popen(["sleep", "1000"]).pid))
    time.sleep(1000)

def modules(prompt, completion, example):
    heavy = {"torch", "vllm", "ray", "transformers", "hydra", "jsonschema", "datasets", "sqlite3"}
    raise RuntimeError(f"{sorted(heavy & set(sys.modules))} {sys.argv}")
"""


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    """The judge's processes among this process's children."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or is a zombie
            if child.is_running() and "zoray.scoring.rewards.judging.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def processes(judge: Judge) -> int:
    """How many of a judge's workers run."""
    return sum(worker._process is not None and worker._process.poll() is None for worker in judge._workers)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert workers() == []


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(REWARDS)
    return "my_reward.py"


@pytest.fixture(scope="module")
def do(tmp_path_factory) -> Iterator[Callable[[str], Judged]]:
    """A function: what a judge with one worker makes of a deed, with a second for each."""
    path = tmp_path_factory.mktemp("do") / "my_reward.py"
    path.write_text(REWARDS)
    with Judge(f"{path}:do", timeout_s=1.0, workers=1) as judge:
        yield lambda deed: judge.submit(str(path.parent), deed, {}).result(60)


def test_values_and_arguments(file):
    with Judge(f"{file}:reward", {"scale": 0.5}) as judge:
        futures = [judge.submit("p", "x" * n, {"prompt": "p", "answers": []}) for n in range(20)]
        assert [future.result(60) for future in futures] == [Judged(0.5 * n) for n in range(20)]
        assert judge.function == f"{Path(file).absolute()}:reward"
    assert pickle.loads(pickle.dumps(Judged(0.5, "x"))) == Judged(0.5, "x")


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("raise", "do raised:\nTraceback (most recent call last):\n"),
        ("raise", "ZeroDivisionError: division by zero"),
        ("odd", "raised:"),
        ("exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
        ("nan", "do returned nan"),
        ("inf", "do returned -inf"),
        ("text", "do returned 'x', expected a number"),
        ("none", "returned None, expected a number"),
        ("list", "returned [1.0], expected a number"),
        ("array", "expected a number"),
        ("mute", "expected a number"),
        ("huge", "expected a number"),
        ("recurse", "RecursionError"),
        ("memory", "MemoryError"),
        ("config", "do: expected this; got that"),
    ],
)
def test_what_is_no_number_is_a_failure(do, deed, says):
    pid = do("pid").value
    value, failure = do(deed)
    assert math.isnan(value) and says in failure and "my_reward.py:do" in failure and len(failure) < 5000
    assert "worker.py" not in failure  # the traceback begins with the function
    assert do("pid").value == pid, "not worth a new process"


def test_whatever_has_a_float_is_a_number(do):
    assert [do(deed) for deed in ("true", "single", "half", "stdin")] == [(1.0, ""), (0.5, ""), (0.5, ""), (0.0, "")]


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("die", "ended its process: exit code 0"),
        ("kill", "ended its process: killed by SIGKILL"),
        ("close", "ended its process"),
        ("sleep", "timed out after 1 s"),
        ("busy", "timed out after 1 s"),
        ("deaf", "timed out after 1 s"),
    ],
)
def test_a_lost_worker_is_a_failure_of_its_call_alone(do, deed, says):
    pid = do("pid").value
    start = time.monotonic()
    value, failure = do(deed)
    assert math.isnan(value) and says in failure and "my_reward.py:do" in failure
    assert time.monotonic() - start < 10
    assert not alive(int(pid)) and do("pid").value not in (pid, math.nan) and do("true") == (1.0, "")


def test_others_go_on_beside_one_that_hangs(file):
    with Judge(f"{file}:do", timeout_s=3.0, workers=2) as judge:
        hung = judge.submit("", "busy", {})
        values = [judge.submit("", "true", {}).result(60).value for _ in range(20)]
        assert values == [1.0] * 20 and "timed out after 3 s" in hung.result(60).failure


def test_what_a_call_started_ends_with_it(do):
    failure = do("child").failure
    assert "timed out" in failure
    wait_until(lambda: not alive(int(Path(failure).with_name("child.pid").read_text())))


def test_workers_share_the_calls(file):
    with Judge(f"{file}:do", workers=4) as judge:
        for future in [judge.submit("", "doze", {}) for _ in range(4)]:  # start all
            assert future.result(60) == (1.0, "")
        assert processes(judge) == 4
        start = time.monotonic()
        futures = [judge.submit("", "doze", {}) for _ in range(8)]
        assert [future.result(60) for future in futures] == [(1.0, "")] * 8
        assert time.monotonic() - start < 1.6  # one after the other: 2.4


def test_workers_are_started_when_they_are_needed(file):
    with Judge(f"{file}:reward", workers=4) as judge:
        assert processes(judge) == 0
        judge.submit("", "", {}).result(60)
        assert processes(judge) == 1


def test_a_worker_imports_nothing_heavy(file):
    with Judge(f"{file}:modules") as judge:
        assert judge.submit("", "", {}).result(60).failure.endswith("RuntimeError: [] ['-c']")


def test_a_slow_import_is_not_a_slow_call(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time; time.sleep(1.5)\ndef reward(prompt, completion, example): return 1\n")
    with Judge(f"{path}:reward", timeout_s=0.5) as judge:
        assert judge.submit("", "", {}).result(60) == (1.0, "")


def test_an_import_may_take_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "START_S", 1.0)
    path = tmp_path / "slow.py"
    path.write_text("import time; time.sleep(1000)\n")
    with Judge(f"{path}:reward") as judge:
        assert "was not imported within 1 s" in judge.submit("", "", {}).result(60).failure


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import os; os._exit(5)", "ended its process: exit code 5"),
        ("def reward(prompt): ...", "to take prompt, completion and example"),
    ],
)
def test_a_function_that_cannot_be_loaded_fails_each_call(tmp_path, text, says):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with Judge(f"{path}:reward") as judge:
        for _ in range(2):
            value, failure = judge.submit("", "", {}).result(60)
            assert math.isnan(value) and says in failure


def test_an_example_that_cannot_travel_is_a_failure(file):
    with Judge(f"{file}:reward", workers=1) as judge:
        assert "could not be called" in judge.submit("", "", {"f": lambda: 0}).result(60).failure
        assert judge.submit("", "abc", {}).result(60) == (3.0, "")


def test_closing_ends_calls_that_run_and_calls_that_wait(file):
    judge = Judge(f"{file}:do", timeout_s=100, workers=1)
    assert judge.submit("", "true", {}).result(60) == (1.0, "")
    futures = [judge.submit("", deed, {}) for deed in ("sleep", "true", "true")]
    start = time.monotonic()
    judge.close()
    assert time.monotonic() - start < 10 and processes(judge) == 0
    assert {future.result(0).failure for future in futures} == {judge_module.CLOSED}
    judge.close()
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit("", "", {})


def test_a_judge_that_nobody_refers_to_ends(file):
    judge = Judge(f"{file}:do", timeout_s=100, workers=1)
    future, worker = judge.submit("", "sleep", {}), judge._workers[0]
    wait_until(lambda: worker._process is not None)
    del judge
    assert future.result(30).failure == judge_module.CLOSED
    wait_until(lambda: worker._process is None)


def test_a_cancelled_call_is_left_out(file):
    with Judge(f"{file}:do", workers=1) as judge:
        first, second = judge.submit("", "doze", {}), judge.submit("", "die", {})
        assert second.cancel() and first.result(60) == (1.0, "")
        assert judge.submit("", "true", {}).result(60) == (1.0, "")


# zoray's own


def test_built_in_rewards_run_here_at_once():
    with Judge("exact_match") as judge:
        future = judge.submit("", "A cat", {"answers": ["cat"]})
        assert future.done() and future.result() == (1.0, "") and processes(judge) == 0
        value, failure = judge.submit("", "A cat", {}).result()
        assert math.isnan(value) and "exact_match: expected examples with 'answers'" in failure
    with Judge("json_schema", {"schema": "person"}) as judge:
        assert judge.submit("", "{}", {}).result() == (0.4, "") and processes(judge) == 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("format", {"pattern": "(a+)+b"}),
        ("json_schema", {"schema": {"type": "object", "properties": {"a": {"pattern": "(a+)+b"}}}}),
    ],
)
def test_regular_expressions_of_the_user_have_a_time_limit(name, arguments):
    with Judge(f"{name}", arguments, timeout_s=1.0) as judge:
        assert "timed out" in judge.submit("", '{"a": "' + "a" * 40 + '"}', {}).result(60).failure or name == "format"
        assert "timed out" in judge.submit("", "a" * 40, {}).result(60).failure or name == "json_schema"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"function": "reward"}, "expected a built-in reward .*, or one as"),
        ({"function": "nothing"}, "expected a built-in reward .*; got 'nothing'"),
        ({"function": "length"}, "missing argument 'most'"),
        ({"function": "json_schema"}, "missing argument 'schema'"),
        (
            {"function": "json_schema", "arguments": {"schema": "none"}},
            "one of: person; got 'none'",
        ),
        ({"timeout_s": 0}, "timeout_s to be a number above 0"),
        ({"workers": 0}, "workers to be a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Judge(**{"function": "f1", **settings})


# the parent


MAIN = """
import psutil, sqlite3, sys, time  # what a worker must not import again
with open("runs.txt", "a") as file: file.write("run\\n")
from zoray.scoring.rewards.judging.judge import Judge
judge = Judge("my_reward.py:do", timeout_s=1000, workers=2)
print(judge.submit("", "print", {}).result(60), flush=True)
for future in [judge.submit("", "doze", {}) for _ in range(2)]: future.result(60)
print(*[child.pid for child in psutil.Process().children()], flush=True)
"""


def started(text: str, *, folder: Path) -> subprocess.Popen[str]:
    """A script that is a process's main module, without a guard."""
    (folder / "script.py").write_text(MAIN + text)
    root = str(Path(judge_module.__file__).parents[4])
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("ending", ["judge.close()", "pass", "judge.submit('', 'busy', {}); time.sleep(0.5)", "1 / 0"])
def test_the_main_module_is_not_run_again_and_its_end_is_the_workers_end(file, tmp_path, ending):
    process = started(f"{ending}\n", folder=tmp_path)
    out, err = process.communicate(timeout=60)
    lines = out.splitlines()
    assert process.returncode == (1 if "/" in ending else 0), err
    assert len(lines) == 2 and lines[0] == "Judged(value=1.0, failure='')", "what a reward prints is not on stdout"
    assert "from the reward\n" in err and "from below\n" in err
    assert (tmp_path / "runs.txt").read_text() == "run\n"
    assert len(lines[1].split()) == 2
    wait_until(lambda: not any(alive(int(pid)) for pid in lines[1].split()))


def test_workers_end_when_their_parent_is_killed(file, tmp_path):
    """Also one that is idle, and one that never lets go of the interpreter."""
    process = started("judge.submit('', 'busy', {})\nprint('ready', flush=True)\ntime.sleep(1000)\n", folder=tmp_path)
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        pass
    children = psutil.Process(process.pid).children()
    assert len(children) == 2 and all(alive(child.pid) for child in children)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    wait_until(lambda: not any(alive(child.pid) for child in children))


@pytest.mark.ray
def test_an_actor_has_a_judge_and_takes_its_workers_along(file, local_ray):
    """Its main module is a script of Ray's, which no worker may run; and Ray kills it without a word."""
    import ray

    class Actor:
        def modules(self, path: str) -> str:
            with Judge(f"{path}:modules") as judge:
                return judge.submit("", "", {}).result(60).failure

        def hang(self, path: str) -> list[int]:
            self.judge = Judge(f"{path}:do", timeout_s=1000, workers=2)
            assert self.judge.submit("", "true", {}).result(60).value == 1.0
            self.judge.submit("", "busy", {})
            return [child.pid for child in psutil.Process().children()]

    path = str(Path(file).absolute())
    actor = ray.remote(num_cpus=0)(Actor).remote()
    assert ray.get(actor.modules.remote(path)).endswith("RuntimeError: [] ['-c']")
    pids = ray.get(actor.hang.remote(path))
    assert pids and all(alive(pid) for pid in pids)
    ray.kill(actor)
    wait_until(lambda: not any(alive(pid) for pid in pids))
