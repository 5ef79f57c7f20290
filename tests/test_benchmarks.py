"""The benchmarks work: their settings build, a small run of each kind goes through, the table says what it should."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from benchmarks import host, learn, memory, scale, shapes, step, wire, workload
from benchmarks.methods import METHODS, run, table
from benchmarks.training_loop import TrainingLoop, option_batch
from zoray.cli import build_experiment, compose
from zoray.engines.hf import Hf
from zoray.engines.packing import Plan
from zoray.models import linear_matrices, weights_hash
from zoray.objectives import ChoiceNLL
from zoray.replica import EncodedSplit
from zoray.spaces import Lora
from zoray.tasks.labelled_file import LabelledFile


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_scores_a_like_number_of_sequences(method):
    e = build_experiment(compose("config", METHODS[method]))
    probes = len(e.estimator.ask(0))
    assert 30 <= probes * e.run.batch // (1 if e.estimator.shared else e.estimator.directions) <= 34


@pytest.mark.parametrize("method", ["lozo-m", "eggroll", "fzoo", "mezo-pairs"])
def test_a_run_keeps_to_its_budget(method, tiny_models, labelled_file):
    words = "task.words=[' terrible',' great']"
    where = ("model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words)
    result = run(method, 1, 2.0, 70, True, (*where, "task.dev=10", "task.test=20", "engine=hf"))
    assert result["steps"] == 2 and 60 <= result["sequences"] <= 70 and result["tokens"] > 70
    assert {"dev_accuracy", "test_accuracy", "dev_loss", "digest"} <= result.keys()
    again = run(method, 1, 2.0, 70, False, (*where, "task.dev=10", "task.test=20", "engine=hf"))
    assert again["digest"] == result["digest"] and "test_loss" not in again
    assert result["lr"] == pytest.approx(2 * compose("config", METHODS[method]).optimizer.lr)


def test_the_table_has_mean_and_spread_over_seeds():
    common = {"method": "x", "lr": 0.1, "steps": 5, "tokens": 1000, "dev_loss": 0.5}
    rows = table(
        [
            {**common, "seed": 0, "dev_accuracy": 0.7, "test_accuracy": 0.6},
            {**common, "seed": 1, "dev_accuracy": 0.8, "test_accuracy": 0.6},
            {**common, "method": "a", "seed": 0, "dev_accuracy": 0.5},
        ]
    ).splitlines()
    assert rows[2].split(" | ")[0] == "| a" and rows[2].split(" | ")[6] == "-"
    assert rows[3] == "| x | 0.1 | 2 | 5 | 1,000 | 0.750 ± 0.071 | 0.600 ± 0.000 | 0.500 ± 0.000 |"


@pytest.mark.parametrize("space", ["lora", "lozo"])
def test_a_step_is_timed_against_the_bare_forward_and_the_training_loop(space, tiny_models, labelled_file, tmp_path):
    words = "task.words=[' terrible',' great']"
    where = ("model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words)
    options = {**step.DEFAULTS, "batch": "4", "pairs": "2", "rounds": "3", "space": space, "parts": "zoray,bare,loop"}
    result = step.measure(options, tmp_path, (*where, "task.dev=10", "task.test=20", "engine=hf"))
    for name in ("seconds_per_step", "zo_tax", "speedup_over_training_loop", "bare_seconds", "loop_seconds"):
        assert 0 < result[name]["low"] <= result[name]["median"] <= result[name]["high"], name
    assert result["tokens_per_step"] > 4 * 4 * 5


def test_the_training_loop_takes_the_steps_of_the_official_one(tiny_models, labelled_file):
    """Its loss is ours, and a step moves the weights by its coefficient along the direction that it probed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = LabelledFile(str(labelled_file), {0: " terrible", 1: " wonderful thing"}, train=8, dev=2, test=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["opt"])
    examples = task.load().train[:3]
    encoded = [ChoiceNLL().encode(example, tokenizer) for example in examples]
    batch = [option_batch(sequences, example.label) for sequences, example in zip(encoded, examples, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(tiny_models["opt"], dtype=torch.float32).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loop = TrainingLoop(model, "lozo", lr=1e-4, eps=1e-3, interval=2)
    start = loop.loss(batch)
    engine = Hf().start(tiny_models["opt"], "float32", linear_matrices(tiny_models["opt"]), Lora(), 0)
    split = EncodedSplit.of(encoded, [example.label for example in examples])
    plan = Plan(split.table, (), np.full(len(split.table), -1), np.arange(len(split.table)))
    losses, _ = ChoiceNLL().reduce(engine.score_plan(plan), split.counts, split.n_outputs, split.labels)
    assert start == pytest.approx(losses.mean(), rel=1e-4)
    for _ in range(3):
        loop.step(batch)
    assert loop.loss(batch) < start
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        assert moved.abs().max() > 1e-6, name
        if parameter.ndim == 2:  # V was drawn twice in three steps, and U is new in each
            assert int(torch.linalg.matrix_rank(moved, rtol=1e-2)) <= 6, name


BILLIONS = {"opt-125m": 0.085, "opt-1.3b": 1.21, "opt-2.7b": 2.52, "opt-6.7b": 6.44, "opt-13b": 12.6}
BILLIONS |= {"llama-3-8b": 6.98, "qwen3-4b": 3.63}  # of inner layers


@pytest.mark.parametrize("name", BILLIONS)
def test_shapes_are_those_of_the_paper(name, tmp_path):
    folder = shapes.make_model(name, tmp_path)
    count = sum(out * into for out, into in linear_matrices(folder).values()) / 1e9
    assert count == pytest.approx(BILLIONS[name], rel=0.01)
    assert weights_hash(folder)


def test_random_examples_have_the_lengths_of_short_sentences():
    single, several = workload.random_examples(2000, 1000), workload.random_examples(5, 1000, options=3, tokens=2)
    lengths = [len(sequence.tokens) for (sequence,) in single]
    assert 24 < np.mean(lengths) < 28 and min(lengths) >= 8 and max(lengths) <= 70
    assert all(len(sequences) == 3 and len(sequences[0].targets) == 2 for sequences in several)


def test_host_time_is_measured_on_both_paths(tmp_path):
    result = host.measure(3, host.toy(tmp_path))
    for size in host.SIZES:
        assert 0 < result[f"direct_ms_{size}"]["median"] < result[f"request_ms_{size}"]["median"]
        assert result[f"request_over_direct_{size}"]["low"] > 1


@pytest.mark.ray
@pytest.mark.parametrize("name", ["two_point", "one_sided", "evolution"])
def test_a_probe_takes_at_most_sixteen_bytes_on_the_wire(name, local_ray):
    few, many = (wire.step_bytes(wire.ESTIMATORS[name](count)) for count in (1, 256))
    sizes = [to_replica + from_replica for _, to_replica, from_replica in (few, many)]
    assert 8 <= (sizes[1] - sizes[0]) / (many[0] - few[0]) <= 12.2 and many[0] >= 500
    assert sizes[0] <= 1024


@pytest.mark.ray
def test_the_driver_is_timed_with_null_replicas(local_ray, tmp_path):
    result = scale.measure(3, 20, tmp_path)
    assert 0 < result["low"] <= result["median"] <= result["high"]
    (journal,) = tmp_path.glob("*/journal.jsonl")
    assert journal.read_bytes().count(b"\n") == 21  # header and steps: the whole loop ran


def test_learning_is_compared_from_the_same_start_on_the_same_examples(tiny_models, labelled_file, tmp_path):
    words = "task.words=[' terrible',' great']"
    where = ("model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words)
    options = {**learn.DEFAULTS, "steps": "4", "every": "2", "batch": "4", "dev": "12", "lr": "1e-3"}
    result = learn.measure(options, (*where, "task.test=20", "engine=hf"))
    zoray, loop = result["zoray"], result["loop"]
    assert [p["step"] for p in zoray] == [p["step"] for p in loop] == [0, 2, 4]
    assert zoray[0]["dev_loss"] == pytest.approx(loop[0]["dev_loss"], rel=1e-4)
    assert zoray[0]["dev_accuracy"] == loop[0]["dev_accuracy"]
    for points in (zoray, loop):
        assert points[2]["dev_loss"] != points[0]["dev_loss"] and points[2]["seconds"] > points[1]["seconds"] > 0
    assert 1.5 < loop[2]["tokens"] / zoray[2]["tokens"] < 2.5  # each option is a sequence of its own
    learn.draw(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize("side", ["plain", "zoray"])
def test_the_peak_is_that_of_the_process_with_the_model(side, tiny_models, labelled_file, tmp_path):
    """A model in a child process, as vLLM starts one by default, would not be measured."""
    words = "task.words=[' terrible',' great']"
    where = ("model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words)
    options = {**memory.DEFAULTS, "side": side, "batch": "4"}
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    assert memory.peak(options, tmp_path, (*where, "task.dev=10", "task.test=10", "engine.kv_cache_gib=0.1")) > 2**28
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
