"""Bad input ends a launch with exit code 2 and one clear line: before a model loads, and without a run folder."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zoray import launch
from zoray.pool.on_ray import reach
from zoray.pool.on_ray.reach import check_reachable
from zoray.pool.settings import Cluster
from zoray.records import ConfigError
from zoray.run import driver
from zoray.run.config import build_experiment, compose, run_main

REAL_TUNE = driver.tune
WORDS = "task.words=[' terrible',' great']"
ROWS = [{"text": f"a dull story {i}", "label": i % 2} for i in range(20)]


def jsonl(path: Path, *extra: str) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "".join(line + "\n" for line in extra))
    return path


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """A function: what `python -m zoray.launch` says as it refuses. It checks that nothing was loaded, made or left.

    In this process, because importing torch for each takes ten times as long as all the rest.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "tune", lambda *_: pytest.fail("a model would have been loaded"))

    def call(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["launch", "run.name=try", "run.folder=runs", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_main("config", launch.main)
        printed = capsys.readouterr()
        assert exit.value.code == 2 and "loaded" not in printed.out
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "runs"] == []
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return line

    return call


@pytest.fixture
def usual(tmp_path, tiny_models) -> list[str]:
    """Settings that would run."""
    data = jsonl(tmp_path / "mail.jsonl")
    return [f"model.path={tiny_models['llama']}", "task=file", f"task.path={data}", WORDS, "engine=hf"]


# model


def test_a_model_path_that_is_not_there(usual, refused):
    line = refused(*usual, "model.path=./nowhere")
    assert "model.path=./nowhere" in line and "is not there" in line and "Give a Hugging Face folder" in line


def test_a_hub_that_can_not_be_reached(usual, refused):
    line = refused(*usual, "model.path=org/name")
    assert "model.path=org/name" in line and "looked up on the Hugging Face Hub" in line and "local folder" in line


@pytest.mark.parametrize("rank", [0, 1000])
def test_a_rank_that_vllm_does_not_take(rank, usual, refused):
    line = refused(*usual, f"space.rank={rank}")
    assert f"space.rank to be a whole number from 1 to 512 (vLLM's largest LoRA rank); got {rank}" in line


def test_layers_that_the_model_does_not_have(usual, refused):
    line = refused(*usual, "space.targets=[q_proj,query]")
    assert "no linear layer of this model ends in query; it has down_proj, gate_proj" in line


# parts that do not go together


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["estimator=two_point", "estimator.shared=false", "estimator.pairs=3", "run.batch=16"],
            "expected run.batch to be a multiple of the estimator's 3 directions, which share it out "
            "(estimator.shared=false); got 16. Take 15",
        ),
        (
            ["estimator=two_point", "estimator.shared=false", "estimator.pairs=4", "run.batch=2"],
            "expected run.batch to be a multiple of the estimator's 4 directions, which share it out "
            "(estimator.shared=false); got 2. Take 4",
        ),
        (
            ["space=lowrank", "optimizer=momentum"],
            "expected optimizer.momentum=0 with space=lowrank, whose momentum would be as large as the model; got 0.9. "
            "Take space=lozo or space=lora",
        ),
        (
            ["space=lozo", "optimizer.anchor=0.1"],
            "expected space.keep_base=true with optimizer.anchor=0.1 and space=lozo",
        ),
        (
            ["space=lowrank", "optimizer.anchor=0.1"],
            "expected space.keep_base=true with optimizer.anchor=0.1 and space=lowrank",
        ),
        (
            ["engine=vllm", "space=lozo", "engine.tensor_parallel=2"],
            "expected engine.tensor_parallel=1 with a space that folds into the base weights",
        ),
        (["estimator=evolution", "estimator.population=7"], "expected an even estimator.population for mirrored pairs"),
    ],
)
def test_parts_that_do_not_go_together(settings, says, usual, refused):
    assert says in refused(*usual, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["estimator=two_point", "estimator.shared=false", "estimator.pairs=3", "run.batch=15"],
        ["estimator=two_point", "estimator.pairs=3", "run.batch=16"],
        ["space=lozo", "optimizer=momentum"],
        ["space=lozo", "optimizer.anchor=0.1", "space.keep_base=true"],
        ["space=lowrank", "optimizer.anchor=0.1", "space.keep_base=true", "estimator=evolution"],
        ["optimizer.anchor=0.1"],
    ],
    ids=" ".join,
)
def test_their_neighbours_that_do(settings, usual):
    build_experiment(compose("config", [*usual, *settings]))


def test_the_shell_sees_parts_that_do_not_go_together(tmp_path, usual):
    """Once in a process of its own: one line, exit code 2, no folder, and long before torch is imported."""
    arguments = [*usual, "run.name=try", "space=lowrank", "optimizer.momentum=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "zoray.launch", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: expected optimizer.momentum=0 with space=lowrank")
    assert not (tmp_path / "runs").exists()


def test_a_folding_space_on_a_quantised_model(tmp_path, usual, refused, tiny_models):
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "quantised"))
    config = {**json.loads((folder / "config.json").read_text()), "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(*usual, "space=lozo", f"model.path={folder}")
    assert "space=lozo folds its steps" in line and "quantised (awq)" in line and "Take space=lora" in line


# data


def test_label_words_that_are_not_one_token(usual, refused):
    words = ["objective.single_token=true", "task.words=[' wonderful thing',' great']"]
    line = refused(*usual, *words)
    assert "label words of one token" in line and "got ' wonderful thing', which is" in line
    assert "objective.single_token=false" in line


def test_a_text_that_is_longer_than_the_model(tmp_path, usual, refused):
    data = jsonl(tmp_path / "long.jsonl", json.dumps({"text": "far too long " * 100, "label": 1}))
    line = refused(*usual, f"task.path={data}")
    assert "at most 256 tokens, the limit of the model; got" in line and "far too long" in line


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.jsonl", "", "empty.jsonl has no rows"),
        ("header.csv", "text,label\n", "header.csv has no rows"),
        ("torn.jsonl", '{"text": "a", "label": 0}\n\n{"text": "b", "la\n', "torn.jsonl, line 3: not JSON"),
        ("cells.csv", "text,label\na,0\nb, c,1\n", "cells.csv, line 3: expected 2 cells (['text', 'label']); got 3"),
        ("label.jsonl", '{"text": "a", "label": 7}\n', "label.jsonl, line 1: label '7' has no word"),
        ("columns.tsv", "body\tlabel\na\t0\n", "columns.tsv, line 1: no column 'text'"),
        ("mail.xml", "a\t0\n", "task.path must end in .jsonl, .csv, .tsv"),
    ],
)
def test_an_empty_or_malformed_data_file(name, text, says, tmp_path, usual, refused):
    (tmp_path / name).write_text(text)
    assert says in refused(*usual, f"task.path={name}")


def test_a_data_file_that_is_not_there(usual, refused):
    assert "can't read task.path=gone.csv: No such file" in refused(*usual, "task.path=gone.csv")


# cluster


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (
            "127.0.0.1:1",
            "a Ray cluster at 127.0.0.1:1 (cluster.address or RAY_ADDRESS); it does not answer ([Errno 111]",
        ),
        ("ray://127.0.0.1:10001", "got 'ray://127.0.0.1:10001'. The Ray Client protocol is not used"),
        ("here", "as host:port or auto; got 'here'"),
        ("127.0.0.1:99999", "as host:port or auto; got '127.0.0.1:99999'"),
        ("http://127.0.0.1:8265", "8265 is the dashboard's"),
    ],
)
def test_a_cluster_address_where_no_cluster_is(address, says, usual, refused):
    started = time.monotonic()
    assert says in refused(*usual, f"cluster.address='{address}'")
    assert time.monotonic() - started < 30


def test_ray_address_counts_as_well(usual, refused, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "at 127.0.0.1:1 (cluster.address or RAY_ADDRESS)" in refused(*usual)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert Cluster().joins == "head:6379" and Cluster(address="other:6379").joins == "other:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert Cluster().joins is None
    check_reachable(None)


def test_a_server_that_accepts_and_never_answers(monkeypatch):
    assert reach.CONNECT_SECONDS <= 30
    monkeypatch.setattr(reach, "CONNECT_SECONDS", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(ConfigError, match="a connection is accepted, but no answer came within 3 s"):
            check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - started < 8


@pytest.mark.ray
def test_a_cluster_that_is_there_is_reachable(local_ray):
    import ray

    check_reachable(ray.get_runtime_context().gcs_address)


@pytest.mark.ray
def test_a_cluster_that_is_too_small_leaves_no_run_folder(usual, refused, monkeypatch, local_ray):
    monkeypatch.setattr(driver, "tune", REAL_TUNE)
    line = refused(*usual, "cluster.replicas=1000")
    assert "expected room for 1000 replicas" in line and "Lower cluster.replicas" in line


# vLLM


def test_models_that_vllm_has_no_lora_for_or_does_not_know(tmp_path):
    """In one process of its own: importing vLLM takes long, and sets much of the environment."""
    code = (
        "from transformers import BloomConfig, LlamaConfig\n"
        "from zoray.engines.vllm.engine import check_lora_support\n"
        "from zoray.records import ConfigError\n"
        "for kind, name in (BloomConfig, 'BloomForCausalLM'), (LlamaConfig, 'UnheardOfForCausalLM'), "
        "(LlamaConfig, None), (LlamaConfig, 'LlamaForCausalLM'):\n"
        "    kind(architectures=[name] if name else None).save_pretrained(str(name))\n"
        "    try:\n"
        "        print('#', check_lora_support(str(name)))\n"
        "    except ConfigError as error:\n"
        "        print('#', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True
    )
    bloom, unknown, unnamed, llama = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert "no LoRA support for BloomForCausalLM (BloomForCausalLM)" in bloom and "or engine=hf" in bloom
    assert "does not know the architecture of UnheardOfForCausalLM (" in unknown and "or engine=hf" in unknown
    assert "does not know the architecture of None (config.json names none)" in unnamed
    assert llama == "# None"


# the run's folder


def test_the_shell_sees_the_same(tmp_path, usual):
    """One refusal in a process of its own, after the tokenizer was loaded."""
    arguments = [*usual, "objective.single_token=true", "task.words=[' wonderful thing',' great']", "run.name=try"]
    command = [sys.executable, "-m", "zoray.launch", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: expected label words of one token")
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_folder_is_named_and_left_alone(tmp_path, usual, refused):
    folder = tmp_path / "runs" / "try"
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text("precious")
    line = refused(*usual)
    assert "run folder runs/try not to exist yet" in line
    assert "run.resume=runs/try" in line and "another run.name" in line
    assert [path.name for path in folder.iterdir()] == ["journal.jsonl"]
    assert (folder / "journal.jsonl").read_text() == "precious"


def test_a_run_folder_that_can_not_be_made(tmp_path, usual, refused):
    (tmp_path / "file").write_text("")
    line = refused(*usual, "run.folder=file")
    assert "can't make the run folder file/try" in line and "another run.folder" in line


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-x", "lr=0.1", "a,b"])
def test_a_run_name_that_is_no_folder_name(name):
    with pytest.raises(ConfigError, match=r"expected run\.name of letters"):
        launch.main(compose("config", [f"run.name='{name}'"]))


@pytest.mark.parametrize(
    ("error", "leaves", "kept"),
    [
        (ConfigError("no LoRA"), {}, False),
        (RuntimeError("out of memory"), {"journal.jsonl": "header\n", "metrics.jsonl": ""}, False),
        (KeyboardInterrupt(), {"journal.jsonl": "header\n", "metrics.jsonl": ""}, False),
        (RuntimeError("lost"), {"journal.jsonl": "header\n", "metrics.jsonl": "an evaluation\n"}, True),
        (RuntimeError("lost"), {"journal.jsonl": "header\nstep 0\n", "metrics.jsonl": ""}, True),
    ],
    ids=["nothing", "header only", "interrupted", "evaluated", "stepped"],
)
def test_a_run_that_fails_before_it_measured_anything_leaves_no_folder(
    error, leaves, kept, tmp_path, usual, monkeypatch
):
    """So that the next try may have the same name; what was measured is never removed."""

    def tune(experiment, *_):
        for name, text in leaves.items():
            (experiment.run.path / name).write_text(text)
        raise error

    monkeypatch.setattr(driver, "tune", tune)
    folder = tmp_path / "runs" / "try"
    with pytest.raises(type(error)):
        launch.main(compose("config", [*usual, f"run.folder={tmp_path / 'runs'}", "run.name=try"]))
    assert folder.exists() == kept
    assert not kept or {path.name for path in folder.iterdir()} == {"config.yaml", *leaves}


# resume


@pytest.fixture
def stored(tmp_path, usual) -> Path:
    """A run's folder as a session left it before its first step."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    settings = ["run.name=first", f"run.folder={tmp_path / 'runs'}", "engine.max_length=99", "run.steps=7"]
    OmegaConf.save(compose("config", [*usual, *settings]), folder / "config.yaml")
    return folder


def test_resume_of_what_is_no_run(tmp_path):
    command = [sys.executable, "-m", "zoray.launch", "run.resume=nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: expected the folder of a run (with config.yaml and journal.jsonl); got 'nowhere'\n"


def test_a_resumed_run_keeps_its_settings(stored):
    command = [sys.executable, "-m", "zoray.launch", f"run.resume={stored}", "optimizer.lr=1", "engine.device=cpu"]
    done = subprocess.run([*command, "engine=hf"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "a resumed run keeps its settings; got optimizer.lr=1. Only cluster, engine, logging may change" in done.stderr
    )
    assert [path.name for path in stored.iterdir()] == ["config.yaml"]


def test_what_may_change_in_a_resumed_run_changes_and_nothing_else(stored, monkeypatch):
    seen = []
    monkeypatch.setattr(driver, "tune", lambda experiment, *_: seen.append(experiment) or {"finished": True})

    def resume(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["launch", f"run.resume={stored}", *arguments])
        assert launch.main(compose("config", sys.argv[1:])) == 0
        return seen[-1]

    plain = resume()
    assert plain.run.path == stored and plain.run.steps == 7 and plain.engine.max_length == 99
    changed = resume("cluster.replicas=2", "logging.progress=false")
    assert changed.cluster.replicas == 2 and not changed.logging.progress and changed.engine == plain.engine
    other = resume("engine=vllm", "engine.slots=3")
    assert type(other.engine).__name__ == "Vllm" and other.engine.slots == 3 and other.engine.max_length is None


def test_a_failed_resume_removes_nothing(stored, monkeypatch):
    def tune(*_):
        raise ConfigError("no room")

    monkeypatch.setattr(driver, "tune", tune)
    monkeypatch.setattr(sys, "argv", ["launch", f"run.resume={stored}"])
    with pytest.raises(ConfigError, match="no room"):
        launch.main(compose("config", sys.argv[1:]))
    assert (stored / "config.yaml").exists()
