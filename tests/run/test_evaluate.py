"""`python -m zoray.evaluate` on bare models, adapters, few-shot prompts and other tasks, with predictions in a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from chatty import ANSWERS, CHOICES, Given, chat_llama

from zoray import evaluate
from zoray.engines.hf import Hf
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora
from zoray.models.adapters import peft_space, read_peft, write_peft
from zoray.models.folder import Model
from zoray.records import Commit, ConfigError, Probe, Sampling
from zoray.run.config import compose
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec, load_workload
from zoray.tasks.few_shot import FewShot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def mail(tmp_path_factory):
    """A task of a file."""
    path = tmp_path_factory.mktemp("data") / "mail.jsonl"
    rows = [{"text": f"the film number {i} is", "label": ["dull", "great"][i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"task.path={path}", "task.dev=10", "task.test=10", "task=file"]


def said(capsys, folder, *settings: str) -> str:
    evaluate.main(compose("evaluate", ["engine=hf", "model=hf", f"model.path={folder}", *settings]))
    return capsys.readouterr().out


def expected(folder, settings, shots: int = 0, space=None, data: bytes | None = None, split: str = "dev"):
    """Outcomes of a replica made by hand."""
    from zoray.run.config import build

    task = build(compose("evaluate", settings).task, "task")
    task = FewShot(task, shots) if shots else task
    spec = ReplicaSpec(Model(str(folder)), task, ChoiceNLL(), space or Lora(), TwoPoint(), Hf(), 0, 0, 1)
    replica = Replica(spec)
    if data:
        replica.engine.restore(data, 0)
    return replica.outcomes(split, Probe(0, 0, 0.0))


@pytest.mark.parametrize("shots", [0, 3])
def test_a_bare_model_without_and_with_solved_examples(capsys, folder, mail, shots):
    found = expected(folder, mail, shots)
    line = said(capsys, folder, *mail, f"shots={shots}")
    assert f"dev accuracy {found.scores.mean():.4f}, loss {found.losses.mean():.6f} (10 examples)" in line
    assert line.split("digest ")[1].strip() == "0" * 16


def test_an_adapter_of_peft(capsys, folder, mail, tmp_path):
    """What peft would load is what is scored."""
    space = Lora(rank=3, alpha=6.0, train="AB")
    spec = ReplicaSpec(Model(str(folder)), Given(CHOICES), ChoiceNLL(), space, TwoPoint(), Hf(), 5, 0, 1)
    replica = Replica(spec)
    replica.apply([Commit(0, (0.05,))])
    write_peft(tmp_path / "adapter", replica.adapter(), 3, 6.0, str(folder), space.targets)
    own = peft_space(tmp_path / "adapter")
    assert (own.rank, own.alpha, own.train) == (3, 6.0, "AB")
    data = read_peft(tmp_path / "adapter", own, load_workload(spec).matrices)
    found = expected(folder, mail, space=own, data=data)
    bare = expected(folder, mail)
    assert np.abs(found.losses - bare.losses).max() > 1e-2, "an adapter that changes nothing"
    line = said(capsys, folder, *mail, f"adapter={tmp_path / 'adapter'}")
    assert f"loss {found.losses.mean():.6f} (10 examples)" in line
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = ReplicaSpec(Model(str(folder)), Given(CHOICES), ChoiceNLL(), own, TwoPoint(), Hf(), 0, 0, 1)
    example = CHOICES[0]
    tokens = torch.tensor([tokenizer(example.prompt)["input_ids"]])
    logits = model(input_ids=tokens).logits[0, -1].detach()
    ids = [tokenizer(option)["input_ids"][0] for option in example.options]
    one = Replica(spec)
    one.engine.restore(data, 0)
    loss = one.outcomes("train", Probe(0, 0, 0.0), np.array([0])).losses[0]
    assert loss == pytest.approx(float(-logits[ids].log_softmax(0)[example.label]), abs=1e-4)


def test_predictions_are_written(capsys, folder, mail, tmp_path):
    path = tmp_path / "out" / "said.jsonl"
    said(capsys, folder, *mail, f"predictions={path}")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = expected(folder, mail)
    assert [line["score"] for line in lines] == found.scores.tolist()
    assert [line["loss"] for line in lines] == pytest.approx(found.losses.tolist())
    for line in lines:
        assert (line["predicted"] == line["options"][line["label"]]) == (line["score"] == 1.0)
        assert line["prompt"].startswith("the film number") and set(line["options"]) == {" dull", " great"}
    with pytest.raises(ConfigError, match=r"said.jsonl not to exist yet; it does"):
        said(capsys, folder, *mail, f"predictions={path}")


def test_answers_are_written_and_compared(capsys, folder, tmp_path):
    """F1 of what the model writes, beside the loss of the right answer."""
    rows = tmp_path / "qa.jsonl"
    pairs = [{"prompt": f"the plot number {i} is", "completion": ["great", "far too long"][i % 2]} for i in range(20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    task = ["task=file", f"task.path={rows}", "task.dev=6", "task.metric=f1", "task.max_tokens=5"]
    path = tmp_path / "said.jsonl"
    line = said(capsys, folder, *task, f"predictions={path}")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    score = np.mean([line["score"] for line in lines])
    assert f"dev f1 {score:.4f}, loss " in line and "also tokens " in line
    assert all(isinstance(line["completion"], str) and line["answers"] for line in lines)
    reward = ["objective=reward", "objective.function=length", "objective.arguments={most: 30}"]
    assert "dev reward " in said(capsys, folder, *task, *reward)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["split=train2"], "expected split to be train, dev or test"),
        (["run=runs/none"], "expected either run=..., which has its model and adapter"),
        (["adapter=nowhere"], r"a PEFT adapter's folder \(adapter_config.json\); got nowhere"),
        (["shots=40"], r"usable rows; asked for 40"),
        (["shots=-1"], "shots to be a whole number"),
    ],
)
def test_mistakes_are_named(capsys, folder, mail, settings, says):
    with pytest.raises(ConfigError, match=says):
        said(capsys, folder, *mail, *settings)
    with pytest.raises(ConfigError, match="expected a run, or a model and a task"):
        evaluate.main(compose("evaluate", []))


def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, folder):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(ConfigError, match=r"a plain LoRA adapter without biases; .* has \['use_dora'\]"):
        peft_space(tmp_path)
    spec = ReplicaSpec(Model(str(folder)), Given(CHOICES), ChoiceNLL(), Lora(rank=2), TwoPoint(), Hf(), 5, 0, 1)
    write_peft(tmp_path / "a", Replica(spec).adapter(), 2, 4.0, str(folder))
    with pytest.raises(ConfigError, match=r"expected model.layers.0.*lora_A of shape \(4, 64\) in .*; got \(2, 64\)"):
        read_peft(tmp_path / "a", Lora(rank=4, train="AB"), load_workload(spec).matrices)


def test_the_train_split_and_a_metric_of_answers(folder):
    """A split that steps see can be evaluated as dev is."""
    task = Given(ANSWERS, "exact_match", Sampling(4, stop=("\n",)))
    spec = ReplicaSpec(Model(str(folder)), task, AnswerNLL(), Lora(), TwoPoint(), Hf(), 0, 0, 1)
    found = Replica(spec).outcomes("train", Probe(0, 0, 0.0))
    assert set(found.scores) <= {0.0, 1.0} and np.isfinite(found.losses).all() and found.written == 8
