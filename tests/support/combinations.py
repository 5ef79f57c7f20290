"""For the conformance tests: spaces, estimators and optimizers, and which of their combinations are sensible."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.estimators.feedback import Feedback
from zoray.methods.optimizers import GlobalAdaptive, Sgd, Sign
from zoray.methods.spaces import Lora, LowRank, Lozo

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
VOCABULARY = Lora(rank=2, alpha=4.0, targets=("all-linear", "lm_head", "embed_tokens"), train="AB")
LM_SPACES = {**SPACES, "lora-vocabulary": VOCABULARY}
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
GUIDED = {"feedback": Feedback(lens=0), "feedback-judged": Feedback(lens=0, pairs=2, eps=0.1)}
OPTIMIZERS = {
    "sgd": Sgd(schedule="linear"),
    "momentum": Sgd(schedule="constant", momentum=0.5, warmup=3),
    "sign": Sgd(schedule="cosine", link=Sign()),
    "adaptive": Sgd(schedule="linear", link=GlobalAdaptive(beta=0.9)),
    "decay": Sgd(schedule="constant", clip=50.0, weight_decay=0.02, anchor=0.02),
}


def sensible(space: str, optimizer: str) -> bool:
    """Momentum of fresh full matrices would be as large as the model; an anchor needs the base if steps are folded."""
    if optimizer == "momentum":
        return LM_SPACES[space].takes_momentum
    return optimizer != "decay" or LM_SPACES[space].keep_base or not LM_SPACES[space].folds


def combinations(spaces: Iterable[str]) -> list[Any]:
    """All sensible ones, as parameters of a test; without residual feedback."""
    return [
        pytest.param(*names, id="-".join(names))
        for names in product(spaces, ESTIMATORS, OPTIMIZERS)
        if sensible(names[0], names[2])
    ]


def guided_combinations(spaces: Iterable[str]) -> list[Any]:
    """Those of residual feedback, of which links know nothing, and whose probes along the guide need a momentum."""
    return [
        pytest.param(*names, id="-".join(names))
        for names in product(spaces, GUIDED, ("sgd", "momentum", "decay"))
        if isinstance(LM_SPACES[names[0]], Lora) and (names[2] == "momentum" or not GUIDED[names[1]].pairs)
    ]
