"""What a run has measured: reading it back, the best state, when to give up, before and after, and step=best."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import pytest

from zoray.records import ConfigError, Evaluation, JournalError, StepResult
from zoray.run.reports.history import History, best, read_metrics, resolve_step, stalled, summarise, table


def an_evaluation(step: int, split: str = "dev", accuracy: float = 0.7, loss: float = 0.6) -> Evaluation:
    return Evaluation(step, split, loss=loss, score=accuracy, count=500, tokens=9000, seconds=1.5, digest="ab")


def a_step(step: int, loss: float = 0.5) -> StepResult:
    return StepResult(step=step, loss=loss, score=0.6, lr=1e-4, tokens=100, seconds=0.1)


def write(folder: Path, *records: dict) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def line(record: StepResult | Evaluation) -> dict:
    kind = "step" if isinstance(record, StepResult) else "evaluation"
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(record).items()}
    return {"kind": kind, **finite, "time": 1.0}


RUN = [
    an_evaluation(0, accuracy=0.552, loss=0.6931),
    an_evaluation(100, accuracy=0.731, loss=0.55),
    an_evaluation(200, accuracy=0.728, loss=0.5211),
    an_evaluation(200, "test", accuracy=0.722, loss=0.5302),
]
RESELECTED = [  # the same run, when test was measured before the first step and at the best one
    *RUN[:3],
    an_evaluation(0, "test", accuracy=0.5, loss=0.7),
    an_evaluation(100, "test", accuracy=0.715, loss=0.56),
]


# history


def test_records_come_in_order_and_a_later_one_of_a_step_replaces_the_earlier() -> None:
    history = History()
    for step, loss in ((3, 0.3), (1, 0.1), (2, 0.2), (1, 0.9)):
        history.step(a_step(step, loss))
    for evaluation in (*reversed(RUN), an_evaluation(100, accuracy=0.1)):
        history.evaluation(evaluation)
    assert [(s.step, s.loss) for s in history.steps] == [(1, 0.9), (2, 0.2), (3, 0.3)]
    assert [(e.step, e.split, e.score) for e in history.evaluations] == [
        *((0, "dev", 0.552), (100, "dev", 0.1), (200, "dev", 0.728), (200, "test", 0.722)),
    ]


def test_rewind_forgets_what_was_measured_later_and_keeps_the_step_itself() -> None:
    history = History()
    for step in range(1, 201):
        history.step(a_step(step))
    for evaluation in RUN:
        history.evaluation(evaluation)
    history.rewind(100)
    assert [s.step for s in history.steps] == list(range(1, 101))
    assert history.evaluations == RUN[:2]
    history.rewind(99)
    assert history.evaluations == RUN[:1]


def test_read_takes_resumes_into_account_and_gives_nan_for_null(tmp_path) -> None:
    resume = {"kind": "resume", "step": 1, "time": 1.0}
    lines = [line(a_step(1)), line(a_step(2)), line(RUN[1]), resume, line(a_step(2, math.nan)), line(RUN[0])]
    steps, evaluations = read_metrics(write(tmp_path, *lines))
    assert steps[0] == a_step(1) and math.isnan(steps[1].loss) and len(steps) == 2
    assert evaluations == [RUN[0]]


def test_keys_and_kinds_of_another_version_are_left_out_and_new_ones_have_their_default(tmp_path) -> None:
    older = {key: value for key, value in line(a_step(1)).items() if key != "buried"}
    unknown = {"kind": "weather", "step": 1}
    steps, evaluations = read_metrics(write(tmp_path, {**older, "colour": "red"}, unknown, line(RUN[0])))
    assert (steps, evaluations) == ([a_step(1)], [RUN[0]]) and steps[0].buried == 0


@pytest.mark.parametrize(
    "damage", ['{"kind": "step", "st', '{"step": 3}', '{"kind": "step"}', "[]", '{"kind":"resume"}']
)
def test_a_damaged_line_is_named_unless_it_is_the_torn_last_one(damage, tmp_path) -> None:
    path = write(tmp_path, line(a_step(1))) / "metrics.jsonl"
    path.write_text(path.read_text() + damage)
    assert read_metrics(tmp_path) == ([a_step(1)], [])
    path.write_text(path.read_text() + "\n")
    with pytest.raises(JournalError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)


# the best evaluation


@pytest.mark.parametrize(
    ("others", "winner"),
    [
        pytest.param([(1, 0.70, 0.1), (2, 0.71, 9.0), (3, 0.69, 0.1)], 2, id="accuracy before loss"),
        pytest.param([(1, 0.7, 0.6), (2, 0.7, 0.5), (3, 0.7, 0.55)], 2, id="then loss"),
        pytest.param([(1, 0.7, 0.6), (2, 0.7, 0.5), (3, 0.7, 0.5)], 2, id="then fewest steps"),
        pytest.param([(0, 0.7, 0.5), (1, 0.7, 0.5)], 0, id="step 0 may be best"),
        pytest.param([(1, math.nan, 0.1), (2, 0.0, 99.0)], 2, id="accuracy nan loses to 0"),
        pytest.param([(1, 0.7, math.nan), (2, 0.7, 99.0)], 2, id="loss nan loses to any"),
        pytest.param([(1, 0.7, math.inf), (2, 0.7, 99.0)], 2, id="loss inf loses to any"),
        pytest.param([(1, 0.7, -math.inf), (2, 0.7, 99.0)], 2, id="loss -inf loses to any"),
        pytest.param([(1, 0.8, math.nan), (2, 0.7, 0.5)], 1, id="accuracy before a loss of nan"),
        pytest.param([(1, math.inf, 0.1), (2, 0.7, 0.5)], 2, id="accuracy inf loses"),
    ],
)
def test_best_by_accuracy_then_loss_then_fewest_steps(others, winner) -> None:
    evaluations = [an_evaluation(step, accuracy=accuracy, loss=loss) for step, accuracy, loss in others]
    for order in permutations(evaluations):
        top = best(order)
        assert top is not None and top.step == winner
    assert summarise(evaluations)["best"]["step"] == winner


def test_best_looks_at_dev_only() -> None:
    assert best([]) is None and best([RUN[3]]) is None
    assert best([*RUN, an_evaluation(50, "test", accuracy=0.99)]) == RUN[1]
    assert best(iter(RUN)) == RUN[1]  # a generator will do


def test_best_of_nothing_finite_is_the_first() -> None:
    top = best([an_evaluation(k, accuracy=math.nan, loss=math.nan) for k in (2, 0, 1)])
    assert top is not None and top.step == 0


# when to give up

FALLING = [an_evaluation(step, accuracy=0.9 - step / 100) for step in range(6)]  # best at 0, five worse ones after it


@pytest.mark.parametrize("patience", range(8))
def test_stalled_when_the_last_evaluations_brought_no_new_best(patience) -> None:
    for seen in range(len(FALLING) + 1):
        expected = patience > 0 and seen - 1 >= patience
        assert stalled(FALLING[:seen], patience) is expected
        assert stalled(FALLING[:seen][::-1], patience) is expected  # whatever the order


def test_a_new_best_starts_the_count_again_and_an_equal_one_does_not() -> None:
    better = [*FALLING[:3], an_evaluation(3, accuracy=0.95)]
    assert stalled(better[:3], 2) and not stalled(better, 1)
    assert [stalled([*better, *FALLING[4:stop]], 2) for stop in (4, 5, 6)] == [False, False, True]
    equal = [*FALLING[:1], *(an_evaluation(step, accuracy=0.9) for step in (1, 2))]
    assert [stalled(equal[:count], 2) for count in (1, 2, 3)] == [False, False, True]
    assert not stalled([*equal, an_evaluation(3, accuracy=0.9, loss=0.59)], 1)  # a lower loss is a new best


def test_stalled_counts_each_step_once_and_dev_only() -> None:
    assert not stalled([*FALLING[:2], FALLING[1], FALLING[1]], 2)
    tests = [an_evaluation(step, "test", accuracy=0.1) for step in range(1, 6)]
    assert not stalled([FALLING[0], *tests], 1)
    assert not stalled([], 1) and not stalled(tests, 1)


def test_evaluations_that_are_not_finite_bring_no_best() -> None:
    lost = [an_evaluation(step, accuracy=math.nan, loss=math.nan) for step in (1, 2)]
    assert [stalled([FALLING[0], *lost[:count]], 2) for count in range(3)] == [False, False, True]


# before and after


def test_summarise_takes_initial_final_and_best() -> None:
    summary = summarise(reversed(RUN))
    assert summary["initial"] == {"step": 0, "accuracy": 0.552, "loss": 0.6931, "count": 500}
    assert summary["final"]["step"] == 200 and summary["final"]["accuracy"] == 0.728
    assert summary["final"]["test"]["accuracy"] == 0.722 and "test" not in summary["initial"]
    assert summary["best"]["step"] == 100
    assert summarise([]) == {"initial": {}, "final": {}, "best": {}}
    # Equal accuracy: the lower loss is better, then the earlier step. NaN never wins.
    tied = [an_evaluation(1, loss=0.6), an_evaluation(2, loss=0.5), an_evaluation(3, loss=0.5)]
    assert summarise([*tied, an_evaluation(4, accuracy=math.nan)])["best"]["step"] == 2


def test_summarise_takes_final_from_the_selected_step() -> None:
    numbers = {"step": 100, "accuracy": 0.731, "loss": 0.55, "count": 500}
    on_test = {"step": 100, "accuracy": 0.715, "loss": 0.56, "count": 500}
    summary = summarise(reversed(RESELECTED), 100)
    assert summary["final"] == {**numbers, "test": on_test}
    assert summary["initial"]["step"] == summary["initial"]["test"]["step"] == 0
    assert summary["initial"]["test"]["accuracy"] == 0.5
    assert summary["best"] == numbers
    assert summarise(RUN, 200) == summarise(RUN)
    assert summarise(RUN, 100)["final"] == numbers  # test was measured at another step
    assert summarise(RUN, 150)["final"] == {}


def test_a_run_that_found_nothing_better_has_the_same_before_and_after() -> None:
    summary = summarise(RESELECTED, 0)
    assert summary["initial"] == summary["final"] and summary["final"]["test"]["accuracy"] == 0.5
    assert summarise(RESELECTED[:1])["final"] == {}  # not finished: there is no after yet


def test_table_shows_only_what_was_measured() -> None:
    rows = table(RUN).splitlines()
    assert rows[2].split() == ["dev", "0.552", "0.728", "+0.176", "0.6931", "0.5211"]
    assert rows[3].split() == ["test", "-", "0.722", "-", "-", "0.5302"]
    assert rows[4] == "best dev accuracy 0.731 at step 100"
    assert table(RUN[:1]).splitlines()[2].split() == ["dev", "0.552", "-", "-", "0.6931", "-"]
    assert table([]) == "no evaluation on dev"


def test_table_shows_the_selected_step() -> None:
    rows = table(RESELECTED, 100).splitlines()
    assert rows[2].split() == ["dev", "0.552", "0.731", "+0.179", "0.6931", "0.5500"]
    assert rows[3].split() == ["test", "0.500", "0.715", "+0.215", "0.7000", "0.5600"]
    assert rows[4] == "best dev accuracy 0.731 at step 100" and len(rows[2]) == len(rows[3])
    assert table(RESELECTED, 0).splitlines()[2].split() == ["dev", "0.552", "0.552", "+0.000", "0.6931", "0.6931"]
    assert table(RUN, 200) == table(RUN)


# which step a command line asks for


def test_a_step_is_a_number_or_the_last(tmp_path) -> None:
    """Neither needs any metrics."""
    assert resolve_step(None, tmp_path, 7) == 7 and resolve_step(None, tmp_path, 0) == 0
    assert [resolve_step(step, tmp_path, 7) for step in (0, 3, 7)] == [0, 3, 7]


def test_best_is_the_best_evaluated_step_that_the_journal_has(tmp_path) -> None:
    write(tmp_path, *map(line, [an_evaluation(0, accuracy=0.1), *RUN[1:], an_evaluation(50, accuracy=0.5)]))
    assert resolve_step("best", tmp_path, 200) == resolve_step("best", tmp_path, 100) == 100
    assert resolve_step("best", tmp_path, 99) == 50  # metrics may be ahead of a journal that was cut
    assert resolve_step("best", tmp_path, 49) == 0


@pytest.mark.parametrize("records", [None, [], [line(RUN[3]), line(a_step(1))]], ids=["no file", "empty", "no dev"])
def test_best_needs_an_evaluation_on_dev(records, tmp_path) -> None:
    if records is not None:
        write(tmp_path, *records)
    with pytest.raises(
        ConfigError, match=r"expected an evaluation on dev in .*metrics\.jsonl for step=best; give a num"
    ):
        resolve_step("best", tmp_path, 200)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (-1, r"expected step in 0\.\.7, the steps in this journal; got -1"),
        (8, r"expected step in 0\.\.7, the steps in this journal; got 8"),
        ("two", "expected step to be a whole number or best; got 'two'"),
        ("Best", "expected step to be a whole number or best; got 'Best'"),
        (2.0, "expected step to be a whole number or best; got 2.0"),
        (True, "expected step to be a whole number or best; got True"),
    ],
)
def test_a_step_that_is_not_there(step, says, tmp_path) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_step(step, tmp_path, 7)
