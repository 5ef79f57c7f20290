"""Seconds of a step at several batch sizes: zoray, the bare forward, the request path and the training loop.

One engine serves all batch sizes of an item. Contenders take turns within a round (benchmarks/timing.py), so all of
them are on the device together; one that does not fit is left out, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import busy, rates
from benchmarks.shapes import NAMES, config_of
from benchmarks.step import bare_engine, bare_forward, loop_model, loop_step, one_batch
from benchmarks.stepper import Stepper
from benchmarks.timing import ratio, rounds, spread
from benchmarks.training_loop import TrainingLoop
from benchmarks.workload import experiment
from zoray.models.folder import linear_matrices

SPARE = 12 << 30  # bytes of a device beside the weights: KV caches, graphs, activations


@dataclass(frozen=True)
class Case:
    """What is timed together.

    Args:
        model: a shape.
        pairs: of probes a step.
        space: of zoray's steps; the training loop's is LoZO's.
        batches: numbers of examples a step.
        loops: methods of the training loop.
        compiled: whether its model is also timed after torch.compile, at the first batch size.
        rounds: of the first batch size; the others have as many in proportion.
    """

    model: str
    pairs: int = 1
    space: str = "lora"
    batches: tuple[int, ...] = (16, 32, 128)
    loops: tuple[str, ...] = ("lozo", "mezo")
    compiled: bool = True
    rounds: int = 8

    def __post_init__(self) -> None:
        assert self.model in NAMES

    @property
    def name(self) -> str:
        """For the report."""
        pairs = f"-{self.pairs}-pairs" if self.pairs > 1 else ""
        return self.model + ("" if self.space == "lora" else f"-{self.space}") + pairs


def measure(case: Case, device: str, folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Ratios at the first batch size, and a row for each batch size. `where`: further settings, for tests."""
    dtype = "float32" if device == "cpu" else config_of(case.model)["torch_dtype"]
    options = {"model": case.model, "pairs": str(case.pairs), "space": case.space, "dtype": dtype, "device": device}
    e, workload = experiment({**options, "batch": str(max(case.batches))}, folder, where)
    size = getattr(torch, dtype).itemsize
    weights = size * (
        linear_size(workload) + config_of(case.model)["vocab_size"] * config_of(case.model)["hidden_size"]
    )
    loops = bool(case.loops) and 3 * weights + SPARE < free_bytes(device)
    engine = e.spec.engine.start(workload.folder, dtype, workload.matrices, e.spec.space, e.spec.seed)
    bare = bare_engine(e, workload)
    model = loop_model(workload, options) if loops else None
    able, rows = rates(device, tiny=case.model.endswith("-tiny")), []
    for batch in case.batches:
        built = experiment({**options, "batch": str(batch)}, folder, where)
        rows.append(one_size(case, options, *built, engine, bare, model, weights))
    for row in rows:
        row["of matmul rate"] = row["TFLOP/s"] / able[f"{dtype} TFLOP/s"]
        row["of bandwidth"] = row.pop("GB/s") / able["GB/s"]
    first = rows[0]
    told = ("zo_tax", "over request", "over lozo", "over mezo", "over compiled lozo", "busy", "gaps ms")
    told += ("of matmul rate", "of bandwidth")
    result = {"ms a step": first["zoray ms"], **{key: first[key] for key in told if key in first}}
    if case.loops and not loops:
        result["left out"] = "the training loop: too little memory for it beside the engines"
    return {**result, "weights GB": weights / 1e9, "rows": rows}


def one_size(
    case: Case, options: dict[str, str], e: Any, workload: Any, engine: Any, bare: Any, model: Any, weights: int
) -> dict[str, Any]:
    """The row of one batch size."""
    from zoray.scoring.replica import Replica

    workload, batch = one_batch(e, workload), e.run.batch
    replica = Replica(e.spec, workload, engine)
    stepper, first = Stepper(e, replica), batch == case.batches[0]
    forward, tokens = bare_forward(e, replica, bare)
    contenders = {"zoray": stepper.direct, "bare": forward}
    if case.pairs == 1:
        contenders["request"] = stepper.request
    if model is not None:
        contenders |= {method: loop_step(e, workload, TrainingLoop(model, method)) for method in case.loops}
        if case.compiled and first:
            faster = TrainingLoop(model, case.loops[0])
            faster.model = torch.compile(model)
            contenders[f"compiled {case.loops[0]}"] = loop_step(e, workload, faster)
    count = max(2, case.rounds * case.batches[0] // batch)
    seconds = rounds(contenders, count)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens}
    for name, values in seconds.items():
        row |= {f"{name} ms": 1000 * spread(values)["median"]}
    row["zo_tax"] = ratio(seconds["zoray"], seconds["bare"])["median"]
    row |= {
        f"over {name}": ratio(values, seconds["zoray"])["median"]
        for name, values in seconds.items()
        if name not in ("zoray", "bare")
    }
    median = row["zoray ms"] / 1000
    row |= {"TFLOP/s": 2 * linear_size(workload) * tokens / median / 1e12, "GB/s": weights / median / 1e9}
    return row | busy(stepper.direct, options["device"])


def linear_size(workload: Any) -> int:
    """Parameters of the linear layers of a workload's model, without its embedding and head."""
    return sum(out * into for out, into in linear_matrices(workload.folder, "all-linear").values())


def free_bytes(device: str) -> int:
    """Memory of a card that is free; a CPU's is not asked for."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 1 << 60
