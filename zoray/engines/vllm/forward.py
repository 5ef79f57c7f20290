"""Packed forwards of a vLLM model: many sequences in one pass, hidden states at answer positions only.

No request, scheduler, sampler or detokenizer: tokens and attention metadata go straight to the worker's model runner.
All code that reaches into vLLM's internals is in engines/vllm/, engines/layers/ and engines/shared/.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from zoray.engines.layers import rms_norm_cpu as cpu_norms
from zoray.engines.packing import LOGITS_ELEMENTS, Pack, Plan, SequenceTable, pack, slots_of_tokens, unshared_blocks
from zoray.engines.slots import BLOCKS
from zoray.engines.vllm.compat import attention_metadata, known_fields
from zoray.engines.vllm.graphs import Graphs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

SHARING = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)  # caches that keep blocks as written


class Forward:
    """Scores sequences with a worker's bare model; worker.py adds adapters.

    Uses the worker's KV cache as scratch: no request may be under way in this engine, unless some blocks are reserved
    for scoring (shared/scheduler.py).

    Args:
        runner: the worker's model runner.
        vllm_config: the engine's.
        slots: number of adapter slots.
    """

    head_moves = False  # whether the LM head has adapters

    def __init__(self, runner: Any, vllm_config: Any, slots: int = 0) -> None:
        self.runner, self.vllm_config, self.slots = runner, vllm_config, slots
        self.device: torch.device = runner.device
        self.max_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        groups = runner.kv_cache_config.kv_cache_groups
        self.block_size: int = max(group.kv_cache_spec.block_size for group in groups)
        blocks = runner.kv_cache_config.num_blocks - 1  # block 0 is vLLM's null block
        self.blocks: int = (vllm_config.additional_config or {}).get(BLOCKS, blocks)  # the others are for requests
        self.share = all(  # every group's cache has the same blocks, and attention reads a block as a whole
            group.kv_cache_spec.block_size == self.block_size and isinstance(group.kv_cache_spec, SHARING)
            for group in groups
        )
        self.graphs = Graphs(runner, slots)
        if self.device.type == "cpu":
            cpu_norms.take(runner.model)
            for module in runner.model.modules():
                if hasattr(module, "use_direct_call"):
                    module.use_direct_call = True  # torch's custom operator is for compiled models

    def score(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64."""
        return self.score_slots(plan.table, plan.chosen, plan.probe_of)

    @torch.inference_mode()
    def score_slots(self, table: SequenceTable, chosen: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Sums of log-probabilities of all outputs of chosen sequences (n,), each under its slot (n,), -1 for none."""
        sums = torch.zeros(int(table.n_outputs[chosen].sum()), dtype=torch.float64, device=self.device)
        for packed in pack(table, chosen, slots, self.max_tokens, self.blocks, self.block_size, self.share):
            hidden = self._forward(packed)
            logps = self.log_probabilities(hidden, packed)
            sums.index_add_(0, torch.from_numpy(packed.outputs).to(self.device), logps.double())
        return sums.cpu().numpy()

    def _forward(self, packed: Pack) -> torch.Tensor:
        """One packed forward: hidden states of all tokens, (T, hidden)."""
        mode, descriptor = self.graphs.choose(len(packed.tokens))
        padded = descriptor.num_tokens
        self.map_slots(packed.segments, padded=padded)
        metadata, slot_mapping = self._attention_metadata(packed, padded)
        tokens, positions = self.graphs.inputs(packed.tokens, packed.positions, padded)
        with (
            set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=padded,
                slot_mapping=slot_mapping,
                cudagraph_runtime_mode=mode,
                batch_descriptor=descriptor,
                skip_compiled=self.graphs.plain,
            ),
            self._around_layers(),
        ):
            return self.runner.model(
                input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )

    def log_probabilities(self, hidden: torch.Tensor, packed: Pack) -> torch.Tensor:
        """(M,) float32: only scored rows reach the LM head, in chunks of bounded size."""
        rows, row_of, targets = (
            torch.from_numpy(part).to(self.device) for part in (packed.rows, packed.target_rows, packed.targets)
        )
        chunk = max(1, LOGITS_ELEMENTS // self.vllm_config.model_config.get_vocab_size())
        row_slots: list[int] = []
        if self.head_moves:
            row_slots = slots_of_tokens(packed.segments, len(packed.tokens))[packed.rows].tolist()
            chunk = min(chunk, self.vllm_config.scheduler_config.max_num_seqs)  # vLLM's buffers for rows end there
        parts = []
        for start in range(0, len(rows), chunk):
            if self.head_moves:
                self.map_slots(packed.segments, row_slots[start : start + chunk])
            logits = self.runner.model.compute_logits(hidden[rows[start : start + chunk]])
            if logits is None:  # vLLM gathers them on the first rank, which returns the scores
                return torch.zeros(len(targets), device=self.device)
            logits = logits.float()
            first, end = np.searchsorted(packed.target_rows, (start, start + chunk))  # ascending, as the rows are
            local = row_of[first:end] - start
            parts.append(logits[local, targets[first:end]] - torch.logsumexp(logits, dim=-1)[local])
        return torch.cat(parts)

    def map_slots(
        self, segments: tuple[tuple[int, int, int], ...], row_slots: Sequence[int] = (), padded: int | None = None
    ) -> None:
        """Nothing to do without slots."""

    def _around_layers(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _attention_metadata(self, packed: Pack, padded: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Per-layer attention metadata for S sequences, each in its own KV blocks except for a shared context."""
        lengths, whole = packed.lengths, packed.whole
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        metadata: dict[str, Any] = {}
        mappings: dict[str, torch.Tensor] = {}
        seq_lens = torch.from_numpy(whole)
        of_token = np.repeat(np.arange(len(lengths)), lengths)
        cache_groups = self.runner.kv_cache_config.kv_cache_groups
        for number, (groups, group) in enumerate(zip(self.runner.attn_groups, cache_groups, strict=True)):
            size = group.kv_cache_spec.block_size
            table = packed.blocks if size == self.block_size else unshared_blocks(lengths, size)
            slots = table[of_token, packed.positions // size].astype(np.int64) * size + packed.positions % size
            assert table.max() <= self.blocks
            slot_mapping = self.graphs.slot_mapping(number, slots, padded)
            common = CommonAttentionMetadata(
                query_start_loc=torch.from_numpy(starts).to(self.device),
                query_start_loc_cpu=torch.from_numpy(starts),
                seq_lens=seq_lens.to(self.device),
                num_reqs=len(lengths),
                num_actual_tokens=len(packed.tokens),
                max_query_len=int(lengths.max()),
                max_seq_len=int(whole.max()),
                block_table_tensor=torch.from_numpy(table).to(self.device),
                slot_mapping=slot_mapping,
                causal=True,
                **known_fields(lengths, packed.context, packed.positions, self.device),
            )
            for attention in groups:
                built = attention_metadata(attention, common)
                for layer in attention.layer_names:
                    metadata[layer], mappings[layer] = built, slot_mapping
        return metadata, mappings
