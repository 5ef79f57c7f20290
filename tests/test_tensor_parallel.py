"""Two processes that share a model out: the state and the scores of one process (vLLM on the CPU, for real)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tiny import tiny_work

from zoray.engines.vllm import Vllm
from zoray.models import linear_matrices
from zoray.records import Commit, ConfigError
from zoray.spaces import Lora, Lozo

if TYPE_CHECKING:
    from pathlib import Path


def scores(folder: Path, ranks: int) -> tuple[str, np.ndarray, dict[str, float]]:
    """Digest and scores after a commit, and what the start-up test has measured on the first rank."""
    space = Lora(rank=2, alpha=4, train="AB")
    matrices = linear_matrices(folder)
    engine = Vllm(slots=3, max_tokens=256, kv_cache_gib=0.1, tensor_parallel=ranks).start(
        folder, "float32", matrices, space, seed=3
    )
    engine.apply([Commit(0, (0.03, -0.02))])
    found = engine.digest(), np.concatenate(engine.score(tiny_work(1))), engine.self_test
    engine.reset()
    assert engine.step() == 0
    return found


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_two_processes_give_the_digest_and_the_scores_of_one(architecture, tiny_models):
    one, two = (scores(tiny_models[architecture], ranks) for ranks in (1, 2))
    assert two[0] == one[0]
    assert np.abs(two[1] - one[1]).max() < 1e-4
    assert two[2]["adapter_error"] < 1e-3


def test_a_space_that_folds_is_refused(tiny_models):
    matrices = linear_matrices(tiny_models["llama"])
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel=1 with a space that folds .* take space=lora"):
        Vllm(tensor_parallel=2).start(tiny_models["llama"], "float32", matrices, Lozo(rank=1), seed=0)
