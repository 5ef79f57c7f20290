"""Every sensible space x estimator x optimizer: converges, replays, resumes, and is the same however it is shared out.

All combinations on a quadratic, and all on a tiny language model, one of whose spaces adapts head and embedding too.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from loop import MATRICES, SEED, Quadratic, base_weights, drive, final_digest, through_a_file

from zoray import journal
from zoray.data import ReplicaSpec, load_workload
from zoray.driver import record
from zoray.engines.hf import Hf
from zoray.estimators import Evolution, OneSided, TwoPoint
from zoray.models import Model, load_matrices
from zoray.objectives import ChoiceNLL
from zoray.optimizers import GlobalAdaptive, Sgd, Sign
from zoray.records import Probe
from zoray.replica import Replica
from zoray.spaces import Lora, LowRank, Lozo
from zoray.tasks.labelled_file import LabelledFile
from zoray.tiles import mean

if TYPE_CHECKING:
    from collections.abc import Iterable

SPACES = {
    "lora-B": Lora(rank=4, alpha=8.0),
    "lora-AB": Lora(rank=3, alpha=6.0, train="AB", distribution="gaussian"),
    "lozo": Lozo(rank=2, interval=3, keep_base=True),
    "lozo-rademacher": Lozo(rank=1, interval=5, distribution="rademacher"),
    "eggroll": LowRank(rank=1, keep_base=True),
    "lowrank-4": LowRank(rank=4, distribution="rademacher"),
}
ESTIMATORS = {
    "two_point": TwoPoint(pairs=1, eps=1e-3),
    "two_point-shared_out": TwoPoint(pairs=4, eps=1e-3, shared=False),
    "fzoo": OneSided(probes=6, eps=1e-3),
    "forward": OneSided(probes=6, eps=1e-3, scale="none"),
    "es-zscore": Evolution(population=8, sigma=1e-3),
    "es-rank": Evolution(population=8, sigma=1e-3, antithetic=False, shaping="centred_rank"),
    "es-plain": Evolution(population=8, sigma=1e-3, antithetic=False, shaping="none"),
    "es-prompt": Evolution(population=8, sigma=1e-3, centring="prompt"),
}
SHAPED = {"fzoo", "es-zscore", "es-rank", "es-prompt"}  # weights without a unit: lr is a step in the parameters
OPTIMIZERS = {
    "sgd": Sgd(schedule="linear"),
    "momentum": Sgd(schedule="constant", momentum=0.5, warmup=3),
    "sign": Sgd(schedule="cosine", link=Sign()),
    "adaptive": Sgd(schedule="linear", link=GlobalAdaptive(beta=0.9)),
    "decay": Sgd(schedule="constant", clip=50.0, weight_decay=0.02, anchor=0.02),
}
STEP_SIZES = {"sign": 0.2, "adaptive": 0.06}  # whatever the estimator
UNITS = {"lora-B": 1.0, "lora-AB": 0.5, "lozo": 0.5, "lozo-rademacher": 0.7, "eggroll": 0.4, "lowrank-4": 0.4}


def sensible(space: str, optimizer: str) -> bool:
    """Momentum of fresh full matrices would be as large as the model; an anchor needs the base if steps are folded."""
    if optimizer == "momentum":
        return not isinstance(SPACES.get(space), LowRank)
    return optimizer != "decay" or getattr(SPACES.get(space), "keep_base", True)


def tuned(space: str, estimator: str, optimizer: str) -> Sgd:
    """A learning rate of the right size: a gradient step, or a step in the parameters if the weights have no unit."""
    if optimizer in STEP_SIZES:
        size = STEP_SIZES[optimizer] * (0.4 if SPACES[space].rank == 1 else 1.0)
    else:
        size = 0.5 if estimator == "es-rank" else 0.2 if estimator in SHAPED else 1.5 if optimizer == "sgd" else 0.8
    return replace(OPTIMIZERS[optimizer], lr=UNITS[space] * size)


def combinations(spaces: Iterable[str]) -> list[Any]:
    """All sensible ones, as parameters of a test."""
    return [
        pytest.param(*names, id="-".join(names))
        for names in product(spaces, ESTIMATORS, OPTIMIZERS)
        if sensible(names[0], names[2])
    ]


COMBINATIONS = combinations(SPACES)


@pytest.mark.parametrize(("space", "estimator", "optimizer"), COMBINATIONS)
def test_on_a_quadratic(space, estimator, optimizer, tmp_path):
    steps = 70 if estimator == "two_point" or optimizer == "adaptive" else 30  # small steps, or one direction each
    for factor in (1, 0.4, 2.5):  # one base rate does not suit all combinations equally well
        rate = tuned(space, estimator, optimizer)
        method = (ESTIMATORS[estimator], replace(rate, lr=rate.lr * factor))
        one = Quadratic(SPACES[space])
        before = sum(one.losses(Probe(0, 0, 0.0), range(16)))
        records = drive([one], *method, steps)
        digest = final_digest(one, records)
        after = sum(one.losses(Probe(steps, 0, 0.0), range(16)))
        if after < 0.9 * before:
            break
    else:
        pytest.fail(f"no convergence: {before:.4f} -> {after:.4f}")

    header = {
        "matrices": {name: list(shape) for name, shape in MATRICES.items()},
        "space": record(SPACES[space]),
        "run": {"seed": SEED},
    }
    contents = through_a_file(tmp_path / "journal.jsonl", header, records)
    assert list(contents.steps) == records
    assert journal.replay(contents, weights=base_weights()).digest() == digest

    short = 6
    shares = [Quadratic(SPACES[space]) for _ in range(3)]
    assert drive(shares, *method, steps, tile=3, stop=short) == records[:short]
    assert drive([Quadratic(SPACES[space])], *method, steps, tile=1, stop=short) == records[:short]
    resumed = drive([Quadratic(SPACES[space])], *method, steps, done=contents.steps[:4], stop=short)
    assert resumed == records[:short]


VOCABULARY = Lora(rank=2, alpha=4.0, targets=("all-linear", "lm_head", "embed_tokens"), train="AB")
LM_SPACES = {**SPACES, "lora-vocabulary": VOCABULARY}
LM_COMBINATIONS = combinations(LM_SPACES)
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
    task = LabelledFile(str(labelled_file), {0: " terrible", 1: " great"}, train=60, dev=20, test=20)
    loaded: dict[str, list[Replica]] = {}

    def fresh(space: str) -> list[Replica]:
        if space not in loaded:
            loaded.clear()
            spec = ReplicaSpec(Model(str(tiny_models["llama"])), task, ChoiceNLL(), LM_SPACES[space], Hf(), SEED, 0, 8)
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
    method, steps, short = (ESTIMATORS[estimator], replace(OPTIMIZERS[optimizer], lr=lr)), 4, 2
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


@pytest.mark.parametrize("space", LM_SPACES)
def test_the_loss_of_a_tiny_language_model_falls(space, language_models):
    replica = language_models(space)[0]
    before = mean([loss for loss, _ in replica.outcomes("train", Probe(0, 0, 0.0))])
    optimizer = Sgd(LM_UNITS[space] * 2, schedule="linear")
    records = drive([replica], Evolution(8, 1e-3, antithetic=False, shaping="none"), optimizer, 40)
    replica.apply([noted.commit for noted in records])
    after = mean([loss for loss, _ in replica.outcomes("train", Probe(40, 0, 0.0))])
    assert after < 0.9 * before, f"{before:.4f} -> {after:.4f}"


def test_the_combinations_are_many_and_their_parts_differ():
    assert len(COMBINATIONS) > 200 and len(LM_COMBINATIONS) > 240
    for parts in (LM_SPACES, ESTIMATORS, OPTIMIZERS):
        assert len({str(asdict(part)) + type(part).__name__ for part in parts.values()}) == len(parts)
