"""The compiled RMSNorm stands for vLLM's own on the CPU: the same numbers, and an engine really runs it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from zoray.engines.layers.rms_norm_cpu import CpuNorm, take
from zoray.engines.packing import Plan
from zoray.engines.vllm.engine import Vllm
from zoray.methods.spaces import Lora
from zoray.models.folder import linear_matrices
from zoray.records import TokenSequence

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these kernels are those of the CPU wheel")
current_platform.import_kernels()


class RMSNorm:
    """As vLLM's: what it calls can be replaced."""

    has_weight, variance_size_override, variance_epsilon = True, None, 1e-5

    def __init__(self, hidden: int, dtype: torch.dtype = torch.float32, wrong: bool = False, **other) -> None:
        self.weight = torch.nn.Parameter(torch.randn(hidden).to(dtype))
        self.calls, self.wrong = 0, wrong
        self._forward_method = self.own
        vars(self).update(other)

    def own(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        self.calls += 1
        total = x if residual is None else x + residual
        wide = total.float() * (1.1 if self.wrong and residual is not None else 1.0)
        scale = (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        normed = (wide * scale).to(x.dtype) * self.weight.data * (1.1 if self.wrong else 1.0)
        return normed if residual is None else (normed, total)


class GemmaRMSNorm(RMSNorm):
    """Another norm."""


def model(*norms: RMSNorm) -> SimpleNamespace:
    return SimpleNamespace(modules=lambda: [SimpleNamespace(), *norms])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 576), (300, 64)], ids=str)
def test_the_numbers_are_those_of_its_own_operations(shape, dtype):
    norm = RMSNorm(shape[1], dtype)
    assert take(model(norm)) == 1 and isinstance(norm._forward_method, CpuNorm)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    alone, together = norm.own(x), norm.own(x, residual)
    norm.calls, close = 0, {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(norm._forward_method(x), alone, **close)
    torch.testing.assert_close(norm._forward_method(x, residual), together, **close)
    assert norm.calls == 0


def test_inputs_that_the_kernels_do_not_take_go_to_vllm():
    norm = RMSNorm(16)
    take(model(norm))
    forward, x, norm.calls = norm._forward_method, torch.randn(4, 16), 0
    for given in ((torch.randn(4, 32)[:, ::2],), (x.bfloat16(),), (x, x.bfloat16()), (x, x.t().contiguous().t())):
        before = norm.calls
        forward(*given)
        assert norm.calls == before + 1


@pytest.mark.parametrize(
    "norm",
    [
        *(RMSNorm(12), RMSNorm(16, has_weight=False), RMSNorm(16, variance_size_override=8)),
        *(RMSNorm(16, wrong=True), GemmaRMSNorm(16)),
    ],
)
def test_a_norm_that_does_something_else_is_left_alone(norm):
    assert take(model(norm)) == 0 and norm._forward_method == norm.own


def test_an_engine_runs_it(tiny_models, monkeypatch):
    folder = tiny_models["llama"]
    engine = Vllm(slots=2, max_tokens=64, kv_cache_gib=0.1).start(folder, "float32", linear_matrices(folder), Lora(), 0)
    calls, call = [], CpuNorm.__call__
    monkeypatch.setattr(CpuNorm, "__call__", lambda self, *given: calls.append(len(given)) or call(self, *given))
    one = np.array([2], np.int32)
    engine.score_plan(Plan.of([(None, TokenSequence(np.arange(3, dtype=np.int32), one, one, one * 0, 1))]))
    assert calls == [1, 2, 2, 2, 2]  # twice a layer and once more, all but the first with a residual
