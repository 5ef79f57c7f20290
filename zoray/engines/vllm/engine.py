"""The vLLM engine: configuration, start-up checks, and the calls into the worker (worker.py)."""

from __future__ import annotations

import gc
import hashlib
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.engines.base import Pairs
from zoray.engines.feedback.residual import family_of
from zoray.engines.packing import by_slots
from zoray.engines.slots import DENSE_COLUMNS, FEEDBACK, KERNELS
from zoray.records import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np

    from zoray.engines.packing import Plan, SequenceTable
    from zoray.methods.spaces.base import Space
    from zoray.records import Commit, Probe, Sampling

SLOTS = 16  # at most, if their number is not set
SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM allocates slots for


@dataclass(frozen=True)
class Vllm:
    """Score with vLLM, on CPU or CUDA, on the wheel as it is.

    Args:
        slots: adapters resident at the same time; null: one per probe of a step, at most 16. A step with more probes is
            scored in several passes.
        max_tokens: tokens of one forward; larger plans are split.
        max_length: longest sequence; null for the model's own limit, at most `max_tokens`.
        scoring: "direct", the packed forward; or "request", vLLM's own request path, far slower, to check "direct".
        kv_cache_gib: memory for the KV cache. Scoring needs max_tokens of it, serving more.
        deterministic: score every tile in its own forward, so that a score's last bits do not depend on a replica's
            other tiles; slower.
        eager: no CUDA graphs and no torch.compile, which take time at start; a CPU never has them.
        lora_kernels: on CUDA. "dense": a few products over all slots, which grow with slots * rank; "punica": vLLM's;
            "auto": dense up to 128 columns.
        tensor_parallel: number of GPUs (or CPU processes) that share the model; with space=lora only.
        load_format: "auto", or "dummy" for random weights, for benchmarks without the model's weights.
        feedback: let every forward keep the rows that estimator=feedback needs, and check them at start. A run with
            that estimator sets it itself; on a CPU it only adds the check.
    """

    slots: int | None = None
    max_tokens: int = 4096
    max_length: int | None = None
    scoring: str = "direct"
    kv_cache_gib: float = 1.0
    deterministic: bool = False
    eager: bool = False
    lora_kernels: str = "auto"
    tensor_parallel: int = 1
    load_format: str = "auto"
    feedback: bool = False

    def __post_init__(self) -> None:
        ok = self.slots is None or (isinstance(self.slots, int) and self.slots >= 1)
        require(ok, "engine.slots to be at least 1, or null", self.slots)
        require(isinstance(self.max_tokens, int) and self.max_tokens >= 64, "engine.max_tokens >= 64", self.max_tokens)
        require(self.max_length is None or self.max_length >= 8, "engine.max_length >= 8 or null", self.max_length)
        if 3 * self.resident > self.max_tokens:
            raise ConfigError(
                f"expected engine.max_tokens of at least 3 x engine.slots, for the check of all slots at start; got "
                f"{self.max_tokens} and {self.resident}"
            )
        require(self.tensor_parallel >= 1, "engine.tensor_parallel to be at least 1", self.tensor_parallel)
        require(self.scoring in ("direct", "request"), "engine.scoring to be direct or request", self.scoring)
        require(self.load_format in ("auto", "dummy"), "engine.load_format to be auto or dummy", self.load_format)
        kinds = ("auto", "dense", "punica")
        require(self.lora_kernels in kinds, f"engine.lora_kernels to be one of {', '.join(kinds)}", self.lora_kernels)
        require(isinstance(self.feedback, bool), "engine.feedback to be true or false", self.feedback)
        if self.feedback and self.tensor_parallel > 1:
            raise ConfigError("expected engine.tensor_parallel=1 with estimator=feedback; take more replicas instead")
        require(self.kv_cache_gib > 0, "engine.kv_cache_gib to be positive", self.kv_cache_gib)

    @property
    def resident(self) -> int:
        """The number of slots."""
        return self.slots or SLOTS

    def for_probes(self, probes: int, guided: bool = False) -> Vllm:
        """With slots for a step of this many probes, unless their number is set: unused slots cost time on CUDA.

        `guided`: with feedback.
        """
        found = self if self.slots else replace(self, slots=min(probes, SLOTS))
        return replace(found, feedback=True) if guided else found

    def dense(self, rank: int) -> bool:
        """Whether CUDA uses dense products for adapters of this rank."""
        columns = self.resident * slot_rank(rank)
        return self.lora_kernels == "dense" or (self.lora_kernels == "auto" and columns <= DENSE_COLUMNS)

    def check(self, space: Space) -> None:
        """Raise ConfigError if this engine can't have this space."""
        if self.tensor_parallel > 1 and space.folds:
            raise ConfigError(
                "expected engine.tensor_parallel=1 with a space that folds into the base weights; take space=lora"
            )

    def length_limit(self, model_limit: int) -> int:
        """The longest sequence that this engine will score."""
        return min(model_limit, self.max_tokens, self.max_length or model_limit)

    def start(
        self, folder: Path | str, dtype: str, matrices: Mapping[str, tuple[int, int]], space: Space, seed: int
    ) -> VllmEngine:
        """Load the model and open the adapter state. `matrices`: the linear layers, {canonical name: (out, in)}.

        Raises:
            ConfigError: vLLM cannot run this model, or has no LoRA for it.
        """
        self.check(space)
        if self.feedback:
            family_of(folder, space.select(matrices))
        in_this_process()
        check_lora_support(folder)
        with plain_cpu_weights() if space.folds else nullcontext():
            llm = self._load(folder, dtype, self.lora_arguments(matrices, space))
        return VllmEngine(llm, space, matrices, seed, folder, self.scoring)

    def start_bare(self, folder: Path | str, dtype: str) -> BareVllm:
        """Load the model for scoring without adapters.

        Raises:
            ConfigError: vLLM cannot run this model.
        """
        in_this_process()
        return BareVllm(self._load(folder, dtype, {}))

    def _load(self, folder: Path | str, dtype: str, adapters: Mapping[str, Any]) -> Any:
        from vllm import LLM

        if dtype == "float64":
            raise ConfigError("expected model.dtype of at most 32 bits; vLLM has no float64. Take engine=hf for that")
        if self.tensor_parallel > 1 and _on_cpu():  # each process gets its share of the cores
            os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.tensor_parallel))
        gc.unfreeze()  # vLLM has frozen its objects
        gc.collect()  # collecting an unused engine ends vLLM's process groups, so it must happen before the next starts
        gc.freeze()  # vLLM collects seven times while it starts; these objects need not be searched again
        try:
            return LLM(**self.llm_arguments(folder, dtype), **adapters)
        except ValueError as error:  # a head too large for its LoRA, a target that it can't wrap, ...
            raise ConfigError(f"vLLM does not load {folder} with these settings: {error}") from error

    def lora_arguments(self, matrices: Mapping[str, tuple[int, int]], space: Space) -> dict[str, Any]:
        """vLLM's arguments for slots that take the space's adapters."""
        return {
            "enable_lora": True,
            "max_loras": self.resident,
            "max_lora_rank": slot_rank(space.rank),
            "lora_dtype": "auto",
            "lora_target_modules": sorted({name.rsplit(".", 1)[-1] for name in space.select(matrices)}),
            "additional_config": self._compiled_for(space.rank, sorted(space.select(matrices))),
        }

    def llm_arguments(self, folder: Path | str, dtype: str) -> dict[str, Any]:
        """vLLM's arguments for a model to score with."""
        from zoray.engines.vllm.graphs import compilation

        eager = self.eager or _on_cpu()
        return dict(
            model=str(folder),
            dtype=_dtype(dtype),
            load_format=self.load_format,
            seed=0,
            max_model_len=self.length_limit(_model_limit(folder)),
            max_num_batched_tokens=self.max_tokens,
            max_num_seqs=min(max(256, 4 * self.resident), self.max_tokens),  # the self-test has 3 rows a slot
            enforce_eager=eager,
            tensor_parallel_size=self.tensor_parallel,
            # Within a Ray actor vLLM would use Ray for its ranks, each on a GPU in its own actor.
            **({"distributed_executor_backend": "mp"} if self.tensor_parallel > 1 else {}),
            **({} if eager else {"compilation_config": compilation(self.max_tokens)}),
            **({} if _on_cpu() else {"gpu_memory_utilization": 0.05}),  # else vLLM wants nearly all of it free
            enable_prefix_caching=False,
            kv_cache_memory_bytes=int(self.kv_cache_gib * 2**30),
            worker_extension_cls="zoray.engines.vllm.worker.ZorayWorker",
            disable_log_stats=True,
            skip_tokenizer_init=True,  # sequences come as tokens
            block_size=32 if _on_cpu() else None,  # the CPU default of 128 is mostly padding
        )

    def _compiled_for(self, rank: int, names: Sequence[str] = ()) -> dict[str, Any]:
        """Config entries for all that changes compiled layers: vLLM caches compiled models on disk by their config.

        `names`: of the matrices with adapters.
        """
        folder = Path(__file__).parents[1]
        sources = b"".join((folder / name).read_bytes() for name in ("layers/lora_cuda.py", "feedback/kept.py"))
        kept = {FEEDBACK: list(names)} if self.feedback else {}
        kernels = "dense" if self.dense(rank) else "punica"
        return {KERNELS: kernels, "zoray": hashlib.sha256(sources).hexdigest()[:16], **kept}


class Worker(Pairs):
    """One vLLM instance in this process, and the calls into its worker."""

    llm: Any

    def _call(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]


class BareVllm(Worker):
    """The bare model, without adapters, with the same packed forward."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.dtype: str = self._call("zoray_open_bare")

    def score_plan(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64.

        Raises:
            ConfigError: the plan has probes.
        """
        if len(plan.probes):
            raise ConfigError(f"expected a plan of the bare model; got one with {len(plan.probes)} probes")
        return self._call("zoray_score", plan)


class VllmEngine(Worker):
    """Engine protocol (base.py) over one vLLM instance in this process."""

    def __init__(
        self,
        llm: Any,
        space: Space,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        folder: Path | str,
        scoring: str = "direct",
    ) -> None:
        self.llm, self._folder, self.scoring = llm, str(folder), scoring
        self.self_test: dict[str, float]
        self.self_test, self.dtype = self._call("zoray_open", space, dict(matrices), seed)

    def apply(self, commits: Sequence[Commit]) -> None:
        """Advance the adapter state; commits come in step order."""
        self._call("zoray_apply", tuple(commits))

    def score_plan(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64."""
        if self.scoring == "direct":
            return self._call("zoray_score", plan)
        return self._by_requests(plan)

    def feedback(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sums and residual feedback, see base.py and feedback.py."""
        return self._call("zoray_feedback", plan, gradient)

    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """Fit the maps of feedback, see base.py."""
        self._call("zoray_fit_lens", table, rank)

    def at_once(self) -> tuple[int, int, int]:
        """Tokens and rows of one forward pass for feedback, and those of a KV block, see base.py."""
        return self._call("zoray_at_once")

    def _by_requests(self, plan: Plan) -> np.ndarray:
        from vllm.lora.request import LoRARequest

        from zoray.engines.vllm.requests import score_slots

        slots = self._call("zoray_register")
        adapters = [LoRARequest(f"slot {slot}", slot + 1, "/none") for slot in range(slots)]

        def part(probes: tuple[Probe, ...], members: np.ndarray, slot_of: np.ndarray) -> np.ndarray:
            self._call("zoray_write", probes)
            return score_slots(self.llm, plan, members, slot_of, adapters)

        return plan.gather(slots, part)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Completions by vLLM's own request path, see base.py; more probes than slots take several batches."""
        from vllm.lora.request import LoRARequest

        from zoray.engines.vllm.requests import write

        slots = self._call("zoray_register")
        adapters = [LoRARequest(f"slot {slot}", slot + 1, "/none") for slot in range(slots)]
        for some, members, slot_of in by_slots(probes, probe_of, slots):
            self._call("zoray_write", some)
            chosen = [
                (prompts[i], seeds[i], adapters[s] if s >= 0 else None) for i, s in zip(members, slot_of, strict=True)
            ]
            for number, tokens in write(self.llm, chosen, sampling, stops):
                yield int(members[number]), tokens

    def settle(self) -> None:
        """Compute now the updates that `apply` has put off."""
        self._call("zoray_settle")

    def reset(self) -> None:
        """Back to journal index 0; folded base weights are read from the model's folder again."""
        self._call("zoray_reset", self._folder)

    def step(self) -> int:
        """The journal index of the state."""
        return self._call("zoray_step")

    def digest(self) -> str:
        """Digest of the trained tensors."""
        return self._call("zoray_digest")

    def snapshot(self, limit: int) -> bytes | None:
        """The state, packed by snapshots.pack; None if it takes more than `limit` bytes."""
        return self._call("zoray_snapshot", limit)

    def restore(self, data: bytes, step: int) -> None:
        """Take the state before `step` from a snapshot."""
        self._call("zoray_restore", data, step)

    def adapter(self) -> dict[str, np.ndarray]:
        """The state as float32 arrays, see base.py."""
        return self._call("zoray_adapter")


def slot_rank(rank: int) -> int:
    """The rank of the slots that vLLM allocates for adapters of `rank`."""
    return min(size for size in SLOT_RANKS if size >= rank)


def in_this_process() -> None:
    """One process and one model runner for vLLM in any version, since the packed scorer calls the worker directly."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the pool binds the process itself
    # A replica lies within one node, but torch's gloo listens on the address of the host's name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")


@contextmanager
def plain_cpu_weights() -> Iterator[None]:
    """While a model loads, keep its linear weights plain on a CPU, where vLLM would pack them into oneDNN handles.

    Folding writes base weights in place, which a packed copy would miss.
    """
    from vllm.model_executor.layers import utils

    original = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if original is None or not _on_cpu():
        yield
        return

    def keep(layer: Any, remove_weight: bool) -> None:
        import torch

        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def check_lora_support(folder: Path | str) -> None:
    """Raise ConfigError if vLLM has no implementation of the model, or one without LoRA; loads no weights."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    advice = "Take a model of another family, or engine=hf (slow)"
    architectures = AutoConfig.from_pretrained(folder).architectures or []
    supported = set(ModelRegistry.get_supported_archs())
    known = [name for name in architectures if name in supported]
    if not known:
        raise ConfigError(
            f"vLLM does not know the architecture of {folder} ({architectures or 'config.json names none'}). {advice}"
        )
    loaded = ModelRegistry.models[known[0]].load_model_cls()
    if not getattr(loaded, "supports_lora", False):
        raise ConfigError(
            f"vLLM has no LoRA support for {known[0]} ({folder}), and probes live in LoRA slots. {advice}"
        )


def _model_limit(folder: Path | str) -> int:
    from zoray.models.folder import max_length

    return max_length(folder)


def _dtype(dtype: str) -> Any:
    """float32 on CPU unless asked otherwise: exact, and the fastest where there are no bf16 units."""
    return "float32" if dtype == "auto" and _on_cpu() else dtype


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
