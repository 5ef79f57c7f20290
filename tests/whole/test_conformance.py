"""Every sensible space x estimator x optimizer on a quadratic: converges, replays, resumes, and is the same however it
is shared out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
from combinations import (
    ESTIMATORS,
    GUIDED,
    LM_SPACES,
    OPTIMIZERS,
    SHAPED,
    SPACES,
    combinations,
    guided_combinations,
)
from loop import MATRICES, SEED, Quadratic, base_weights, drive, final_digest, through_a_file

from zoray.methods.optimizers import Sgd
from zoray.records import Probe
from zoray.records.signatures import record
from zoray.run import journal

STEP_SIZES = {"sign": 0.2, "adaptive": 0.06}  # whatever the estimator
UNITS = {"lora-B": 1.0, "lora-AB": 0.5, "lozo": 0.5, "lozo-rademacher": 0.7, "eggroll": 0.4, "lowrank-4": 0.4}


def tuned(space: str, estimator: str, optimizer: str) -> Sgd:
    """A learning rate of the right size: a gradient step, or a step in the parameters if the weights have no unit."""
    if estimator in GUIDED:
        size = 0.02  # of a step in each number
    elif optimizer in STEP_SIZES:
        size = STEP_SIZES[optimizer] * (0.4 if SPACES[space].rank == 1 else 1.0)
    else:
        size = 0.5 if estimator == "es-rank" else 0.2 if estimator in SHAPED else 1.5 if optimizer == "sgd" else 0.8
    return replace(OPTIMIZERS[optimizer], lr=UNITS[space] * size)


def header(space: str) -> dict:
    return {
        "matrices": {name: list(shape) for name, shape in MATRICES.items()},
        "space": record(SPACES[space]),
        "run": {"seed": SEED},
    }


COMBINATIONS = combinations(SPACES)


@pytest.mark.parametrize(("space", "estimator", "optimizer"), COMBINATIONS)
def test_on_a_quadratic(space, estimator, optimizer, tmp_path):
    steps = 70 if estimator == "two_point" or optimizer == "adaptive" else 30  # small steps, or one direction each
    for factor in (1, 0.4, 2.5):  # one base rate does not suit all combinations equally well
        rate = tuned(space, estimator, optimizer)
        method = (ESTIMATORS[estimator], replace(rate, lr=rate.lr * factor))
        one = Quadratic(SPACES[space])
        before = sum(one.losses(Probe(0, 0, 0.0), range(16)))
        try:
            records = drive([one], *method, steps)
        except FloatingPointError:  # too large a step: the loss has left the numbers
            after = math.inf
            continue
        digest = final_digest(one, records)
        after = sum(one.losses(Probe(steps, 0, 0.0), range(16)))
        if after < 0.9 * before:
            break
    else:
        pytest.fail(f"no convergence: {before:.4f} -> {after:.4f}")

    contents = through_a_file(tmp_path / "journal.jsonl", header(space), records)
    assert list(contents.steps) == records
    assert journal.replay(contents, weights=base_weights()).digest() == digest

    short = 6
    shares = [Quadratic(SPACES[space]) for _ in range(3)]
    assert drive(shares, *method, steps, tile=3, stop=short) == records[:short]
    assert drive([Quadratic(SPACES[space])], *method, steps, tile=1, stop=short) == records[:short]
    resumed = drive([Quadratic(SPACES[space])], *method, steps, done=contents.steps[:4], stop=short)
    assert resumed == records[:short]


@pytest.mark.parametrize(("space", "estimator", "optimizer"), guided_combinations(SPACES))
def test_feedback_on_a_quadratic(space, estimator, optimizer, tmp_path):
    """With exact feedback; its tiles are part of the result, who scores them is not."""
    method, steps, one = (GUIDED[estimator], tuned(space, estimator, optimizer)), 30, Quadratic(SPACES[space])
    before = sum(one.losses(Probe(0, 0, 0.0), range(16)))
    records = drive([one], *method, steps, tile=3)
    digest = final_digest(one, records)
    assert sum(one.losses(Probe(steps, 0, 0.0), range(16))) < 0.7 * before

    contents = through_a_file(tmp_path / "journal.jsonl", header(space), records)
    assert list(contents.steps) == records and all(noted.commit.signs for noted in records)
    assert journal.replay(contents).digest() == digest
    if GUIDED[estimator].pairs:
        assert records[0].trust == () and records[-1].trust[0] == 2 * (30 - 1)  # no momentum in the first step

    for replicas in (2, 3, 5):
        shares = [Quadratic(SPACES[space]) for _ in range(replicas)]
        assert drive(shares, *method, steps, tile=3, stop=6) == records[:6]
    resumed = drive([Quadratic(SPACES[space])], *method, steps, tile=3, done=contents.steps[:4], stop=6)
    assert resumed == records[:6]


def test_the_feedback_of_the_quadratic_is_its_gradient():
    one = Quadratic(SPACES["lora-AB"])
    drive([one], GUIDED["feedback"], OPTIMIZERS["momentum"], 4)
    centre, examples = Probe(one.state.step, 0, 0.0), range(8)
    feedback, before = one.feedback(centre, examples), sum(one.losses(centre, examples))
    for name, values in feedback.items():
        view = one.state.layout.view(one.state.flat, name)
        for place in ((0, 0), (1, 2)):
            view[place] += 1e-3
            assert (sum(one.losses(centre, examples)) - before) / 1e-3 == pytest.approx(values[place], abs=2e-3)
            view[place] -= 1e-3


def test_the_combinations_are_many_and_their_parts_differ():
    assert len(COMBINATIONS) > 200 and len(combinations(LM_SPACES)) > 240
    for parts in (LM_SPACES, ESTIMATORS | GUIDED, OPTIMIZERS):
        assert len({str(asdict(part)) + type(part).__name__ for part in parts.values()}) == len(parts)
