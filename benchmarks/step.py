"""How long is a step, against the bare forward pass, and against the training loop? Side by side in one run.

    python -m benchmarks.step                                      SmolLM2-135M, movie reviews, batch 16, one pair
    python -m benchmarks.step pairs=4 batch=32 space=lora
    python -m benchmarks.step model=opt-1.3b dtype=float16         random weights of a real shape, random tokens

`zoray` is a replica's whole step without Ray: the last step's commit, slot writes, packed scoring, losses, estimate and
update. `bare` is the packed forward of the same tokens without any adapter: zo_tax = zoray / bare. On a CPU it is the
same engine's; on CUDA, where the products of adapters are part of the compiled model, that of an engine that has none.
`request` is the step through vLLM's request path, `loop` the official training loop's on transformers
(benchmarks/training_loop.py). `parts` chooses among them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.options import parse
from benchmarks.stepper import Stepper
from benchmarks.timing import ratio, rounds, spread
from benchmarks.training_loop import TrainingLoop, option_batch
from benchmarks.workload import experiment

DEFAULTS = {"model": "smollm2", "batch": "16", "pairs": "1", "space": "lora", "dtype": "auto", "rounds": "10"}
DEFAULTS |= {"parts": "zoray,bare,request,loop", "device": "cpu", "method": "lozo"}


def main(arguments: list[str]) -> None:
    """Time the parts and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


def measure(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """The result for some options. `where`: further settings of the experiment, for tests."""
    from zoray.scoring.replica import Replica

    e, workload = experiment(options, folder, where)
    workload = one_batch(e, workload)
    replica = Replica(e.spec, workload)
    stepper = Stepper(e, replica)
    bare, tokens = bare_forward(e, replica, bare_engine(e, workload) if options["device"] == "cuda" else replica.engine)
    contenders = {"zoray": stepper.direct, "bare": bare, "request": stepper.request}
    if "loop" in options["parts"]:
        contenders["loop"] = loop_step(e, workload, TrainingLoop(loop_model(workload, options), options["method"]))
    parts = options["parts"].split(",")
    seconds = rounds({name: step for name, step in contenders.items() if name in parts}, int(options["rounds"]))
    result: dict[str, Any] = {"benchmark": "step", **options, "tokens_per_step": tokens, "threads": _threads()}
    result |= {f"{name}_seconds": spread(values) for name, values in seconds.items()}
    result["seconds_per_step"] = spread(seconds["zoray"])
    ratios = {"zo_tax": ("zoray", "bare"), "speedup_over_request_path": ("request", "zoray")}
    for name, of in (ratios | {"speedup_over_training_loop": ("loop", "zoray")}).items():
        if set(of) <= seconds.keys():
            result[name] = ratio(*(seconds[part] for part in of))
    return result


def one_batch(e: Any, workload: Any) -> Any:
    """The workload with the examples of the first step only: every step of every contender has the same tokens."""
    from zoray.scoring.workload import order_of

    train = workload.splits.train
    first = order_of(e.spec, workload).step(0).tolist()
    encoded = {**workload.encoded, "train": tuple(workload.encoded["train"][i] for i in first)}
    return replace(workload, splits=replace(workload.splits, train=tuple(train[i] for i in first)), encoded=encoded)


def bare_engine(e: Any, workload: Any) -> Any:
    """An engine for the same model that knows nothing of adapters."""
    return e.spec.engine.start_bare(workload.folder, e.spec.model.dtype)


def bare_forward(e: Any, replica: Any, engine: Any) -> tuple[Any, int]:
    """A function that scores the sequences of a step on an engine without adapters; tokens of a step."""
    import numpy as np

    from zoray.records import Probe, Tile
    from zoray.scoring.tables import EncodedSplit

    workload = replica.workload
    split = EncodedSplit(workload.splits.train, workload.encoded["train"])
    number, count = {"step": 0}, len(e.estimator.ask(0))
    tokens = []

    def forward() -> None:
        tile = Tile((Probe(number["step"], 0, 0.0),), 0, e.run.batch)
        examples = np.tile(replica._indices(tile), count)
        encoded, chosen = split.take(examples)
        engine.score_plan(encoded.plan((), np.full(len(chosen), -1), chosen))
        tokens.append(int(encoded.tokens[chosen].sum()))
        number["step"] += 1

    forward()
    return forward, tokens[0]


def loop_model(workload: Any, options: dict[str, str]) -> Any:
    """The model on transformers, for the training loop; random weights but for smollm2."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if options["dtype"] == "auto" else getattr(torch, options["dtype"])
    if options["model"] == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(workload.folder, dtype=dtype)
    else:
        with torch.device(options["device"]):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workload.folder), dtype=dtype)
    return model.to(options["device"]).eval()


def loop_step(e: Any, workload: Any, loop: TrainingLoop) -> Any:
    """A function that takes the next step of the training loop on the same examples."""
    from zoray.scoring.workload import order_of

    train, order = workload.splits.train, order_of(e.spec, workload)

    def step() -> None:
        indices = order.step(loop.steps)
        loop.step([option_batch(workload.encoded["train"][i], train[i].label) for i in indices])

    return step


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main(sys.argv[1:])
