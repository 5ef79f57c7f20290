"""How much memory does tuning take beyond plain serving? Peak of a replica against vLLM with the same KV cache.

    python -m benchmarks.memory [space=lora] [batch=16] [pairs=1] [model=smollm2] [steps=3]
    python -m benchmarks.memory estimator=feedback [task=text]

Each side is a process of its own (`apart=0`: one after the other in this one, which counts what Python takes in both).
`plain` is vLLM without LoRA that generates one token for as many sequences as a step scores; `zoray` a replica that
takes steps. On a CPU it is the process's peak resident size, on CUDA the peak of the allocator. The ratio is zoray /
plain. On a CPU neither side compiles the model, which would take memory of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.options import parse

DEFAULTS = {"space": "lora", "batch": "16", "pairs": "1", "model": "smollm2", "dtype": "auto", "steps": "3", "side": ""}
DEFAULTS |= {"apart": "1", "estimator": "two_point", "task": "choice"}


def main(arguments: list[str]) -> None:
    """Measure both sides and print one JSON object; with `side=` one of them, in this process."""
    options = parse(arguments, DEFAULTS)
    if options["side"]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(peak(options, Path(folder))))
        return
    print(json.dumps(measure(options)))


def measure(options: dict[str, str], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Peak bytes of both sides, and their ratio. `where`: further settings of the experiment in this process."""
    result: dict[str, Any] = {"benchmark": "memory", **options}
    for side in ("plain", "zoray"):
        one = {**options, "side": side}
        result[f"{side}_bytes"] = in_process(one) if options["apart"] == "1" else here(one, where)
    result["ratio"] = result["zoray_bytes"] / result["plain_bytes"]
    return result


def in_process(options: dict[str, str]) -> int:
    """Peak bytes of one side, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", *(f"{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def here(options: dict[str, str], where: tuple[str, ...]) -> int:
    """Peak bytes of this process during one side."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    with tempfile.TemporaryDirectory() as folder:
        return peak(options, Path(folder), where)


def peak(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> int:
    """Peak bytes of one side, which this process is. `where`: further settings of the experiment, for tests."""
    from benchmarks.stepper import Stepper
    from benchmarks.workload import experiment
    from zoray.scoring.replica import Replica

    e, workload = experiment(options, folder, where)
    if options["side"] == "zoray":
        stepper = Stepper(e, Replica(e.spec, workload))
        for _ in range(int(options["steps"])):
            stepper.direct()
    else:
        count = int(options["batch"]) * len(e.estimator.ask(0))
        plain(e, workload, count)
    return _peak()


def plain(e: Any, workload: Any, count: int) -> None:
    """vLLM as anyone starts it, with the same budgets."""
    from zoray.engines.vllm.engine import in_this_process
    from zoray.models.folder import max_length

    in_this_process()  # as zoray does, so that the peak is this process's
    from vllm import LLM, SamplingParams

    engine = e.engine
    llm = LLM(
        model=str(workload.folder),
        dtype="float32" if _on_cpu() else "auto",
        load_format=engine.load_format,
        max_model_len=engine.length_limit(max_length(workload.folder)),
        max_num_batched_tokens=engine.max_tokens,
        kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30),
        enforce_eager=engine.eager or _on_cpu(),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    prompts = [sequences[0].tokens.tolist() for sequences in workload.encoded["train"][:count]]
    llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts],
        SamplingParams(max_tokens=1, detokenize=False, temperature=0.0),
        use_tqdm=False,
    )


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage would count a larger parent in
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


if __name__ == "__main__":
    main(sys.argv[1:])
