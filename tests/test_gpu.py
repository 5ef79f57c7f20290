"""What must hold between CPU and CUDA, to the bit. Skipped visibly without a card; `pytest -m gpu` selects it."""

from __future__ import annotations

import pytest
import torch

from zoray.directions import Layout, direction_torch
from zoray.records import Commit, Probe
from zoray.spaces import Lora

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
