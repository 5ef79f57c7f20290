"""What a run will need, before it starts: tokens, slots, memory, bytes, time.

Tokens, slots and weights are exact, the rest of the memory is an upper estimate; time is the forward pass's arithmetic
at the rate of a matrix product measured here, so it tells minutes from hours, no more.
"""

from __future__ import annotations

import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoray.engines.packing import LOGITS_ELEMENTS
from zoray.engines.slots import STAGED_ELEMENTS
from zoray.methods.estimators import Feedback
from zoray.methods.spaces.base import CACHED_ELEMENTS
from zoray.models.folder import parameters
from zoray.records import Commit, Scores
from zoray.records.tiles import Grid, probes_of, scored
from zoray.scoring.workload import order_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from zoray.run.experiment import Experiment
    from zoray.scoring.workload import Workload

PROCESS = 1.5 * 2**30  # bytes of Python, torch, vLLM and Ray in a replica's process
SAMPLED_STEPS = 50
TAX = 1.15  # factor for adapters, head and host over the inner layers' products
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # by vLLM, into one module
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Footprint:
    """What a run needs. Bytes and seconds are for one replica that does all the work."""

    trained: int
    matrices: int
    probes: int
    sequences: int  # per step; each option of several tokens counts as one
    tokens: tuple[int, int, int]  # per step: mean, least, most over the first steps
    forwards: int  # per step, by slots and tokens
    memory: dict[str, int]  # bytes by part
    to_replica: int  # bytes of a step's message
    from_replica: int
    seconds: float  # per step
    flops: float  # per second, as measured

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.memory.values())


REMEDIES = {
    "weights": "Take a smaller model, or model.dtype=bfloat16",
    "KV cache": "Lower engine.kv_cache_gib",
    "adapter slots": "Lower engine.slots or space.rank; a step with more probes than slots takes several passes",
    "adapter state": "Lower space.rank, name fewer space.targets, or set space.keep_base=false",
    "directions": "Lower space.rank, or name fewer space.targets",
    "activations": "Lower engine.max_tokens",
    "feedback": "Lower estimator.lens, or name fewer space.targets",
    "process": "Lower cluster.replicas",
}


def make(e: Experiment, workload: Workload, device: str = "cpu") -> Footprint:
    """The plan of an experiment."""
    matrices = e.space.select(workload.matrices)
    count, embeddings, hidden, vocabulary = parameters(workload.folder)
    size = 2 if e.model.dtype in ("float16", "bfloat16") or (e.model.dtype == "auto" and device != "cpu") else 4
    grid, tokens = Grid.of(e.spec, 0), step_tokens(e, workload)
    probes, most = len(e.estimator.ask(0)), max(tokens)
    sequences = scored(grid.tiles) * len(workload.encoded["train"][0])
    slots, budget = e.spec.engine.slots or 0, e.engine.max_tokens or most
    ranks = e.engine.tensor_parallel
    passes = max(1, -(-probes // slots)) if slots else probes
    forwards = max(passes, -(-int(np.mean(tokens)) // budget))
    at_once = min(budget, most)
    drawn = e.space.drawn(workload.matrices)
    staged = min(probes, slots) * drawn if device == "cpu" else 0  # the buffer for numbers written into slots
    staged = staged if staged <= STAGED_ELEMENTS else 0
    widest = max(out for out, _ in workload.matrices.values())
    copy = size * sum(out * into for out, into in matrices.values()) if e.space.keep_base else 0
    memory = {
        "weights": count * size // (1 if device == "cpu" else ranks),
        "KV cache": int(e.engine.kv_cache_gib * GIB),
        "adapter slots": slots * size * slot_elements(e, matrices, workload.matrices, device),
        "adapter state": 4 * e.space.kept(workload.matrices, e.optimizer.momentum > 0) + copy,
        "directions": 4 * (min(CACHED_ELEMENTS, e.estimator.directions * drawn) + staged),
        "activations": at_once * size * (2 * widest + 4 * hidden) + 4 * min(LOGITS_ELEMENTS, at_once * vocabulary),
        **(
            {"feedback": feedback_bytes(e.estimator.lens, matrices, hidden, count * size)}
            if isinstance(e.estimator, Feedback)
            else {}
        ),
        "process": int(PROCESS) * (ranks if device == "cpu" else 1),
    }
    commit, answer = messages(e, matrices, _losses(grid))
    flops = matmul_rate(device, size, hidden, widest, at_once)
    inner = 2 * (count - embeddings) * float(np.mean(tokens))
    return Footprint(
        trained=e.space.trained(workload.matrices),
        matrices=len(matrices),
        probes=probes,
        sequences=sequences,
        tokens=(round(float(np.mean(tokens))), min(tokens), most),
        forwards=forwards,
        memory=memory,
        to_replica=len(pickle.dumps(((commit,), 1, "train", ((0, 1),), False))),
        from_replica=len(pickle.dumps(answer)),
        seconds=TAX * inner / flops,
        flops=flops,
    )


def lines(plan: Footprint, e: Experiment, device: str, limit: int, replicas: int) -> list[str]:
    """The plan as text."""
    mean, least, most = plan.tokens
    rows = [
        ("model", f"{e.model.path}, {plan.memory['weights'] / MIB:,.0f} MiB of weights"),
        ("space", f"{type(e.space).__name__.lower()}: {plan.trained:,} numbers trained in {plan.matrices} matrices"),
        ("a step", f"{plan.probes} probes, {plan.sequences} sequences, {plan.forwards} forward(s)"),
        ("", f"{mean:,} tokens ({least:,} to {most:,} in the first {SAMPLED_STEPS} steps)"),
        ("memory", f"{plan.total / GIB:.2f} GiB a replica, of {limit / GIB:.1f} GiB ({device})"),
        *(("", f"{part:<14} {size / MIB:>9,.0f} MiB") for part, size in plan.memory.items()),
        ("on the wire", f"{plan.to_replica:,} bytes to a replica, {plan.from_replica:,} back, each step"),
        *(
            [("journal", f"about {plan.to_replica * 5 / 4 * e.run.steps / MIB:,.0f} MiB for {e.run.steps:,} steps")]
            if e.estimator.guided
            else []
        ),
        ("time", f"about {plan.seconds:.2g} s a step at the {plan.flops / 1e9:,.0f} GFLOP/s measured here"),
        (
            "",
            f"about {_duration(plan.seconds * e.run.steps / replicas)} for {e.run.steps:,} steps, without evaluations",
        ),
    ]
    if replicas > 1:
        rows.append(("", f"shared by {replicas} replicas, each with a device or cores of its own"))
    return [f"{name:<12} {text}" for name, text in rows]


def messages(e: Experiment, matrices: Mapping[str, tuple[int, int]], losses: int) -> tuple[Commit, Scores]:
    """A commit and an answer as large as a step's."""
    if not e.estimator.guided:
        return Commit(0, (0.1,) * e.estimator.directions), Scores(np.zeros(losses), 0.0, 0)
    trained = e.space.trained(matrices)
    signs, gains = bytes(-(-trained // 8)), (0.1,) * len(matrices)
    return Commit(0, (), gains=gains, signs=signs), Scores(
        np.zeros(losses), 0.0, 0, feedback=np.zeros(trained, np.int8)
    )


def feedback_bytes(lens: int, matrices: Mapping[str, tuple[int, int]], hidden: int, weights: int) -> int:
    """Bytes of the rows that a forward keeps, the maps, and the products that the maps are fitted from."""
    rows, fit = max(1 << 26, int(0.04 * weights)), min(1 << 28, 12 * hidden * hidden * len(matrices))
    return rows + (8 * lens * hidden * len(matrices) + fit if lens else 0)


def step_tokens(e: Experiment, workload: Workload) -> list[int]:
    """Forward tokens of each of the first steps; completions count at their maximum length."""
    order, tokens = order_of(e.spec, workload), []
    for step in range(min(SAMPLED_STEPS, e.run.steps)):
        lengths = np.array([_length(workload, int(i)) for i in order.step(step)])
        tiles = Grid.of(e.spec, step).tiles
        tokens.append(sum(int(lengths[t.start : t.stop].sum()) * len(t.probes) for t in tiles))
    return tokens


def _length(workload: Workload, index: int) -> int:
    """The most tokens a training example takes under one probe."""
    example, sequences = workload.example("train", index)
    sampling = workload.parts[example.part].objective.sampling
    return sum(len(sequence.tokens) for sequence in sequences) + (0 if sampling is None else 1 + sampling.max_tokens)


def slot_elements(
    e: Experiment, chosen: dict[str, tuple[int, int]], matrices: dict[str, tuple[int, int]], device: str = "cpu"
) -> int:
    """Numbers in one slot. vLLM rounds the rank up, and wraps every module that holds a matrix of a chosen name.

    Where CUDA uses dense products, the B of matrices fused in one module are padded with zeros.
    """
    from zoray.engines.vllm.engine import Vllm, slot_rank

    leaves = {name.rpartition(".")[2] for name in chosen}
    leaves |= {leaf for fused in FUSED if leaves & fused for leaf in fused}
    engine = e.spec.engine
    dense = device != "cpu" and isinstance(engine, Vllm) and engine.dense(e.space.rank)
    total = 0
    for name, (out, into) in matrices.items():
        leaf = name.rpartition(".")[2]
        beside = max((len(fused) for fused in FUSED if leaf in fused), default=1) if dense else 1
        total += (out * beside + into) if leaf in leaves else 0
    return slot_rank(e.space.rank) * total


def matmul_rate(device: str, size: int, into: int, out: int, tokens: int) -> float:
    """Floating-point operations per second of x W^T at the model's sizes, the best of a few."""
    import torch

    dtype = torch.float32 if size == 4 else torch.bfloat16
    x, w = (torch.ones(rows, into, dtype=dtype, device=device) for rows in (min(tokens, 2048), out))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        _sync(x @ w.t())
        best = min(best, time.perf_counter() - began)
    return 2 * x.shape[0] * into * out / best


def _sync(tensor: torch.Tensor) -> None:
    tensor[:1, :1].cpu()


def _losses(grid: Grid) -> int:
    return scored(grid.tiles) if grid.per_example else len(probes_of(grid.tiles))


def device_of_here() -> tuple[str, int]:
    """The device that a replica would use here, and its memory in bytes."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")  # a container's or a job's own limit
    given = group.read_text(encoding="utf-8").strip() if group.is_file() else "max"
    return "cpu", min(total, int(given)) if given.isdecimal() else total


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
