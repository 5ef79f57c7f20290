"""Two processes that share a model out: the state and the scores of one process (vLLM on the CPU, for real)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tiny import tiny_work

from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, Lozo
from zoray.models.folder import Model, linear_matrices
from zoray.pool.on_ray.cluster import size
from zoray.pool.on_ray.start import start_pool
from zoray.pool.settings import Cluster
from zoray.records import Commit, ConfigError
from zoray.records.tiles import Grid, losses_of
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

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


@pytest.mark.parametrize("architecture", [pytest.param("llama", marks=pytest.mark.slow), "opt"])
def test_two_processes_give_the_digest_and_the_scores_of_one(architecture, tiny_models):
    one, two = (scores(tiny_models[architecture], ranks) for ranks in (1, 2))
    assert two[0] == one[0]
    assert np.abs(two[1] - one[1]).max() < 1e-4
    assert two[2]["adapter_error"] < 1e-3


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_of_two_ranks_in_the_pool(local_ray, tiny_models, labelled_file):
    """Placed in one bundle; the digest and the losses of a replica of one rank."""
    task = File(str(labelled_file), [" terrible", " great"])
    model, engine = Model(str(tiny_models["llama"])), Vllm(slots=4, max_tokens=512, kv_cache_gib=0.1)
    space, pairs = Lora(rank=2, alpha=4), TwoPoint(pairs=2, eps=0.1)
    found = {}
    for ranks in (1, 2):
        parallel = replace(engine, tensor_parallel=ranks)
        spec = ReplicaSpec(model, task, ChoiceNLL(), space, pairs, parallel, 1, 2, batch=4, tile_examples=2)
        with start_pool(spec, Cluster(replicas=1, cpus_per_replica=2), f"ranks-{ranks}") as pool:
            pool.commit(Commit(0, (0.03, -0.02)))
            scores, digest = pool.evaluate(Grid.of(spec, 1), digest=True)
            found[ranks] = digest, np.array(losses_of(pairs.ask(1), Grid.of(spec, 1).tiles, scores)[0])
    assert found[1][0] == found[2][0]
    assert np.abs(found[1][1] - found[2][1]).max() < 1e-4


def test_a_gpu_for_each_rank(local_ray):
    with pytest.raises(ConfigError, match=r"expected cluster.gpus_per_replica=2, a GPU for each rank.*; got 1"):
        size(Cluster(gpus_per_replica=1), ranks=2)


def test_a_space_that_folds_is_refused(tiny_models):
    matrices = linear_matrices(tiny_models["llama"])
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel=1 with a space that folds .* take space=lora"):
        Vllm(tensor_parallel=2).start(tiny_models["llama"], "float32", matrices, Lozo(rank=1), seed=0)
