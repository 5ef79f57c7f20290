"""zoray inside a vLLM worker: adapter slots written in place, and packed scoring without the request path.

Mixed into vLLM's worker class by `worker_extension_cls`, on an unmodified wheel. Everything that reaches into vLLM's
internals is in engines/vllm*.py, cpu_*.py and cuda_*.py. Tried on 0.32 (CPU); written against 0.26's sources as well.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from zoray.directions import MANY_ELEMENTS, compile_directions
from zoray.engines import cpu_gated, cpu_lora, cpu_norms
from zoray.engines.packing import LOGITS_ELEMENTS, Pack, Plan, SequenceTable, pack, slots_of_tokens, unshared_blocks
from zoray.engines.slots import Slots
from zoray.engines.vllm_graphs import Graphs
from zoray.engines.vllm_layers import find_slots, find_weights, gives_logits, takes_tokens
from zoray.engines.vllm_selftest import prove_compiled, prove_live
from zoray.models import restore
from zoray.records import ConfigError

if current_platform.is_cuda():  # when vLLM looks up its workers' extension, which is before it wraps a model's layers
    from zoray.engines import cuda_lora

    cuda_lora.register()

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoray.records import Commit, Probe
    from zoray.spaces.base import Space, State


SHARING = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)  # caches whose blocks stay as written


class ZorayWorker:
    """The methods that zoray's engine calls on every worker through `collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def zoray_open(
        self, space: Space, matrices: Mapping[str, tuple[int, int]], seed: int
    ) -> tuple[dict[str, float], str]:
        """Create the adapter state beside the slots; prove that the slots are live.

        Returns what the test measured, and the dtype of the base weights.
        """
        self._zoray = PackedScorer(self.model_runner, self.vllm_config, space, matrices, seed)
        return self._zoray.self_test, str(self.vllm_config.model_config.dtype).removeprefix("torch.")

    def zoray_reset(self, folder: str) -> None:
        self._zoray.reset(folder)

    def zoray_apply(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            self._zoray.state.apply(commit)

    def zoray_score(self, plan: Plan) -> np.ndarray:
        return self._zoray.score(plan)

    def zoray_register(self) -> int:
        return self._zoray.register_slots()

    def zoray_write(self, probes: Sequence[Probe]) -> None:
        self._zoray.write_all(probes)

    def zoray_step(self) -> int:
        return self._zoray.state.step

    def zoray_digest(self) -> str:
        return self._zoray.state.digest()

    def zoray_adapter(self) -> dict[str, np.ndarray]:
        return self._zoray.state.arrays()


class PackedScorer:
    """Adapter state, the slots it fills, and one packed forward for all probes and sequences.

    Uses the worker's KV cache as scratch: no request may be in flight in this engine meanwhile.
    """

    def __init__(self, runner: Any, vllm_config: Any, space: Space, matrices: Mapping[str, tuple[int, int]], seed: int):
        self.runner, self.vllm_config, self.space = runner, vllm_config, space
        self.device: torch.device = runner.device
        self.slots: int = vllm_config.lora_config.max_loras
        self.max_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        groups = runner.kv_cache_config.kv_cache_groups
        self.block_size: int = max(group.kv_cache_spec.block_size for group in groups)
        self.blocks: int = runner.kv_cache_config.num_blocks - 1  # block 0 is vLLM's null block
        self.share = all(  # a block of tokens is one block of every group's cache, which attention reads as a whole
            group.kv_cache_spec.block_size == self.block_size and isinstance(group.kv_cache_spec, SHARING)
            for group in groups
        )
        self.manager = _adapter_manager(runner)
        if self.device.type == "cpu":
            cpu_lora.join(self.manager.modules.values())
            cpu_norms.take(runner.model)
            if space.drawn(matrices) >= MANY_ELEMENTS:
                compile_directions(space.distribution)
        self.wrapper = self._lora_wrapper()
        self.graphs = Graphs(runner, self.slots)
        fused = cpu_gated.fuse(runner.model, self.wrapper, space.rank) if self.device.type == "cpu" else []
        self.matrices = space.select(matrices)
        self.contents = Slots(space, find_slots(self.manager, self.matrices))
        self.weights = find_weights(self.manager, self.matrices) if space.folds else {}
        self.head_moves = any(gives_logits(module) for module in self.manager.modules.values())
        self._open = partial(space.open, matrices, seed, self.device)
        self.state: State = self._open(self.weights)
        self.self_test = prove_live(self)
        if fused:
            self.self_test |= cpu_gated.settle(fused, self.wrapper, self.slots)
        self.self_test |= prove_compiled(self)
        self.contents.forget()

    def reset(self, folder: str) -> None:
        """Back to journal index 0; folded base weights are read from the model's folder again."""
        if self.weights:
            restore(self.weights, folder)
        self.state = self._open(self.weights)
        self.contents.forget()

    def _lora_wrapper(self) -> Any:
        """The wrapper that maps tokens to slots; on CPU replaced by the segmented one in every LoRA layer."""
        modules = list(self.manager.modules.values())
        if self.device.type != "cpu":
            return next(iter(self.manager.punica_wrapper_mapping.values()))
        mapping = self.manager.punica_wrapper_mapping
        wrapper = cpu_lora.SegmentedLora(self.max_tokens, self.vllm_config.scheduler_config.max_num_seqs, self.device)
        wrapper.used_rank, wrapper.embeds = self.space.rank, any(map(takes_tokens, modules))
        for key in mapping:
            mapping[key] = wrapper
        for module in modules:
            module.set_mapping(wrapper)
            cpu_lora.shorten(module)
        for module in self.runner.model.modules():
            if hasattr(module, "use_direct_call"):
                module.use_direct_call = True  # an operator of torch's is for compiled models
        return wrapper

    def write_all(self, probes: Sequence[Probe]) -> None:
        """Put probes into the slots from the first on."""
        self.contents.write(self.state, probes)
        if self.device.type == "cpu":
            self.wrapper.one_a = self.contents.one_a

    def register_slots(self) -> int:
        """For the request path: make adapter id k + 1 mean slot k, without any file; how many slots there are."""
        loaded = self.runner.lora_manager.list_adapters()
        for slot in range(self.slots):
            if slot + 1 not in loaded:
                rank = self.vllm_config.lora_config.max_lora_rank
                self.runner.lora_manager.add_dummy_lora(LoRARequest(f"slot {slot}", slot + 1, "/none"), rank)
                self.manager.activate_adapter(slot + 1)
                self.contents.forget(slot)
        if self.manager.lora_index_to_id != list(range(1, self.slots + 1)):
            raise ConfigError(f"vLLM has put adapters elsewhere: {self.manager.lora_index_to_id}")
        return self.slots

    @torch.inference_mode()
    def score(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64."""

        def part(probes: tuple[Probe, ...], members: np.ndarray, slots: np.ndarray) -> np.ndarray:
            self.write_all(probes)
            return self.score_slots(plan.table, plan.chosen[members], slots)

        return plan.gather(self.slots, part)

    @torch.inference_mode()
    def score_slots(self, table: SequenceTable, chosen: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Sums of log-probabilities of all outputs of chosen sequences (n,), each under what its slot (n,) holds."""
        sums = torch.zeros(int(table.n_outputs[chosen].sum()), dtype=torch.float64, device=self.device)
        for packed in pack(table, chosen, slots, self.max_tokens, self.blocks, self.block_size, self.share):
            hidden = self._forward(packed)
            logps = self._log_probabilities(hidden, packed)
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
            self.wrapper.deferring() if self.device.type == "cpu" else nullcontext(),
        ):
            return self.runner.model(
                input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )

    def _log_probabilities(self, hidden: torch.Tensor, packed: Pack) -> torch.Tensor:
        """(M,) float32: only the asked rows reach the LM head, in chunks of bounded size."""
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
            if logits is None:  # they are gathered on the first rank, and asked for there
                return torch.zeros(len(targets), device=self.device)
            logits = logits.float()
            first, end = np.searchsorted(packed.target_rows, (start, start + chunk))  # ascending, as the rows are
            local = row_of[first:end] - start
            parts.append(logits[local, targets[first:end]] - torch.logsumexp(logits, dim=-1)[local])
        return torch.cat(parts)

    def map_slots(
        self, segments: tuple[tuple[int, int, int], ...], row_slots: Sequence[int] = (), padded: int | None = None
    ) -> None:
        """Tell the LoRA layers the slot of each token, and the head that of each of its rows; -1 is the bare model."""
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        self.manager._last_mapping = None  # of vLLM's request path, which would else take it for what is set
        self.wrapper.map_tokens(segments, vocabulary, row_slots, padded or segments[-1][2])

    def _attention_metadata(self, packed: Pack, padded: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Per-layer attention metadata for S sequences in KV blocks of their own, but for a context that they share."""
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
                **_optional_fields(packed, self.device),
            )
            for attention in groups:
                # 0.32 maps kernel block tables in a helper that 0.26 does not have
                build = getattr(attention, "build_metadata", None)
                built = build(common, 0) if build else attention.get_metadata_builder(0).build(0, common)
                for layer in attention.layer_names:
                    metadata[layer], mappings[layer] = built, slot_mapping
        return metadata, mappings


def _adapter_manager(runner: Any) -> Any:
    """vLLM's slot manager, behind the worker's LoRA manager."""
    return runner.lora_manager._adapter_manager


def _optional_fields(packed: Pack, device: torch.device) -> dict[str, Any]:
    """Fields of CommonAttentionMetadata that not every version has."""
    known, whole = CommonAttentionMetadata.__dataclass_fields__, packed.whole
    fields: dict[str, Any] = {
        "positions": torch.from_numpy(packed.positions).to(device),
        "is_prefilling": torch.ones(len(packed.lengths), dtype=torch.bool),
        "seq_lens_cpu_upper_bound": torch.from_numpy(whole),
        "_seq_lens_cpu": torch.from_numpy(whole),
        "_num_computed_tokens_cpu": torch.from_numpy(packed.context),
    }
    return {name: value for name, value in fields.items() if name in known}
