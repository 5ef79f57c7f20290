"""The benchmarks work: their settings build, a small run of each kind goes through, the table says what it should."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from benchmarks import (
    cosines,
    device,
    feedback_step,
    host,
    kernels,
    learn,
    memory,
    noise,
    scale,
    shapes,
    step,
    wire,
    workload,
)
from benchmarks.methods import METHODS, run, table
from benchmarks.training_loop import TrainingLoop, option_batch
from zoray.engines.hf import Hf
from zoray.methods.spaces import Lora
from zoray.models.folder import linear_matrices, weights_hash
from zoray.models.tokens import Encoder
from zoray.run.config import build_experiment, compose
from zoray.scoring.objectives import ChoiceNLL, Outcomes
from zoray.scoring.replica import Replica
from zoray.scoring.tables import Encoded
from zoray.tasks.file.task import File


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


def test_a_feedback_step_is_timed_against_the_bare_forward_of_the_same_tokens(tiny_models, labelled_file, tmp_path):
    words = "task.words=[' terrible',' great']"
    where = ("model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words)
    options = {**feedback_step.DEFAULTS, "batch": "4", "rounds": "3", "memory": "false"}
    result = feedback_step.measure(options, tmp_path, (*where, "task.dev=10", "task.test=20", "engine=hf"))
    for task in ("choice", "text"):
        for name in ("feedback_seconds", "bare_seconds", "tax"):
            found = result[f"{task}_{name}"]
            assert 0 < found["low"] <= found["median"] <= found["high"], (task, name)
        assert result[f"{task}_numbers"] == 8 * (64 + 64 + 64 + 128)  # the writers of the second layer
    assert result["choice_rows"] == 4 and result["choice_tokens"] < result["text_tokens"]
    assert 20 < result["text_rows"] < result["text_tokens"]


def test_completions_are_asked_for_behind_their_prompts(tiny_models):
    (a,), (b,) = workload.random_examples(2, 500)
    folder = tiny_models["llama"]
    found = workload.completions(workload.Workload(folder, {}, None, {"train": ((a,), (b,)), "dev": ()}))
    ((one,), (other,)) = found.encoded["train"]
    assert np.array_equal(np.append(one.tokens, one.targets[-1]), np.concatenate([a.tokens, b.tokens]))
    assert np.array_equal(one.targets, b.tokens) and np.array_equal(other.targets, a.tokens)
    assert one.rows[0] == len(a.tokens) - 1 and one.rows[-1] == len(one.tokens) - 1 and one.n_outputs == 1


@pytest.mark.parametrize("task", ["choice", "text"])
def test_cosines_are_one_in_the_last_matrix_and_less_in_others(task, tiny_models, labelled_file, tmp_path):
    words = "task.words=[' terrible',' great']"
    where = ["model=hf", f"model.path={tiny_models['opt']}", "task=file", f"task.path={labelled_file}", words]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"{k} things that were said of the film, and {k * 7} others" for k in range(400)))
    options = {**cosines.DEFAULTS, "file": str(lines), "ranks": "4,full", "batch": "4", "batches": "2"}
    result = cosines.measure(options, task, [*where, "task.dev=20", "task.test=20"])
    rows = {row["matrix"]: row for row in result["rows"]}
    assert result["settings"] == ["identity", "4", "full"] and result["examples"] == 8
    last = rows["model.decoder.layers.1.fc2"]
    assert all(last[name] == pytest.approx(1.0, abs=1e-6) for name in result["settings"])
    for name in ("model.decoder.layers.0.fc2", "all", "all, descent by signs"):
        found = [rows[name][setting] for setting in result["settings"]]
        assert len(set(found)) == 3 and min(found) > 0.1 and max(found) < 0.999, name
    assert sum(row["share"] or 0.0 for row in result["rows"]) == pytest.approx(1.0)
    printed = cosines.table(result).splitlines()
    assert printed[0] == "out_proj / fc2" and printed[4].startswith("| 0 |") and printed[5].startswith("| 1 |")
    cosines.draw([result, {**result, "settings": ["identity"]}, result], tmp_path / "cosines.png")
    assert (tmp_path / "cosines.png").stat().st_size > 10_000


def test_descent_is_one_along_the_gradient_itself():
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=1000)
    assert cosines.descent(gradient, gradient) == pytest.approx(1) and cosines.cosine(gradient, gradient) > 0.999
    assert cosines.descent(-3 * gradient, gradient) == pytest.approx(-1)
    assert abs(cosines.descent(rng.normal(size=1000), gradient)) < 0.1
    assert cosines.descent(gradient, 0 * gradient) == cosines.cosine(gradient, 0 * gradient) == 0.0


def test_the_training_loop_takes_the_steps_of_the_official_one(tiny_models, labelled_file):
    """Its loss is ours, and a step moves the weights by its coefficient along the direction that it probed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = File(str(labelled_file), {0: " terrible", 1: " wonderful thing"}, train=8, dev=2, test=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["opt"])
    examples = task.load().train[:3]
    encoded = [ChoiceNLL().encode(example, Encoder(tokenizer)) for example in examples]
    batch = [option_batch(sequences, example.label) for sequences, example in zip(encoded, examples, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(tiny_models["opt"], dtype=torch.float32).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loop = TrainingLoop(model, "lozo", lr=1e-4, eps=1e-3, interval=2)
    start = loop.loss(batch)
    engine = Hf().start(tiny_models["opt"], "float32", linear_matrices(tiny_models["opt"]), Lora(), 0)
    table, each = Encoded.of(encoded, examples), np.arange(3)
    sums = engine.score_plan(table.plan((), np.full(3, -1), each))
    assert start == pytest.approx(ChoiceNLL().reduce(table.sums(sums, each)).losses.mean(), rel=1e-4)
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
        assert 0 < result[f"model_ms_{size}"]["median"] < result[f"direct_ms_{size}"]["median"]
        without, whole = (result[f"request_over_direct{part}_{size}"]["median"] for part in ("_without_model", ""))
        assert without > whole


def test_noise_is_told_from_signal_and_rounding_needs_a_larger_eps(tmp_path):
    """In exact float32 every eps is sound; bfloat16 rounds away what a small one does."""
    options = {**noise.DEFAULTS, "model": "llama-tiny", "batch": "8", "probes": "4"}
    exact, rough = (
        noise.measure({**options, "dtype": dtype}, tmp_path, ("engine=hf",)) for dtype in ("float32", "bfloat16")
    )
    assert exact["dtype"] == "float32" and rough["dtype"] == "bfloat16"
    assert [row["eps"] for row in exact["rows"]] == list(noise.EPS)
    slopes = [row["signal"] / row["eps"] for row in exact["rows"]]
    assert max(slopes) < 1.5 * min(slopes)  # the signal is in proportion to eps
    assert exact["sound from eps"] == noise.EPS[0] and exact["repeat"] == 0
    assert rough["sound from eps"] is None or rough["sound from eps"] >= 1e-3
    assert rough["rows"][0]["rounding"] > 100 * exact["rows"][0]["rounding"]


class Shaky:
    """A replica whose losses depend on nothing but where an example stands, and how often it has been asked."""

    class workload:
        class splits:
            train = range(20)

    losses = Replica.losses

    def __init__(self, position: float, call: float) -> None:
        self.position, self.call, self.calls = position, call, 0

    @property
    def scorer(self):
        return self

    def outcomes(self, split, probes, probe_of, examples) -> Outcomes:
        self.calls += 1
        losses = np.ones(len(examples)) + self.position * np.arange(len(examples)) * (examples < 4)
        return Outcomes(losses + self.call * self.calls, losses)


def test_each_reason_for_noise_is_told_apart():
    batch = np.arange(4)
    assert set(noise.noise(Shaky(0, 0), batch).values()) == {0.0}
    found = noise.noise(Shaky(0.01, 0), batch)
    assert found["repeat"] == found["reorder"] == 0 < found["mates"]  # a mean of the same places; then of others
    assert noise.noise(Shaky(0, 0.01), batch)["repeat"] == pytest.approx(
        0.01 * np.sqrt(np.mean(np.arange(1, 1 + noise.REPEATS) ** 2))
    )


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("outs", [(24,), (24, 8, 8)], ids=str)
def test_the_kernels_that_are_timed_compute_the_same(slots, outs):
    import torch

    layer = kernels.Layer(16, outs, 8, slots, 21, "cpu", torch.float32)
    for b in layer.module.lora_b_stacked:
        b.normal_()
    names = ("lora_a_stacked", "lora_b_stacked")
    values = [part for name in names for part in getattr(layer.module, name)]
    found = []
    for make in (layer.vllm, lambda: layer.by_runs(8), layer.dense):
        for name in names:
            setattr(layer.module, name, tuple(torch.empty_like(part) for part in getattr(layer.module, name)))
        add = layer.adding(make())
        places = [part for name in names for part in getattr(layer.module, name)]
        assert make != layer.vllm or all(part.is_contiguous() for part in places)  # which its kernels ask for
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        layer.y.zero_()
        add()
        found.append(layer.y.clone())
    assert found[0].abs().max() > 1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_the_parts_of_a_step_are_timed(tmp_path):
    options = {**kernels.DEFAULTS, "model": "llama-tiny", "tokens": "40", "rows": "8", "space": "lozo"}
    result = kernels.measure(options, tmp_path)
    for name in ("base", "adapters", "adapters by vLLM", "slots", "apply", "head"):
        assert result[f"{name} us"] > 0, name
    sizes = {row["product"]: (row["in"], row["out"]) for row in result["rows"]}
    assert sizes == {"qkv": (64, 128), "o": (64, 64), "up": (64, 256), "down": (128, 64)}
    assert result["base us"] == pytest.approx(2 * sum(row["base us"] for row in result["rows"]))


def test_a_profile_says_how_busy_a_step_keeps_the_device():
    import time

    import torch

    assert device.union([(3, 5), (0, 2), (1, 2.5), (4, 4.5)]) == 4.5
    found = device.busy(lambda: (time.sleep(0.05), torch.ones(300, 300) @ torch.ones(300, 300)), "cpu")
    assert 0 < found["busy"] < 0.9 and 45 < found["gaps ms"] < 500


@pytest.mark.ray
@pytest.mark.parametrize("name", ["two_point", "one_sided", "evolution"])
def test_a_probe_takes_at_most_sixteen_bytes_on_the_wire(name, local_ray):
    few, many = (wire.step_bytes(wire.ESTIMATORS[name](count)) for count in (1, 256))
    sizes = [to_replica + from_replica for _, to_replica, from_replica in (few, many)]
    assert 8 <= (sizes[1] - sizes[0]) / (many[0] - few[0]) <= 12.2 and many[0] >= 500
    assert sizes[0] <= 1024


@pytest.mark.ray
def test_feedback_takes_a_bit_a_number_there_and_a_byte_back(local_ray):
    found = wire.feedback_bytes(wire.writers(4, 64, 256))
    assert found["numbers"] == 2 * 8 * (64 + 64 + 64 + 256) and found["matrices"] == 4
    assert found["numbers"] / 8 < found["to_replica"] <= found["numbers"] / 8 + 1024
    assert found["numbers"] < found["from_replica"] <= found["numbers"] + 256
    assert found["numbers"] / 8 < found["journal"] <= found["numbers"] / 8 * 1.25 + 1024


@pytest.mark.parametrize("name", ["opt-13b", "llama-3-8b"])
def test_the_writers_are_those_of_the_shapes(name, tmp_path):
    matrices = linear_matrices(shapes.make_model(name, tmp_path))
    assert wire.GUIDED.trained(matrices) == wire.GUIDED.trained(wire.writers(*wire.MODELS[name]))


@pytest.mark.ray
def test_the_driver_is_timed_with_null_replicas(tmp_path):
    for result in scale.measure(3, 20, tmp_path):  # steps a second, and the driver's milliseconds
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
