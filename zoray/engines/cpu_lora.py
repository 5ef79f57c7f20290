"""LoRA on the CPU as a few small GEMMs, instead of vLLM's gather of a whole adapter per token.

The stock CPU wrapper indexes `lora_a_weights[lora_indices]`, which copies a full A and B for every token. Tokens of one
adapter always stand together (the packed scorer orders them by slot; the scheduler keeps a request's tokens together),
so runs of equal adapters can share a GEMM; runs of equal length, as probes of one batch have, share a batched one. The
matrices that a layer has fused (q, k and v; gate and up) lie in one tensor, so that x A^T is a single GEMM for all of
them, and for all slots where these hold the same A. Guarantees: an adapter whose B is zero leaves the output's bits
untouched.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FUSED_ELEMENTS = 1 << 18  # of a layer's output from which on they are left to the activation
FUSED_RANK = 8  # the largest rank whose products with B an activation takes over


@dataclass(frozen=True)
class Held:
    """Products with B that wait for the activation: their layer's output, and x A^T and B^T of its two matrices."""

    output: int  # address of its data
    low: tuple[torch.Tensor, torch.Tensor]  # (S, L, rank)
    b: tuple[torch.Tensor, torch.Tensor]  # (S, rank, width)


class SegmentedLora(PunicaWrapperCPU):
    """Drop-in for the wrapper that all LoRA layers of a CPU worker share."""

    segments: tuple[tuple[int, int, int], ...] = ()  # (slot, first token, last token + 1)
    row_segments: tuple[tuple[int, int, int], ...] = ()  # the same for the rows that reach the LM head
    used_rank: int | None = None  # ranks above it are zero in every slot, and skipped in B
    embeds = True  # whether an embedding has adapters
    one_a = False  # whether all slots that tokens are mapped to hold the same A
    gated: frozenset[int] = frozenset()  # ids of the B whose products an activation adds (cpu_gated.py)
    _deferring = _however_small = False
    _held: Held | None = None
    _equal: tuple[int, int, int] | None = None  # (first slot, slots, tokens of each) where segments are alike

    def map_tokens(
        self,
        segments: Sequence[tuple[int, int, int]],
        vocabulary: int,
        row_slots: Sequence[int] = (),
        padded: int | None = None,
    ) -> None:
        """Which tokens belong to which slot, -1 for none, and the slots of the rows that reach the LM head.

        An embedding looks A up at slot * vocabulary + token. Padding, if any, belongs to no slot.
        """
        self._set(tuple(segment for segment in segments if segment[0] >= 0))
        if self.embeds:
            for slot, start, end in segments:
                self._embeddings_indices[start:end] = max(slot, 0) * vocabulary
        self.row_segments = _runs(torch.tensor(list(row_slots), dtype=torch.long)) if row_slots else ()

    @property
    def capacity(self) -> int:
        """How many tokens can be mapped."""
        return len(self._embeddings_indices)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """vLLM's request path: segments from the token -> adapter mapping of this batch."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.one_a = False
        self._set(_runs(self.token_lora_indices))
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
        if not self.segments:
            return
        begin, stop = self.segments[0][1], self.segments[-1][2]  # tokens of no adapter come before
        a, rank = joined(lora_a_stacked), lora_a_stacked[0].shape[2]
        used = rank if self.used_rank is None else self.used_rank
        low = self._lower(x, a, begin, stop)
        equal = self._equal
        waits = self._deferring and id(lora_b_stacked) in self.gated and scale == 1.0
        waits = waits and (y.numel() >= FUSED_ELEMENTS or self._however_small)
        # all rows, in several runs of several tokens: one of either would be compiled for anew
        if waits and equal is not None and (begin, stop) == (0, len(y)) and min(equal[1:]) > 1:
            self._hold(y, low, lora_b_stacked, equal, rank, used)
            return
        offset = 0
        for i, (b, size) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            narrow, wide = low[:, i * rank : i * rank + used], y[:, offset : offset + size]
            offset += size
            if equal is not None:
                first, count, length = equal
                b_of = b[first : first + count, 0, :, :used].transpose(1, 2)
                wide[begin:stop].view(count, length, size).baddbmm_(narrow.view(count, length, used), b_of, alpha=scale)
                continue
            for slot, start, end in self.segments:
                wide[start:end].addmm_(narrow[start - begin : end - begin], b[slot, 0, :, :used].t(), alpha=scale)

    def _lower(self, x: torch.Tensor, a: torch.Tensor, begin: int, stop: int) -> torch.Tensor:
        """x A^T of the tokens from `begin` to `stop`, (tokens, matrices * rank), for A (slots, matrices * rank, in)."""
        if self.one_a:
            return x[begin:stop] @ a[self.segments[0][0]].t()
        if self._equal is not None:
            first, count, length = self._equal
            inputs = x[begin:stop].view(count, length, -1)
            return torch.bmm(inputs, a[first : first + count].transpose(1, 2)).flatten(0, 1)
        low = x.new_empty(stop - begin, a.shape[1])
        for slot, start, end in self.segments:
            torch.mm(x[start:end], a[slot].t(), out=low[start - begin : end - begin])
        return low

    @contextmanager
    def deferring(self, however_small: bool = False) -> Iterator[None]:
        """Within it, layers that are `gated` leave their products with B to the activation that follows.

        That is from FUSED_ELEMENTS on: to call what torch has compiled takes 0.1 ms.
        """
        self._deferring, self._held, self._however_small = True, None, however_small
        try:
            yield
            self._check_taken()
        finally:
            self._deferring, self._held = False, None

    def take(self, y: torch.Tensor) -> Held | None:
        """What has been left to the activation of y, if anything."""
        held, self._held = self._held, None
        if held is not None and held.output != y.data_ptr():
            raise RuntimeError("expected the activation right after its layer; this vLLM has something in between")
        return held

    def _check_taken(self) -> None:
        if self._held is not None:
            raise RuntimeError("an activation did not take the adapters that were left to it")

    def _hold(
        self,
        y: torch.Tensor,
        low: torch.Tensor,
        stacked: tuple[torch.Tensor, ...],
        equal: tuple[int, int, int],
        rank: int,
        used: int,
    ) -> None:
        """Leave the products of x A^T, `low` (tokens, 2 * rank), with B to the activation of y."""
        self._check_taken()
        first, count, length = equal
        low = low.view(count, length, -1)
        low_gate, low_up = low[..., :used], low[..., rank : rank + used]
        gate, up = (b[first : first + count, 0, :, :used].transpose(1, 2) for b in stacked)
        self._held = Held(y.data_ptr(), (low_gate, low_up), (gate, up))

    def _set(self, segments: tuple[tuple[int, int, int], ...]) -> None:
        self.segments, self._equal = segments, None
        lengths = {end - start for _, start, end in segments}
        in_order = all(b[0] == a[0] + 1 and b[1] == a[2] for a, b in pairwise(segments))
        if len(lengths) == 1 and in_order:
            self._equal = (segments[0][0], len(segments), lengths.pop())

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


def join_a(modules: Iterable[Any]) -> None:
    """Let the A of matrices that a layer has fused be views of one tensor, (slots, matrices * rank, in)."""
    for module in modules:
        stacked = getattr(module, "lora_a_stacked", None)
        if isinstance(stacked, tuple) and len(stacked) > 1 and len({a.shape for a in stacked}) == 1:
            slots, _, rank, width = stacked[0].shape
            whole = stacked[0].new_zeros(slots, len(stacked) * rank, width)
            module.lora_a_stacked = tuple(part.unsqueeze(1) for part in whole.split(rank, dim=1))


def joined(stacked: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All A of a layer as one tensor, (slots, matrices * rank, in); no copy where `join_a` has seen the layer."""
    if len(stacked) == 1:
        return stacked[0][:, 0]
    whole, (_, _, rank, _) = stacked[0]._base, stacked[0].shape
    if whole is not None and whole.ndim == 3 and whole.shape[1] == len(stacked) * rank:
        return whole
    return torch.cat([a[:, 0] for a in stacked], dim=1)


def _runs(slots: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """(slot, start, end) of each run of equal slots, without those of -1."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return tuple(
        (slot, end - count, end)
        for slot, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
        if slot >= 0
    )
