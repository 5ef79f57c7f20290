"""Residual feedback inside a vLLM worker: what a packed forward keeps at asked rows, and the gradient made of it.

The rows' inputs of the adapted matrices, and the stream before the final norm, go into buffers while the forward runs;
nothing else of it is kept. Then the exact gradient at the stream, from the final norm and the LM head, and from both
the feedback of every matrix (residual.py). Everything that reaches into vLLM's internals is in engines/vllm*.py,
cpu_*.py and cuda_*.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.engines.lens import Map, Streams, fit
from zoray.engines.packing import LOGITS_ELEMENTS, pack
from zoray.engines.residual import Head, Norm, family_of, norm_behind, outer, reader_of
from zoray.engines.vllm_layers import names_in
from zoray.records import ConfigError, Probe
from zoray.spaces.base import layer_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoray.engines.packing import Plan, SequenceTable

ROW_BYTES = 1 << 26  # of a forward's rows that are kept, at least
ROW_SHARE = 0.04  # of the bytes of the model's weights
LENS_TOKENS = 1024  # of a forward pass whose streams are kept for a moment


class Rows:
    """What is kept of a forward: at each of some rows, the input of each matrix, where asked its output, the stream."""

    def __init__(self) -> None:
        self.at: torch.Tensor | None = None  # (R,) tokens of the forward; None keeps nothing
        self.inputs: dict[int, torch.Tensor] = {}  # by the identity of a layer's slots: (R, in)
        self.outputs: dict[int, torch.Tensor] = {}  # likewise (R, out), of `with_outputs` only
        self.stream: torch.Tensor | None = None  # (R, hidden)
        self.wanted: frozenset[int] = frozenset()
        self.with_outputs: frozenset[int] = frozenset()

    def keep(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Called by every LoRA layer with its input and its final output."""
        if self.at is None or layer not in self.wanted:
            return
        self.inputs[layer] = x.index_select(0, self.at)
        if layer in self.with_outputs:
            self.outputs[layer] = y.index_select(0, self.at)

    def keep_stream(self, _: Any, inputs: tuple[Any, ...]) -> None:
        """A hook before the final norm, whose inputs are hidden states and what has been left to be added to them."""
        if self.at is not None:
            some = [part.index_select(0, self.at).float() for part in inputs[:2] if part is not None]
            self.stream = some[0] + some[1] if len(some) > 1 else some[0]

    def clear(self) -> None:
        self.at = self.stream = None
        self.inputs.clear()
        self.outputs.clear()


class Feedback:
    """The residual feedback of a worker's adapter state. Built when it is first asked for.

    Args:
        scorer: the worker's PackedScorer.

    Raises:
        ConfigError: this model, or these matrices, have none here.
    """

    def __init__(self, scorer: Any) -> None:
        self._scorer, model = scorer, scorer.runner.model
        config = scorer.vllm_config
        if config.parallel_config.tensor_parallel_size > 1:
            raise ConfigError("expected engine.tensor_parallel=1 with estimator=feedback; take more replicas instead")
        family = family_of(config.model_config.model, scorer.matrices)
        self.rows, self._family = Rows(), family
        self._maps: dict[str, Map] = {}
        self._layers: dict[str, int] = {}
        for module_name, module in scorer.manager.modules.items():
            names = names_in(scorer.manager, module_name)
            if len(names) == 1 and names[0] in scorer.matrices:
                self._layers[names[0]] = id(module.lora_b_stacked)
        self._behind: dict[str, Norm] = {}
        for name in self._layers:
            if (behind := norm_behind(family, name)) is not None:
                self._behind[name] = Norm.of(model.get_submodule(behind))
        self.rows.wanted = frozenset(self._layers.values())
        self.rows.with_outputs = frozenset(self._layers[name] for name in self._behind)
        final = model.get_submodule(family.norm)
        self._norm = Norm.of(final)
        final.register_forward_pre_hook(self.rows.keep_stream)
        self._head = head_of(model, config.model_config.get_vocab_size())
        self._chunk = max(1, LOGITS_ELEMENTS // len(self._head.weight))
        width = sum(into + out * (name in self._behind) for name, (out, into) in scorer.matrices.items())
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        item = torch.finfo(config.model_config.dtype).bits // 8
        self.most_rows = max(1, int(max(ROW_BYTES, ROW_SHARE * weights)) // (width * item))
        scorer.wrapper.kept = self.rows

    @torch.inference_mode()
    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """See Engine.fit_lens. Without CUDA graphs and compiled code, in which hooks are not called."""
        scorer = self._scorer
        if not rank:
            self._maps = {}
            return
        layers = 1 + max(layer_number(name) or 0 for name in scorer.all_matrices)
        readers = {name: reader_of(self._family, name, layers) for name in self._layers}
        chosen, bare = np.arange(len(table)), np.full(len(table), -1, np.int64)
        tokens = min(scorer.max_tokens, LENS_TOKENS)
        passes = list(pack(table, chosen, bare, tokens, scorer.blocks, scorer.block_size, False))

        def run(packed: Any, streams: Streams) -> None:
            streams.rows = torch.from_numpy(packed.rows).to(scorer.device)
            scorer._forward(packed)

        plain, scorer.graphs.plain = scorer.graphs.plain, True
        try:
            hidden = len(self._norm.weight)
            self._maps = fit(readers, self._family.norm, passes, run, scorer.runner.model, hidden, rank)
        finally:
            scorer.graphs.plain = plain

    @torch.inference_mode()
    def __call__(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See Engine.feedback."""
        scorer = self._scorer
        if any(probe.scale for probe in plan.probes) or len(plan.probes) > 1:
            raise ConfigError(f"expected a plan of one probe of scale 0; got {plan.probes}")
        scorer.write_all(plan.probes or (Probe(scorer.state.step, 0, 0.0),))
        packs = list(
            pack(plan.table, plan.chosen, plan.probe_of, scorer.max_tokens, scorer.blocks, scorer.block_size, False)
        )
        if len(packs) != 1:
            raise ConfigError(f"expected sequences of one forward pass for feedback; got {len(packs)} passes")
        (packed,) = packs
        self.rows.at = torch.from_numpy(packed.rows).to(scorer.device)
        try:
            hidden = scorer._forward(packed)
            return self._made(plan, gradient, packed, hidden)
        finally:
            self.rows.clear()

    def _made(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray], packed: Any, hidden: torch.Tensor
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        scorer, device = self._scorer, self._scorer.device
        outputs = torch.from_numpy(packed.outputs).to(device)
        sums = torch.zeros(int(plan.first_output[-1]), dtype=torch.float64, device=device)
        sums.index_add_(0, outputs, scorer.log_probabilities(hidden, packed).double())
        values = sums.cpu().numpy()
        slopes = np.asarray(gradient(values), np.float64)
        own = np.repeat(plan.probe_of >= 0, plan.table.n_outputs[plan.chosen])  # the bare model has no adapter to move
        weights = torch.from_numpy(np.where(own, slopes, 0.0).astype(np.float32)).to(device)[outputs]
        row_of, targets = (torch.from_numpy(part).to(device) for part in (packed.target_rows, packed.targets))
        assert self.rows.at is not None and self.rows.stream is not None
        asked = hidden.index_select(0, self.rows.at)
        delta = self._head.back(asked, row_of, targets, weights, self._chunk)
        delta = self._norm.back(self.rows.stream, delta)
        return values, self._by_matrix(delta)

    def _by_matrix(self, delta: torch.Tensor) -> dict[str, np.ndarray]:
        """Feedback of all trained tensors from the gradient at the end of the stream (R, hidden)."""
        scorer, tensors = self._scorer, {}
        for name, a, b in scorer.state.tensors(scorer.state.flat):
            layer, behind = self._layers[name], self._behind.get(name)
            own = self._maps[name].back(delta) if name in self._maps else delta
            own = own if behind is None else behind.back(self.rows.outputs[layer], own)
            found = outer(own, self.rows.inputs[layer], a, b, scorer.space.scaling)
            tensors |= {f"{name}.lora_{part}": tensor for part, tensor in zip("AB", found, strict=True)}
        return {name: tensors[name].cpu().numpy() for name in scorer.state.layout.shapes}


def head_of(model: Any, vocabulary: int) -> Head:
    """The LM head of a model of vLLM's.

    Raises:
        ConfigError: its weight is not plain numbers.
    """
    module = getattr(model, "lm_head", None)
    weight = getattr(module if module is not None else model.get_input_embeddings(), "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ConfigError(
            "expected an LM head with plain weights for estimator=feedback; this model's is quantised. Take "
            "estimator=rloo, or a model whose head is not"
        )
    processor = model.logits_processor
    processor = getattr(processor, "base_layer", processor)
    return Head(weight.data[:vocabulary], float(processor.scale), processor.soft_cap)
