"""What must hold between CPU and CUDA, to the bit. Skipped visibly without a card; `pytest -m gpu` selects it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_work

from zoray.directions import Layout, direction_torch
from zoray.engines.hf import Hf
from zoray.engines.vllm import Vllm
from zoray.models import linear_matrices
from zoray.records import Commit, Probe
from zoray.spaces import Lora, LowRank, Lozo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none"),
]
MATRICES = {"layers.0.q_proj": (96, 67), "layers.0.k_proj": (33, 67), "layers.1.up_proj": (1000, 64)}


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_directions_have_the_same_bits_on_cpu_and_cuda(distribution):
    shapes = {name: (shape[0], 3) for name, shape in MATRICES.items()}
    cpu, cuda = (Layout(shapes, device).direction(7, 5, 2, distribution) for device in ("cpu", "cuda"))
    assert torch.equal(cpu, cuda.cpu())
    part = direction_torch(7, 5, 2, "layers.1.up_proj", (1000, 3), distribution, slice(10, 500), device="cuda")
    whole = direction_torch(7, 5, 2, "layers.1.up_proj", (1000, 3), distribution)
    assert torch.equal(part.cpu(), whole[10:500])


@pytest.mark.parametrize("train", ["B", "AB"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_states_stay_bit_identical_over_a_hundred_commits(train, distribution):
    space = Lora(rank=3, alpha=5, train=train, distribution=distribution)
    states = [space.open(MATRICES, 11, device) for device in ("cpu", "cuda")]
    assert states[0].digest() == states[1].digest()
    for step in range(100):
        for state in states:
            state.apply(Commit(step, (0.0123, -0.0456), decay=0.999))
    assert states[0].digest() == states[1].digest()
    probe = Probe(100, 0, 0.01)
    assert torch.equal(states[0].perturbed(probe), states[1].perturbed(probe).cpu())


FOLDING = {
    "lozo": Lozo(rank=2, interval=3, keep_base=True),
    "lozo-stochastic": Lozo(rank=2, interval=3, keep_base=True, fold_rounding="stochastic", distribution="rademacher"),
    "lowrank": LowRank(rank=3, keep_base=True),
    "lowrank-stochastic": LowRank(rank=3, keep_base=True, fold_rounding="stochastic", distribution="rademacher"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FOLDING)
def test_folded_base_weights_stay_bit_identical(name, dtype):
    """With momentum (where the space has it), decay and anchor: every operation that a commit can ask for."""
    space, random = FOLDING[name], torch.Generator().manual_seed(0)
    base = {matrix: (torch.randn(shape, generator=random) * 0.05).to(dtype) for matrix, shape in MATRICES.items()}
    copies = [{matrix: weight.clone().to(device) for matrix, weight in base.items()} for device in ("cpu", "cuda")]
    states = [
        space.open(MATRICES, 11, device, weights) for device, weights in zip(("cpu", "cuda"), copies, strict=True)
    ]
    with_momentum = {"momentum": 0.9, "rate": -0.01} if isinstance(space, Lozo) else {}
    for step in range(31):  # ends within an interval
        for state in states:
            state.apply(Commit(step, (0.0123, 0.0, -0.0456), decay=0.999, anchor=0.99, **with_momentum))
        assert states[0].digest() == states[1].digest(), step
    for matrix in MATRICES:
        assert torch.equal(copies[0][matrix], copies[1][matrix].cpu()) and not torch.equal(
            copies[0][matrix], base[matrix]
        )
    probe = Probe(31, 1, 0.01)
    for (_, *on_cpu), (_, *on_cuda) in zip(*(state.factors(probe) for state in states), strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_cuda, strict=True))


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
