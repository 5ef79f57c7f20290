"""The plain baselines: offsets mend a bias, probes find what is linear, gradients are right and lower the loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks import baselines, through_block
from benchmarks.bare_model import MeanSign, Reading, Split, adapted, descend, linear_layers, load, read
from benchmarks.baselines import DEFAULTS, Probe
from zoray import records
from zoray.models.folder import load_tokenizer
from zoray.models.tokens import Encoder
from zoray.records import ConfigError, Example
from zoray.run.config import build_experiment, compose
from zoray.scoring.replica import Replica
from zoray.scoring.workload import load_workload

WORDS = "task.words=[' terrible',' great']"


def settings(folder, file):
    return [f"model.path={folder}", "task=file", f"task.path={file}", WORDS, "task.dev=20", "task.test=20"]


def drawn(n, width, classes, seed=0, apart=3.0):
    """States of some classes, each around a centre of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = apart * torch.nn.functional.one_hot(labels, width).float()
    return centres + torch.randn(n, width, generator=generator), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("fit", [baselines.centred, baselines.fitted])
def test_offsets_mend_a_constant_bias(classes, fit):
    logits, labels = drawn(600, classes, classes, apart=6.0)
    biased = logits + torch.tensor([50.0, *[0.0] * (classes - 1)])
    readings = {"train": Reading(biased[:60], biased, labels[:60]), "dev": Reading(biased[60:], biased, labels[60:])}
    assert baselines.scores(readings)["dev_accuracy"] == pytest.approx(1 / classes)
    mended = baselines.scores(readings, fit(biased[:60], labels[:60]))
    assert mended["dev_accuracy"] > 0.95 and mended["dev_loss"] < baselines.scores(readings)["dev_loss"]


def test_the_threshold_is_the_best_there_is():
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(40, 2, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    found = baselines.fitted(logits, labels)
    cuts = torch.linspace(-6, 6, 2001)
    best = max(((logits + torch.stack([cut * 0, cut])).argmax(1) == labels).sum() for cut in cuts)
    assert ((logits + found).argmax(1) == labels).sum() == best


def test_offsets_without_labels_do_not_see_them():
    logits, labels = drawn(40, 2, 2)
    assert torch.equal(baselines.centred(logits, labels), baselines.centred(logits, 1 - labels))
    assert not torch.equal(baselines.fitted(logits, labels), baselines.fitted(logits, 1 - labels))


def test_margins_take_rows_of_train_by_seed():
    logits, labels = drawn(400, 2, 2, apart=1.0)
    readings = {"train": Reading(logits, logits, labels), "dev": Reading(logits[:50], logits, labels[:50])}
    found = list(baselines.margins(readings, [0, 1]))
    rows = [(record["method"].split()[1], record["setting"], record["seed"]) for record in found]
    without = [("without", "16 rows", 0), ("without", "16 rows", 1), ("without", "400 rows", 0)]
    assert rows == [*without, *(("with", f"{n} rows", seed) for n in (16, 320) for seed in (0, 1))]
    assert found[0]["dev_loss"] != found[1]["dev_loss"]


def test_a_probe_parts_what_is_linear_and_not_what_is_noise():
    states, labels = drawn(400, 10, 3)
    noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(9))
    layers = torch.stack([noise, 100 * states + 7], 1)
    cut = {"train": slice(0, 200), "dev": slice(200, 300), "test": slice(300, 400)}
    readings = {name: Reading(torch.zeros(400, 3)[s], layers[s], labels[s]) for name, s in cut.items()}
    found = {record["method"] + record["setting"]: record for record in baselines.probes(readings, (4, 9), (1.0,), [0])}
    assert found["probe200 rows, layer 4"]["test_accuracy"] < 0.5
    assert found["probe200 rows, layer 9"]["test_accuracy"] > 0.9
    assert found["probe, layer by dev200 rows"]["layer"] == 9


def test_a_probe_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    states, labels = drawn(120, 6, 3, apart=1.0)
    probe = Probe(states, labels, 3, 4.0)
    x = ((states - states.mean(0)) / states.std(0)).double().numpy()
    other = linear_model.LogisticRegression(C=1 / 4.0, tol=1e-8, max_iter=1000).fit(x, labels.numpy())
    ours = probe(states).softmax(1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize(("family", "names"), [("llama", 2), ("opt", 2), ("qwen2", 2)])
def test_adapters_are_what_they_say(family, names, tiny_models):
    model = load(tiny_models[family])
    some = linear_layers(model, False, 1)
    assert len(some) == names and len(linear_layers(model, False, 0)) == 2 * names
    assert len(linear_layers(model, True, 1)) == 2 * (6 if family == "opt" else 7)
    ids = torch.arange(5, 17)[None]
    before = model(input_ids=ids).logits
    with adapted(some, 0, rank=4) as parameters:
        assert torch.equal(model(input_ids=ids).logits, before)
        for parameter in parameters[1::2]:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
        moved = model(input_ids=ids).logits
        model(input_ids=ids).logits.square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    assert torch.equal(model(input_ids=ids).logits, before)
    for layer, a, b in zip(some, parameters[::2], parameters[1::2], strict=True):
        layer.weight.data += 16 / 4 * b.detach() @ a.detach()
    assert (moved - before).abs().max() > 0.01
    torch.testing.assert_close(model(input_ids=ids).logits, moved.detach(), atol=1e-4, rtol=1e-4)


def test_a_model_without_such_layers_is_refused(tiny_models):
    with pytest.raises(ConfigError, match="first="):
        linear_layers(load(tiny_models["llama"]), False, 2)


def test_the_mean_of_signs_steps_as_written():
    x = torch.tensor([1.0, -1.0, 5.0], requires_grad=True)
    gradients = [torch.tensor([3.0, -0.1, 0.0]), torch.tensor([-2.0, -0.2, 1.0])]
    assert [*descend([x], "MeanSign", 0.5, 2, lambda step: (x * gradients[step]).sum())] == [1, 2]
    m1, factor = np.array([0.1, -0.1, 0.0]), 0.5  # the learning rate of the second of two steps is half
    m2 = 0.9 * m1 + 0.1 * np.array([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(x.detach(), np.array([1.0, -1.0, 5.0]) - 0.5 * m1 - factor * 0.5 * m2, rtol=1e-6)
    assert MeanSign([x], lr=1.0).defaults["beta"] == 0.9


def test_rows_read_together_are_as_rows_alone(tiny_models):
    model = load(tiny_models["opt"])
    rng, words = np.random.default_rng(0), torch.tensor([7, 9, 11])
    split = Split([rng.integers(5, 500, n).tolist() for n in (9, 3, 14, 3, 9, 1)], torch.zeros(6, dtype=torch.int64))
    found = read(model, split, words, (0, 2))
    assert found.logits.shape == (6, 3) and found.states.shape == (6, 2, 64)
    for row, tokens in enumerate(split.sequences):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        torch.testing.assert_close(found.logits[row], alone.logits[0, -1, words], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.states[row, 1], alone.hidden_states[2][0, -1], atol=1e-4, rtol=1e-4)


def test_prompts_are_those_of_the_task_and_odd_options_are_refused(tiny_models):
    encoder = Encoder(load_tokenizer(tiny_models["llama"]), 8, cut=True)
    rows = (
        Example("It was", (" terrible", " great"), 1),
        Example("a dull and lifeless story It was", (" terrible", " great")),
    )
    data, words = baselines.encode({"train": rows}, encoder, bos=True)
    assert encoder.tokenizer.decode(data["train"].sequences[0]) == "<s>It was"
    assert [encoder.tokenizer.decode([word]) for word in words] == [" terrible", " great"]
    assert data["train"].labels.tolist() == [1, 0]
    long = data["train"].sequences[1]
    assert len(long) == 8 and long[0] == 1 and encoder.tokenizer.decode(long).endswith("It was")
    assert encoder.tokenizer.decode(baselines.encode({"train": rows}, encoder)[0]["train"].sequences[0]) == "It was"
    for options in ((" terrible", " wonderful thing"), (" great", " terrible"), ()):
        with pytest.raises(ConfigError, match="options"):
            baselines.encode({"train": (*rows, Example("It was", options))}, encoder)


def test_all_of_it_runs_and_backpropagation_learns(tiny_models, labelled_file, tmp_path, capsys):
    out = tmp_path / "found" / "out.json"
    own = ["budget=32,320", "batch=16", "seeds=0,1", "penalties=1", "lr=3", f"out={out}"]
    baselines.main([*settings(tiny_models["llama"], labelled_file), *own])
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result and printed[0].startswith("| method | setting | seeds |")
    records = result["results"]
    untuned = records[0]
    assert untuned["method"] == "untuned"
    assert {r["method"].split()[0] for r in records} == {"untuned", "margin", "probe", "probe,", "backprop"}
    for rule in ("adam", "meansign", "adamw-all"):
        runs = [r for r in records if r["method"] == f"backprop {rule}"]
        assert [(r["steps"], r["seed"]) for r in runs] == [(2, 0), (2, 1), (20, 0), (20, 1)]
        assert runs[2]["dev_loss"] < untuned["dev_loss"] and runs[2]["test_loss"] < untuned["test_loss"]
        assert runs[2]["dev_loss"] != runs[3]["dev_loss"]
    assert len(printed) == 2 + len({(r["method"], r["setting"]) for r in records}) + 1


def test_a_run_again_is_the_same_and_leaves_the_model_as_it_was(tiny_models, labelled_file):
    options = {**DEFAULTS, "what": "untuned,backprop", "rules": "meansign", "seeds": "1", "budget": "64,64"}
    found = list(baselines.measure(options, settings(tiny_models["qwen2"], labelled_file)))
    assert found[1]["dev_loss"] == found[2]["dev_loss"] != found[0]["dev_loss"]


def test_of_several_states_the_best_on_dev_has_a_row_of_its_own(tiny_models, labelled_file):
    options = {**DEFAULTS, "what": "backprop", "rules": "adam", "lr": "300", "seeds": "0", "batch": "16"}
    where = settings(tiny_models["llama"], labelled_file)
    (alone,) = baselines.measure({**options, "budget": "128"}, where)
    last, best = baselines.measure({**options, "budget": "128", "states": "4"}, where)
    assert {**last, "seconds": 0} == {**alone, "seconds": 0}  # to measure on the way changes nothing
    assert best["setting"] == f"{last['setting']}, best of 4 on dev" and best["steps"] in (2, 4, 6, 8)
    assert (best["dev_accuracy"], -best["dev_loss"]) > (last["dev_accuracy"], -last["dev_loss"])


def test_text_is_learnt_and_held_out_lines_are_held_out(tiny_models, tmp_path):
    lines = [f"one of the best movies of the year number {n} and far too long" for n in range(60)]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*lines, *lines, "short"]))
    model, encoder = load(tiny_models["llama"]), Encoder(load_tokenizer(tiny_models["llama"]))
    held, train = baselines.lines_of(path, encoder, False, 20)
    assert len(held) == 20 and len(train) == 40 and not {*map(tuple, held)} & {*map(tuple, train)}
    assert all(len(tokens) <= 48 for tokens in (*held, *train))
    options = {**DEFAULTS, "file": str(path), "budget": "0,480", "rules": "adam", "lr": "10"}
    untuned, tuned = baselines.text(model, encoder, False, options, [0], 20)
    total = sum(
        cross_entropy(
            model(input_ids=torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum"
        ).item()
        for row in held
    )
    assert untuned["dev_loss"] == pytest.approx(total / sum(len(row) - 1 for row in held), rel=1e-4)
    assert tuned["steps"] == 30 and tuned["dev_loss"] < 0.9 * untuned["dev_loss"]
    with pytest.raises(ConfigError, match="more than 300 lines"):
        baselines.lines_of(path, encoder, False, 300)


def test_answers_are_scored_as_zoray_scores_them(tiny_models, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"The film {n} was", "completion": f" one of the best {n % 3} of all"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = [f"model.path={tiny_models['llama']}", "task=file", f"task.path={path}", "task.dev=20", "task.test=0"]
    options = {**DEFAULTS, "what": "answers", "budget": "0,320", "rules": "adam", "lr": "10", "seeds": "0"}
    untuned, tuned = baselines.measure(options, where)
    e = build_experiment(compose("config", [*where, "objective=answer_nll", "engine=hf"]))
    own = Replica(e.spec, load_workload(e.spec)).outcomes("dev", records.Probe(0, 0, 0.0)).losses.mean()
    assert untuned["dev_loss"] == pytest.approx(own, rel=1e-5)
    assert tuned["steps"] == 20 and tuned["dev_loss"] < 0.9 * untuned["dev_loss"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_step_through_the_last_mlp_is_exact(tiny_models, labelled_file, family):
    """Nothing is lost between that MLP and the stream's end; on the way to its attention the MLP's branch is."""
    options = {**through_block.DEFAULTS, "examples": "4"}
    cosines = through_block.measure(options, settings(tiny_models[family], labelled_file))
    assert set(cosines) == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    of_mlp = [cosines[f"{part}_proj"] for part in ("gate", "up", "down")]
    assert all(exact == pytest.approx(1, abs=1e-4) for _, exact in cosines.values())
    assert all(guess == pytest.approx(1, abs=1e-4) for guess, _ in of_mlp)
    assert all(guess < 0.9999 for guess, _ in (cosines[f"{part}_proj"] for part in "qkvo"))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"what": "probes"}, "what"), ({"rules": "sgd"}, "rules"), ({"what": "text"}, "file=PATH")],
)
def test_wrong_arguments_are_refused_before_a_model_loads(options, says, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ConfigError, match=says):
        next(baselines.measure({**DEFAULTS, **options}))
