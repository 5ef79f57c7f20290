"""Every sensible space x estimator x optimizer on a tiny language model; one space adapts head and embedding too.

All combinations replay, resume and are the same however a step is shared out. That the loss falls is tested for every
space, every estimator and every optimizer, but not for all their combinations, which would take an hour.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from combinations import ESTIMATORS, LM_SPACES, OPTIMIZERS, SHAPED, combinations
from loop import SEED, drive, final_digest, through_a_file

from zoray.engines.hf import Hf
from zoray.methods.estimators import TwoPoint
from zoray.models.folder import Model, load_matrices
from zoray.records import Probe
from zoray.records.signatures import record
from zoray.records.tiles import mean
from zoray.run import journal
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec, load_workload
from zoray.tasks.file.task import File

# All combinations are tried on quadratics (test_conformance.py); here every pair of two kinds of parts.
LM_COMBINATIONS = [
    case for case in combinations(LM_SPACES) if case.values[1] in ("two_point", "es-prompt") or case.values[2] == "sgd"
]
LM_UNITS = {
    "lora-B": 0.02,
    "lora-AB": 0.01,
    "lora-vocabulary": 0.01,
    "lozo": 4e-4,
    "lozo-rademacher": 1e-3,
    "eggroll": 5e-4,
    "lowrank-4": 5e-4,
}


@pytest.fixture(scope="module")
def language_models(tiny_models, labelled_file):
    """Three replicas of a space on the tiny Llama, loaded once and reset for each test."""
    task = File(str(labelled_file), {0: " terrible", 1: " great"}, train=60, dev=20, test=20)
    loaded: dict[str, list[Replica]] = {}

    def fresh(space: str) -> list[Replica]:
        if space not in loaded:
            loaded.clear()
            model = Model(str(tiny_models["llama"]))
            spec = ReplicaSpec(model, task, ChoiceNLL(), LM_SPACES[space], TwoPoint(), Hf(), SEED, 0, 8)
            workload = load_workload(spec)
            loaded[space] = [Replica(spec, workload) for _ in range(3)]
        for replica in loaded[space]:
            replica.reset()
        return loaded[space]

    return fresh


@pytest.mark.parametrize(("space", "estimator", "optimizer"), LM_COMBINATIONS)
def test_on_a_tiny_language_model(space, estimator, optimizer, language_models, tmp_path):
    replicas = language_models(space)
    lr = LM_UNITS[space] * (0.3 if space.startswith("lora") and (estimator in SHAPED or optimizer == "sign") else 1.0)
    method, steps, short = (ESTIMATORS[estimator], replace(OPTIMIZERS[optimizer], lr=lr)), 3, 2
    records = drive(replicas, *method, steps, batch=4, tile=2)
    digest = final_digest(replicas[0], records)

    header = {
        "matrices": {name: list(shape) for name, shape in replicas[0].workload.matrices.items()},
        "space": record(LM_SPACES[space]),
        "run": {"seed": SEED},
    }
    contents = through_a_file(tmp_path / "journal.jsonl", header, records)
    weights = None
    if LM_SPACES[space].folds:
        weights = load_matrices(replicas[0].workload.folder, header["matrices"], "float32")
    assert journal.replay(contents, weights=weights).digest() == digest

    for replica in replicas[1:]:
        replica.reset()
    assert drive(replicas[1:2], *method, steps, batch=4, tile=3, stop=short) == records[:short]
    assert drive(replicas[2:], *method, steps, batch=4, tile=4, done=contents.steps[:short]) == records
    assert len({r.digest for r in records}) == steps, "every step moves the state"


FALLING = [
    *((space, "es-plain", "sgd") for space in LM_SPACES),
    *(("lora-B", estimator, "sgd") for estimator in ESTIMATORS if estimator != "es-plain"),
    *(("lora-B", "es-plain", optimizer) for optimizer in OPTIMIZERS if optimizer != "sgd"),
]


SIZES = {"fzoo": 0.3, "es-zscore": 0.3, "es-rank": 1.0, "es-prompt": 0.8}


@pytest.mark.parametrize(("space", "estimator", "optimizer"), FALLING)
def test_the_loss_of_a_tiny_language_model_falls(space, estimator, optimizer, language_models):
    replica = language_models(space)[0]
    before = mean(replica.outcomes("train", Probe(0, 0, 0.0)).losses.tolist())
    size = SIZES.get(estimator, 2.0) if optimizer not in ("sign", "adaptive") else 0.3
    method = (ESTIMATORS[estimator], replace(OPTIMIZERS[optimizer], lr=LM_UNITS[space] * size))
    steps = 80 if estimator == "two_point" else 40  # one direction each
    records = drive([replica], *method, steps)
    replica.apply([noted.commit for noted in records])
    after = mean(replica.outcomes("train", Probe(steps, 0, 0.0)).losses.tolist())
    assert after < 0.9 * before, f"{before:.4f} -> {after:.4f}"
