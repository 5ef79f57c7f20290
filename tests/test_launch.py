"""The main job from the command line on a tiny model: what a run leaves, resume, replay, evaluation, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from zoray import journal
from zoray.cli import compose
from zoray.launch import main
from zoray.monitoring import read_metrics
from zoray.replay import replay

pytestmark = pytest.mark.ray
STEPS = 12


def command(module: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", f"zoray.{module}", *overrides]


def settings(folder: Path, model: Path, data: Path, engine: str, name: str, *more: str) -> list[str]:
    words = "task.words=[' terrible',' great']"
    return [
        *(f"model.path={model}", "task=file", f"task.path={data}", words, "task.dev=20", "task.test=20"),
        *(f"engine={engine}", f"run.name={name}", f"run.folder={folder}", f"run.steps={STEPS}", "run.batch=8"),
        *("run.eval_every=4", "run.digest_every=3", "optimizer.lr=0.02", "cluster.dashboard=false"),
        *(("engine.kv_cache_gib=0.25", "engine.max_tokens=1024") if engine == "vllm" else ()),
        *more,
    ]


def launch_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The same main in this process and on the shared Ray: most of a short run's time is importing and starting."""
    monkeypatch.setattr(sys, "argv", ["zoray.launch", *arguments])
    assert main(compose("config", list(arguments))) == 0


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
        launch_here(patch, *settings(root, tiny_models["llama"], labelled_file, "hf", "whole"))
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
    assert "adapters live: adapter_error" in done.stdout and "dev" in done.stdout and "test" in done.stdout


def test_the_loss_on_dev_falls(vllm_run):
    summary = json.loads((vllm_run[0] / "summary.json").read_text())
    assert summary["final"]["loss"] < summary["initial"]["loss"]


def test_one_and_two_replicas_agree_up_to_score_noise(
    vllm_run, tmp_path, tiny_models, labelled_file, local_ray, monkeypatch
):
    """Tiles are packed differently, so the last bits differ; the coefficients are differences over 2 eps of them."""
    launch_here(monkeypatch, *settings(tmp_path, tiny_models["llama"], labelled_file, "vllm", "one", "run.test=false"))
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
        assert f"dev accuracy {measured[8].accuracy:.4f}" in line and measured[8].digest in line
        assert abs(float(line.split("loss ")[1].split()[0]) - measured[8].loss) < 1e-4


def test_exported_adapter_in_peft_gives_the_final_loss_and_predictions(vllm_run, tiny_models):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zoray.cli import build_experiment, load_run_config

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_a_run_that_was_cut_short_resumes_to_the_same_digest(
    number, hf_run, tmp_path, tiny_models, labelled_file, monkeypatch
):
    arguments = settings(tmp_path, tiny_models["llama"], labelled_file, "hf", "cut", "run.test=false")
    folder = tmp_path / "cut"
    process = subprocess.Popen(command("launch", *arguments), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "journal.jsonl").exists() and (folder / "journal.jsonl").read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.wait(timeout=120)
    done = len(journal.read(folder / "journal.jsonl").steps)
    assert 0 < done < STEPS
    if number == signal.SIGTERM:
        assert process.returncode == 3
        assert "go on with run.resume=" in (process.stdout.read() if process.stdout else "")
    launch_here(monkeypatch, f"run.resume={folder}", "cluster.dashboard=false")
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    whole, cut = (journal.read(path / "journal.jsonl") for path in (hf_run, folder))
    assert [s.commit for s in cut.steps] == [s.commit for s in whole.steps]
    assert [e.accuracy for e in read_metrics(folder)[1]] == [
        e.accuracy for e in read_metrics(hf_run)[1] if e.split == "dev"
    ]


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
