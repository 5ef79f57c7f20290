"""LoRA on CUDA: a few dense products over all slots if these are narrow, else vLLM's kernels.

x A^T is computed for the A of all slots at once, the columns of slots other than a token's own are set to zero, and one
product with the B of all slots adds the rest: two GEMMs and a multiplication a layer, however tokens are divided among
slots, with shapes that a CUDA graph can hold. The cost grows with slots * rank, and beyond DENSE_COLUMNS vLLM's Punica
kernels stay. They read each token's slot from tensors that vLLM fills by sorting on the device and waiting for the
result; here the host, which already has the order, fills them. Written against vLLM 0.26 and 0.32, and not yet run on a
GPU: the products are tested on the CPU, inside vLLM, and the tables against vLLM's own.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from zoray.engines.feedback.kept import Keeping, StaticRows, keep_stream, most_rows
from zoray.engines.feedback.residual import family_of, norm_behind
from zoray.engines.layers.vllm_layers import gives_logits, join_a, join_b, names_in, slots_of, takes_tokens
from zoray.engines.packing import slots_of_tokens
from zoray.engines.slots import DENSE_COLUMNS, FEEDBACK, KERNELS
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


class DenseLayer:
    """Replaces a linear layer's wrapper: the layer's own products, as GEMMs over all slots.

    It holds the whole tensors, since a compiled model can't reach them through the views in vLLM's layers.

    Args:
        mask: (tokens + 1, slots), 1 where a token belongs to a slot.
        a: (slots, columns, in), the A of the layer's fused matrices, one below the other.
        b: (slots, columns, out), their B^T.
    """

    def __init__(self, mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        self.mask, self.a, self.b = mask, a.flatten(0, 1), b.flatten(0, 1)
        self.slots, self.columns = a.shape[:2]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        *,
        buffer: Any = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[t] += scale * x[t] A^T B^T for the adapter of each token t, in place; y (T, out), x (T, in)."""
        low = (x @ self.a.t()).view(x.shape[0], self.slots, self.columns)
        low = (low * self.mask[: x.shape[0], :, None]).flatten(1)
        if add_inputs:
            y.addmm_(low, self.b, alpha=scale)
        else:
            y.copy_(low @ self.b * scale)


class Mask:
    """Which token belongs to which slot; allocated once, since a captured graph keeps its address."""

    def __init__(self, tokens: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        # a row more than a forward can have: a trace must not mistake the number of rows for that of tokens
        self.values = torch.zeros(tokens + 1, slots, dtype=dtype, device=device)
        self._numbers = torch.arange(slots, dtype=torch.int32, device=device)

    def set(self, of_token: np.ndarray) -> None:
        """Set the slot of each token, -1 for none."""
        slots = torch.from_numpy(of_token.astype(np.int32)).to(self.values.device, non_blocking=True)
        self.values[: len(of_token)].copy_(slots[:, None] == self._numbers)


class CudaLora(PunicaWrapperGPU):  # type: ignore[misc]  # final only for vLLM's own type checker
    """vLLM's own kernels, with their tables filled by the host."""

    linear_only = True  # no adapter of an embedding or a head
    kept: StaticRows | None = None  # for feedback's rows, in an engine started for feedback

    def map_tokens(
        self, segments: Sequence[tuple[int, int, int]], vocabulary: int, row_slots: Sequence[int], padded: int
    ) -> None:
        """Set the slots of `padded` tokens, and the slots of the rows that reach the LM head."""
        of_token = slots_of_tokens(segments, padded)
        if self.linear_only:
            self.map_linear(of_token)
        else:
            self._map_as_vllm(of_token, row_slots or [slot for slot, _, _ in segments], vocabulary)

    def map_linear(self, of_token: np.ndarray) -> None:
        """Set the slot of each token (T,) for linear layers."""
        fill_tables(self.token_mapping_meta, of_token)

    def _map_as_vllm(self, of_token: np.ndarray, of_row: Sequence[int], vocabulary: int) -> None:
        """Map in vLLM's own way, for layers that read more than the two tables; it waits for the device."""
        tokens, rows = tuple((of_token + 1).tolist()), tuple(slot + 1 for slot in of_row)  # 0 means no adapter
        mapping = LoRAMapping(tokens, rows, is_prefill=True)
        self.update_metadata(mapping, list(range(1, self.max_loras + 1)), self.max_loras + 1, vocabulary)


class DenseCudaLora(CudaLora):
    """The same with dense products in linear layers; only an embedding and a head use vLLM's kernels."""

    mask: Mask

    def map_linear(self, of_token: np.ndarray) -> None:
        """See CudaLora.map_linear."""
        self.mask.set(of_token)

    def update_metadata(self, mapping: LoRAMapping, lora_index_to_id: Any, *rest: Any, **kwargs: Any) -> None:
        """vLLM's request path, and its warm-up before a graph is captured."""
        super().update_metadata(mapping, lora_index_to_id, *rest, **kwargs)
        self.mask.set(self.token_lora_indices.cpu().numpy())


def fill_tables(meta: Any, of_token: np.ndarray) -> None:
    """Fill the tables of LoRAKernelMeta.prepare_tensors from the slot of each token (T,), without the device."""
    numbers, counts = np.unique(of_token, return_counts=True)
    none = bool(numbers[-1] < 0)
    size = len(meta.active_lora_ids)
    active, each, starts = np.full(size, -1), np.zeros(size), np.zeros(size + 1)
    if not none:
        active[: len(numbers)], each[: len(numbers)] = numbers, counts
        starts[1 : len(numbers) + 1] = np.cumsum(counts)
        order = np.argsort(of_token, kind="stable")
        _copy(meta.token_lora_mapping[: len(of_token)], of_token)
        _copy(meta.token_indices_sorted_by_lora_ids[: len(of_token)], order)
    _copy(meta.active_lora_ids, active)
    _copy(meta.num_tokens_per_lora, each)
    _copy(meta.lora_token_start_loc, starts)
    captured = [count for count in meta.captured_lora_counts if count >= len(numbers)]
    meta.no_lora_flag_cpu[0] = none
    meta.num_active_loras_cpu[0] = 0 if none else min(captured, default=len(numbers))


def _copy(there: torch.Tensor, values: np.ndarray) -> None:
    there.copy_(torch.from_numpy(values.astype(np.int32)), non_blocking=True)


@lru_cache(maxsize=1)
def register() -> None:
    """Let LoRA managers made from now on in this process use these wrappers; once is enough.

    Call it before vLLM compiles the model and captures graphs. The engine's config chooses the kernels; a model loaded
    by other code stays unchanged.
    """
    original = LoRAModelManager._create_lora_modules

    def create(manager: Any) -> None:
        original(manager)
        config = get_current_vllm_config()
        more: Any = config.additional_config
        if isinstance(more, dict) and KERNELS in more:
            prepare(manager, dense=more[KERNELS] == "dense")
            if more.get(FEEDBACK):
                keep_rows(manager, more[FEEDBACK], config.model_config.model, config.model_config.dtype)

    LoRAModelManager._create_lora_modules = create  # type: ignore[method-assign]


def prepare(manager: Any, dense: bool) -> None:
    """Install this file's wrappers and layers in a LoRA manager.

    Raises:
        ConfigError: vLLM's kernels are needed, and have no float32.
    """
    modules, config = list(manager.modules.values()), manager.lora_config
    linear = [module for module in modules if is_linear(module)]
    if config.lora_dtype == torch.float32 and not (dense and len(linear) == len(modules)):
        raise ConfigError(
            "expected model.dtype=bfloat16 or float16 where vLLM's LoRA kernels are needed, which have no float32: for "
            f"adapters of an embedding or the LM head, and for more than {DENSE_COLUMNS} columns (engine.slots * rank)"
        )
    kind = DenseCudaLora if dense else CudaLora
    wrapper = kind(manager.max_num_batched_tokens, manager.max_num_seqs, manager.device, lora_config=config)
    wrapper.linear_only = len(linear) == len(modules)
    for key in manager.punica_wrapper_mapping:
        manager.punica_wrapper_mapping[key] = wrapper
    for module in modules:
        module.set_mapping(wrapper)
    forget_addresses(modules)
    if isinstance(wrapper, DenseCudaLora):
        wrapper.mask = Mask(manager.max_num_batched_tokens, config.max_loras, config.lora_dtype, manager.device)
        for module in linear:
            module.set_mapping(DenseLayer(wrapper.mask.values, join_a(module), join_b(module)))


def keep_rows(manager: Any, names: Sequence[str], folder: str, dtype: torch.dtype) -> StaticRows:
    """Let the layers of these matrices, and the final norm, keep rows for feedback; other layers stay unchanged.

    Call it after `prepare` and before the model is compiled. `dtype`: of the model in `folder`.
    """
    family, wanted, widths, layers = family_of(folder, names), set(names), dict[str, tuple[int, int]](), {}
    for module_name, module in manager.modules.items():
        for name in wanted.intersection(names_in(manager, module_name)):
            ((a, b),) = slots_of(module)
            widths[name] = (a.shape[3], b.shape[2] if norm_behind(family, name) else 0)
            layers[name] = module
    norm = manager.model.get_submodule(family.norm)
    hidden = len(norm.weight)
    most = min(most_rows(manager.model, widths, hidden, dtype), manager.max_num_batched_tokens)
    rows = StaticRows(widths, hidden, most, dtype, manager.device)
    for name, module in layers.items():
        module.set_mapping(Keeping(module.punica_wrapper, rows, name))
    keep_stream(norm, rows)
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.kept = rows
    return rows


def forget_addresses(modules: Sequence[Any]) -> None:
    """Drop what vLLM's kernels have cached for earlier slots at the addresses of these modules' slots.

    The kernels cache strides and sizes by address for the life of a process, in which one engine may follow another.
    Entries for other addresses stay: another engine's captured graphs read them.
    """
    kernels = sys.modules.get("vllm.lora.ops.triton_ops.utils")  # imported if there are kernels
    if kernels is None:
        return
    here = {tensor.data_ptr() for module in modules for pair in slots_of(module) for tensor in pair}
    for table in (kernels._LORA_A_PTR_DICT, kernels._LORA_B_PTR_DICT):
        for addresses in [key for key in table if here.intersection(key)]:
            del table[addresses]


def is_linear(module: Any) -> bool:
    """Whether a LoRA module is a plain linear layer, fused or not."""
    special = takes_tokens(module) or gives_logits(module)
    return not special and isinstance(module.lora_a_stacked, tuple) and isinstance(module.lora_b_stacked, tuple)
