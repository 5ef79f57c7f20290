"""Replay: a journal alone gives the run's state back, or says where it does not."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from zoray import journal
from zoray.cli import run_main
from zoray.journal import Contents, StepRecord
from zoray.optimizers import to_float32
from zoray.records import Commit, ConfigError, JournalError
from zoray.replay import main, replay
from zoray.spaces import Lora, LoraState

MATRICES = {"model.layers.0.q_proj": (6, 10), "model.layers.0.up_proj": (11, 7)}
SEED, STEPS, DIGEST_EVERY = 5, 7, 2
SPACES = [
    Lora(rank=3),
    Lora(rank=2, alpha=4.0, targets=("up_proj",), train="AB", distribution="gaussian"),
]


def commit(step: int) -> Commit:
    return Commit(step, tuple(to_float32((k - 1.3) / (step + 3)) for k in range(3)), decay=1.0 if step % 3 else 0.99)


def write(folder: Path, space: Lora = SPACES[0]) -> list[str]:
    """A run's journal, made as the driver makes it; returns the state's digest after 0, 1, ... steps."""
    folder.mkdir()
    state = space.open(MATRICES, SEED)
    header = {
        "matrices": {name: list(shape) for name, shape in space.select(MATRICES).items()},
        "space": {"name": "Lora", **asdict(space)},
        "run": {"seed": SEED, "steps": STEPS},
    }
    digests = [state.digest()]
    with journal.Journal.create(folder / journal.FILE_NAME, header) as log:
        for step in range(STEPS):
            noted = digests[-1] if step % DIGEST_EVERY == 0 else None
            log.append(StepRecord(commit(step), (0.7, 0.6) * 3, noted))
            state.apply(commit(step))
            digests.append(state.digest())
    return digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def read(folder: Path) -> Contents:
    return journal.read(folder / journal.FILE_NAME)


def tensors(state: LoraState) -> list[tuple[str, list, list]]:
    return [(name, a.tolist(), b.tolist()) for name, a, b in state.tensors(state.flat)]


@pytest.mark.parametrize("space", SPACES, ids=["B", "AB"])
def test_replay_gives_the_state_of_every_step(folder, space):
    digests = write(folder, space)
    contents = read(folder)
    assert len(set(digests)) == STEPS + 1
    direct = space.open(MATRICES, SEED)
    for step in range(STEPS + 1):
        state = replay(contents, step)
        assert (state.step, state.digest()) == (step, digests[step])
        assert tensors(state) == tensors(direct)
        if step < STEPS:
            direct.apply(commit(step))
    assert replay(contents).digest() == digests[-1]


def test_replay_needs_the_journals_seed(folder):
    digests = write(folder)
    contents = read(folder)
    undigested = tuple(replace(step, digest=None) for step in contents.steps)
    other = replace(contents, header={**contents.header, "run": {"seed": SEED + 1}}, steps=undigested)
    assert replay(other).digest() != digests[-1]


@pytest.mark.parametrize("step", [-1, STEPS + 1])
def test_steps_that_are_not_there_are_refused(folder, step):
    write(folder)
    with pytest.raises(ConfigError, match=rf"expected step in 0\.\.{STEPS}, the steps in this journal; got {step}"):
        replay(read(folder), step)


def test_a_digest_that_differs_names_the_step(folder):
    digests = write(folder)
    contents = read(folder)
    steps = list(contents.steps)
    steps[4] = replace(steps[4], digest="0123456789abcdef")
    damaged = replace(contents, steps=tuple(steps))
    says = f"replay differs from the run at step 4: digest {digests[4]}, the run had 0123456789abcdef"
    with pytest.raises(JournalError, match=says):
        replay(damaged)
    assert replay(damaged, 4).digest() == digests[4]  # up to there it is the run


def test_another_coefficient_is_found_at_the_next_digest(folder):
    write(folder)
    contents = read(folder)
    steps = list(contents.steps)
    coefficients = (*steps[2].commit.coefficients[:2], to_float32(steps[2].commit.coefficients[2] * 1.000001))
    assert coefficients != steps[2].commit.coefficients
    steps[2] = replace(steps[2], commit=replace(steps[2].commit, coefficients=coefficients))
    with pytest.raises(JournalError, match="differs from the run at step 4"):
        replay(replace(contents, steps=tuple(steps)))


def test_an_unknown_space_is_refused(folder):
    write(folder)
    contents = read(folder)
    with pytest.raises(JournalError, match=r"expected a space that this version knows \(Lora\); got 'Hira'"):
        replay(replace(contents, header={**contents.header, "space": {"name": "Hira"}}))


# the command


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoray.replay", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def test_the_command_prints_step_and_digest(folder, tmp_path):
    digests = write(folder)
    done = command(tmp_path, f"run={folder}")
    assert done.stdout == f"step {STEPS} of {STEPS}, digest {digests[-1]}, 4 digests on the way agree\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # it leaves nothing behind


def test_a_missing_run_is_one_clear_line(tmp_path):
    done = command(tmp_path, "run=gone")
    says = "expected a journal at gone/journal.jsonl; there is none. Give the folder of a run: run=runs/<name>"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {says}\n")


@pytest.fixture
def in_process(folder, tmp_path, monkeypatch, capsys):
    """The command without a process of its own: arguments -> (exit code, stdout, stderr). A run is in `run`."""
    write(folder)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["zoray.replay", *arguments])
        with pytest.raises(SystemExit) as done:
            run_main("replay", main)
        return done.value.code, *capsys.readouterr()

    return call


def test_the_command_stops_at_a_step(in_process, folder):
    said = f"step 3 of {STEPS}, digest {replay(read(folder), 3).digest()}, 2 digests on the way agree\n"
    assert in_process("run=run", "step=3") == (0, said, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected the folder of a run: python -m zoray.replay run=runs/<name> [step=K]"),
        (["run=run", "step=two"], "expected step to be a whole number; got 'two'"),
        (["run=run", "step=-1"], f"expected step in 0..{STEPS}, the steps in this journal; got -1"),
        (["run=run", "step=8"], f"expected step in 0..{STEPS}, the steps in this journal; got 8"),
    ],
)
def test_a_mistake_in_the_command_is_one_clear_line(in_process, arguments, says):
    assert in_process(*arguments) == (2, "", f"error: {says}\n")


def test_a_damaged_journal_is_a_failure_that_names_the_line(in_process, folder):
    path = folder / journal.FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"step":3', b'"step":4', 1))
    code, out, said = in_process("run=run")
    assert (code, out) == (1, "")
    assert said.startswith("error: JournalError: run/journal.jsonl, line 5: damaged") and said.count("\n") == 1


def test_replay_needs_no_engine_and_no_model(folder, tmp_path):
    digests = write(folder)
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['zoray.replay', {f'run={folder}'!r}]\n"
        "try:\n    runpy.run_module('zoray.replay', run_name='__main__')\n"
        "except SystemExit as done:\n    assert done.code == 0, done.code\n"
        "heavy = {'vllm', 'ray', 'transformers', 'peft', 'datasets', 'wandb'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert digests[-1] in done.stdout
    assert done.stdout.endswith("heavy: [] True\n")
