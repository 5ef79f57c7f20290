"""The bridge to lm-evaluation-harness, on a task of ours: what it scores is the step of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest
from chatty import CHOICES, Given, chat_llama, experiment
from journalled import make
from local_pool import LocalPool
from vllm.config.lora import MaxLoRARanks

from zoray import lm_eval
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora, LowRank
from zoray.records import Probe
from zoray.run.config import compose
from zoray.run.driver import tune
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import load_workload

TASK = """task: films
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: label
doc_to_choice: "{{{{options}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module", params=["lora", "lowrank"])
def run(request, tmp_path_factory):
    """A run's folder, a folder with the task, and how many examples the run's last state has right."""
    root = tmp_path_factory.mktemp("harness")
    folder = chat_llama(root / "model")
    space = {"lora": Lora(rank=12, alpha=24.0, train="AB"), "lowrank": LowRank(rank=1)}[request.param]
    e = experiment(folder, Given(CHOICES), ChoiceNLL(), root / "runs", space=space, optimizer=Sgd(lr=3e-2), steps=4)
    e.run.path.mkdir(parents=True)
    tune(e, load_workload(e.spec), {}, LocalPool)
    rows = root / "films.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": c.prompt, "options": c.options, "label": c.label}) + "\n" for c in CHOICES)
    )
    (root / "tasks").mkdir()
    (root / "tasks" / "films.yaml").write_text(TASK.format(path=rows))
    replica = Replica(e.spec)
    start = replica.outcomes("train", Probe(0, 0, 0.0)).scores.mean()
    return e.run.path, root / "tasks", start


def harness(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "zoray.lm_eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_harness_scores_the_step(run, tmp_path):
    """Its accuracy at a step is that of zoray.evaluate there, and the bare model's is the start's."""
    folder, tasks, start = run
    accuracy = {}
    for step in ("0", "null"):
        where = [f"run={folder}", f"step={step}", f"include_path={tasks}", f"out={tmp_path / step}.json"]
        done = harness("tasks=[films]", "model_args={dtype: float32}", *where)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "|films|" in done.stdout.replace(" ", "")
        accuracy[step] = json.loads((tmp_path / f"{step}.json").read_text())["results"]["films"]["acc,none"]
    assert accuracy["0"] == start
    said = subprocess.run(
        [sys.executable, "-m", "zoray.export", f"run={folder}", "step=null", f"out={tmp_path / 'm'}", "format=merged"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    from zoray.engines.hf import Hf
    from zoray.methods.estimators import TwoPoint
    from zoray.models.folder import Model
    from zoray.scoring.workload import ReplicaSpec

    merged = Replica(
        ReplicaSpec(Model(str(tmp_path / "m")), Given(CHOICES), ChoiceNLL(), Lora(), TwoPoint(), Hf(), 0, 0, 4)
    )
    assert accuracy["null"] == merged.outcomes("train", Probe(0, 0, 0.0)).scores.mean()


@pytest.mark.slow
def test_vllm_scores_the_step_as_transformers_does(run, tmp_path):
    """Also where vLLM is its build for CPUs, and where no slot has the adapter's rank."""
    folder, tasks, _ = run
    accuracy = {}
    for backend in ("hf", "vllm"):
        where = [f"run={folder}", "step=null", f"include_path={tasks}", f"out={tmp_path / backend}.json"]
        done = harness("tasks=[films]", "model_args={dtype: float32}", f"backend={backend}", *where)
        assert done.returncode == 0, done.stderr[-3000:]
        accuracy[backend] = json.loads((tmp_path / f"{backend}.json").read_text())["results"]["films"]["acc,none"]
    assert accuracy["vllm"] == accuracy["hf"]


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (12, 16), (33, 64), (300, 320), (512, 512)])
def test_vllm_is_asked_for_a_rank_that_it_has_slots_for(tiny_models, tmp_path, rank, slot):
    made = make(tmp_path / "run", tiny_models["llama"], Lora(rank=rank, targets=("q_proj",)), steps=1)
    config = compose("lm_eval", [f"run={made.folder}", "step=null", "backend=vllm", "tasks=[films]"])
    asked = lm_eval._step(config, tmp_path)
    assert asked["max_lora_rank"] == str(slot) and slot in get_args(MaxLoRARanks)
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["r"] == rank


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected a run or a model, and tasks"),
        (["run=nowhere", "tasks=[films]", "backend=tf"], "expected backend to be one of hf, vllm; got 'tf'"),
        (["run=nowhere", "tasks=[films]"], "nowhere/journal.jsonl"),
        (["model=smollm2-135m", "tasks=[no_such_task]"], r"expected tasks that lm_eval knows; got ['no_such_task']"),
        (["model=smollm2-135m", "tasks=[arc_easy]"], "expected the data of tasks=['arc_easy'] from the Hub, or in its"),
    ],
)
def test_mistakes_are_named(arguments, says):
    done = harness(*arguments)
    assert done.returncode in (1, 2) and says in done.stderr and "Traceback" not in done.stderr
