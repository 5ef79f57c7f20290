"""The main job from the command line on a tiny model: what a run leaves, resume, replay, evaluation, selection."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from local_pool import LocalPool, launched

from zoray import evaluate
from zoray import replay as replay_command
from zoray.models.folder import load_matrices
from zoray.records import ConfigError, JournalError
from zoray.replay import replay
from zoray.run import driver, journal
from zoray.run.config import compose
from zoray.run.journal import open_journal
from zoray.run.reports.history import read_metrics

pytestmark = pytest.mark.ray
STEPS = 12


def command(module: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", f"zoray.{module}", *overrides]


def settings(folder: Path, model: Path, data: Path, engine: str, name: str, *more: str) -> list[str]:
    words = "task.words=[' terrible',' great']"
    return [
        *(f"model.path={model}", "task=file", f"task.path={data}", words, "task.dev=20", "task.test=20"),
        *(f"engine={engine}", f"run.name={name}", f"run.folder={folder}", f"run.steps={STEPS}", "run.batch=8"),
        *("estimator=two_point", "run.stratify=false"),
        *("run.eval_every=4", "run.digest_every=3", "optimizer.lr=0.02", "cluster.dashboard=false"),
        *(("engine.kv_cache_gib=0.25", "engine.max_tokens=1024") if engine == "vllm" else ()),
        *more,
    ]


def launch_here(monkeypatch: pytest.MonkeyPatch, *arguments: str, ray: bool = False) -> None:
    """The same main in this process, on the shared Ray or without: most of a short run's time is importing."""
    with monkeypatch.context() as patch:
        if not ray:
            patch.setattr(driver, "tune", partial(driver.tune, start_pool=LocalPool))
        assert launched(patch, *arguments) == 0


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command("launch", *arguments), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory, tiny_models, labelled_file) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run on vLLM with two replicas."""
    root = tmp_path_factory.mktemp("runs")
    done = launch(*settings(root, tiny_models["llama"], labelled_file, "vllm", "two", "cluster.replicas=2"))
    return root / "two", done


@pytest.fixture(scope="module")
def hf_run(tmp_path_factory, tiny_models, labelled_file, local_ray) -> Path:
    """A finished, undisturbed run on the reference engine."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        launch_here(patch, *settings(root, tiny_models["llama"], labelled_file, "hf", "whole"), ray=True)
    return root / "whole"


def test_a_run_leaves_what_the_readme_says(vllm_run):
    folder, done = vllm_run
    left = {path.name for path in folder.iterdir()}
    assert left >= {"config.yaml", "journal.jsonl", "metrics.jsonl", "summary.json", "curve.png", "adapter"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == STEPS and summary["replicas"] == 2
    for key in ("wall_seconds", "seconds_per_step", "tokens_per_second", "forward_tokens", "digest"):
        assert summary[key], key
    assert {"accuracy", "loss", "test"} <= set(summary["initial"]) and {"accuracy", "test"} <= set(summary["final"])
    assert summary["best"]["step"] in (0, 4, 8, 12)
    assert summary["selected"] == summary["final"]["step"] == summary["final"]["test"]["step"]
    assert summary["silent_directions"] == {"dropped": 0, "ties": 0, "buried": 0}
    assert 0 <= summary["score_noise"] < 1e-4  # of another packing, in float32
    assert "adapters live: adapter_error" in done.stdout and "dev" in done.stdout and "test" in done.stdout


def test_the_loss_on_dev_falls(vllm_run):
    summary = json.loads((vllm_run[0] / "summary.json").read_text())
    assert summary["final"]["loss"] < summary["initial"]["loss"]


def test_one_and_two_replicas_agree_up_to_score_noise(
    vllm_run, tmp_path, tiny_models, labelled_file, local_ray, monkeypatch
):
    """Tiles are packed differently, so the last bits differ; the coefficients are differences over 2 eps of them."""
    launch_here(
        monkeypatch, *settings(tmp_path, tiny_models["llama"], labelled_file, "vllm", "one", "run.test=false"), ray=True
    )
    one, two = (journal.read(folder / "journal.jsonl") for folder in (tmp_path / "one", vllm_run[0]))
    a = np.array([step.commit.coefficients[0] for step in one.steps])
    b = np.array([step.commit.coefficients[0] for step in two.steps])
    assert len(a) == STEPS and np.abs(a).min() > 0
    assert np.abs(a - b).max() < 0.01 * np.abs(a).max()


def test_replay_gives_the_digest_of_the_run_and_checks_it_on_the_way(vllm_run):
    folder, _ = vllm_run
    summary = json.loads((folder / "summary.json").read_text())
    done = subprocess.run(command("replay", f"run={folder}"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert summary["digest"] in done.stdout and f"step {STEPS} of {STEPS}" in done.stdout
    assert "4 digests on the way agree" in done.stdout


def test_evaluating_a_replayed_step_gives_what_the_run_measured_there(vllm_run):
    folder, _ = vllm_run
    measured = {e.step: e for e in read_metrics(folder)[1] if e.split == "dev"}
    for arguments in ([], ["engine=hf"]):
        done = subprocess.run(
            command("evaluate", f"run={folder}", "step=8", *arguments), capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("step 8:"))
        assert f"dev accuracy {measured[8].score:.4f}" in line and measured[8].digest in line
        assert abs(float(line.split("loss ")[1].split()[0]) - measured[8].loss) < 1e-4


@pytest.mark.parametrize("change", [("seed: 0", "seed: 1"), ("rank: 2", "rank: 3")])
def test_evaluate_refuses_a_config_that_is_not_the_journals(change, hf_run, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(hf_run, folder)
    text = (folder / "config.yaml").read_text()
    assert text.count(change[0]) == 1 or change[0] == "seed: 0"
    (folder / "config.yaml").write_text(text.replace(*change))
    with pytest.raises(JournalError, match=r"the journal was made with .* Undo the change of that file"):
        evaluate.main(compose("evaluate", [f"run={folder}"]))


def test_replicas_with_other_model_files_are_refused(tmp_path, tiny_models, labelled_file, monkeypatch):
    """The journal pins the model that this machine sees; a node may have another one at the same path."""
    monkeypatch.setattr("zoray.run.journal.weights_hash", lambda folder: "0123456789abcdef")
    with pytest.raises(ConfigError, match=r"replicas' model files to be those of this machine, .*Give all nodes"):
        launch_here(monkeypatch, *settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "other"))


def test_exported_adapter_in_peft_gives_the_final_loss_and_predictions(vllm_run, tiny_models):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zoray.run.config import build_experiment
    from zoray.run.folder import load_run_config

    folder, _ = vllm_run
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    words = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" terrible", " great")]
    losses, correct = [], []
    for example in build_experiment(load_run_config(folder)).task.load().dev:
        with torch.inference_mode():
            logits = model(**tokenizer(example.prompt, return_tensors="pt", return_token_type_ids=False)).logits[
                0, -1, words
            ]
        losses.append(float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([example.label]))))
        correct.append(int(logits.argmax()) == example.label)
    final = json.loads((folder / "summary.json").read_text())["final"]
    assert abs(np.mean(losses) - final["loss"]) < 1e-3
    assert abs(np.mean(correct) - final["accuracy"]) < 1e-9


def test_two_runs_of_one_seed_are_equal(hf_run, tmp_path, tiny_models, labelled_file, monkeypatch):
    launch_here(monkeypatch, *settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "again", "run.test=false"))
    first, second = (journal.read(folder / "journal.jsonl") for folder in (hf_run, tmp_path / "again"))
    assert [s.commit for s in first.steps] == [s.commit for s in second.steps]
    assert replay(first).digest() == replay(second).digest()


@pytest.mark.slow
def test_a_run_that_is_cut_short_three_times_resumes_to_the_same_digest(
    hf_run, tmp_path, tiny_models, labelled_file, monkeypatch
):
    """By kill -9, by SIGTERM and by Ctrl-C, each in a process of its own, some steps after the last."""
    folder = tmp_path / "cut"
    path, begun = folder / "journal.jsonl", 0
    arguments = settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "cut", "run.test=false")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with (tmp_path / "said").open("w") as out:
            process = subprocess.Popen(command("launch", *arguments), stdout=out)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") > begun + 1:
                break
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.wait(timeout=120)
        done = len(journal.read(path).steps)
        assert begun < done < STEPS
        if number != signal.SIGKILL:
            assert process.returncode == 3
            assert "go on with run.resume=" in (tmp_path / "said").read_text()
        begun, arguments = done, [f"run.resume={folder}", "cluster.dashboard=false"]
    launch_here(monkeypatch, *arguments)
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    whole, cut = (journal.read(path / "journal.jsonl") for path in (hf_run, folder))
    assert [s.commit for s in cut.steps] == [s.commit for s in whole.steps]
    assert [e.score for e in read_metrics(folder)[1]] == [e.score for e in read_metrics(hf_run)[1] if e.split == "dev"]


# other spaces, estimators and optimizers; the reference engine, without Ray

PATIENCE = 3
KINDS = {
    "lozo": [
        *("space=lozo", "space.interval=2", "space.keep_base=true", "optimizer=momentum", "optimizer.lr=0.035"),
        *("optimizer.anchor=1", "optimizer.weight_decay=1", "estimator.pairs=2", "estimator.shared=false"),
        *("run.steps=7", "run.select=last"),
    ],
    "lowrank": [
        *("space=lowrank", "estimator=evolution", "estimator.population=4", "estimator.centring=prompt"),
        *("optimizer.lr=0.01", "run.steps=6", "run.stratify=true"),
    ],
    "adaptive": [  # a step size that is too large, so that the best state is neither the first nor the last
        *("optimizer=adaptive", "optimizer.momentum=0.5", "optimizer.lr=0.1", "optimizer.schedule=constant"),
        *("run.steps=30", "run.eval_every=1", f"run.patience={PATIENCE}"),
    ],
}
FOLDING = ("lozo", "lowrank")


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_models, labelled_file):
    """A function: the folder of a finished run of a kind; each kind runs once."""
    root, finished = tmp_path_factory.mktemp("kinds"), {}

    def run(kind: str) -> Path:
        if kind not in finished:
            with pytest.MonkeyPatch.context() as patch:
                arguments = settings(root, tiny_models["llama"], labelled_file, "hf", kind, "run.digest_every=1")
                launch_here(patch, *arguments, *KINDS[kind])
            finished[kind] = root / kind
        return finished[kind]

    return run


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def cut(whole: Path, folder: Path, steps: int) -> Path:
    """What is left of a run that was killed while it wrote step `steps` into its journal."""
    folder.mkdir()
    shutil.copy(whole / "config.yaml", folder)
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[: steps + 1]) + lines[steps + 1][:20])
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(record) + "\n" for record in metrics if record["step"] <= steps]
    (folder / "metrics.jsonl").write_text("".join(kept))
    return folder


def rebuilt(folder: Path, kind: str, model: Path, step: int):
    """The state of a run after a step, from its journal."""
    contents = journal.read(folder / "journal.jsonl")
    weights = load_matrices(model, contents.header["matrices"], "float32") if kind in FOLDING else None
    return replay(contents, step, weights=weights)


def printed(capsys, command_main, config: str, *arguments: str) -> str:
    """The last line that a main prints, here and not in a process of its own."""
    capsys.readouterr()
    command_main(compose(config, list(arguments)))
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_reaches_its_end_and_replays(kind, start, tiny_models, capsys):
    folder = start(kind)
    summary, contents = summary_of(folder), journal.read(folder / "journal.jsonl")
    steps, selected = summary["steps"], summary["selected"]
    assert summary["finished"] and steps == len(contents.steps) and 0 < selected <= steps
    assert (folder / "adapter").exists() == (kind not in FOLDING)  # what folds is exported as a whole model
    said = printed(capsys, replay_command.main, "replay", f"run={folder}", f"step={selected}")
    assert said == f"step {selected} of {steps}, digest {summary['digest']}, {selected} digests on the way agree"
    last = printed(capsys, replay_command.main, "replay", f"run={folder}")
    assert last.startswith(f"step {steps} of {steps}, ") and last.endswith(f" {steps} digests on the way agree")
    assert (summary["digest"] in last) == (selected == steps)
    measured = {(e.step, e.split): e for e in read_metrics(folder)[1]}
    assert measured[selected, "dev"].digest == measured[selected, "test"].digest == summary["digest"]
    assert len({e.digest for e in measured.values()}) == len({step for step, _ in measured})  # every step moved it
    assert 0 < summary["score_noise"] < 1e-5  # rounding; the reference scores each sequence alone
    assert summary["silent_directions"] == {"dropped": 0, "ties": 0, "buried": 0}


def test_the_journal_has_what_each_kind_needs(start, tiny_models):
    lozo, lowrank, adaptive = (journal.read(start(kind) / "journal.jsonl") for kind in KINDS)
    assert all(contents.header["dtype"] == "float32" for contents in (lozo, lowrank, adaptive))
    assert all(contents.header["revision"] is None for contents in (lozo, lowrank, adaptive))
    assert [contents.header["run"]["stratify"] for contents in (lozo, lowrank, adaptive)] == [False, True, False]
    commits = [noted.commit for noted in lozo.steps]
    assert all(c.momentum == 0.9 and -0.035 <= c.rate < 0 and len(c.coefficients) == 2 for c in commits)
    assert all(0.96 < c.decay < 1 and c.anchor == c.decay for c in commits)
    assert not any(noted.optimizer for noted in (*lozo.steps, *lowrank.steps))
    assert all(len(noted.losses) == 4 and noted.commit.momentum is None for noted in lowrank.steps)
    states = [noted.optimizer for noted in adaptive.steps]
    assert [round(power, 9) for _, power in states] == [round(0.99**t, 9) for t in range(1, len(states) + 1)]
    assert all(v > 0 for v, _ in states) and len(set(states)) == len(states)
    assert adaptive.header["optimizer"]["link"] == {"name": "GlobalAdaptive", "beta": 0.99, "epsilon": 1e-8}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes_to_the_same_end(kind, start, tmp_path, monkeypatch):
    """Within an interval of lozo, and before adaptive has found its best state."""
    whole = start(kind)
    folder = cut(whole, tmp_path / kind, steps=3)
    launch_here(monkeypatch, f"run.resume={folder}")
    first, second = (journal.read(path / "journal.jsonl") for path in (whole, folder))
    assert second.steps == first.steps  # commits, losses, digests and the optimizer's state
    before, after = (summary_of(path) for path in (whole, folder))
    for key in ("digest", "steps", "selected", "initial", "final", "best", "finished"):
        assert after[key] == before[key], key
    measured = [read_metrics(path) for path in (whole, folder)]
    steps, evaluations = zip(*measured, strict=True)
    assert len({tuple((s.step, s.loss, s.score, s.lr) for s in some) for some in steps}) == 1
    assert len({tuple((e.step, e.split, e.loss, e.digest) for e in some) for some in evaluations}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_folding_run_does_not_resume_on_weights_of_another_dtype(kind, start, tmp_path):
    """They hold other digits after a fold, so it would not be one run; an adapter is the same on any."""
    path = cut(start(kind), tmp_path / kind, steps=3) / "journal.jsonl"
    contents, before = journal.read(path), path.read_bytes()
    if kind in FOLDING:
        with pytest.raises(JournalError, match=r"folds into base weights of float32; this engine holds bfloat16"):
            open_journal(path, contents.header, contents, "bfloat16", folds=True)
        assert path.read_bytes() == before
    else:
        open_journal(path, contents.header, contents, "bfloat16", folds=False).close()
    with open_journal(path, contents.header, contents, "float32", folds=kind in FOLDING) as log:
        assert log.next_step == 3


# patience and selection


def test_patience_ends_a_run_early_and_a_resume_of_it_at_once(start, tmp_path, monkeypatch, capsys):
    whole = start("adaptive")
    summary = summary_of(whole)
    top = max((e for e in read_metrics(whole)[1] if e.split == "dev"), key=lambda e: (e.score, -e.loss, -e.step))
    assert top.step > 0 and summary["steps"] == top.step + PATIENCE < 30
    folder = shutil.copytree(whole, tmp_path / "ended")
    (folder / "summary.json").unlink()
    before = (folder / "journal.jsonl").read_bytes()
    launch_here(monkeypatch, f"run.resume={folder}")
    assert f"nothing better on dev in {PATIENCE} evaluations: the run ends early" in capsys.readouterr().out
    assert (folder / "journal.jsonl").read_bytes() == before
    again = summary_of(folder)
    for key in ("digest", "steps", "selected", "initial", "final", "best", "finished", "forward_tokens"):
        assert again[key] == summary[key], key
    assert read_metrics(folder)[1] == read_metrics(whole)[1]  # nothing was measured twice


def test_the_best_state_on_dev_is_the_result(start, tiny_models):
    """adapter/, digest, the numbers on test and the summary are all of that step."""
    from safetensors.numpy import load_file

    folder = start("adaptive")
    summary, evaluations = summary_of(folder), read_metrics(folder)[1]
    selected, last = summary["selected"], summary["steps"]
    assert selected == summary["best"]["step"] == summary["final"]["step"] < last
    states = {step: rebuilt(folder, "adaptive", tiny_models["llama"], step) for step in (selected, last)}
    assert summary["digest"] == states[selected].digest() != states[last].digest()
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.weight": value for name, value in states[selected].arrays().items()}
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    assert [e.step for e in evaluations if e.split == "test"] == [0, selected]
    final = next(e for e in evaluations if (e.step, e.split) == (selected, "test"))
    assert summary["final"]["test"]["loss"] == final.loss and final.digest == summary["digest"]
    assert summary["final"]["accuracy"] > summary["initial"]["accuracy"]


def test_the_last_state_is_the_result_where_it_is_asked_for(start, tiny_models):
    folder = start("lozo")
    summary, evaluations = summary_of(folder), read_metrics(folder)[1]
    assert summary["selected"] == summary["steps"] == summary["final"]["step"] == 7
    assert summary["best"]["step"] < 7, "this run can't tell best from last: take another optimizer.lr"
    assert [e.step for e in evaluations if e.split == "test"] == [0, 7]
    assert summary["digest"] == rebuilt(folder, "lozo", tiny_models["llama"], 7).digest()


@pytest.mark.parametrize("kind", ["lowrank", "adaptive"])
def test_evaluate_takes_the_best_step_and_another_task(kind, start, labelled_file, capsys):
    folder = start(kind)
    summary = summary_of(folder)
    selected, final = summary["selected"], summary["final"]
    assert selected < summary["steps"] or kind == "lowrank"
    for split, numbers in (("dev", final), ("test", final["test"])):
        said = printed(capsys, evaluate.main, "evaluate", f"run={folder}", "step=best", f"split={split}")
        scores = f"{split} accuracy {numbers['accuracy']:.4f}, loss {numbers['loss']:.6f} (20 examples)"
        assert said == f"step {selected}: {scores}, digest {summary['digest']}"
    swapped = ["task=file", f"task.path={labelled_file}", "task.words=[' great',' terrible']", "task.dev=20"]
    said = printed(capsys, evaluate.main, "evaluate", f"run={folder}", "step=best", *swapped, "task.test=20")
    assert f"accuracy {1 - final['accuracy']:.4f}, " in said and said.endswith(f"digest {summary['digest']}")


def test_directions_that_say_nothing_are_counted_and_warned_of(
    tmp_path, tiny_models, labelled_file, monkeypatch, capsys
):
    """A perturbation that float32 swallows: every pair is a tie, no step moves, and patience ends the run."""
    more = ["estimator.eps=1e-30", "estimator.pairs=2", "run.eval_every=1", "run.patience=2", "run.select=last"]
    more += ["run.batch=5", "run.stratify=true"]
    launch_here(monkeypatch, *settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "silent", *more))
    summary = summary_of(tmp_path / "silent")
    assert (summary["finished"], summary["steps"], summary["selected"]) == (True, 2, 2)
    assert summary["best"]["step"] == 0 and summary["final"]["loss"] == summary["initial"]["loss"]
    assert summary["silent_directions"] == {"dropped": 0, "ties": 4, "buried": 0}
    assert [s.ties for s in read_metrics(tmp_path / "silent")[0]] == [2, 2]
    said = capsys.readouterr().out
    assert "warning: 4 of 4 directions said nothing" in said
    assert "warning: batches of 5 can't hold 2 labels equally often" in said
    commits = [noted.commit for noted in journal.read(tmp_path / "silent" / "journal.jsonl").steps]
    assert [commit.coefficients for commit in commits] == [(0.0, 0.0)] * 2


@pytest.mark.slow
def test_joins_a_running_cluster_of_two_nodes(hf_run, tmp_path, tiny_models, labelled_file):
    """A head and a second raylet with one core each: one replica on either, and the same journal as on one machine."""
    from ray.cluster_utils import Cluster as RayCluster

    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        address = cluster.address  # None after the shutdown
        more = ("run.test=false", "cluster.replicas=auto", f"cluster.address={address}")
        done = launch(*settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "joined", *more))
    finally:
        cluster.shutdown()
    assert f"joined the Ray cluster at {address}: 2 CPU" in done.stdout
    assert "2 replica(s)" in done.stdout
    whole, joined = (journal.read(path / "journal.jsonl") for path in (hf_run, tmp_path / "joined"))
    assert [s.commit for s in joined.steps] == [s.commit for s in whole.steps]
