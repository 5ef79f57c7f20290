"""Runs whose reward fails now and then go on and say so; those whose reward mostly fails stop and say why."""

from __future__ import annotations

import json

import pytest
from chatty import PROMPTS, Given, chat_llama, experiment
from local_pool import LocalPool

from zoray.records import ConfigError, Sampling
from zoray.run.driver import tune
from zoray.run.reports.history import read_metrics
from zoray.scoring.objectives import Reward
from zoray.scoring.workload import load_workload

FAILING = '''
import hashlib, time

def reward(prompt, completion, example, share, how):
    """Fails for a share of the completions, which ones depends on the text alone."""
    number = int(hashlib.sha256((prompt + completion).encode()).hexdigest(), 16) % 1000
    if number < 1000 * share:
        kind = ("raise", "hang", "nan")[number % 3] if how == "all" else how
        if kind == "raise":
            raise KeyError(f"no such thing in {completion!r}")
        if kind == "hang":
            time.sleep(60)
        return float("nan")
    return min(len(completion), 20) / 20 if example["answer"] == "42" else -1.0
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


def run(folder, tmp_path, share: float, how: str, **settings):
    path = tmp_path / "my_reward.py"
    path.write_text(FAILING)
    objective = Reward(f"{path}:reward", {"share": share, "how": how}, temperature=1.0, timeout_s=0.4, failed=-0.5)
    task = Given(PROMPTS, "reward", Sampling(max_tokens=5))
    e = experiment(folder, task, objective, tmp_path / "runs", batch=8, **settings)
    e.run.path.mkdir(parents=True)
    return e, lambda: tune(e, load_workload(e.spec), {}, LocalPool)


def test_a_reward_that_fails_for_a_few_completions_does_not_stop_a_run(folder, tmp_path, capsys):
    """Raising, hanging and NaN, 5 % of all; they are counted, and worth what was set."""
    e, tuned = run(folder, tmp_path, 0.05, "all", steps=8)
    summary = tuned()
    steps, evaluations = read_metrics(e.run.path)
    assert summary["finished"] and len(steps) == 8
    failed = sum(step.failed for step in steps)
    assert 3 <= failed <= 40 and summary["failed_rewards"] == failed  # of 256
    said = capsys.readouterr().out
    assert "completions have no reward and count as objective.failed; the first: " in said
    assert f"warning: {failed} completions had no reward" in said
    dev = [e for e in evaluations if e.split == "dev"]
    assert dev[0].metric == "reward" and {"tokens", "ended", "failed"} == set(dev[0].others)
    assert dev[0].loss == -dev[0].score
    assert json.loads((e.run.path / "summary.json").read_text())["initial"]["reward"] == dev[0].score


@pytest.mark.parametrize(("how", "says"), [("raise", 'KeyError: "no such thing in'), ("nan", "returned nan")])
def test_a_reward_that_fails_for_most_completions_stops_the_run(folder, tmp_path, how, says):
    e, tuned = run(folder, tmp_path, 0.6, how, steps=20)
    with pytest.raises(ConfigError) as stopped:
        tuned()
    text = str(stopped.value)
    assert "expected a reward for at least 50% of the completions (objective.max_failed=0.5); got none for" in text
    assert says in text and ("Traceback" in text) == (how == "raise") and "my_reward.py" in text
    assert (e.run.path / "journal.jsonl").exists()  # what was done is kept


def test_what_a_failed_reward_is_worth_and_how_many_may_fail(folder, tmp_path):
    e, tuned = run(folder, tmp_path, 1.0, "nan", steps=2)
    object.__setattr__(e.objective, "max_failed", 1.0)
    summary = tuned()
    assert summary["failed_rewards"] == 2 * 4 * 8 and summary["final"]["reward"] == -0.5
    steps, _ = read_metrics(e.run.path)
    assert {(step.loss, step.ties) for step in steps} == {(0.5, 2)}  # all the same: directions that say nothing


def test_mistakes_in_the_function_show_before_a_model_loads(folder, tmp_path):
    e, _ = run(folder, tmp_path, 0.0, "nan")
    for function, says in (
        (e.objective.function.replace("my_reward", "your_reward"), "there is no .*your_reward.py"),
        (e.objective.function + "s", r"a function rewards; it has none. Did you mean reward\?"),
    ):
        object.__setattr__(e.objective, "function", function)
        with pytest.raises(ConfigError, match=says):
            load_workload(e.spec)
