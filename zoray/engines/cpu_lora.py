"""LoRA on the CPU as two small GEMMs a segment, instead of vLLM's gather of a whole adapter per token.

The stock CPU wrapper indexes `lora_a_weights[lora_indices]`, which copies a full A and B for every token. Tokens of one
adapter always stand together (the packed scorer orders them by slot; the scheduler keeps a request's tokens together),
so runs of equal adapters can share a GEMM. Guarantees: an adapter whose B is zero leaves the output's bits untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

if TYPE_CHECKING:
    from collections.abc import Sequence


class SegmentedLora(PunicaWrapperCPU):
    """Drop-in for the wrapper that all LoRA layers of a CPU worker share."""

    segments: tuple[tuple[int, int, int], ...] = ()  # (slot, first token, last token + 1)
    row_segments: tuple[tuple[int, int, int], ...] = ()  # the same for the rows that reach the LM head
    used_rank: int | None = None  # ranks above it are zero in every slot and are skipped

    def map_tokens(self, segments: tuple[tuple[int, int, int], ...], vocabulary: int) -> None:
        """Which tokens belong to which slot, -1 for none; an embedding looks A up at slot * vocabulary + token."""
        self.segments = tuple(segment for segment in segments if segment[0] >= 0)
        for slot, start, end in segments:
            self._embeddings_indices[start:end] = max(slot, 0) * vocabulary

    def map_rows(self, slots: Sequence[int]) -> None:
        """The slot of each row that reaches the LM head, -1 for none."""
        self.row_segments = _runs(torch.tensor(list(slots), dtype=torch.long))

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """vLLM's request path: segments from the token -> adapter mapping of this batch."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.segments = _runs(self.token_lora_indices)
        self.row_segments = _runs(self.sampler_indices)

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

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y[t] += x[t] B^T, in place; x (T, rank) are the rows of A that were looked up."""
        for slot, start, end in self.segments:
            b = lora_b_stacked[slot, 0, :, : self.used_rank]
            y[start:end].addmm_(x[start:end, : self.used_rank], b.t())

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[h] += scale * x[h] A^T B^T for each row h of the LM head, in place; y (H, vocabulary), x (H, hidden)."""
        for slot, start, end in self.row_segments:
            low = x[start:end] @ lora_a_stacked[slot, 0, : self.used_rank].t()
            b = lora_b_stacked[slot, 0, :, : self.used_rank]
            y[start:end, : b.shape[0]].addmm_(low.to(y.dtype), b.t().to(y.dtype), alpha=scale)


def _runs(slots: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """(slot, start, end) of each run of equal slots, without those of -1."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return tuple(
        (slot, end - count, end)
        for slot, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
        if slot >= 0
    )
