"""Mixtures: shares of the batch, objectives and metrics of parts; and solved examples before a prompt."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from chatty import ANSWERS, CHATS, CHOICES, Given, chat_llama, experiment
from local_pool import LocalPool

from zoray.records import ConfigError, Example, Message, Sampling
from zoray.run.config import build_experiment, compose
from zoray.run.driver import tune
from zoray.run.reports.history import read_metrics
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Metric, Reward
from zoray.scoring.workload import load_workload
from zoray.tasks.batches import Order, labels_of, part_numbers
from zoray.tasks.few_shot import FewShot
from zoray.tasks.mixture import Joined, Mixture, Part


def test_parts_have_their_shares_of_every_stretch_of_steps():
    """At any point each part is within one of its weight; its own examples come equally often."""
    parts = np.repeat([0, 1, 2], [30, 5, 12])
    spec = SimpleNamespace(data_seed=3, batch=4, stratify=False)
    order = Order(spec, np.zeros(47, np.int64), parts, (5.0, 1.0, 2.0))
    seen = np.concatenate([order.step(step) for step in range(300)])
    for count in range(1, 1200):
        shares = np.bincount(parts[seen[:count]], minlength=3)
        assert (np.abs(shares - count * np.array([5, 1, 2]) / 8) <= 1.5).all(), count
    for part in range(3):
        times = np.bincount(seen)[parts == part]
        assert times.max() - times.min() <= 1
    assert (np.concatenate([order.step(step) for step in range(300)]) == seen).all()
    assert (
        seen
        != np.concatenate(
            [
                Order(
                    SimpleNamespace(data_seed=4, batch=4, stratify=False),
                    np.zeros(47, np.int64),
                    parts,
                    (5.0, 1.0, 2.0),
                ).step(s)
                for s in range(300)
            ]
        )
    ).any()


def test_labels_are_balanced_within_parts():
    parts, labels = np.repeat([0, 1], [30, 20]), np.array([0] * 25 + [1] * 5 + [0, 1] * 10)
    order = Order(SimpleNamespace(data_seed=0, batch=8, stratify=True), labels, parts, (1.0, 1.0))
    for step in range(20):
        chosen = order.step(step)
        assert np.bincount(2 * parts[chosen] + labels[chosen]).tolist() == [2, 2, 2, 2]
    assert order.labels == 2


def test_a_mixture_joins_what_is_read_as_it_goes():
    lazy = Joined([CHOICES, ANSWERS])
    mixture = Mixture({"a": Part(Given(CHOICES)), "b": Part(Given(ANSWERS))})
    train = mixture.load().train
    assert tuple(lazy) == train == lazy[:] and len(lazy) == 16 and lazy[-1] == train[-1]
    assert [example.part for example in train] == part_numbers(lazy).tolist() == part_numbers(train).tolist()
    assert labels_of(lazy).tolist() == labels_of(train).tolist()
    assert pickle.loads(pickle.dumps(lazy))[9] == train[9]
    with pytest.raises(IndexError):
        lazy[16]


def test_a_run_of_several_tasks_reports_each(tmp_path):
    folder = chat_llama(tmp_path / "m")
    parts = {
        "films": Part(Given(CHOICES), 2.0),
        "answers": Part(Given(ANSWERS, "f1", Sampling(4, stop=("\n",))), 1.0, AnswerNLL()),
        "rewards": Part(Given(ANSWERS[:4], "reward", Sampling(4)), 1.0, Reward("exact_match")),
    }
    e = experiment(folder, Mixture(parts), ChoiceNLL(), tmp_path / "runs", batch=8)
    (tmp_path / "runs" / "r").mkdir(parents=True)
    workload = load_workload(e.spec)
    assert [type(part.objective).__name__ for part in workload.parts] == ["ChoiceNLL", "AnswerNLL", "Reward"]
    summary = tune(e, workload, {}, LocalPool)
    assert summary["steps"] == 3
    _, evaluations = read_metrics(tmp_path / "runs" / "r")
    first = evaluations[0]
    assert first.metric == "score" and {
        "films/accuracy",
        "films/loss",
        "answers/f1",
        "answers/loss",
        "rewards/reward",
    } <= set(first.others)
    expected = (2 * first.others["films/accuracy"] + first.others["answers/f1"] + first.others["rewards/reward"]) / 4
    assert first.score == pytest.approx(expected)
    alone = tune_start(tmp_path, folder, Given(CHOICES), ChoiceNLL())
    assert alone.score == pytest.approx(first.others["films/accuracy"]) and alone.loss == pytest.approx(
        first.others["films/loss"]
    )
    alone = tune_start(tmp_path, folder, parts["answers"].task, AnswerNLL())
    assert alone.score == pytest.approx(first.others["answers/f1"]) and alone.loss == pytest.approx(
        first.others["answers/loss"]
    )


def tune_start(tmp_path, folder, task, objective):
    """A task's evaluation before the first step."""
    name = f"alone-{type(objective).__name__}"
    (tmp_path / "runs" / name).mkdir()
    e = experiment(folder, task, objective, tmp_path / "runs", steps=1, test=False, name=name)
    seen = []
    tune(e, load_workload(e.spec), {}, LocalPool, on_dev=lambda pool, found, rows: seen.append((found, rows)))
    (first, rows), (_, later) = seen
    assert rows.shape == later.shape == (first.count,) and rows.mean() == pytest.approx(first.score)
    return read_metrics(tmp_path / "runs" / name)[1][0]


def test_a_mixture_on_the_command_line_is_written_out():
    parts = "{movie_reviews: 2, few: {task: sst2, train: 100, objective: answer_nll}, squad: {weight: 0.5}}"
    config = compose("config", ["task=mixture", f"task.parts={parts}"])
    mixture = build_experiment(config).task
    assert [(p.name, type(p.task).__name__, p.weight) for p in mixture.mixed] == [
        ("movie_reviews", "MovieReviews", 2),
        ("few", "SST2", 1.0),
        ("squad", "SQuAD", 0.5),
    ]
    assert mixture.parts["few"].objective == AnswerNLL() and mixture.parts["few"].task.train == 100
    assert config.task.parts.few.task.words == [" terrible", " great"]  # what the run's config.yaml will hold


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("{sst2: 1}", "expected two or more tasks in task.parts"),
        ("{sst2: 1, rte: 0}", "expected a positive weight for task.parts.rte"),
        ("{sst2: 1, rtee: 1}", r"task.parts.rtee.task to be one of .*; got 'rtee'. Did you mean rte\?"),
        ("{sst2: 1, rte: {trian: 5}}", r"unknown config key 'task.parts.rte.trian'.*Did you mean train\?"),
        ("{sst2: 1, rte: {train: many}}", r"expected task.parts.rte.task.train to be"),
        ("{sst2: 1, rte: {objective: dpo}}", r"task.parts.rte.objective to be one of"),
    ],
)
def test_mistakes_in_a_mixture_are_named(parts, says):
    with pytest.raises(ConfigError, match=says):
        build_experiment(compose("config", ["task=mixture", f"task.parts={parts}"]))


def test_an_f1_score_is_of_a_single_task(tmp_path):
    folder = chat_llama(tmp_path / "m")
    mixture = Mixture({"a": Part(Given(CHOICES)), "b": Part(Given(CHOICES))})
    with pytest.raises(ConfigError, match="F1 score as objective only of a single task"):
        load_workload(experiment(folder, mixture, Metric("f1"), tmp_path).spec)


def test_solved_examples_come_before_the_prompt():
    shot = FewShot(Given(CHOICES), 2, seed=1)
    splits, plain = shot.load(), Given(CHOICES).load()
    assert splits.train == plain.train and shot.metric == "accuracy"
    first, second, asked = splits.dev[0].prompt.split("\n\n")
    assert asked == plain.dev[0].prompt and splits.dev[0].options == plain.dev[0].options
    solved = {e.prompt + e.options[e.label] for e in CHOICES}
    assert first != second and {first, second} <= solved
    assert {e.prompt.rpartition("\n\n")[0] for e in (*splits.dev, *splits.test)} == {f"{first}\n\n{second}"}
    assert FewShot(Given(CHOICES), 2, seed=2).load().dev != splits.dev
    assert splits.dev[0].calibration == "It was"


def test_in_a_chat_solved_examples_are_turns():
    asked = FewShot(Given(CHATS), 1).load().dev[0].prompt
    assert [m.role for m in asked] == ["user", "assistant"] * 3 + ["user"]
    assert asked[3].content in {e.answers[0] for e in CHATS} and asked[-1] == Message("user", "the film?")
    with pytest.raises(ConfigError, match="a task with answers or options for shots"):
        FewShot(Given((Example("a"), Example("b"))), 1).load()
    with pytest.raises(ConfigError, match="8 usable rows; asked for 9"):
        FewShot(Given(CHOICES), 9).load()
    with pytest.raises(ConfigError, match="shots to be a whole number"):
        FewShot(Given(CHOICES), 0)
