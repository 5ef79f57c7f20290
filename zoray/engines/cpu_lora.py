"""LoRA on the CPU as two small GEMMs a segment, instead of vLLM's gather of a whole adapter per token.

The stock CPU wrapper indexes `lora_a_weights[lora_indices]`, which copies a full A and B for every token. Tokens of one
adapter always stand together (the packed scorer orders them by slot; the scheduler keeps a request's tokens together),
so runs of equal adapters can share a GEMM. Guarantees: an adapter whose B is zero leaves the output's bits untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class SegmentedLora(PunicaWrapperCPU):
    """Drop-in for the wrapper that all LoRA layers of a CPU worker share."""

    segments: tuple[tuple[int, int, int], ...] = ()  # (slot, first token, last token + 1)
    used_rank: int | None = None  # ranks above it are zero in every slot and are skipped

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """vLLM's request path: segments from the token -> adapter mapping of this batch."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots, counts = torch.unique_consecutive(self.token_lora_indices, return_counts=True)
        ends = counts.cumsum(0).tolist()
        self.segments = tuple(
            (slot, end - count, end)
            for slot, count, end in zip(slots.tolist(), counts.tolist(), ends, strict=True)
            if slot >= 0
        )

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y[t] += scale * x[t] A^T B^T for the adapter of each token t, in place; y (T, out), x (T, in)."""
        for slot, start, end in self.segments:
            inputs, offset = x[start:end], 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                low = inputs @ a[slot, 0, : self.used_rank].t()
                y[start:end, offset : offset + size].addmm_(low, b[slot, 0, :, : self.used_rank].t(), alpha=scale)
                offset += size
