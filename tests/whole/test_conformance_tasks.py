"""Every task with every objective that makes sense for it, on a tiny model: encoded, scored, stepped, evaluated."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from chatty import chat_llama, experiment
from hub import SCHEMAS, copy
from local_pool import LocalPool

from zoray.methods.estimators import Evolution, TwoPoint
from zoray.run.config import build, compose, group_options
from zoray.run.driver import tune
from zoray.run.reports.history import read_metrics
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Metric, Preference, Reward
from zoray.scoring.workload import load_workload

ROWS = {
    "choice": [{"text": f"the film number {i} is", "label": ["dull", "great"][i % 2]} for i in range(40)],
    "completion": [
        {"prompt": f"the plot number {i} is", "completion": ["great", "far too long"][i % 2]} for i in range(40)
    ],
    "chat": [
        {"messages": [{"role": "user", "content": f"film {i}?"}, {"role": "assistant", "content": "great"}]}
        for i in range(40)
    ],
    "preference": [{"prompt": f"the music number {i} is", "chosen": "great", "rejected": "dull"} for i in range(40)],
    "prompt": [{"prompt": f"the story number {i} is", "answer": "great"} for i in range(40)],
}
CHOICE = {
    "choice_nll": ChoiceNLL(),
    "sfc": ChoiceNLL(calibration="sfc"),
    "answer_nll": AnswerNLL(),
    "accuracy": Metric("accuracy"),
    "f1": Metric("f1"),
}
PLAIN = {name: CHOICE[name] for name in CHOICE if name != "sfc"}
ANSWER = {"answer_nll": AnswerNLL(), "f1": Metric("f1"), "exact_match": Metric("exact_match")}
REWARD = {"length": Reward("length", {"most": 40}, max_tokens=4)}
SENSIBLE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record"), CHOICE),
    **dict.fromkeys(("squad", "drop"), ANSWER | REWARD),
    "gsm8k": {"answer_nll": AnswerNLL(), "numeric": Metric("numeric")},
    "movie_reviews": PLAIN,
    "file:choice": PLAIN,
    "file:completion": ANSWER | REWARD,
    "file:chat": ANSWER | REWARD,
    "file:preference": {"preference": Preference(), "choice_nll": ChoiceNLL()},
    "file:prompt": REWARD,
    "countdown": {"countdown": Reward("countdown", max_tokens=6)},
    "structured": {"json_schema": Reward("json_schema", {"schema": "person"}, max_tokens=6)},
    "questions": REWARD,
    "mixture": {"answer_nll": AnswerNLL()},
}
LONG = {"boolq", "multirc", "record", "squad", "drop", "structured", "countdown"}  # for a model of 256 positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


def task_of(name: str, root) -> Any:
    """A task of a fixture, through its config."""
    option, _, kind = name.partition(":")
    sizes = ["task.train=4", "task.dev=2", "task.test=1"]
    if kind:
        path = root / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        sizes += [f"task.path={path}", "task.max_tokens=4"]
    elif option in SCHEMAS:
        sizes += [f"task.path={copy(root, option, 20, 8)}"]
    elif option == "mixture":
        path = copy(root, "sst2", 20, 8)
        few = "train: 4, dev: 2, test: 1"
        reward = '{reward: {function: "length", arguments: {most: 40}, max_tokens: 4}}'
        parts = f"{{sst2: {{path: {path}, {few}}}, questions: {{{few}, objective: {reward}}}}}"
        return build(compose("config", ["task=mixture", f"task.parts={parts}"]).task, "task")
    return build(compose("config", [f"task={option}", *sizes]).task, "task")


def test_every_task_is_here():
    assert {name.partition(":")[0] for name in SENSIBLE} == set(group_options("task"))
    named = {type(o).__name__ for objectives in SENSIBLE.values() for o in objectives.values()}
    assert named == {"ChoiceNLL", "AnswerNLL", "Metric", "Preference", "Reward"}
    assert set(group_options("objective")) == {"choice_nll", "answer_nll", "metric", "preference", "reward"}


@pytest.mark.parametrize(
    ("name", "objective"),
    [pytest.param(name, o, id=f"{name}-{o}") for name, objectives in SENSIBLE.items() for o in objectives],
)
def test_a_task_with_an_objective(name, objective, folder, tmp_path):
    task = task_of(name, tmp_path)
    settings: dict[str, Any] = {
        "steps": 1,
        "batch": 2,
        "estimator": TwoPoint(eps=0.05),
        "test": False,
        "too_long": "cut" if name in LONG else "refuse",
    }
    e = experiment(folder, task, SENSIBLE[name][objective], tmp_path / "runs", **settings)
    e.run.path.mkdir(parents=True)
    workload = load_workload(e.spec)
    sizes = [len(workload.splits[split]) for split in ("train", "dev", "test")]
    assert sizes == ([8, 4, 2] if name == "mixture" else [4, 2, 1])
    summary = tune(e, workload, {}, LocalPool)
    steps, evaluations = read_metrics(e.run.path)
    assert summary["finished"] and len(steps) == 1 and all(math.isfinite(s.loss) and s.tokens > 0 for s in steps)
    assert [(e.split, e.step) for e in evaluations] == [("dev", 0), ("dev", 1)]
    by_loss = workload.parts[0].evaluator.metric is None
    for found in evaluations:
        assert math.isfinite(found.loss) and np.isfinite(list(found.others.values())).all()
        assert (found.metric is None) == by_loss and math.isfinite(found.score) != by_loss
    if not by_loss and name != "mixture":
        assert evaluations[0].metric in ("accuracy", "f1", "exact_match", "numeric", "reward", task.metric)


def test_centring_by_prompt_takes_rewards(folder, tmp_path):
    """Each completion's reward is told apart."""
    task = task_of("questions", tmp_path)
    e = experiment(
        folder,
        task,
        REWARD["length"],
        tmp_path / "runs",
        estimator=Evolution(4, 0.05, centring="prompt"),
        steps=1,
        test=False,
    )
    e.run.path.mkdir(parents=True)
    assert tune(e, load_workload(e.spec), {}, LocalPool)["finished"]
