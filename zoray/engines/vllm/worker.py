"""zoray inside a vLLM worker: adapter slots written in place, and packed scoring without the request path.

Mixed into vLLM's worker class by `worker_extension_cls`, on an unmodified wheel. All code that reaches into vLLM's
internals is in engines/vllm/, engines/layers/ and engines/shared/. Runs on 0.32 (CPU); also written against 0.26.
"""

from __future__ import annotations

import pickle
import time
from contextlib import nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from zoray.engines.layers import gated_mlp_cpu as cpu_gated
from zoray.engines.layers import lora_cpu as cpu_lora
from zoray.engines.layers.vllm_layers import find_slots, find_weights, gives_logits, takes_tokens
from zoray.engines.slots import FEEDBACK, PROBES, Slots
from zoray.engines.vllm.feedback import ForwardFeedback
from zoray.engines.vllm.forward import Forward
from zoray.engines.vllm.piggyback import Piggyback
from zoray.engines.vllm.selftest import prove_compiled, prove_feedback, prove_live
from zoray.methods.directions import MANY_ELEMENTS, compile_directions
from zoray.methods.snapshots import pack, unpack
from zoray.models.folder import restore
from zoray.records import ConfigError

if current_platform.is_cuda():  # at import, when vLLM loads its workers' extension, before it wraps a model's layers
    from zoray.engines.layers import lora_cuda as cuda_lora

    cuda_lora.register()

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from zoray.engines.packing import Plan, SequenceTable
    from zoray.methods.spaces.base import Space, State
    from zoray.records import Commit, Probe


class ZorayWorker:
    """The methods that zoray's engine calls on every worker through `collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def zoray_open(
        self, space: Space, matrices: Mapping[str, tuple[int, int]], seed: int
    ) -> tuple[dict[str, float], str]:
        """Create the adapter state beside the slots; check that the slots are live.

        Returns the errors that the check measured, and the dtype of the base weights.
        """
        self._zoray: Any = PackedScorer(self.model_runner, self.vllm_config, space, matrices, seed)
        return self._zoray.self_test, str(self.vllm_config.model_config.dtype).removeprefix("torch.")

    def zoray_open_bare(self) -> str:
        """Prepare scoring without adapters; returns the dtype of the weights."""
        self._zoray = Forward(self.model_runner, self.vllm_config)
        return str(self.vllm_config.model_config.dtype).removeprefix("torch.")

    def zoray_reset(self, folder: str) -> None:
        self._zoray.reset(folder)

    def zoray_apply(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            self._zoray.state.apply(commit)

    def zoray_settle(self) -> None:
        self._zoray.state.settle()

    def zoray_score(self, plan: Plan) -> np.ndarray:
        return self._zoray.score(plan)

    def zoray_feedback(self, plan: Plan, gradient: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self._zoray.feedback(plan, gradient)

    def zoray_fit_lens(self, table: SequenceTable, rank: int) -> None:
        self._zoray.feedback.fit_lens(table, rank)

    def zoray_at_once(self) -> tuple[int, int, int]:
        scorer = self._zoray
        return min(scorer.max_tokens, scorer.blocks * scorer.block_size), scorer.feedback.most_rows, scorer.block_size

    def zoray_register(self) -> int:
        return self._zoray.register_slots()

    def zoray_write(self, probes: Sequence[Probe]) -> None:
        self._zoray.write_all(probes)

    def zoray_write_some(self, probes: Sequence[Probe], first: int) -> float:
        """Write probes into slots; returns the seconds it took, not counting the wait for a step of requests."""
        began = time.monotonic()
        self._zoray.write_all(probes, first)
        return time.monotonic() - began

    def zoray_score_slots(self, table: SequenceTable, slots: np.ndarray) -> np.ndarray:
        return self._zoray.score_slots(table, np.arange(len(table)), slots)

    def zoray_join(self) -> bool:
        return self._zoray.joined.attach()

    def zoray_keeps(self) -> bool:
        return self._zoray.device.type == "cpu"  # there no CUDA graph runs the steps of requests

    def zoray_expect(
        self, names: Sequence[str], table: SequenceTable, slots: Sequence[int], feedback: bool = False
    ) -> None:
        self._zoray.joined.expect(names, table, slots, feedback)

    def zoray_take(self, names: Sequence[str]) -> np.ndarray:
        return self._zoray.joined.take(names)

    def zoray_take_feedback(self, names: Sequence[str], gradient: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self._zoray.joined.take_feedback(names, gradient)

    def zoray_put(self, slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._zoray.contents.put(slot, arrays)

    def zoray_call(self, message: bytes) -> bytes:
        """Call any of these methods from another process: (name, arguments) in, (error, result) out, pickled.

        Both ends are zoray's, over the sockets between an engine and its own core.
        """
        method, arguments = pickle.loads(message)
        try:
            return pickle.dumps((None, getattr(self, method)(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            return pickle.dumps((repr(error) if not isinstance(error, ConfigError) else error, None))

    def zoray_step(self) -> int:
        return self._zoray.state.step

    def zoray_digest(self) -> str:
        return self._zoray.state.digest()

    def zoray_snapshot(self, limit: int) -> bytes | None:
        return pack(self._zoray.state, limit)

    def zoray_restore(self, data: bytes, step: int) -> None:
        unpack(self._zoray.state, data, step)
        self._zoray.contents.forget()

    def zoray_adapter(self) -> dict[str, np.ndarray]:
        return self._zoray.state.arrays()


class PackedScorer(Forward):
    """Adapter state, the slots it fills, and one packed forward for all probes and sequences."""

    def __init__(self, runner: Any, vllm_config: Any, space: Space, matrices: Mapping[str, tuple[int, int]], seed: int):
        super().__init__(runner, vllm_config, vllm_config.lora_config.max_loras)
        self.probe_slots: int = (vllm_config.additional_config or {}).get(PROBES, self.slots)
        self.space = space
        self.joined = Piggyback(self)
        self.manager = _adapter_manager(runner)
        if self.device.type == "cpu":
            cpu_lora.join(self.manager.modules.values())
            if space.drawn(matrices) >= MANY_ELEMENTS:
                compile_directions(space.distribution)
        self.wrapper = self._lora_wrapper()
        fused = cpu_gated.fuse(runner.model, self.wrapper, space.rank) if self.device.type == "cpu" else []
        self.all_matrices, self.matrices = dict(matrices), space.select(matrices)
        self.contents = Slots(space, find_slots(self.manager, self.matrices))
        self.weights = find_weights(self.manager, self.matrices) if space.folds else {}
        self.head_moves = any(gives_logits(module) for module in self.manager.modules.values())
        self._open = partial(space.open, matrices, seed, self.device)
        self.state: State = self._open(self.weights)
        self.self_test = prove_live(self)
        if fused:
            self.self_test |= cpu_gated.settle(fused, self.wrapper, self.slots)
        self.self_test |= prove_compiled(self)
        if (vllm_config.additional_config or {}).get(FEEDBACK):
            self.self_test |= prove_feedback(self)
        self.contents.forget()

    @cached_property
    def feedback(self) -> ForwardFeedback:
        """Computes residual feedback, see Engine.feedback."""
        return ForwardFeedback(self)

    def reset(self, folder: str) -> None:
        """Back to journal index 0; folded base weights are read from the model's folder again."""
        if self.weights:
            restore(self.weights, folder)
        self.state = self._open(self.weights)
        self.contents.forget()

    def _lora_wrapper(self) -> Any:
        """The wrapper that maps tokens to slots; on a CPU the segmented one replaces it in every LoRA layer."""
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
        return wrapper

    def write_all(self, probes: Sequence[Probe], first: int = 0) -> None:
        """Write probes into the slots from `first` on."""
        self.contents.write(self.state, probes, first)

    def register_slots(self) -> int:
        """For the request path: map adapter id k + 1 to slot k, without any file; returns the number of slots."""
        loaded = self.runner.lora_manager.list_adapters()
        for slot in range(self.slots):
            if slot + 1 not in loaded:
                rank = self.vllm_config.lora_config.max_lora_rank
                self.runner.lora_manager.add_dummy_lora(LoRARequest(f"slot {slot}", slot + 1, "/none"), rank)
                self.manager.activate_adapter(slot + 1)
                self.contents.forget(slot)
        if self.manager.lora_index_to_id != list(range(1, self.slots + 1)):
            raise ConfigError(f"vLLM has put adapters into other slots: {self.manager.lora_index_to_id}")
        return self.slots

    @torch.inference_mode()
    def score(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64."""

        def part(probes: tuple[Probe, ...], members: np.ndarray, slots: np.ndarray) -> np.ndarray:
            self.write_all(probes)
            return self.score_slots(plan.table, plan.chosen[members], slots)

        return plan.gather(self.probe_slots, part)

    def map_slots(
        self, segments: tuple[tuple[int, int, int], ...], row_slots: Sequence[int] = (), padded: int | None = None
    ) -> None:
        """Give the LoRA layers the slot of each token, and the head the slot of each row; -1 is the bare model."""
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        self.manager._last_mapping = None  # else vLLM's request path would assume that its own mapping is still set
        self.wrapper.map_tokens(segments, vocabulary, row_slots, padded or segments[-1][2])
        if self.device.type == "cpu":
            self.wrapper.one_a = self.contents.one_a(slot for slot, _, _ in segments if slot >= 0)

    def _around_layers(self) -> AbstractContextManager[object]:
        return self.wrapper.deferring() if self.device.type == "cpu" else nullcontext()


def _adapter_manager(runner: Any) -> Any:
    """vLLM's slot manager, behind the worker's LoRA manager."""
    return runner.lora_manager._adapter_manager
