"""The fused gated MLP against the same MLP in separate operations; every way in which it steps back or complains."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from zoray.engines.layers import gated_mlp_cpu as cpu_gated
from zoray.engines.layers.gated_mlp_cpu import fuse, plain, prove_fused, settle
from zoray.engines.layers.lora_cpu import SegmentedLora, join

SLOTS, RANK, HIDDEN, WIDTH = 4, 8, 24, 48
EQUAL = ((1, 0, 3), (2, 3, 6), (3, 6, 9))
SEGMENTS = {
    "equal": EQUAL,
    "ragged": ((0, 0, 2), (1, 2, 9)),
    "single": ((2, 0, 9),),
    "behind bare tokens": ((-1, 0, 3), (1, 3, 6), (2, 6, 9)),
    "bare": ((-1, 0, 9),),
    "one token each": tuple((slot, slot, slot + 1) for slot in range(4)),
}


@pytest.fixture(autouse=True)
def forgotten():
    """What earlier tests of this process have compiled, and what is left of it, which can hold torch's guards.

    Torch compiles a function anew only so many times, and not at all while a guard keeps it from dispatching.
    """
    gc.collect()
    torch._dynamo.reset()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class SiluAndMul:
    """As vLLM's: what it calls can be replaced."""

    def __init__(self) -> None:
        self._forward_method = plain

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return self._forward_method(y)


class Linear:
    """A layer with gate and up side by side, and adapters of both."""

    def __init__(self, wrapper: SegmentedLora, used: int) -> None:
        self.wrapper, self.weight = wrapper, random(2 * WIDTH, HIDDEN)
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, HIDDEN) for _ in range(2))
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, WIDTH, RANK) for _ in range(2))
        join([self])
        self.used = used

    def write(self, scale: float = 1.0) -> None:
        for i, (a, b) in enumerate(zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)):
            a[:, 0, : self.used].copy_(random(SLOTS, self.used, HIDDEN) + i)
            b[:, 0, :, : self.used].copy_(scale * random(SLOTS, WIDTH, self.used) + scale * i)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.t()
        self.wrapper.add_lora_linear(y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, (WIDTH, WIDTH))
        return y


class Mlp:
    def __init__(self, wrapper: SegmentedLora, used: int = RANK, between=lambda y: y) -> None:
        self.gate_up_proj, self.act_fn, self.between = Linear(wrapper, used), SiluAndMul(), between

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(self.between(self.gate_up_proj(x)))


def make(used: int = RANK, between=lambda y: y) -> tuple[SegmentedLora, Mlp, list]:
    wrapper = SegmentedLora(64, 16, torch.device("cpu"))
    wrapper.used_rank = used
    mlp = Mlp(wrapper, used, between)
    fused = fuse(SimpleNamespace(modules=lambda: [SimpleNamespace(), mlp]), wrapper, used)
    mlp.gate_up_proj.write()
    return wrapper, mlp, fused


@pytest.mark.parametrize("used", [1, 2, 8])
@pytest.mark.parametrize("name", SEGMENTS)
def test_fused_is_what_the_operations_are_alone(name, used):
    wrapper, mlp, fused = make(used)
    assert fused == [mlp]
    segments = SEGMENTS[name]
    wrapper.map_tokens(segments, 100)
    x = random(segments[-1][2], HIDDEN)
    linear = mlp.gate_up_proj
    expected = plain(linear(x))
    held, hold = [], wrapper._hold
    wrapper._hold = lambda *arguments: held.append(1) or hold(*arguments)  # type: ignore[method-assign]
    with torch.inference_mode(), wrapper.deferring(however_small=True):
        found = mlp(x)
    assert len(held) == (name == "equal")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (expected - plain(x @ linear.weight.t())).abs().max() > 1 or name == "bare"
    linear.write(0.0)
    with torch.inference_mode(), wrapper.deferring(however_small=True):
        zero = mlp(x)
        wrapper.map_tokens(((-1, 0, len(x)),), 100)
        torch.testing.assert_close(zero, mlp(x), atol=1e-5, rtol=1e-6)  # vector and scalar exp differ in the last bit


def test_large_ranks_and_other_activations_are_left_alone():
    wrapper = SegmentedLora(64, 16, torch.device("cpu"))
    mlp = Mlp(wrapper)
    model = SimpleNamespace(modules=lambda: [mlp])
    assert fuse(model, wrapper, 16) == [] and mlp.act_fn._forward_method is plain and not wrapper.gated
    mlp.act_fn = SimpleNamespace()  # type: ignore[assignment]
    assert fuse(model, wrapper, 2) == []


def test_without_a_compiler_nothing_changes(monkeypatch, caplog):
    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("no compiler\nfound")

        return call

    cpu_gated.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    try:
        _, mlp, fused = make()
        assert fused == [] and mlp.act_fn._forward_method is plain
        assert "activations stay uncompiled: no compiler" in caplog.text
    finally:
        cpu_gated.compiled.cache_clear()


def test_the_proof_measures_and_leaves_an_mlp_alone_that_does_more_between_its_products(caplog):
    wrapper, mlp, fused = make()
    assert prove_fused(fused, wrapper, SLOTS) < 1e-5
    assert settle(fused, wrapper, SLOTS)["activation_error"] < 1e-5 and wrapper.gated
    for between, says in ((lambda y: y.mul_(2.0), "differs by"), (lambda y: y.clone(), "right after its layer")):
        wrapper, mlp, fused = make(between=between)
        with pytest.raises((ValueError, RuntimeError), match=says):
            prove_fused(fused, wrapper, SLOTS)
        assert settle(fused, wrapper, SLOTS) == {} and says in caplog.text
        wrapper.map_tokens(EQUAL, 100)
        x = random(9, HIDDEN)
        with wrapper.deferring(however_small=True):
            assert torch.equal(mlp(x), plain(between(mlp.gate_up_proj(x))))


def test_nothing_is_compiled_after_the_proof():
    wrapper, mlp, fused = make(used=2)
    before = compilations()
    assert prove_fused(fused, wrapper, SLOTS) < 1e-5
    proved = compilations()
    assert proved > before
    for segments in (EQUAL, ((0, 0, 20), (1, 20, 40)), tuple((s, 2 * s, 2 * s + 2) for s in range(4)), ((-1, 0, 50),)):
        wrapper.map_tokens(segments, 100)
        with torch.inference_mode(), wrapper.deferring(however_small=True):
            mlp(random(segments[-1][2], HIDDEN))
    assert compilations() == proved


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_adapters_that_no_activation_took_are_noticed():
    wrapper, mlp, _ = make()
    wrapper.map_tokens(EQUAL, 100)
    x = random(9, HIDDEN)
    with pytest.raises(RuntimeError, match="did not take"), wrapper.deferring(however_small=True):
        mlp.gate_up_proj(x)
    with pytest.raises(RuntimeError, match="did not take"), wrapper.deferring(however_small=True):
        mlp.gate_up_proj(x)
        mlp.gate_up_proj(x)
    expected = plain(mlp.gate_up_proj(x))
    torch.testing.assert_close(mlp(x), expected)  # and outside nothing is left to it
