"""The benchmarks work: their settings build, a small run of each kind goes through, the table says what it should."""

from __future__ import annotations

import pytest

from benchmarks.methods import METHODS, run, table
from zoray.cli import build_experiment, compose


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_scores_a_like_number_of_sequences(method):
    e = build_experiment(compose("config", METHODS[method]))
    probes = len(e.estimator.ask(0))
    assert 30 <= probes * e.run.batch // (1 if e.estimator.shared else e.estimator.directions) <= 34


@pytest.mark.parametrize("method", ["lozo-m", "eggroll", "fzoo", "pairs-share-batch"])
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
