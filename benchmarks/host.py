"""How much host time does a step take, packed against vLLM's request path? On a toy model, where little else is left.

    python -m benchmarks.host [rounds=30]

The toy has two layers of width 32 and prompts of eight tokens: what its matrices cost is lost in what the host does. A
step is one pair on n / 2 examples: the commit of the step before, slot writes, scoring, losses, estimate and update.
`model_ms` of that is inside the model, where both paths call the same layers from Python (on CUDA, a graph):
`without_model` is the ratio of the rest.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.options import parse
from benchmarks.stepper import Stepper
from benchmarks.timing import ratio, rounds, spread
from zoray.records import Example, Splits, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (32, 256)


def main(arguments: list[str]) -> None:
    """Time both paths at both sizes and print one JSON object."""
    options = parse(arguments, {"rounds": "30"})
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(int(options["rounds"]), toy(Path(folder)))))


def measure(count: int, folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Milliseconds of a step of each path at each size."""
    result: dict[str, Any] = {"benchmark": "host"}
    contenders, clocks = {}, {}
    for size in SIZES:
        stepper = Stepper(*replica(folder, size // 2, where))
        clock = Clock(stepper.replica.engine)
        for path, step in (("direct", stepper.direct), ("request", stepper.request)):
            contenders[f"{path}_{size}"], clocks[f"{path}_{size}"] = clock.around(step)
    seconds = rounds(contenders, count)
    inside = {name: values[3::2] for name, values in clocks.items()}  # the second calls, after the warm-up's two
    for name, values in seconds.items():
        path, _, size = name.partition("_")
        result[f"{path}_ms_{size}"] = spread([1000 * value for value in values])
    for size in SIZES:
        paths = f"request_{size}", f"direct_{size}"
        result[f"request_over_direct_{size}"] = ratio(*(seconds[path] for path in paths))
        result[f"model_ms_{size}"] = spread([1000 * value for value in inside[paths[1]]])
        rest = [[a - b for a, b in zip(seconds[path], inside[path], strict=True)] for path in paths]
        result[f"request_over_direct_without_model_{size}"] = ratio(*rest)
    return result


class Clock:
    """Seconds inside an engine's model."""

    def __init__(self, engine: Any) -> None:
        model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self._began = self._sum = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._sum += time.perf_counter() - self._began

    def around(self, step: Callable[[], None]) -> tuple[Callable[[], None], list[float]]:
        """The step, and a list that gets the seconds inside the model of each call."""
        found: list[float] = []

        def timed() -> None:
            self._sum = 0.0
            step()
            found.append(self._sum)

        return timed, found


def replica(folder: Path, examples: int, where: tuple[str, ...]) -> tuple[Any, Any]:
    """An experiment with `examples` a step, and its replica on the toy model."""
    from zoray.models.folder import linear_matrices
    from zoray.run.config import build_experiment, compose
    from zoray.scoring.replica import Replica
    from zoray.scoring.workload import Workload

    settings = [
        "model=hf",
        f"model.path={folder}",
        "space=lora",
        "estimator=two_point",
        f"run.batch={examples}",
        "engine.slots=2",
    ]
    settings += [f"run.tile_examples={examples}", "run.stratify=false", "engine.load_format=dummy"]
    e = build_experiment(compose("config", [*settings, "engine.kv_cache_gib=0.1", *where]))
    rng = np.random.default_rng(0)
    rows, both = np.full(2, 7, np.int32), np.arange(2, dtype=np.int32)
    encoded = tuple(
        (TokenSequence(rng.integers(4, 100, 8).astype(np.int32), rows, np.array([5, 6], np.int32), both, 2),)
        for _ in range(2 * examples)
    )
    train = tuple(Example("", ("a", "b"), i % 2) for i in range(len(encoded)))
    matrices = linear_matrices(folder, e.space.targets)
    return e, Replica(e.spec, Workload(folder, matrices, Splits(train, ()), {"train": encoded}))


def toy(folder: Path) -> Path:
    """The config.json of the toy model, and a file that stands for its weights."""
    from safetensors.numpy import save_file

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32}
    config |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    config |= {"head_dim": 32, "max_position_embeddings": 64, "torch_dtype": "float32", "tie_word_embeddings": False}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
