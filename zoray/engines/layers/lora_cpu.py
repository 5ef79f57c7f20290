"""LoRA on the CPU as a few small GEMMs, instead of vLLM's gather of a whole adapter per token.

The stock CPU wrapper indexes `lora_a_weights[lora_indices]`, which copies a full A and B for every token. Tokens of one
adapter always stand together (the packed scorer orders them by slot; the scheduler keeps a request's tokens together),
so runs of equal adapters share a GEMM; runs of equal length, as from probes of one batch, share a batched GEMM; and
runs of a token or two, as in completions, multiply by all slots in one product, with other slots' columns zeroed. The
matrices that a layer has fused (q, k and v; gate and up) lie in one tensor, so that x A^T is a single GEMM for all of
them, and also for all slots if these hold the same A. Guarantees: an adapter whose B is zero leaves the output's bits
untouched.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from zoray.engines.layers.vllm_layers import join_a, join_b

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FUSED_ELEMENTS = 1 << 18  # of a layer's output; from here on the activation applies the adapters
PLAIN = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear")
FUSED_RANK = 8  # the largest rank whose products with B an activation takes over
SHORT_RUN = 16  # tokens of a run on average; up to here all slots are multiplied at once
JOINED_ELEMENTS = 1 << 15  # of a slot's B with the zeros between matrices; up to here one product beats several


@dataclass(frozen=True)
class Held:
    """Products with B that wait for the activation: their layer's output, and x A^T and B^T of its two matrices."""

    output: int  # address of the output's data
    low: tuple[torch.Tensor, torch.Tensor]  # (S, L, rank)
    b: tuple[torch.Tensor, torch.Tensor]  # (S, rank, width)


class Views(NamedTuple):
    """Views of a layer's tensors for products over some slots."""

    stacked_b: tuple[torch.Tensor, ...]  # the layer's, to recognise it
    a: torch.Tensor  # A^T of all its matrices: (in, columns) if the slots share it, else (S, in, columns)
    b: tuple[tuple[slice | None, slice | None, torch.Tensor], ...]  # (of low, of the output, B^T (S, used, out))
    rank: int  # columns of a matrix


class SegmentedLora(PunicaWrapperCPU):
    """Drop-in for the wrapper shared by all LoRA layers of a CPU worker."""

    segments: tuple[tuple[int, int, int], ...] = ()  # (slot, first token, last token + 1)
    row_segments: tuple[tuple[int, int, int], ...] = ()  # the same for the rows that reach the LM head
    used_rank: int | None = None  # higher ranks are zero in every slot, and are skipped in B
    embeds = True  # whether an embedding has adapters
    one_a = False  # whether all slots in use hold the same A
    gated: frozenset[int] = frozenset()  # ids of the B whose products an activation adds (gated_mlp_cpu.py)
    _deferring = _however_small = False
    _held: Held | None = None
    _slots: tuple[int, int, bool] = (0, 0, False)  # (first, count, whether with one A) of the slots in `_views`
    _equal: tuple[int, int, int] | None = None  # (first slot, slots, tokens of each) if segments are alike
    _masks: tuple[int, torch.Tensor] | None = None  # (first slot, (tokens, slots) of 0 and 1) if runs are short

    def map_tokens(
        self,
        segments: Sequence[tuple[int, int, int]],
        vocabulary: int,
        row_slots: Sequence[int] = (),
        padded: int | None = None,
    ) -> None:
        """Set the slot of each token, -1 for none, and the slots of the rows that reach the LM head.

        An embedding looks A up at slot * vocabulary + token. Padding, if any, belongs to no slot.
        """
        self._set(tuple(segment for segment in segments if segment[0] >= 0))
        if self.embeds:
            for slot, start, end in segments:
                self._embeddings_indices[start:end] = max(slot, 0) * vocabulary
        self.row_segments = _runs(torch.tensor(list(row_slots), dtype=torch.long)) if row_slots else ()

    @property
    def capacity(self) -> int:
        """The number of tokens that can be mapped."""
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
        begin, stop = self.segments[0][1], self.segments[-1][2]  # tokens without an adapter come before
        whole = stop - begin == len(y)
        if not whole:
            x, y = x[begin:stop], y[begin:stop]
        if self._masks is not None:
            self._by_masks(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
            return
        if self._equal is None:
            self._by_runs(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
            return
        first, count, length = self._equal
        views = self._views_of(lora_a_stacked, lora_b_stacked, first, count)
        low = (x @ views.a).view(count, length, -1) if self.one_a else torch.bmm(x.view(count, length, -1), views.a)
        # all rows, in several runs of several tokens: torch would compile again for one run, or for one token
        waits = self._deferring and id(lora_b_stacked) in self.gated and whole and scale == 1.0
        if waits and min(count, length) > 1 and (y.numel() >= FUSED_ELEMENTS or self._however_small):
            self._hold(y, low, views)
            return
        out = y.view(count, length, -1)
        for columns, rows, b in views.b:
            part = out if rows is None else out[..., rows]
            part.baddbmm_(low if columns is None else low[..., columns], b, alpha=scale)

    def _by_runs(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        stacked_a: tuple[torch.Tensor, ...],
        stacked_b: tuple[torch.Tensor, ...],
        scale: float,
        sizes: tuple[int, ...],
    ) -> None:
        """The same for runs of any lengths, one after another; x and y begin with the first run."""
        a, rank, begin = joined(stacked_a), stacked_a[0].shape[2], self.segments[0][1]
        low = x @ a[self.segments[0][0]].t() if self.one_a else x.new_empty(len(x), a.shape[1])
        for slot, start, end in self.segments:
            run, offset = slice(start - begin, end - begin), 0
            if not self.one_a:
                torch.mm(x[run], a[slot].t(), out=low[run])
            for i, (b, size) in enumerate(zip(stacked_b, sizes, strict=True)):
                used = b[slot, 0, :, : self.used_rank].t()
                narrow = low[run, i * rank : i * rank + len(used)]
                y[run, offset : offset + size].addmm_(narrow, used, alpha=scale)
                offset += size

    def _by_masks(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        stacked_a: tuple[torch.Tensor, ...],
        stacked_b: tuple[torch.Tensor, ...],
        scale: float,
        sizes: tuple[int, ...],
    ) -> None:
        """The same for many short runs, as of requests that decode: all slots at once, with other slots zeroed."""
        assert self._masks is not None
        first, mask = self._masks  # (T, S)
        some, a = slice(first, first + mask.shape[1]), joined(stacked_a)
        rank = stacked_a[0].shape[2]
        low = (x @ a[some].flatten(0, 1).t()).view(len(x), mask.shape[1], -1) * mask[..., None].to(x.dtype)
        block = joined_b(stacked_b)
        if block is not None:
            y.addmm_(low.flatten(1), block[some].flatten(0, 1), alpha=scale)
            return
        offset = 0
        for i, (b, size) in enumerate(zip(stacked_b, sizes, strict=True)):
            used = b[some, 0, :, : self.used_rank].transpose(1, 2)
            narrow = low[..., i * rank : i * rank + used.shape[1]].flatten(1)
            y[:, offset : offset + size].addmm_(narrow, used.flatten(0, 1), alpha=scale)
            offset += size

    def _views_of(
        self, stacked_a: tuple[torch.Tensor, ...], stacked_b: tuple[torch.Tensor, ...], first: int, count: int
    ) -> Views:
        """The views of a layer's tensors; kept while the same slots are in use."""
        if self._slots != (slots := (first, count, self.one_a)):
            self._slots, self._views = slots, {}
        views = self._views.get(id(stacked_b))
        if views is None or views.stacked_b is not stacked_b:
            some, a, rank = slice(first, first + count), joined(stacked_a), stacked_a[0].shape[2]
            kept = a[first].t() if self.one_a else a[some].transpose(1, 2)
            parts: list[tuple[slice | None, slice | None, torch.Tensor]] = []
            offset, block = 0, joined_b(stacked_b)
            if block is not None:
                parts.append((None, None, block[some]))
            for i, b in enumerate(stacked_b if block is None else ()):
                used = b[some, 0, :, : self.used_rank].transpose(1, 2)
                low, high = slice(i * rank, i * rank + used.shape[1]), slice(offset, offset + b.shape[2])
                one = len(stacked_b) == 1
                parts.append((None if one and used.shape[1] == rank else low, None if one else high, used))
                offset += b.shape[2]
            views = Views(stacked_b, kept, tuple(parts), rank)
            if a.data_ptr() == stacked_a[0].data_ptr():  # else it is a copy, which would miss later writes
                self._views[id(stacked_b)] = views
        return views

    @contextmanager
    def deferring(self, however_small: bool = False) -> Iterator[None]:
        """Within it, `gated` layers leave their products with B to the activation that follows.

        From FUSED_ELEMENTS on only, since a call of compiled code takes 0.1 ms.
        """
        self._deferring, self._held, self._however_small = True, None, however_small
        try:
            yield
            self._check_taken()
        finally:
            self._deferring, self._held = False, None

    def take(self, y: torch.Tensor) -> Held | None:
        """The products left to the activation of y, if any."""
        held, self._held = self._held, None
        if held is not None and held.output != y.data_ptr():
            raise RuntimeError("expected the activation right after its layer; this vLLM has something in between")
        return held

    def _check_taken(self) -> None:
        if self._held is not None:
            raise RuntimeError("an activation did not take the adapters that were left to it")

    def _hold(self, y: torch.Tensor, low: torch.Tensor, views: Views) -> None:
        """Leave the products of x A^T, `low` (S, L, 2 * rank), with B to the activation of y."""
        self._check_taken()
        first, count, _ = self._slots
        gate, up = (b[first : first + count, 0, :, : self.used_rank].transpose(1, 2) for b in views.stacked_b)
        used = gate.shape[1]
        self._held = Held(y.data_ptr(), (low[..., :used], low[..., views.rank : views.rank + used]), (gate, up))

    def _set(self, segments: tuple[tuple[int, int, int], ...]) -> None:
        self.segments, self._equal, self._masks = segments, None, None
        slots = {slot for slot, _, _ in segments}
        tokens = segments[-1][2] - segments[0][1] if segments else 0
        if len(segments) > 2 * len(slots) and tokens <= SHORT_RUN * len(segments):
            mask = torch.zeros(tokens, max(slots) - min(slots) + 1)
            for slot, start, end in segments:
                mask[start - segments[0][1] : end - segments[0][1], slot - min(slots)] = 1.0
            self._masks = (min(slots), mask)
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


def join(modules: Iterable[Any]) -> None:
    """Put the A of a layer's fused matrices into one tensor; and their B, with zeros between, if it is small."""
    for module in modules:
        stacked = getattr(module, "lora_a_stacked", None)
        if isinstance(stacked, tuple) and len(stacked) > 1 and len({a.shape for a in stacked}) == 1:
            columns, width = len(stacked) * stacked[0].shape[2], sum(b.shape[2] for b in module.lora_b_stacked)
            join_a(module)
            if columns * width <= JOINED_ELEMENTS:
                join_b(module)


def shorten(module: Any) -> None:
    """Let a linear layer call its product and its adapters directly, without the steps for GPUs and several ranks.

    A layer that is not plain (quantised, tensor-parallel, or returning its bias for later) stays unchanged.
    """
    base: Any = getattr(module, "base_layer", None)
    whole = module.forward
    product = getattr(base, "cpu_linear", None)
    if product is None or type(base).__name__ not in PLAIN or base.tp_size > 1:
        return
    if type(base.quant_method).__name__ != "UnquantizedLinearMethod" or base.skip_bias_add or not base.return_bias:
        return

    def forward(x: torch.Tensor) -> Any:
        if x.ndim != 2:
            return whole(x)
        y = product(x, base.weight, base.bias)
        stacked = module.lora_a_stacked, module.lora_b_stacked
        module.punica_wrapper.add_lora_linear(y, x, *stacked, 1.0, module.output_slices)
        return y, None

    module.forward = forward


def joined(stacked: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All A of a layer as one tensor, (slots, matrices * rank, in); no copy if `join` has changed the layer."""
    if len(stacked) == 1:
        return stacked[0][:, 0]
    whole, (_, _, rank, _) = stacked[0]._base, stacked[0].shape
    if whole is not None and whole.ndim == 3 and whole.shape[1] == len(stacked) * rank:
        return whole
    return torch.cat([a[:, 0] for a in stacked], dim=1)


def joined_b(stacked: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """All B^T of a layer as one tensor, (slots, matrices * rank, out) with zeros between, if stored that way."""
    whole, columns = stacked[0]._base, len(stacked) * stacked[0].shape[3]
    fits = len(stacked) > 1 and whole is not None and whole.shape[1:] == (columns, sum(b.shape[2] for b in stacked))
    return whole if fits else None


def _runs(slots: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """(slot, start, end) of each run of equal slots, without runs of -1."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return tuple(
        (slot, end - count, end)
        for slot, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
        if slot >= 0
    )
