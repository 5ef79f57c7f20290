"""What crosses processes: frozen, equal after pickling, and checked where it is made."""

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from zoray import records
from zoray.methods.optimizers import to_float32
from zoray.records import (
    Commit,
    ConfigError,
    Evaluation,
    Example,
    JournalError,
    Message,
    Probe,
    ReplicaLost,
    Sampling,
    Scores,
    Splits,
    StepResult,
    Tile,
    TokenSequence,
    is_finite,
    require,
)

EXAMPLE = Example("It was", (" terrible", " great"), 1)
RECORDS = [
    Probe(3, 1, -0.01),
    Commit(3, (0.1, 0.0, -0.33333334), decay=0.999),
    Commit(3, (1 / 3, 0.1), momentum=0.5, rate=-0.25),
    Tile((Probe(3, 0, 0.01), Probe(3, 0, -0.01)), 4, 8, "dev"),
    Scores(np.array([3 << 40, -(2**63)], np.int64), 1.0, 512),
    Scores(np.array([0.5, -1.0]), 1.0, 512, {}, written=2, failed=1, failure="Traceback"),
    EXAMPLE,
    Message("user", "a"),
    Example((Message("user", "a"),), answers=("b",), data={"row": [1]}, calibration="", part=1),
    Sampling(8, 0.7, 0.9, ("\n",)),
    TokenSequence(*(np.arange(4, dtype=np.int32) for _ in range(4)), n_outputs=4),
    StepResult(step=3, loss=0.7, score=0.5, lr=1e-2, tokens=4096, seconds=0.25, dropped=1, ties=2),
    Evaluation(step=3, split="dev", loss=0.7, score=0.5, count=100, tokens=4096, seconds=0.25, digest="00ff"),
    Splits((EXAMPLE,), (EXAMPLE, EXAMPLE)),
]
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


def names(record) -> list[str]:
    return list(record._fields) if isinstance(record, tuple) else [field.name for field in fields(record)]


def test_every_record_is_in_the_list():
    kinds = [thing for thing in vars(records).values() if isinstance(thing, type)]
    there = {thing for thing in kinds if is_dataclass(thing) or hasattr(thing, "_fields")}
    assert {type(record) for record in RECORDS} == there


@each_record
def test_records_pickle(record):
    back = pickle.loads(pickle.dumps(record))
    assert type(back) is type(record)
    for name in names(record):
        before, after = getattr(record, name), getattr(back, name)
        assert type(after) is type(before)
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype and after.tolist() == before.tolist()
        else:
            assert after == before
    if not isinstance(record, (TokenSequence, Scores)):  # which hold arrays, and are compared by identity
        assert back == record and hash(back) == hash(record)


@each_record
def test_records_are_frozen(record):
    name = names(record)[0]
    with pytest.raises(AttributeError):
        setattr(record, name, getattr(record, name))


@pytest.mark.parametrize("error", [ConfigError("a"), JournalError("b"), ReplicaLost("c")])
def test_errors_pickle(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error)


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_label_without_an_option_is_refused(label):
    with pytest.raises(ConfigError, match=rf"label must be in 0\.\.1, got {label} for prompt 'It was'"):
        Example("It was", (" terrible", " great"), label)


def test_an_example_without_options_is_refused():
    with pytest.raises(ConfigError, match="label must be 0 without options, got 1"):
        Example("It was", (), 1)
    with pytest.raises(ConfigError, match=r"got 1 for prompt 'It was'$"):
        Example((Message("system", "a"), Message("user", "It was")), (), 1)


def test_splits_are_found_by_name():
    splits = Splits((EXAMPLE,), (EXAMPLE, EXAMPLE))
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [1, 2, 0]
    with pytest.raises(ConfigError, match="split must be train, dev or test, got 'validation'"):
        splits["validation"]


def test_require_says_what_was_expected_what_came_and_what_to_do():
    require(True, "anything", None)
    with pytest.raises(ConfigError) as error:
        require(False, "a size of at least 1", 0, "Raise size")
    assert str(error.value) == "expected a size of at least 1; got 0. Raise size"
    with pytest.raises(ConfigError) as error:
        require(False, "a name", "x")
    assert str(error.value) == "expected a name; got 'x'"


def test_is_finite():
    assert all(is_finite(value) for value in (0, 1.5, np.float32(2), np.float64(-3), np.int64(4)))
    assert not any(is_finite(value) for value in (float("nan"), float("inf"), np.float32("-inf"), "1", None))


def test_what_an_optimizer_makes_takes_four_bytes_a_coefficient():
    """And arrives as the same numbers, which are decimals and not the float32's own doubles."""
    values = np.random.default_rng(0).normal(size=1000)
    coefficients = tuple(to_float32(float(value)) for value in values)
    sent = pickle.dumps(Commit(7, coefficients, decay=0.5))
    assert len(sent) < 4 * 1000 + 200
    assert pickle.loads(sent) == Commit(7, coefficients, decay=0.5)
    other = tuple(values.tolist())  # not float32 at all: nine bytes each, and unchanged
    assert pickle.loads(pickle.dumps(Commit(7, other))).coefficients == other
