"""Residual feedback inside a vLLM worker: rows kept from a packed forward, and the gradient computed from them.

While the forward runs, kept.py keeps the adapted matrices' inputs and the stream before the final norm, at scored rows
only. Then the final norm and the LM head give the exact gradient at the stream, and both together the feedback of every
matrix (residual.py). All code that reaches into vLLM's internals is in engines/vllm/, engines/layers/ and
engines/shared/.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.engines.feedback.kept import Keeping, Kept, KeptRows, StaticRows, most_rows
from zoray.engines.feedback.lens import Map, Streams, fit
from zoray.engines.feedback.residual import Head, Norm, family_of, log_softmax_, norm_behind, outer, reader_of
from zoray.engines.layers.vllm_layers import names_in
from zoray.engines.packing import LOGITS_ELEMENTS, pack
from zoray.methods.spaces.base import layer_number
from zoray.records import ConfigError, Probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoray.engines.packing import Pack, Plan, SequenceTable

LENS_TOKENS = 512  # in a forward pass for a fit, whose streams are held in memory


class ForwardFeedback:
    """The residual feedback of a worker's adapter state. Built on first use.

    Args:
        scorer: the worker's PackedScorer.

    Raises:
        ConfigError: feedback does not support this model or these matrices.
    """

    def __init__(self, scorer: Any) -> None:
        self._scorer, model = scorer, scorer.runner.model
        config = scorer.vllm_config
        if config.parallel_config.tensor_parallel_size > 1:
            raise ConfigError("expected engine.tensor_parallel=1 with estimator=feedback; take more replicas instead")
        family = family_of(config.model_config.model, scorer.matrices)
        self.family = family
        self._maps: dict[str, Map] = {}
        behind = {name: norm for name in scorer.matrices if (norm := norm_behind(family, name)) is not None}
        self.behind = {name: Norm.of(model.get_submodule(norm)) for name, norm in behind.items()}
        final = model.get_submodule(family.norm)
        self._norm = Norm.of(final)
        self._head = head_of(model, config.model_config.get_vocab_size())
        self._chunk = max(1, LOGITS_ELEMENTS // len(self._head.weight))
        static = getattr(scorer.wrapper, "kept", None)
        if isinstance(static, StaticRows):
            self.rows, self.most_rows = static, static.most
        elif scorer.device.type == "cpu":
            self.rows = KeptRows({name: name in behind for name in scorer.matrices})
            for module_name, module in scorer.manager.modules.items():
                for name in scorer.matrices.keys() & set(names_in(scorer.manager, module_name)):
                    module.set_mapping(Keeping(module.punica_wrapper, self.rows, name))
            final.register_forward_pre_hook(lambda _, inputs: self.rows.keep_stream(*inputs[:2]))
            widths = {name: (into, out * (name in behind)) for name, (out, into) in scorer.matrices.items()}
            self.most_rows = most_rows(model, widths, len(self._norm.weight), config.model_config.dtype)
        else:
            raise ConfigError(
                "expected an engine that was started for estimator=feedback, so that its compiled model keeps rows; "
                "this one was not. Set engine.feedback=true"
            )

    @property
    def readers(self) -> dict[str, str]:
        """Matrix -> the norm that reads the stream right after it."""
        layers = 1 + max(layer_number(name) or 0 for name in self._scorer.all_matrices)
        return {name: reader_of(self.family, name, layers) for name in self._scorer.matrices}

    @torch.inference_mode()
    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """See Engine.fit_lens. Runs without CUDA graphs and compiled code, which don't call hooks."""
        scorer = self._scorer
        if not rank:
            self._maps = {}
            return
        chosen, bare = np.arange(len(table)), np.full(len(table), -1, np.int64)
        tokens = min(scorer.max_tokens, LENS_TOKENS)
        passes = list(pack(table, chosen, bare, tokens, scorer.blocks, scorer.block_size, False))

        def run(packed: Pack, streams: Streams) -> None:
            streams.rows = torch.from_numpy(packed.rows).to(scorer.device)
            scorer._forward(packed)

        with scorer.graphs.plainly():
            hidden = len(self._norm.weight)
            self._maps = fit(self.readers, self.family.norm, passes, run, scorer.runner.model, hidden, rank)

    @torch.inference_mode()
    def __call__(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See Engine.feedback."""
        scorer = self._scorer
        if any(probe.scale for probe in plan.probes) or len(plan.probes) > 1:
            raise ConfigError(f"expected a plan of one probe of scale 0; got {plan.probes}")
        scorer.write_all(plan.probes or (Probe(scorer.state.step, 0, 0.0),))
        packed = self.packed(plan)
        at = torch.from_numpy(packed.rows).to(scorer.device)
        self.rows.ask(at)
        try:
            with nullcontext() if self.rows.fits(len(at)) else scorer.graphs.plainly():
                hidden = scorer._forward(packed)
            return self._made(plan, gradient, packed, hidden, at)
        finally:
            self.rows.clear()

    def packed(self, plan: Plan) -> Pack:
        """A plan as a single forward pass."""
        scorer = self._scorer
        packs = list(
            pack(plan.table, plan.chosen, plan.probe_of, scorer.max_tokens, scorer.blocks, scorer.block_size, False)
        )
        if len(packs) != 1:
            raise ConfigError(f"expected sequences of one forward pass for feedback; got {len(packs)} passes")
        return packs[0]

    def _made(
        self,
        plan: Plan,
        gradient: Callable[[np.ndarray], np.ndarray],
        packed: Pack,
        hidden: torch.Tensor,
        at: torch.Tensor,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        scorer, device = self._scorer, self._scorer.device
        outputs = torch.from_numpy(packed.outputs).to(device)
        sums = torch.zeros(int(plan.first_output[-1]), dtype=torch.float64, device=device)
        asked = hidden.index_select(0, at)
        row_of, targets = (torch.from_numpy(part).to(device) for part in (packed.target_rows, packed.targets))
        every = None  # computed once, if the head takes all rows at a time
        if len(at) <= self._chunk and self._head.soft_cap is None:
            every = log_softmax_(scorer.runner.model.compute_logits(asked).float())
            logps = every[row_of, targets]
        else:
            logps = scorer.log_probabilities(hidden, packed)
        sums.index_add_(0, outputs, logps.double())
        values = sums.cpu().numpy()
        slopes = np.asarray(gradient(values), np.float64)
        own = np.repeat(plan.probe_of >= 0, plan.table.n_outputs[plan.chosen])  # the bare model has no adapter to train
        weights = torch.from_numpy(np.where(own, slopes, 0.0).astype(np.float32)).to(device)[outputs]
        assert self.rows.stream is not None
        kept = Kept(self.rows.inputs, self.rows.outputs, self.rows.stream, asked)
        positions = torch.from_numpy(packed.positions[packed.rows]).to(device)
        return values, self.of_rows(kept, row_of, targets, weights, positions, every)

    def of_rows(
        self,
        kept: Kept,
        row_of: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        positions: torch.Tensor,
        logps: torch.Tensor | None = None,
    ) -> dict[str, np.ndarray]:
        """Feedback of all trained tensors; weights[m] is d loss / d log p(targets[m]) at row row_of[m], (M,) each.

        `positions` (R,) of the rows in their sequences; `logps` (R, V), see Head.back.
        """
        delta = self._head.back(kept.hidden, row_of, targets, weights, self._chunk, logps)
        delta = self._norm.back(kept.stream, delta)
        scorer, tensors = self._scorer, {}
        for name, a, b in scorer.state.tensors(scorer.state.flat):
            behind = self.behind.get(name)
            own = self._maps[name].back(delta, positions) if name in self._maps else delta
            own = own if behind is None else behind.back(kept.outputs[name], own)
            found = outer(own, kept.inputs[name], a, b, scorer.space.scaling)
            tensors |= {f"{name}.lora_{part}": tensor for part, tensor in zip("AB", found, strict=True)}
        return {name: tensors[name].cpu().numpy() for name in scorer.state.layout.shapes}


def head_of(model: Any, vocabulary: int) -> Head:
    """The LM head of a vLLM model.

    Raises:
        ConfigError: the head's weight is not plain numbers.
    """
    module = getattr(model, "lm_head", None)
    weight = getattr(module if module is not None else model.get_input_embeddings(), "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ConfigError(
            "expected an LM head with plain weights for estimator=feedback; this model's is quantised. Take "
            "estimator=rloo, or a model with a plain head"
        )
    processor = model.logits_processor
    processor = getattr(processor, "base_layer", processor)
    return Head(weight.data[:vocabulary], float(processor.scale), processor.soft_cap)
