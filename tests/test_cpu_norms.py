"""The compiled RMSNorm stands for vLLM's own on the CPU: the same numbers, and an engine really runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from zoray.engines import cpu_norms
from zoray.engines.vllm import Vllm
from zoray.models import linear_matrices
from zoray.spaces import Lora

ops = cpu_norms._ops()
pytestmark = pytest.mark.skipif(not ops, reason="this vLLM has no table of implementations, or no compiled kernels")


@pytest.mark.parametrize("shape", [(1, 16), (7, 576), (300, 64)])
def test_the_numbers_are_those_of_the_native_operations(shape):
    cpu_norms.register()
    norm, add_norm = ops
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    expected = norm.impls["native"].impl_fn(x, weight, 1e-5, None)
    torch.testing.assert_close(norm.impls[cpu_norms.NAME].impl_fn(x, weight, 1e-5, None), expected)
    expected = add_norm.impls["native"].impl_fn(x, residual, weight, 1e-5, None)
    torch.testing.assert_close(add_norm.impls[cpu_norms.NAME].impl_fn(x, residual, weight, 1e-5, None), expected)


def test_what_the_kernel_does_not_take_stays_with_vllm():
    x = torch.randn(4, 32)
    assert cpu_norms._plain(x, torch.ones(32), 1e-5) and cpu_norms._plain_with_residual(x, x, torch.ones(32), 1e-5)
    assert not cpu_norms._plain(x, None, 1e-5)
    assert not cpu_norms._plain(x, torch.ones(32), 1e-5, 16)
    assert not cpu_norms._plain(x, torch.ones(32, dtype=torch.bfloat16), 1e-5)
    assert not cpu_norms._plain(x[:, ::2], torch.ones(16), 1e-5)
    assert not cpu_norms._plain(torch.randn(4, 12), torch.ones(12), 1e-5)
    assert not cpu_norms._plain_with_residual(x, x.bfloat16(), torch.ones(32), 1e-5)
    assert not cpu_norms._plain_with_residual(x, x.t().contiguous().t(), torch.ones(32), 1e-5)


def test_an_engine_runs_it(tiny_models, monkeypatch):
    from zoray.engines.packing import Plan
    from zoray.records import TokenSequence

    folder = tiny_models["llama"]
    engine = Vllm(slots=2, max_tokens=64, kv_cache_gib=0.1).start(folder, "float32", linear_matrices(folder), Lora(), 0)
    calls = []
    for op in ops:
        impl = op.impls[cpu_norms.NAME]
        monkeypatch.setattr(impl, "impl_fn", lambda *a, f=impl.impl_fn: calls.append(1) or f(*a))
    import numpy as np

    one = np.array([2], np.int32)
    engine.score_plan(Plan.of([(None, TokenSequence(np.arange(3, dtype=np.int32), one, one, one * 0, 1))]))
    assert len(calls) >= 4  # twice a layer
