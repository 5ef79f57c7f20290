"""Replay: a journal alone gives the run's state back, or says where it does not."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from zoray.methods.optimizers import to_float32
from zoray.methods.spaces import Lora, LoraState, LowRank, Lozo
from zoray.models.folder import linear_matrices, load_matrices, weights_hash
from zoray.records import Commit, ConfigError, Evaluation, JournalError
from zoray.replay import main, replay
from zoray.run import journal
from zoray.run.config import run_main
from zoray.run.journal import Contents, StepRecord

MATRICES = {"model.layers.0.q_proj": (6, 10), "model.layers.0.up_proj": (11, 7)}
SEED, STEPS, DIGEST_EVERY = 5, 7, 2
SPACES = [
    Lora(rank=3),
    Lora(rank=2, alpha=4.0, targets=("up_proj",), train="AB", distribution="gaussian"),
]


def commit(step: int) -> Commit:
    return Commit(step, tuple(to_float32((k - 1.3) / (step + 3)) for k in range(3)), decay=1.0 if step % 3 else 0.99)


def full_commit(step: int) -> Commit:
    """With everything that a commit can do; in step 3 without momentum."""
    other = {} if step == 3 else {"momentum": to_float32(0.9), "rate": to_float32(-0.1 / (step + 1))}
    return replace(commit(step), anchor=to_float32(1 - 0.01 * step), **other)


def write(folder, space=SPACES[0], commits=commit, matrices=MATRICES, weights=None, pinned=None) -> list[str]:
    """A run's journal, made as the driver makes it; returns the state's digest after 0, 1, ... steps."""
    folder.mkdir()
    state = space.open(matrices, SEED, weights=weights)
    header = {
        "matrices": {name: list(shape) for name, shape in space.select(matrices).items()},
        "space": {"name": type(space).__name__, **asdict(space)},
        "run": {"seed": SEED, "steps": STEPS},
        **(pinned or {}),
    }
    digests = [state.digest()]
    with journal.Journal.create(folder / journal.FILE_NAME, header) as log:
        for step in range(STEPS):
            noted = digests[-1] if step % DIGEST_EVERY == 0 else None
            log.append(StepRecord(commits(step), (0.7, 0.6) * 3, noted))
            state.apply(commits(step))
            digests.append(state.digest())
    return digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def read(folder: Path) -> Contents:
    return journal.read(folder / journal.FILE_NAME)


def tensors(state: LoraState) -> list[tuple[str, list, list]]:
    return [(name, a.tolist(), b.tolist()) for name, a, b in state.tensors(state.flat)]


@pytest.mark.parametrize("commits", [commit, full_commit])
@pytest.mark.parametrize("space", SPACES, ids=["B", "AB"])
def test_replay_gives_the_state_of_every_step(folder, space, commits):
    digests = write(folder, space, commits)
    contents = read(folder)
    assert len(set(digests)) == STEPS + 1
    direct = space.open(MATRICES, SEED)
    for step in range(STEPS + 1):
        state = replay(contents, step)
        assert (state.step, state.digest()) == (step, digests[step])
        assert tensors(state) == tensors(direct)
        if step < STEPS:
            direct.apply(commits(step))
    assert replay(contents).digest() == digests[-1]


def test_a_journal_of_format_1_is_replayed(folder):
    digests = write(folder, pinned={"format": 1})
    assert read(folder).header["format"] == 1
    assert replay(read(folder)).digest() == digests[-1]


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
    says = r"expected a space that this version knows \(Lora, Lozo, LowRank\); got 'Hira' with \[\]"
    with pytest.raises(JournalError, match=says):
        replay(replace(contents, header={**contents.header, "space": {"name": "Hira"}}))


@pytest.mark.parametrize("change", [{"momentum": 0.8}, {"rate": -0.5}, {"anchor": 0.5}, {"decay": 0.5}])
def test_another_number_of_a_commit_is_found_at_the_next_digest(folder, change):
    """In step 0 no momentum has gathered that a factor could change, so in step 2."""
    write(folder, SPACES[1], full_commit)
    contents = read(folder)
    steps = list(contents.steps)
    steps[2] = replace(steps[2], commit=replace(steps[2].commit, **change))
    with pytest.raises(JournalError, match="differs from the run at step 4"):
        replay(replace(contents, steps=tuple(steps)))


# runs that fold into their base weights

FOLDING = [
    Lozo(rank=2, interval=3, keep_base=True),
    Lozo(rank=1, interval=1, keep_base=True, distribution="rademacher", fold_rounding="stochastic"),
    LowRank(rank=2, keep_base=True, fold_rounding="stochastic"),
    LowRank(rank=3, targets=("up_proj",), distribution="rademacher", keep_base=True),
]


def plain_full_commit(step: int) -> Commit:
    """Without momentum, which space=lowrank has not."""
    return replace(full_commit(step), momentum=None, rate=1.0)


def base(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in MATRICES.items()}
    return {name: torch.from_numpy(value).to(dtype) for name, value in values.items()}


def clones(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def weights(request) -> dict[str, torch.Tensor]:
    return base(request.param)


@pytest.mark.parametrize("space", FOLDING, ids=["lozo", "lozo-every-step", "lowrank", "lowrank-targets"])
def test_replay_of_a_folding_space_gives_the_weights_of_every_step(folder, space, weights):
    commits = full_commit if isinstance(space, Lozo) else plain_full_commit
    digests = write(folder, space, commits, weights=clones(weights))
    contents, direct, written = read(folder), space.open(MATRICES, SEED, weights=(live := clones(weights))), None
    assert len(set(digests)) == STEPS + 1
    for step in range(STEPS + 1):
        written = clones(weights)
        state = replay(contents, step, weights=written)
        assert (state.step, state.digest()) == (step, digests[step])
        assert all(torch.equal(written[name], live[name]) for name in MATRICES)
        pending = [(name, b.tolist(), a.tolist()) for name, (b, a) in state.pending().items()]
        assert pending == [(name, b.tolist(), a.tolist()) for name, (b, a) in direct.pending().items()]
        if step < STEPS:
            direct.apply(commits(step))
    changed = [name for name in MATRICES if not torch.equal(written[name], weights[name])]
    assert changed == list(space.select(MATRICES))


@pytest.mark.parametrize("space", FOLDING[::2], ids=["lozo", "lowrank"])
def test_replay_of_a_folding_space_needs_the_runs_own_weights(folder, space):
    weights = base(torch.float32)
    write(folder, space, weights=clones(weights))
    contents = read(folder)
    with pytest.raises(ConfigError, match=f"space={type(space).__name__.lower()} folds into the base weights; this"):
        replay(contents)
    used = clones(weights)
    replay(contents, weights=used)
    with pytest.raises(JournalError, match="differs from the run at step 0"):
        replay(contents, weights=used)  # they are the tuned ones now
    other = clones(weights)
    name = list(MATRICES)[-1]
    other[name].view(torch.int32)[-1, -1] ^= 1
    with pytest.raises(JournalError, match="differs from the run at step 0"):
        replay(contents, weights=other)
    other[name] = weights[name].to(torch.bfloat16)
    with pytest.raises(JournalError, match="differs from the run at step 0"):
        replay(contents, weights=other)


@pytest.mark.parametrize(("space", "ranks"), [(FOLDING[0], [2, 2]), (FOLDING[2], [6] * STEPS)], ids=["lozo", "lowrank"])
def test_replay_shows_every_fold(folder, space, ranks):
    """The factors that `on_fold` sees add up to what the weights have gained: two folds and a rest, or seven folds."""
    weights, seen = base(torch.float32), []
    undecayed = [replace(commit(step), decay=1.0) for step in range(STEPS)]
    write(folder, space, undecayed.__getitem__, weights=clones(weights))
    written = clones(weights)

    def keep(factors):
        seen.append({name: (b.double().numpy(), a.double().numpy()) for name, (b, a) in factors.items()})

    replay(read(folder), weights=written, on_fold=keep)
    assert [next(iter(factors.values()))[0].shape[1] for factors in seen] == ranks
    for name, shape in MATRICES.items():
        gained = sum(factors[name][0] @ factors[name][1] for factors in seen)
        assert gained.shape == shape
        found = written[name].double().numpy() - weights[name].double().numpy()
        assert np.abs(gained).max() > 0.1 and np.abs(found - gained).max() < 1e-5


# the command


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoray.replay", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_command_prints_step_and_digest(folder, tmp_path):
    digests = write(folder)
    done = command(tmp_path, f"run={folder}")
    assert done.stdout == f"step {STEPS} of {STEPS}, digest {digests[-1]}, 4 digests on the way agree\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # it leaves nothing behind


def test_a_missing_run_is_one_clear_line(tmp_path):
    done = command(tmp_path, "run=gone")
    says = "expected a journal at gone/journal.jsonl; there is none. Give the folder of a run: run=runs/NAME"
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
        ([], "expected the folder of a run: python -m zoray.replay run=runs/NAME (and step=K or step=best)"),
        (["run=run", "step=two"], "expected step to be a whole number or best; got 'two'"),
        (["run=run", "step=1.0"], "expected step to be a whole number or best; got 1.0"),
        (["run=run", "step=true"], "expected step to be a whole number or best; got True"),
        (["run=run", "step=best"], "expected an evaluation on dev in run/metrics.jsonl for step=best; give a number"),
        (["run=run", "step=-1"], f"expected step in 0..{STEPS}, the steps in this journal; got -1"),
        (["run=run", "step=8"], f"expected step in 0..{STEPS}, the steps in this journal; got 8"),
    ],
)
def test_a_mistake_in_the_command_is_one_clear_line(in_process, arguments, says):
    assert in_process(*arguments) == (2, "", f"error: {says}\n")


def measured(folder: Path, *evaluations: tuple[int, str, float, float]) -> None:
    """metrics.jsonl with evaluations (step, split, accuracy, loss), as a monitor writes them."""
    records = [Evaluation(step, split, loss, right, 10, 100, 0.5) for step, split, right, loss in evaluations]
    lines = [json.dumps({"kind": "evaluation", **asdict(record)}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("evaluations", "step"),
    [
        ([(0, "dev", 0.5, 0.7), (4, "dev", 0.75, 0.6), (6, "dev", 0.7, 0.5), (6, "test", 0.9, 0.1)], 4),
        ([(2, "dev", 0.6, 0.6), (STEPS + 1, "dev", 0.9, 0.1)], 2),  # a step that the journal has not (or not yet)
    ],
)
def test_step_best_is_the_best_one_on_dev(in_process, folder, evaluations, step):
    measured(folder, *evaluations)
    code, out, said = in_process("run=run", "step=best")
    assert (code, said) == (0, "")
    assert out.startswith(f"step {step} of {STEPS}, digest {replay(read(folder), step).digest()}, ")


def test_step_best_needs_an_evaluation_on_dev(in_process, folder):
    measured(folder, (2, "test", 0.6, 0.6), (STEPS + 1, "dev", 0.9, 0.1))
    says = "error: expected an evaluation on dev in run/metrics.jsonl for step=best; give a number\n"
    assert in_process("run=run", "step=best") == (2, "", says)


@pytest.mark.parametrize(
    ("space", "dtype", "step"),
    [(Lozo(rank=2, interval=3), "float32", STEPS), (Lozo(interval=2), "bfloat16", 4), (LowRank(), "float16", 3)],
    ids=["lozo-float32", "lozo-bfloat16", "lowrank-float16"],
)
def test_the_command_finds_the_base_weights_of_a_folding_run(in_process, tmp_path, tiny_models, space, dtype, step):
    model = tiny_models["llama"]
    matrices = linear_matrices(model)
    before = weights_hash(model)
    pinned = {"model": str(model), "revision": None, "weights": before, "dtype": dtype}
    digests = write(tmp_path / "folded", space, commit, matrices, load_matrices(model, matrices, dtype), pinned)
    code, out, said = in_process("run=folded", f"step={step}")
    assert code == 0, said
    assert out == f"step {step} of {STEPS}, digest {digests[step]}, {(step + 1) // 2} digests on the way agree\n"
    assert weights_hash(model) == before  # the folder itself is never written


def test_the_command_refuses_other_base_weights(in_process, tmp_path, tiny_models):
    model = tiny_models["llama"]
    matrices = linear_matrices(model)
    pinned = {"model": str(model), "revision": None, "weights": "0123456789abcdef", "dtype": "float32"}
    write(tmp_path / "folded", Lozo(), commit, matrices, load_matrices(model, matrices, "float32"), pinned)
    code, out, said = in_process("run=folded")
    assert (code, out) == (1, "")
    found = f"the journal was made with base weights 0123456789abcdef; {model} has {weights_hash(model)}. Give the"
    assert said.endswith(f"error: JournalError: {found} weights that the run had\n")


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
