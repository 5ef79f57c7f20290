"""The segmented LoRA kernel against a loop over tokens: equal and ragged segments, one A and many, fused matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from zoray.engines.layers.lora_cpu import SegmentedLora, join, joined, joined_b, shorten

SLOTS, RANK, WIDTH, SIZES = 4, 8, 24, (16, 8, 8)
EQUAL = ((1, 2, 5), (2, 5, 8), (3, 8, 11))  # (slot, first token, last + 1); tokens 0 and 1 have no adapter
RAGGED = ((0, 2, 3), (1, 3, 8), (3, 8, 11))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def expected(y, x, a, b, segments, scale):
    y, offset = y.clone().double(), 0
    for a_i, b_i, size in zip(a, b, SIZES[: len(a)], strict=True):
        for slot, start, end in segments:
            for t in range(start, end):
                y[t, offset : offset + size] += scale * (
                    b_i[slot, 0].double() @ (a_i[slot, 0].double() @ x[t].double())
                )
        offset += size
    return y


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("one_a", [False, True])
@pytest.mark.parametrize("fused", ["", "A", "A and B"])
@pytest.mark.parametrize("segments", [EQUAL, RAGGED, EQUAL[:1]], ids=["equal", "ragged", "single"])
@pytest.mark.parametrize("used", [None, 5])
def test_every_path_is_the_loop_over_tokens(matrices, one_a, fused, segments, used, monkeypatch):
    monkeypatch.setattr("zoray.engines.layers.lora_cpu.JOINED_ELEMENTS", 1 << 20 if fused == "A and B" else 0)
    module = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(SLOTS, 1, RANK, WIDTH) for _ in range(matrices)),
        lora_b_stacked=tuple(torch.zeros(SLOTS, 1, size, RANK) for size in SIZES[:matrices]),
    )
    if fused:
        join([module, SimpleNamespace()])
        if matrices > 1:
            assert joined(module.lora_a_stacked) is joined(module.lora_a_stacked)  # no copy
            assert (joined_b(module.lora_b_stacked) is not None) == (fused == "A and B")
    a, b = module.lora_a_stacked, module.lora_b_stacked
    for i in range(matrices):
        a[i][:, 0, :used].copy_(random(1 + i, used or RANK, WIDTH)[:1] if one_a else random(SLOTS, used or RANK, WIDTH))
        b[i][:, 0, :, :used].copy_(random(SLOTS, SIZES[i], used or RANK))
    wrapper = SegmentedLora(64, 16, torch.device("cpu"))
    wrapper.used_rank, wrapper.one_a = used, one_a
    wrapper.map_tokens(((-1, 0, 2), *segments), 100)
    x, y = random(11, WIDTH), random(11, sum(SIZES[:matrices]))
    found = y.clone()
    wrapper.add_lora_linear(found, x, a, b, 0.5, SIZES[:matrices])
    torch.testing.assert_close(found.double(), expected(y, x, a, b, segments, 0.5), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:2], y[:2])
    for part in a:
        part.mul_(-2.0)  # what is written later is seen
    again = y.clone()
    wrapper.add_lora_linear(again, x, a, b, 0.5, SIZES[:matrices])
    torch.testing.assert_close(again.double(), expected(y, x, a, b, segments, 0.5), atol=1e-4, rtol=1e-5)
    for part in b:
        part.zero_()
    found = y.clone()
    wrapper.add_lora_linear(found, x, a, b, 0.5, SIZES[:matrices])
    assert torch.equal(found, y)


def test_without_any_adapter_nothing_is_touched():
    wrapper = SegmentedLora(64, 16, torch.device("cpu"))
    wrapper.map_tokens(((-1, 0, 11),), 100)
    y = random(11, 16)
    found = y.clone()
    wrapper.add_lora_linear(found, random(11, WIDTH), (), (), 1.0, ())
    assert torch.equal(found, y)


class UnquantizedLinearMethod:
    """As vLLM's, by name."""


class RowParallelLinear:
    """A base layer of vLLM's, as far as `shorten` looks at it."""

    tp_size, skip_bias_add, return_bias = 1, False, True

    def __init__(self, **other) -> None:
        self.weight, self.bias, self.quant_method = random(16, WIDTH), random(16), UnquantizedLinearMethod()
        self.cpu_linear = torch.nn.functional.linear
        vars(self).update(other)


class GateLinear(RowParallelLinear):
    """One that does more than its base."""


def lora_layer(base: RowParallelLinear) -> SimpleNamespace:
    wrapper = SegmentedLora(64, 16, torch.device("cpu"))
    wrapper.map_tokens(EQUAL, 100)
    parts = {"lora_a_stacked": (random(SLOTS, 1, RANK, WIDTH),), "lora_b_stacked": (random(SLOTS, 1, 16, RANK),)}
    whole = {"forward": lambda x: "vLLM's own", "output_slices": (16,), "punica_wrapper": wrapper}
    return SimpleNamespace(base_layer=base, **parts, **whole)


def test_a_plain_layer_calls_its_product_and_its_adapters_directly():
    layer = lora_layer(RowParallelLinear())
    shorten(layer)
    x = random(11, WIDTH)
    y, bias = layer.forward(x)
    bare = x @ layer.base_layer.weight.t() + layer.base_layer.bias
    by_hand = expected(bare, x, layer.lora_a_stacked, layer.lora_b_stacked, EQUAL, 1.0)
    torch.testing.assert_close(y.double(), by_hand, atol=1e-4, rtol=1e-5)
    assert bias is None and not torch.allclose(y, bare) and layer.forward(x[None]) == "vLLM's own"


@pytest.mark.parametrize(
    "base",
    [
        *(RowParallelLinear(tp_size=2), RowParallelLinear(skip_bias_add=True), RowParallelLinear(return_bias=False)),
        *(RowParallelLinear(quant_method=object()), RowParallelLinear(cpu_linear=None), GateLinear(), None),
    ],
)
def test_a_layer_that_does_more_is_left_alone(base):
    layer = lora_layer(base)
    shorten(layer)
    assert layer.forward(random(11, WIDTH)) == "vLLM's own"
