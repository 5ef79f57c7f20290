"""How long is a step of residual feedback, against the bare forward pass of the same tokens; and how much memory is it?

    python -m benchmarks.feedback_step                             SmolLM2-135M, batch 16
    python -m benchmarks.feedback_step tasks=text rounds=20 memory=false
    python -m benchmarks.feedback_step model=opt-1.3b dtype=float16 random weights of a real shape, random tokens

`feedback` is a replica's whole step without Ray: the last step's commit, the packed forward whose rows are kept, the
gradient at the end of the stream, the feedback of all matrices as whole numbers, their signs, the update. `bare` is the
packed forward of the same tokens without any adapter (on CUDA of an engine that has none): tax = feedback / bare, the
median of paired ratios as in benchmarks/step.py. Of `choice` one row of each of 16 movie reviews is asked for; of
`text` all of 16 completions, each a review behind another one.

`memory` is the peak of a process that takes such steps against that of plain serving, see benchmarks/memory.py. The
maps of feedback are fitted when a replica starts, which is not part of a step's time but of its peak.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import memory
from benchmarks.options import parse
from benchmarks.step import bare_engine, bare_forward, one_batch
from benchmarks.stepper import Stepper
from benchmarks.timing import ratio, rounds, spread
from benchmarks.workload import experiment

DEFAULTS = {"model": "smollm2", "dtype": "auto", "batch": "16", "rounds": "8", "tasks": "choice,text", "device": "cpu"}
DEFAULTS |= {"memory": "true"}
FIXED = {"estimator": "feedback", "space": "lora", "pairs": "0"}


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


def measure(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """The result for some options. `where`: further settings of the experiment, for tests."""
    import torch

    tasks, engine = options["tasks"].split(","), None
    result: dict[str, Any] = {"benchmark": "feedback_step", **options, "threads": torch.get_num_threads()}
    if options["memory"] == "true":
        for task in tasks:
            one = {**memory.DEFAULTS, **{k: options[k] for k in ("model", "dtype", "batch")}, **FIXED, "task": task}
            found = memory.measure(one)
            result[f"{task}_memory"] = {key: found[key] for key in ("plain_bytes", "zoray_bytes", "ratio")}
    for task in tasks:
        found, engine = timed(options, task, folder, where, engine)
        result |= {f"{task}_{name}": value for name, value in found.items()}
    return result


def timed(
    options: dict[str, str], task: str, folder: Path, where: tuple[str, ...], engine: Any
) -> tuple[dict[str, Any], Any]:
    """The times of one task, and the engine for the next one, which takes it from its beginning."""
    from zoray.scoring.replica import Replica

    e, workload = experiment({**options, **FIXED, "task": task}, folder, where)
    workload = one_batch(e, workload)
    if engine is not None:
        engine.reset()
    replica = Replica(e.spec, workload, engine)
    stepper = Stepper(e, replica)
    other = bare_engine(e, workload) if options["device"] == "cuda" else replica.engine
    bare, tokens = bare_forward(e, replica, other)
    seconds = rounds({"feedback": stepper.direct, "bare": bare}, int(options["rounds"]))
    asked = sum(len({*one.rows.tolist()}) for some in workload.encoded["train"] for one in some)
    found: dict[str, Any] = {"tokens": tokens, "rows": asked, "numbers": e.space.trained(workload.matrices)}
    found |= {f"{name}_seconds": spread(values) for name, values in seconds.items()}
    return found | {"tax": ratio(seconds["feedback"], seconds["bare"])}, replica.engine


if __name__ == "__main__":
    main(sys.argv[1:])
