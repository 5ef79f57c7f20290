"""LoRA on CUDA: few dense products over all slots where these are narrow, else vLLM's kernels, without waits.

x A^T is taken for the A of all slots at once, what belongs to other slots than a token's own is set to zero, and one
product with the B of all slots adds the rest: two GEMMs and a multiplication a layer, whatever the slots' tokens, with
shapes that a CUDA graph can hold. Their cost grows with slots * rank, and beyond DENSE_COLUMNS vLLM's Punica kernels
stay. These read which token has which slot from tensors that vLLM fills by sorting on the device and waiting for the
result; here the host, which has the order already, fills them. Written against vLLM 0.26 and 0.32; it has not run on a
card yet: the products are tested on the CPU, inside vLLM, and the tables against vLLM's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from zoray.engines.cpu_lora import join_a, joined
from zoray.engines.slots import DENSE_COLUMNS
from zoray.engines.vllm_layers import gives_logits, takes_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Dense:
    """For a wrapper of vLLM's: the products of linear layers as GEMMs over all slots. A mixin, to go first."""

    mask: torch.Tensor  # (tokens, slots): 1 where a token belongs to a slot
    slot_numbers: torch.Tensor  # (slots,)

    def open_mask(self, tokens: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the mask, once: a captured graph reads it where it is."""
        self.mask = torch.zeros(tokens, slots, dtype=dtype, device=device)
        self.slot_numbers = torch.arange(slots, dtype=torch.int32, device=device)

    def map_mask(self, of_token: np.ndarray) -> None:
        """The slot of each token, -1 for none."""
        slots = torch.from_numpy(of_token.astype(np.int32)).to(self.mask.device, non_blocking=True)
        self.mask[: len(of_token)].copy_(slots[:, None] == self.slot_numbers)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[t] += scale * x[t] A^T B^T for the adapter of each token t, in place; y (T, out), x (T, in)."""
        a, b = joined(lora_a_stacked), side_by_side(lora_b_stacked)  # (slots, columns, in), (slots, columns, out)
        slots, columns, _ = a.shape
        low = x @ a.flatten(0, 1).t()
        own = self.mask[: x.shape[0], :, None] * scale
        low = (low.view(-1, slots, columns) * own).flatten(1)
        if add_inputs:
            y.addmm_(low, b.flatten(0, 1))
        else:
            torch.mm(low, b.flatten(0, 1), out=y)


class CudaLora(PunicaWrapperGPU):  # type: ignore[misc]  # final to its authors' type checker only
    """vLLM's own kernels, with their tables filled by the host."""

    linear_only = True  # no adapter of an embedding or a head

    def map_tokens(
        self, segments: Sequence[tuple[int, int, int]], vocabulary: int, row_slots: Sequence[int], padded: int
    ) -> None:
        """Which of `padded` tokens belong to which slot, and the slots of the rows that reach the LM head."""
        of_token = slots_of_tokens(segments, padded)
        if not self.linear_only:
            self._map_as_vllm(of_token, row_slots or [slot for slot, _, _ in segments], vocabulary)
        else:
            fill_tables(self.token_mapping_meta, of_token)

    def _map_as_vllm(self, of_token: np.ndarray, of_row: Sequence[int], vocabulary: int) -> None:
        """By vLLM's own way, for layers that read more than the two tables; it waits for the device."""
        tokens, rows = tuple((of_token + 1).tolist()), tuple(slot + 1 for slot in of_row)  # 0 means no adapter
        mapping = LoRAMapping(tokens, rows, is_prefill=True)
        self.update_metadata(mapping, list(range(1, self.max_loras + 1)), self.max_loras + 1, vocabulary)


class DenseCudaLora(Dense, CudaLora):
    """Dense products for linear layers, vLLM's kernels for an embedding and a head."""

    def map_tokens(
        self, segments: Sequence[tuple[int, int, int]], vocabulary: int, row_slots: Sequence[int], padded: int
    ) -> None:
        """See CudaLora.map_tokens."""
        of_token = slots_of_tokens(segments, padded)
        self.map_mask(of_token)
        if not self.linear_only:
            self._map_as_vllm(of_token, row_slots or [slot for slot, _, _ in segments], vocabulary)

    def update_metadata(self, mapping: LoRAMapping, lora_index_to_id: Any, *rest: Any, **kwargs: Any) -> None:
        """vLLM's request path, and its warm-up before a graph is captured."""
        super().update_metadata(mapping, lora_index_to_id, *rest, **kwargs)
        self.map_mask(self.token_lora_indices.cpu().numpy())


def slots_of_tokens(segments: Sequence[tuple[int, int, int]], padded: int) -> np.ndarray:
    """The slot of each token, (padded,) int32; -1 for those of no adapter and for the padding."""
    of_token = np.full(padded, -1, np.int32)
    for slot, start, stop in segments:
        of_token[start:stop] = slot
    return of_token


def fill_tables(meta: Any, of_token: np.ndarray) -> None:
    """What LoRAKernelMeta.prepare_tensors makes of the slot of each token (T,), without asking the device anything."""
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


def lay_side_by_side(modules: Iterable[Any]) -> None:
    """Let the B of matrices that a layer has fused be blocks of one (slots, columns, out), with zeros beside them.

    So one product serves all of a layer's matrices. Before any graph is captured: B moves.
    """
    for module in modules:
        stacked = module.lora_b_stacked
        slots, _, _, rank = stacked[0].shape
        sizes = [b.shape[2] for b in stacked]
        whole = stacked[0].new_zeros(slots, len(stacked) * rank, sum(sizes))
        parts = zip(whole.split(rank, dim=1), range(len(sizes)), strict=True)
        blocks = [part.split(sizes, dim=2)[i] for part, i in parts]  # (slots, rank, out of the matrix)
        module.lora_b_stacked = tuple(block.transpose(1, 2).unsqueeze(1) for block in blocks)


def side_by_side(stacked: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All B of a layer that `lay_side_by_side` has seen, (slots, columns, out)."""
    whole = stacked[0]._base
    assert whole is not None and whole.ndim == 3, "the layer's B have not been laid side by side"
    return whole


@lru_cache(maxsize=1)
def register() -> None:
    """Let LoRA managers that are made from now on in this process use these wrappers; once is enough.

    That is before vLLM compiles the model and captures graphs. Which kernels is for the engine's config to say.
    """
    original = LoRAModelManager._create_lora_modules

    def create(manager: Any) -> None:
        original(manager)
        config: Any = get_current_vllm_config().additional_config
        prepare(manager, config["zoray_lora_kernels"])

    LoRAModelManager._create_lora_modules = create  # type: ignore[method-assign]


def prepare(manager: Any, kernels: str) -> None:
    """Give a manager and its layers a wrapper of this file. `kernels`: auto, dense or punica."""
    modules = list(manager.modules.values())
    special = [module for module in modules if takes_tokens(module) or gives_logits(module)]
    linear = [module for module in modules if module not in special]
    config = manager.lora_config
    narrow = config.max_loras * config.max_lora_rank <= DENSE_COLUMNS
    dense = bool(linear) and (kernels == "dense" or (kernels == "auto" and narrow))
    if dense:
        join_a(linear)
        lay_side_by_side(linear)
    kind = DenseCudaLora if dense else CudaLora
    wrapper = kind(manager.max_num_batched_tokens, manager.max_num_seqs, manager.device, lora_config=config)
    wrapper.linear_only = not special
    if isinstance(wrapper, DenseCudaLora):
        wrapper.open_mask(manager.max_num_batched_tokens, config.max_loras, config.lora_dtype, manager.device)
    for key in manager.punica_wrapper_mapping:
        manager.punica_wrapper_mapping[key] = wrapper
    for module in modules:
        module.set_mapping(wrapper)
