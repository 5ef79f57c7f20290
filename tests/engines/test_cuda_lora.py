"""What runs on CUDA and can be checked without: dense LoRA products, vLLM's tables, padded forwards in vLLM itself."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from tiny import tiny_work
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.lora.punica_wrapper import punica_gpu
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from zoray.engines.hf import Hf
from zoray.engines.layers.lora_cpu import SegmentedLora
from zoray.engines.layers.lora_cuda import (
    CudaLora,
    DenseCudaLora,
    DenseLayer,
    Mask,
    fill_tables,
    forget_addresses,
    prepare,
)
from zoray.engines.layers.vllm_layers import join_a, join_b
from zoray.engines.packing import slots_of_tokens
from zoray.engines.slots import KERNELS
from zoray.engines.vllm import worker as vllm_worker
from zoray.engines.vllm.engine import Vllm
from zoray.engines.vllm.graphs import Graphs, compilation, sizes
from zoray.methods.spaces import Lora, Lozo
from zoray.models.folder import linear_matrices
from zoray.records import Commit, ConfigError

SLOTS, RANK, WIDTH = 3, 2, 16


def layer(outs: tuple[int, ...], seed: int = 0) -> Any:
    """A LoRA layer of some fused matrices, its slots as vLLM allocates them."""
    shape = (SLOTS, 1)
    a = tuple(torch.zeros(*shape, RANK, WIDTH) for _ in outs)
    b = tuple(torch.zeros(*shape, out, RANK) for out in outs)
    return SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b, outs=outs, seed=seed)


def filled(module: Any) -> Any:
    random = torch.Generator().manual_seed(module.seed)
    for part in (*module.lora_a_stacked, *module.lora_b_stacked):
        part.copy_(torch.randn(part.shape, generator=random))
    return module


@pytest.mark.parametrize("outs", [(24,), (24, 8, 8), (32, 32)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("add_inputs", [True, False])
def test_dense_products_are_those_of_each_token_with_its_own_adapter(outs, scale, add_inputs):
    module, mask = layer(outs), Mask(64, SLOTS, torch.float32, torch.device("cpu"))
    dense = DenseLayer(mask.values, join_a(module), join_b(module))
    filled(module)
    of_token = np.array([-1, 0, 0, 2, 2, 2, 1, -1, 0, -1])
    mask.set(np.full(64, 1))  # what an earlier batch has left
    mask.set(of_token)
    x, y = given(10, outs)
    found = y.clone()
    dense.add_lora_linear(found, x, None, None, scale, outs, add_inputs=add_inputs)
    for t, slot in enumerate(of_token):
        pairs = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
        parts = [scale * (b[slot, 0] @ (a[slot, 0] @ x[t])) for a, b in pairs]
        expected = (y[t] if add_inputs else 0 * y[t]) + (torch.cat(parts) if slot >= 0 else 0)
        assert torch.allclose(found[t], expected, atol=1e-5)
        if slot < 0 and add_inputs:
            assert torch.equal(found[t], y[t])


def given(tokens: int, outs: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(tokens, WIDTH, generator=random), torch.randn(tokens, sum(outs), generator=random)


def test_dense_products_can_be_compiled_as_vllm_compiles():
    """In one graph, without guards, traced at the largest number of tokens; then fewer, other slots, other adapters."""
    outs, most = (24, 8, 8), 64
    module, mask = layer(outs), Mask(most, SLOTS, torch.float32, torch.device("cpu"))
    dense, weight = DenseLayer(mask.values, join_a(module), join_b(module)), torch.randn(sum(outs), WIDTH)
    filled(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight.t()
        dense.add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, outs)
        return y

    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, options=options)
    for tokens, slot in ((most, 0), (10, 2), (33, 1), (most, -1)):
        x, _ = given(tokens, outs)
        mask.set(np.array([slot] * (tokens - 3) + [-1, 0, 2]))
        module.lora_b_stacked[1].mul_(-1.5)
        if tokens == most and slot == 0:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            assert torch.allclose(compiled(x), forward(x), atol=1e-4)


def test_slots_laid_out_for_one_product_stay_what_they_are_for_whoever_writes_them():
    module = layer((24, 8, 8))
    a, b = join_a(module), join_b(module)
    filled(module)
    assert [tuple(part.shape) for part in module.lora_a_stacked] == [(SLOTS, 1, RANK, WIDTH)] * 3
    assert [tuple(part.shape) for part in module.lora_b_stacked] == [(SLOTS, 1, out, RANK) for out in (24, 8, 8)]
    assert a.is_contiguous() and tuple(a.shape) == (SLOTS, 3 * RANK, WIDTH)
    assert b.is_contiguous() and tuple(b.shape) == (SLOTS, 3 * RANK, 40)
    assert int((b != 0).sum()) == SLOTS * RANK * 40  # blocks, and zeros beside them
    assert torch.equal(b[1, 2:4, 24:32], module.lora_b_stacked[1][1, 0].t())


def part_of_vllm(name: str) -> Any:
    """A file of vLLM's package of Triton kernels, alone: the package imports all of them, which a CPU can't."""
    path = Path(vllm.__file__).parent / f"lora/ops/triton_ops/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernel_meta() -> Any:
    """vLLM's own LoRAKernelMeta."""
    return part_of_vllm("lora_kernel_metadata").LoRAKernelMeta


def test_pointers_that_vllm_has_kept_of_earlier_slots_are_dropped_and_no_others(monkeypatch):
    """Slots of another rank at the address of an engine's that is gone would be read with its strides."""
    kernels = part_of_vllm("utils")
    monkeypatch.setitem(sys.modules, "vllm.lora.ops.triton_ops.utils", kernels)
    # its helper needs a GPU's pinned memory
    monkeypatch.setattr(kernels, "async_tensor_h2d", lambda values, dtype, device: torch.tensor(values, dtype=dtype))
    gone, alive, new = (layer((24, 24), seed) for seed in range(3))
    memory = [torch.zeros(2 * part.numel()) for part in (*gone.lora_a_stacked, *gone.lora_b_stacked)]
    for module, rank in ((gone, RANK), (new, 2 * RANK)):
        a, b = memory[:2], memory[2:]
        module.lora_a_stacked = tuple(part[: SLOTS * rank * WIDTH].view(SLOTS, 1, rank, WIDTH) for part in a)
        module.lora_b_stacked = tuple(part[: SLOTS * 24 * rank].view(SLOTS, 1, 24, rank) for part in b)

    def strides(module: Any) -> tuple[int, int]:
        a = kernels._get_lora_a_ptr(list(module.lora_a_stacked), "cpu")
        return a[1], kernels._get_lora_b_ptr(list(module.lora_b_stacked), 0, "cpu")[2]

    before, others = strides(gone), strides(alive)
    assert strides(new) == before != (2 * before[0], 2 * before[1])  # what goes wrong
    kept = [dict(table) for table in (kernels._LORA_A_PTR_DICT, kernels._LORA_B_PTR_DICT)]
    forget_addresses([new])
    for table, earlier in zip((kernels._LORA_A_PTR_DICT, kernels._LORA_B_PTR_DICT), kept, strict=True):
        assert len(table) == 1 and all(value is earlier[key] for key, value in table.items())
    assert strides(new) == (2 * before[0], 2 * before[1]) and strides(alive) == others


@pytest.mark.parametrize(
    "of_token",
    [
        pytest.param([0, 0, 1, 1, 1, 3], id="ordered"),
        pytest.param([-1, -1, 0, 2, 2, -1, -1], id="bare and padded"),
        pytest.param([2, 0, 1, 2, 0, -1, 1], id="mixed"),
        pytest.param([3], id="one"),
        pytest.param([-1, -1, -1], id="none"),
    ],
)
@pytest.mark.parametrize("captured", [None, [1, 2, 4, 5]], ids=str)
def test_tables_are_those_that_vllm_makes(of_token, captured):
    found, expected = (kernel_meta().make(4, 16, "cpu", captured) for _ in range(2))
    for meta in (found, expected):
        for name in ("token_lora_mapping", "token_indices_sorted_by_lora_ids"):
            getattr(meta, name).fill_(7)
        meta.num_tokens_per_lora.fill_(9)  # of an earlier batch
    expected.prepare_tensors(torch.tensor(of_token, dtype=torch.long))
    fill_tables(found, np.array(of_token, np.int32))
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name
            assert getattr(found, name).dtype == value.dtype


class Manager:
    """A LoRA manager of vLLM's, as far as `prepare` looks at it."""

    max_num_batched_tokens, max_num_seqs, device = 64, 8, torch.device("cpu")

    def __init__(self, special: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        self.lora_config = SimpleNamespace(
            max_loras=SLOTS, max_lora_rank=RANK, lora_dtype=dtype, specialize_active_lora=False
        )
        self.punica_wrapper_mapping = {"language_model": None, "again": None}
        self.modules = {"q": layer((24,)), "qkv": layer((24, 8, 8))}
        if special:
            self.modules["embed"] = layer((24,))
            self.modules["embed"].lora_a_stacked_2d = None
        for module in self.modules.values():
            module.set_mapping = partial(setattr, module, "wrapper")


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_layers_get_dense_products_or_kernels_with_filled_tables(dense, special, monkeypatch):
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", kernel_meta(), raising=False)
    manager = Manager(special)
    prepare(manager, dense)
    wrapper: Any = manager.punica_wrapper_mapping["again"]
    assert type(wrapper) is (DenseCudaLora if dense else CudaLora) and wrapper.linear_only is not special
    for name, module in manager.modules.items():
        assert type(module.wrapper) is (DenseLayer if dense and name != "embed" else type(wrapper))
    segments = ((0, 0, 3), (1, 3, 5))
    wrapper.map_tokens(segments, 100, [0, 1], 8)  # three tokens of padding
    expected = [0, 0, 0, 1, 1, -1, -1, -1]
    if dense:
        assert manager.modules["q"].wrapper.mask is wrapper.mask.values
        assert wrapper.mask.values[:8].argmax(1).tolist() == [max(slot, 0) for slot in expected]
        assert wrapper.mask.values[:8].sum(1).tolist() == [1] * 5 + [0] * 3
    if special or not dense:
        assert wrapper.token_mapping_meta.token_lora_mapping[:8].tolist() == expected
    if special:
        assert wrapper.sampler_indices.tolist() == [0, 1]


@pytest.mark.parametrize(("dense", "special"), [(False, False), (True, True)])
def test_float32_is_refused_where_kernels_are_needed_that_have_none(dense, special):
    with pytest.raises(ConfigError, match=r"model.dtype=bfloat16 or float16 .* no float32"):
        prepare(Manager(special, torch.float32), dense)


def test_which_kernels_is_settled_before_vllm_looks_for_a_compiled_model():
    kinds = {
        settings: Vllm(slots=settings[0], lora_kernels=settings[2])._compiled_for(settings[1])[KERNELS]
        for settings in [(16, 8, "auto"), (16, 16, "auto"), (16, 16, "dense"), (2, 1, "punica")]
    }
    assert list(kinds.values()) == ["dense", "punica", "dense", "punica"]


def test_sizes_of_graphs():
    for most in (64, 100, 870, 4096, 16384):
        found = sizes(most)
        assert found == sorted(set(found)) and found[-1] == most and found[0] == min(64, most)
        assert all(b <= a * 1.126 for a, b in pairwise(found))


def graphs(slots: int = SLOTS, largest: int = 512) -> Graphs:
    """Over vLLM's own dispatcher, with the keys that it would have captured; without adapters where no slots are."""
    settings = compilation(largest)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode[settings["cudagraph_mode"]],
            cudagraph_capture_sizes=settings["cudagraph_capture_sizes"],
            cudagraph_specialize_lora=settings["cudagraph_specialize_lora"],
            max_cudagraph_capture_size=largest,
            compile_sizes=[],
            is_attention_compiled_piecewise=lambda: True,
        ),
        lora_config=SimpleNamespace(max_loras=slots, specialize_active_lora=False) if slots else None,
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        num_speculative_tokens=0,
    )
    dispatcher = CudagraphDispatcher(config)  # type: ignore[arg-type]
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.PIECEWISE)
    return Graphs(SimpleNamespace(cudagraph_dispatcher=dispatcher), slots)


@pytest.mark.parametrize("slots", [SLOTS, 0])
def test_every_forward_finds_a_captured_graph_or_none(slots):
    found = graphs(slots)
    captured = found.runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.PIECEWISE]
    for tokens in (1, 63, 64, 65, 72, 73, 200, 511, 512):
        mode, descriptor = found.choose(tokens)
        assert mode == CUDAGraphMode.PIECEWISE and descriptor in captured
        assert tokens <= descriptor.num_tokens <= max(64, tokens * 1.126)
        assert descriptor.has_lora == (slots > 0) and descriptor.num_active_loras == (slots + 1 if slots else 0)
    assert found.choose(513) == (CUDAGraphMode.NONE, BatchDescriptor(513))
    found.plain = True
    assert found.choose(65) == (CUDAGraphMode.NONE, BatchDescriptor(65))


class PaddingDispatcher:
    """Pads as graphs would, and asks for none, so that a CPU can run the forward."""

    def dispatch(self, tokens: int, **_: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        return CUDAGraphMode.NONE, BatchDescriptor(-(-tokens // 32) * 32)


class DenseCpuLora(SegmentedLora):
    """The mask of dense products, set by vLLM's CPU worker."""

    mask: Mask

    def map_tokens(self, segments: Any, vocabulary: int, row_slots: Any = (), padded: int | None = None) -> None:
        self.mask.set(slots_of_tokens(segments, padded or segments[-1][2]))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """vLLM on the CPU with the products and the padding of the CUDA path."""

    def wrapper(scorer: Any) -> Any:
        made = DenseCpuLora(scorer.max_tokens, 64, scorer.device)
        made.mask = Mask(scorer.max_tokens, scorer.slots, torch.float32, scorer.device)
        scorer.runner.cudagraph_dispatcher = PaddingDispatcher()
        scorer.graphs = Graphs(scorer.runner, scorer.slots)
        scorer.runner.input_ids.gpu.fill_(3)
        for module in scorer.manager.modules.values():
            module.set_mapping(DenseLayer(made.mask.values, join_a(module), join_b(module)))
        return made

    monkeypatch.setattr(vllm_worker.PackedScorer, "_lora_wrapper", wrapper)
    monkeypatch.setattr(vllm_worker.cpu_lora, "join", lambda _: None)
    monkeypatch.setattr(vllm_worker.cpu_gated, "fuse", lambda *_: [])


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("space", [Lora(rank=2, alpha=4, train="AB"), Lozo(rank=2)], ids=lambda s: type(s).__name__)
def test_the_cuda_path_scores_as_the_reference(space, architecture, tiny_models, as_on_cuda):
    folder = tiny_models[architecture]
    matrices = linear_matrices(folder, "all-linear")
    engine = Vllm(slots=3, max_tokens=256, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    assert engine.self_test["compiled_error"] < 1e-4  # padded against not padded, before the first step
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    for one in (engine, reference):
        one.apply([Commit(0, (0.03, -0.02))])
    found, expected = (np.concatenate(one.score(tiny_work(1))) for one in (engine, reference))
    assert np.abs(found - expected).max() < 1e-4


def test_padding_that_does_harm_is_found_and_left_out(tiny_models, as_on_cuda, monkeypatch, caplog):
    original = Graphs.inputs

    def wrong(self: Graphs, tokens: np.ndarray, positions: np.ndarray, padded: int) -> Any:
        return original(self, tokens + (padded > len(tokens)), positions, padded)

    monkeypatch.setattr(Graphs, "inputs", wrong)
    folder, space = tiny_models["llama"], Lora(rank=2, alpha=4)
    matrices = linear_matrices(folder, "all-linear")
    engine = Vllm(slots=3, max_tokens=256, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    assert "compiled_error" not in engine.self_test and "CUDA graphs stay unused" in caplog.text
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    found, expected = (np.concatenate(one.score(tiny_work(0))) for one in (engine, reference))
    assert np.abs(found - expected).max() < 1e-4
