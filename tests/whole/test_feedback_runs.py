"""Whole runs with residual feedback: the loss falls, they resume, replay and export, and mistakes show at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from chatty import ANSWERS, CHOICES, PROMPTS, Given, chat_llama, experiment
from guided import SPACE, guided
from local_pool import LocalPool
from omegaconf import OmegaConf
from rows import write_rows

from zoray import evaluate, export
from zoray.engines.vllm.engine import Vllm
from zoray.methods import snapshots
from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.estimators.feedback import GROUPS, Feedback, gains
from zoray.methods.optimizers import Sgd, Sign
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.pool.settings import Cluster
from zoray.records import ConfigError, Probe, Sampling
from zoray.run import journal
from zoray.run.config import build_experiment, compose
from zoray.run.driver import tune
from zoray.run.journal import make_header
from zoray.run.reports.history import read_metrics
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Metric, Reward
from zoray.scoring.workload import load_workload

if TYPE_CHECKING:
    from pathlib import Path

    from zoray.run.experiment import Experiment

STEPS = 9
REWARDING = """
def reward(prompt, completion, example):
    return sum(map(ord, completion)) % 10 / 10
"""
EVERYTHING = Sgd(lr=0.01, schedule="cosine", warmup=2, momentum=0.8, weight_decay=0.5, anchor=0.5)
RUNS: dict[str, dict[str, Any]] = {
    "usual": {"batch": 8, "tile_examples": 8},
    "everything": {
        **{"batch": 6, "tile_examples": 4, "estimator": Feedback(lens=8, pairs=3, eps=0.05), "optimizer": EVERYTHING}
    },
    "plain": {
        **{"estimator": Feedback(lens=0), "optimizer": Sgd(lr=0.004, schedule="constant"), "tile_examples": 1},
        "space": Lora(rank=2, targets="residual:0.5"),
    },
    "f1": {"estimator": Feedback(lens=0, pairs=1), "batch": 8, "tile_examples": 3},
    "reward": {"estimator": Feedback(lens=0, pairs=1, samples=2)},
}


class Snapping(LocalPool):
    """With snapshots, as the pool has them."""

    began = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if (snapshot := arguments[-1]) is not None:
            self.replica.engine.restore(snapshot.path.read_bytes(), snapshot.step)
            type(self).began = snapshot.step

    def keep_snapshot(self, path: Path) -> None:
        snapshots.write(path, self.replica.engine.snapshot(1 << 30) or b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


def made(kind: str, folder: Path, root: Path, **more: Any) -> Experiment:
    """An experiment of a kind, whose folder is there."""
    root.mkdir(exist_ok=True, parents=True)
    task, objective = Given(CHOICES), ChoiceNLL()
    if kind == "f1":
        objective = Metric("f1")
    if kind == "reward":
        (root.parent / "rewarding.py").write_text(REWARDING)
        task = Given(PROMPTS, "reward", Sampling(4))
        objective = Reward(f"{root.parent / 'rewarding.py'}:reward", temperature=1.0, workers=1)
    settings = {"steps": STEPS, "digest_every": 2, "select": "last", "test": False}
    e = guided(folder, task, objective, root, **(settings | RUNS[kind] | more))
    e.run.path.mkdir()
    return e


def lines(e: Experiment) -> list[bytes]:
    return (e.run.path / journal.FILE_NAME).read_bytes().splitlines()


def stopped_at(e: Experiment, step: int) -> Any:
    """Whether the journal has come that far."""
    return lambda: len(lines(e)) > step


def resumed(e: Experiment, **more: Any) -> Experiment:
    return replace(e, run=replace(e.run, resume=str(e.run.path)), **more)


def run(e: Experiment, pool: Any = LocalPool, **more: Any) -> dict[str, Any]:
    return tune(e, load_workload(e.spec), {}, pool, **more)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A function: an undisturbed run of a kind, once, and its summary."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def start(kind: str) -> tuple[Experiment, dict[str, Any]]:
        if kind not in done:
            e = made(kind, folder, root / kind / "runs")
            done[kind] = e, run(e)
        return done[kind]

    return start


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_stopped_and_resumed_is_the_undisturbed_one(kind, whole, folder, tmp_path):
    """Its journal to the last byte, twice cut: in the first steps, when nothing is known of the guide, and later."""
    undisturbed, summary = whole(kind)
    assert summary["finished"] and len(lines(undisturbed)) == STEPS + 1
    e = made(kind, folder, tmp_path / "runs")
    if kind == "reward":  # the header has the function's path
        e = replace(e, objective=undisturbed.objective)
    assert run(e, stopping=stopped_at(e, 1))["steps"] == 1
    again = resumed(e)
    assert not run(again, stopping=stopped_at(e, 6))["finished"] and len(lines(e)) == 7
    path = e.run.path / journal.FILE_NAME
    path.write_bytes(path.read_bytes()[:-40])  # the last line is torn
    assert run(again)["digest"] == summary["digest"]
    assert lines(e) == lines(undisturbed)


@pytest.mark.parametrize("kind", RUNS)
def test_replay_gives_the_states_of_the_run(kind, whole):
    e, summary = whole(kind)
    contents = journal.read(e.run.path / journal.FILE_NAME)
    assert [noted.digest is not None for noted in contents.steps] == [step % 2 == 0 for step in range(STEPS)]
    assert journal.replay(contents).digest() == summary["digest"]
    digests = [journal.replay(contents, step).digest() for step in range(STEPS + 1)]
    assert len(set(digests)) == STEPS + 1
    numbers = e.space.trained(load_workload(e.spec).matrices)
    for noted in contents.steps:
        assert len(noted.commit.signs) == -(-numbers // 8) and len(noted.commit.gains) == len(
            contents.header["matrices"]
        )
        assert noted.commit.coefficients == () and len(noted.losses) == 1 + 2 * e.estimator.pairs


@pytest.mark.parametrize("kind", ["usual", "everything", "plain"])
def test_the_loss_falls(kind, whole):
    _, summary = whole(kind)
    assert summary["final"]["loss"] < 0.9 * summary["initial"]["loss"]


def test_the_loss_of_answers_falls(folder, tmp_path):
    e = guided(folder, Given(ANSWERS, None), AnswerNLL(), tmp_path, batch=8, tile_examples=8, steps=20)
    e.run.path.mkdir()
    summary = run(e)
    assert summary["final"]["loss"] < 0.8 * summary["initial"]["loss"]
    steps, _ = read_metrics(e.run.path)
    assert steps[-1].loss < steps[0].loss and {step.ties + step.buried + step.dropped for step in steps} == {0}


def test_what_is_known_of_the_guide_is_journalled_and_used(whole):
    e, summary = whole("everything")
    contents = journal.read(e.run.path / journal.FILE_NAME)
    trusts = [noted.trust for noted in contents.steps]
    assert trusts[0] == () and trusts[1][0] == 3.0 and trusts[-1][0] == 3.0 * (STEPS - 1)  # no momentum before step 0
    assert all(len(trust) == 1 + GROUPS for trust in trusts[1:]) and len(summary["trust"]) == GROUPS
    factor = 1 - e.optimizer.momentum
    for noted in contents.steps:
        known = [factor * gain for gain in gains(noted.trust, len(noted.commit.gains))]
        assert noted.commit.gains == pytest.approx(known, rel=1e-6)
    assert len(set(contents.steps[-1].commit.gains)) > 1
    trust: tuple[float, ...] = ()
    for noted in contents.steps:
        trust = e.estimator.judge(trust, e.estimator.ask(noted.commit.step), [(loss,) for loss in noted.losses])
        assert trust == noted.trust
    assert "trust" not in whole("usual")[1]


def test_schedules_and_decays_are_in_the_commits(whole):
    e, _ = whole("everything")
    commits = [noted.commit for noted in journal.read(e.run.path / journal.FILE_NAME).steps]
    assert [c.rate for c in commits] == pytest.approx([-e.optimizer.lr_at(s, STEPS) for s in range(STEPS)], rel=1e-6)
    for c in commits:
        assert c.momentum == pytest.approx(0.8) and c.decay == c.anchor == pytest.approx(1 + 0.5 * c.rate, rel=1e-6)
    assert {
        c.momentum for c in (n.commit for n in journal.read(whole("plain")[0].run.path / "journal.jsonl").steps)
    } == {None}


def test_a_resumed_run_begins_from_its_snapshot(whole, folder, tmp_path):
    undisturbed, summary = whole("everything")
    e = replace(made("everything", folder, tmp_path / "runs"), cluster=Cluster(snapshot_every=2))
    run(e, Snapping, stopping=stopped_at(e, 7))
    kept = snapshots.read(e.run.path / snapshots.FILE_NAME)
    assert kept is not None and 2 <= kept.step <= 6
    assert run(resumed(e), Snapping)["digest"] == summary["digest"] and Snapping.began == kept.step
    assert lines(e) == lines(undisturbed)


@pytest.mark.parametrize("step", [4, STEPS])
def test_an_exported_step_has_the_loss_of_the_run_there(step, whole, folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    e, _ = whole("everything")
    export.write(e.run.path, tmp_path / "adapter", step, "peft")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pool: Any = LocalPool(e.spec, None, "", print, (), (), None)
    contents = journal.read(e.run.path / journal.FILE_NAME)
    pool.replica.apply([noted.commit for noted in contents.steps[:step]])
    own = pool.replica.scorer.surprise  # of what the run scores, example by example
    expected = own((Probe(step, 0, 0.0),), np.zeros(8, np.int64), np.arange(8))
    for index in range(8):
        (sequence,) = pool.replica.workload.encoded["train"][index]
        with torch.inference_mode():
            logps = model(torch.from_numpy(sequence.tokens)[None].long()).logits[0].log_softmax(-1)
        picked = logps[torch.from_numpy(sequence.rows).long(), torch.from_numpy(sequence.targets).long()]
        assert -float(picked.mean()) == pytest.approx(expected[index], abs=1e-4)


def test_the_driver_and_a_smaller_batch_of_tiles_agree(whole, folder, tmp_path):
    """Tiles are what feedback is measured by, so they are part of the result; most signs are the same all the same."""
    e = made("usual", folder, tmp_path / "runs", tile_examples=4)
    run(e, stopping=stopped_at(e, 1))
    first, other = (
        journal.read(of.run.path / journal.FILE_NAME).steps[0].commit.signs for of in (whole("usual")[0], e)
    )
    bits = [np.unpackbits(np.frombuffer(signs, np.uint8)) for signs in (first, other)]
    assert 0.8 < (bits[0] == bits[1]).mean() < 1


def test_a_run_from_the_command_line_is_evaluated_without_feedback(folder, tmp_path, monkeypatch, capsys):
    """Its settings are those of conf/; at any step its loss is what the run measured, and no map is fitted for it."""
    texts = [{"text": f"{e.prompt} {k}", "label": e.label} for k in range(3) for e in CHOICES]
    arguments = [
        *(f"model.path={folder}", "model=hf", "engine=hf", "task=file", "task.words=[' terrible',' great']"),
        *(f"task.path={write_rows(tmp_path / 'rows.jsonl', texts)}", "task.dev=8", "task.test=0", "run.test=false"),
        *("estimator=feedback", "optimizer=feedback", "space.train=AB", "space.targets=residual", "run.steps=4"),
        *("run.eval_every=2", f"run.folder={tmp_path}", "run.name=r", "run.batch=4", "logging.curve=false"),
    ]
    config = compose("config", arguments)
    e = build_experiment(config)
    assert isinstance(e.estimator, Feedback) and e.optimizer.momentum > 0 and e.space.train == "AB"
    e.run.path.mkdir()
    OmegaConf.save(config, e.run.path / "config.yaml")
    run(e)
    measured = {found.step: found for found in read_metrics(e.run.path)[1]}
    monkeypatch.setattr("zoray.engines.hf.HfEngine.fit_lens", lambda *_: pytest.fail("a map is fitted"))
    for step in (2, 4):
        capsys.readouterr()
        evaluate.main(compose("evaluate", [f"run={e.run.path}", f"step={step}"]))
        said = capsys.readouterr().out
        assert f"loss {measured[step].loss:.6f} (8 examples), digest {measured[step].digest}" in said


# journals of runs without feedback

ESTIMATORS = {
    "two_point": TwoPoint(pairs=2, eps=0.02),
    "one_sided": OneSided(probes=2, eps=0.02),
    "evolution": Evolution(population=4, sigma=0.02),
}
BEFORE = {  # fields of components in the header of format 2
    "two_point": {"name", "pairs", "eps", "shared", "max_dropped"},
    "optimizer": {"name", "lr", "schedule", "warmup", "clip", "momentum", "weight_decay", "anchor", "link"},
    "space": {"name", "rank", "alpha", "targets", "train", "distribution"},
}
HEADER = ["format", "model", "revision", "weights", "matrices", "space", "task", "objective", "estimator", "optimizer"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_journal_of_a_run_without_feedback_is_of_the_format_before(estimator, folder, tmp_path):
    """But for the number of the format: no line has a field more, in another order or in other words."""
    optimizer = Sgd(lr=1e-3, momentum=0.5, anchor=0.5, link=Sign())
    e = experiment(
        folder, Given(CHOICES), ChoiceNLL(), tmp_path, test=False, estimator=ESTIMATORS[estimator], optimizer=optimizer
    )
    e.run.path.mkdir()
    run(e)
    found = [json.loads(line) for line in lines(e)]
    assert list(found[0]) == [*HEADER, "run", "versions", "dtype", "crc"] and found[0]["format"] == journal.FORMAT
    assert found[0]["estimator"].keys() == BEFORE.get(estimator, found[0]["estimator"].keys())
    assert found[0]["optimizer"].keys() == BEFORE["optimizer"] and found[0]["space"].keys() == BEFORE["space"]
    for body in found[1:]:
        digest = ["digest"] if "digest" in body else []
        assert list(body) == ["step", "c", "anchor", "momentum", "rate", "losses", *digest, "prev", "crc"]
    assert make_header(e, load_workload(e.spec)).keys() == found[0].keys() - {"format", "dtype", "crc"}


def test_a_journal_of_the_format_before_is_read_and_resumed(folder, tmp_path):
    e = experiment(folder, Given(CHOICES), ChoiceNLL(), tmp_path, test=False, steps=4, select="last")
    e.run.path.mkdir()
    whole = run(e)
    path = e.run.path / journal.FILE_NAME
    found = [json.loads(line.rpartition(b',"crc":"')[0] + b"}") for line in lines(e)]
    found[0]["format"] = 2
    sealed, previous = [], None
    for body in found[:3]:
        if previous is not None:
            body["prev"] = journal._hash(previous[:-1])
        previous = journal._seal(body)
        sealed.append(previous)
    path.write_bytes(b"".join(sealed))
    (e.run.path / "metrics.jsonl").unlink()
    assert run(resumed(e))["digest"] == whole["digest"]


# what does not go together


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"space": Lozo(rank=1)}, "expected space=lora with estimator=feedback, .*; got space=lozo"),
        (
            {"space": LowRank(rank=1), "optimizer": Sgd()},
            "expected space=lora with estimator=feedback, .*; got space=lowrank",
        ),
        (
            {"estimator": Feedback(pairs=1), "optimizer": Sgd()},
            "optimizer.momentum above 0 with estimator.pairs, .*; got 0.0",
        ),
        ({"engine": Vllm(tensor_parallel=2)}, "engine.tensor_parallel=1 with estimator=feedback; got 2"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, says, folder, tmp_path):
    engine = parts.pop("engine", None)
    with pytest.raises(ConfigError, match=says):
        e = guided(folder, Given(CHOICES), ChoiceNLL(), tmp_path, **parts)
        replace(e, engine=engine or e.engine)


@pytest.mark.parametrize("targets", ["all-linear", ("o_proj", "q_proj"), ("lm_head",)])
def test_matrices_that_do_not_write_to_the_stream_are_refused_before_a_model_loads(
    targets, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("zoray.engines.hf.Hf.start", lambda *_: pytest.fail("a model loads"))
    e = guided(folder, Given(CHOICES), ChoiceNLL(), tmp_path, space=replace(SPACE, targets=targets))
    with pytest.raises(ConfigError, match=r"matrices that write to the residual stream .* Set space.targets=residual"):
        load_workload(e.spec)
    load_workload(replace(e, estimator=TwoPoint()).spec)


def test_a_family_that_is_not_known_is_refused_before_a_model_loads(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "granite"}))
    e = guided(other, Given(CHOICES), ChoiceNLL(), tmp_path)
    with pytest.raises(ConfigError, match=r"expected a model of one of these families .*is of granite. Take"):
        load_workload(e.spec)


def test_a_head_that_is_quantised_is_refused():
    from zoray.engines.vllm.feedback import head_of

    for weight in (None, torch.zeros(4, 2, dtype=torch.int8)):
        model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight), logits_processor=None)
        with pytest.raises(ConfigError, match="expected an LM head with plain weights for estimator=feedback"):
            head_of(model, 4)


@pytest.mark.parametrize(
    "wrong", [{"samples": 1}, {"pairs": -1}, {"eps": 0.0}, {"eps": float("nan")}, {"lens": 1.5}, {"pairs": True}]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match="expected estimator"):
        Feedback(**wrong)
