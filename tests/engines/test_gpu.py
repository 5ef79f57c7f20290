"""What must hold on CUDA. Skipped visibly without a card; `pytest -m gpu` selects it.

The checks are those of `python -m benchmarks.gpu_report`, on tiny models, and the LoRA kernels one by one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_work

from benchmarks.gpu_report.checks import Place, all_checks
from zoray.engines.hf import Hf
from zoray.engines.vllm.engine import Vllm
from zoray.methods.spaces import Lora
from zoray.models.folder import linear_matrices
from zoray.records import Commit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checks make their models."""
    return tmp_path_factory.mktemp("gpu_models")


@pytest.mark.parametrize("name", all_checks(Place("cuda", True, Path())))
def test_a_check_of_the_report_holds(name, folder):
    assert all_checks(Place("cuda", True, folder))[name]()


@pytest.mark.parametrize(
    ("architecture", "targets", "dtype", "kernels", "tolerance"),
    [
        ("llama", "all-linear", "float32", "dense", 1e-3),
        ("opt", "all-linear", "float32", "dense", 1e-3),
        ("llama", "all-linear", "bfloat16", "punica", 0.15),
        ("llama", ("all-linear", "lm_head", "embed_tokens"), "bfloat16", "auto", 0.15),
    ],
    ids=str,
)
@pytest.mark.parametrize("eager", [True, False])
def test_vllm_on_cuda_scores_as_the_reference(tiny_models, architecture, targets, dtype, kernels, tolerance, eager):
    """Several probes and sequences in one packed forward, and rows of the LM head that belong to different slots."""
    folder, space = tiny_models[architecture], Lora(rank=2, alpha=4, train="AB", targets=targets)
    matrices = linear_matrices(folder, targets)
    config = Vllm(slots=3, max_tokens=256, kv_cache_gib=0.25, eager=eager, lora_kernels=kernels)
    vllm = config.start(folder, dtype, matrices, space, seed=3)
    assert eager or vllm.self_test["compiled_error"] < 0.05
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    for engine in (vllm, reference):
        engine.apply([Commit(0, (0.03, -0.02))])
    assert vllm.digest() == reference.digest()
    found, expected = (np.concatenate(engine.score(tiny_work(1))) for engine in (vllm, reference))
    assert np.abs(found - expected).max() < tolerance
