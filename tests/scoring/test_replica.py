"""What a replica measures of its engine before the first step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zoray.engines.hf import Hf
from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.spaces import Lora
from zoray.models.folder import Model
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.scorer import NEAR, rounding
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

X = np.array(NEAR)[:, None]


def test_points_of_a_probe_are_equidistant():
    assert np.allclose(np.diff(NEAR), 0.05) and NEAR[2] == 1.0


def test_what_is_smooth_has_no_rounding():
    curves = np.linspace(-2, 2, 7)
    assert rounding(3 + curves * X - 2 * X**2 + curves * X**3) < 1e-14
    assert 0 < rounding(np.exp(curves * X)) < 1e-4  # a fourth derivative of up to 16 e^2, times 0.05 ** 4


@pytest.mark.parametrize("size", [1e-6, 0.3])
def test_independent_errors_are_measured(size):
    errors = np.random.default_rng(0).normal(0, size, (5, 4000))
    assert rounding(2 * X + X**3 + errors) == pytest.approx(size, rel=0.05)
    one = np.zeros((5, 100))
    one[2] = size
    assert rounding(one) == pytest.approx(size * 6 / math.sqrt(70))


@pytest.mark.parametrize("estimator", [TwoPoint(eps=1e-2), OneSided(eps=1e-2), Evolution(4, 1e-2)], ids=str)
def test_noise_is_that_of_the_dtype(estimator, tiny_models, labelled_file):
    """The reference scores each sequence alone, so rounding is all there is: a thousand times in bfloat16."""
    task = File(str(labelled_file), {0: " terrible", 1: " great"}, train=20, dev=4, test=4)
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = Model(str(tiny_models["llama"]), dtype=dtype)
        spec = ReplicaSpec(model, task, ChoiceNLL(), Lora(), estimator, Hf(), 0, 0, 4)
        found[dtype] = Replica(spec).info.noise
    assert 0 < found["float32"] < 1e-5 < 1e-4 < found["bfloat16"] < 0.2
    assert found["bfloat16"] > 300 * found["float32"]
