"""The reference engine: transformers, one sequence at a time, no batching, no cache. Slow and exact.

Protocol and adapter state are those of the vLLM engine, so any difference between the two is a difference in scoring.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.engines.base import Pairs
from zoray.engines.feedback.lens import Map, fit
from zoray.engines.feedback.residual import family_of, norm_behind, outer, reader_of
from zoray.methods.snapshots import pack, unpack
from zoray.methods.spaces.base import is_embedding
from zoray.models.folder import restore
from zoray.records import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from zoray.engines.feedback.lens import Streams
    from zoray.engines.feedback.residual import Family
    from zoray.engines.packing import Plan, SequenceTable
    from zoray.methods.spaces.base import Space
    from zoray.records import Commit, Probe, Sampling, TokenSequence


@dataclass(frozen=True)
class Hf:
    """Score with transformers.

    Args:
        device: the model's device, "cpu" or "cuda".
        max_length: longest sequence; null for the model's own limit.
        deterministic: always true: each sequence has its own forward pass.
    """

    slots: ClassVar[int] = 0
    max_tokens: ClassVar[int | None] = None
    kv_cache_gib: ClassVar[float] = 0.0
    tensor_parallel: ClassVar[int] = 1

    device: str = "cpu"
    max_length: int | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        require(self.device.split(":")[0] in ("cpu", "cuda"), "engine.device to be cpu or cuda", self.device)
        require(self.deterministic is True, "engine.deterministic to be true for engine=hf", self.deterministic)
        require(self.max_length is None or self.max_length >= 8, "engine.max_length >= 8 or null", self.max_length)

    def for_probes(self, probes: int, guided: bool = False) -> Hf:
        """The same settings: there are no slots, and hooks give feedback."""
        return self

    def check(self, space: Space) -> None:
        """Any space will do."""

    def length_limit(self, model_limit: int) -> int:
        """The longest sequence that this engine will score."""
        return min(model_limit, self.max_length or model_limit)

    def start(
        self, folder: Path | str, dtype: str, matrices: Mapping[str, tuple[int, int]], space: Space, seed: int
    ) -> HfEngine:
        """Load the model and open the adapter state."""
        import torch
        from transformers import AutoModelForCausalLM

        torch_dtype = torch.float32 if dtype == "auto" and self.device == "cpu" else dtype
        # Eager attention takes its softmax in float32, whatever the model's dtype.
        attention = "sdpa" if dtype == "float64" else "eager"
        options = {"dtype": torch_dtype, "attn_implementation": attention, "device_map": self.device}
        return HfEngine(AutoModelForCausalLM.from_pretrained(folder, **options).eval(), space, matrices, seed, folder)


class HfEngine(Pairs):
    """Engine protocol (base.py) over a transformers model; adapters are applied by forward hooks."""

    def __init__(
        self, model: Any, space: Space, matrices: Mapping[str, tuple[int, int]], seed: int, folder: Path | str = ""
    ) -> None:
        self.model, self.space = model, space
        self._open = partial(space.open, matrices, seed, model.device)
        self._folder = folder
        folded = space.select(matrices) if space.folds else {}  # else not read: a quantised layer has no `weight`
        self.weights = {name: model.get_submodule(name).weight.data for name in folded}
        self.state = self._open(self.weights)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.self_test: dict[str, float] = {}
        self._active: dict[str, tuple[Any, Any]] = {}
        self._maps: dict[str, Map] = {}
        for name in self.state.matrices:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        import torch

        def add_adapter(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            if name not in self._active:
                return output
            wide = torch.promote_types(output.dtype, torch.float32)  # the adapter's, or wider
            a, b = self._active[name]
            low = a.to(wide).t()[inputs[0]] if is_embedding(name) else inputs[0].to(wide) @ a.to(wide).t()
            change = self.space.scaling * (low @ b.to(wide).t())
            return output + (change * getattr(module, "embed_scale", 1)).to(output.dtype)  # Gemma scales its embedding

        return add_adapter

    def apply(self, commits: Sequence[Commit]) -> None:
        """Advance the adapter state; commits come in step order."""
        for commit in commits:
            self.state.apply(commit)

    def score_plan(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64."""
        first = plan.first_output
        result = np.zeros(first[-1])
        for k, probe in enumerate((None, *plan.probes)):
            self._active = {} if probe is None else {name: (a, b) for name, a, b in self.state.factors(probe)}
            for i in np.flatnonzero(plan.probe_of == k - 1):
                result[first[i] : first[i + 1]] = self._score_one(plan.table[int(plan.chosen[i])])
        self._active = {}
        return result

    def feedback(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sums and residual feedback, see base.py; final norm, head and norms behind matrices use autograd."""
        import torch

        if any(probe.scale for probe in plan.probes) or len(plan.probes) > 1:
            raise ConfigError(f"expected a plan of one probe of scale 0; got {plan.probes}")
        family = family_of(self._folder, self.state.matrices)
        sums = self.score_plan(plan)
        slopes, first = gradient(sums), plan.first_output
        factors = {name: (a, b) for probe in plan.probes for name, a, b in self.state.factors(probe)}
        found = {name: [torch.zeros_like(a), torch.zeros_like(b)] for name, (a, b) in factors.items()}
        for i in np.flatnonzero(plan.probe_of >= 0):
            self._active = factors
            one, own = plan.table[int(plan.chosen[i])], slopes[first[i] : first[i + 1]]
            for name, delta, x in self._deltas(family, one, own):
                for total, part in zip(found[name], outer(delta, x, *factors[name], self.space.scaling), strict=True):
                    total += part
        self._active = {}
        state: Any = self.state
        tensors = {f"{name}.lora_{part}": pair["AB".index(part)] for name, pair in found.items() for part in "AB"}
        return sums, {name: tensors[name].cpu().numpy() for name in state.layout.shapes}

    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """Fit the maps of feedback, see base.py."""
        import torch

        self._maps = {}
        if not rank:
            return
        family = family_of(self._folder, self.state.matrices)
        layers = self.model.config.get_text_config().num_hidden_layers
        readers = {name: reader_of(family, name, layers) for name in self.state.matrices}

        def run(number: int, streams: Streams) -> None:
            one = table[number]
            streams.rows = torch.from_numpy(one.rows.astype(np.int64)).to(self.model.device)
            self.model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None].to(self.model.device))

        hidden = self.model.config.get_text_config().hidden_size
        with torch.inference_mode():
            maps = fit(readers, family.norm, range(len(table)), run, self.model, hidden, rank)
        self._maps = {name: Map(one.u.clone(), one.v.clone()) for name, one in maps.items()}

    def at_once(self) -> tuple[int, int, int]:
        """No limits: each sequence has its own forward pass."""
        return 1 << 62, 1 << 62, 1

    def _deltas(self, family: Family, one: TokenSequence, slopes: np.ndarray) -> Iterator[tuple[str, Any, Any]]:
        """For each matrix: its name, the gradient at its output (R, out) and its input (R, in), at the scored rows."""
        import torch

        device, seen, hooks = self.model.device, dict[str, Any](), []
        for name in self.state.matrices:
            keep = partial(seen.__setitem__, name)
            hook = lambda _, inputs, output, keep=keep: keep((inputs[0], output))  # noqa: E731
            hooks.append(self.model.get_submodule(name).register_forward_hook(hook))
        norm = self.model.get_submodule(family.norm)
        hooks.append(norm.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("", inputs[0])))
        rows = torch.from_numpy(np.unique(one.rows).astype(np.int64)).to(device)
        with torch.no_grad():
            self.model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None].to(device))
        for hook in hooks:
            hook.remove()
        stream = seen[""].flatten(0, -2)[rows].detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = self.model.get_output_embeddings()(norm(stream)).float()
            cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
            logits = cap * torch.tanh(logits / cap) if cap else logits
            at = torch.searchsorted(rows, torch.from_numpy(one.rows.astype(np.int64)).to(device))
            picked = logits.log_softmax(-1)[at, torch.from_numpy(one.targets.astype(np.int64)).to(device)]
            weights = torch.from_numpy(slopes[one.outputs]).to(picked)
            (delta,) = torch.autograd.grad((picked * weights).sum(), stream)
        for name in self.state.matrices:
            x, y = (part.flatten(0, -2)[rows].detach().clone() for part in seen[name])
            own = self._maps[name].back(delta.float(), rows) if name in self._maps else delta
            if (behind := norm_behind(family, name)) is not None:
                with torch.enable_grad():
                    own = torch.autograd.grad(self.model.get_submodule(behind)(y.requires_grad_()), y, own.to(y))[0]
            yield name, own.float(), x

    def _score_one(self, sequence: TokenSequence) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tokens = torch.from_numpy(sequence.tokens.astype(np.int64))[None].to(self.model.device)
            logits = self.model(input_ids=tokens).logits[0]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        picked = logps[sequence.rows.astype(np.int64), sequence.targets.astype(np.int64)].double().cpu().numpy()
        return np.bincount(sequence.outputs, weights=picked, minlength=sequence.n_outputs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Completions one after another, see base.py; samples differ from vLLM's, which draws differently."""
        import torch

        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        for k, probe in enumerate((None, *probes)):
            for i in np.flatnonzero(probe_of == k - 1).tolist():
                self._active = {} if probe is None else {name: (a, b) for name, a, b in self.state.factors(probe)}
                with torch.random.fork_rng(), torch.inference_mode():
                    torch.manual_seed(seeds[i])
                    tokens = torch.tensor([list(prompts[i])], device=self.model.device)
                    written = self.model.generate(
                        tokens,
                        attention_mask=torch.ones_like(tokens),
                        max_new_tokens=sampling.max_tokens,
                        eos_token_id=sorted(stops) or None,
                        pad_token_id=0,
                        **options,
                    )
                self._active = {}
                yield i, written[0, tokens.shape[1] :].tolist()

    def settle(self) -> None:
        """Compute now the updates that `apply` has put off."""
        self.state.settle()

    def reset(self) -> None:
        """Back to journal index 0; folded base weights are read from the model's folder again."""
        if self.space.folds:
            restore(self.weights, self._folder)
        self.state = self._open(self.weights)

    def step(self) -> int:
        """The journal index of the state."""
        return self.state.step

    def digest(self) -> str:
        """Digest of the trained tensors."""
        return self.state.digest()

    def snapshot(self, limit: int) -> bytes | None:
        """The state, packed by snapshots.pack; None if it takes more than `limit` bytes."""
        return pack(self.state, limit)

    def restore(self, data: bytes, step: int) -> None:
        """Take the state before `step` from a snapshot."""
        unpack(self.state, data, step)

    def adapter(self) -> dict[str, np.ndarray]:
        """The state as float32 arrays, see base.py."""
        return self.state.arrays()
