"""How much host time does a step take, packed against vLLM's request path? On a toy model, where little else is left.

    python -m benchmarks.host [rounds=30]

The toy has two layers of width 32 and prompts of eight tokens: what its matrices cost is lost in what the host does. A
step is one pair on n / 2 examples: the commit of the step before, slot writes, scoring, losses, estimate and update.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import parse
from benchmarks.stepper import Stepper
from benchmarks.timing import ratio, rounds, spread
from zoray.records import Example, Splits, TokenSequence

SIZES = (32, 256)


def main(arguments: list[str]) -> None:
    """Time both paths at both sizes and print one JSON object."""
    options = parse(arguments, {"rounds": "30"})
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(int(options["rounds"]), toy(Path(folder)))))


def measure(count: int, folder: Path, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Milliseconds of a step of each path at each size."""
    result: dict[str, Any] = {"benchmark": "host"}
    contenders = {}
    for size in SIZES:
        stepper = Stepper(*replica(folder, size // 2, where))
        contenders |= {f"direct_{size}": stepper.direct, f"request_{size}": stepper.request}
    seconds = rounds(contenders, count)
    for name, values in seconds.items():
        path, _, size = name.partition("_")
        result[f"{path}_ms_{size}"] = spread([1000 * value for value in values])
    for size in SIZES:
        result[f"request_over_direct_{size}"] = ratio(seconds[f"request_{size}"], seconds[f"direct_{size}"])
    return result


def replica(folder: Path, examples: int, where: tuple[str, ...]) -> tuple[Any, Any]:
    """An experiment with `examples` a step, and its replica on the toy model."""
    from zoray.cli import build_experiment, compose
    from zoray.data import Workload
    from zoray.models import linear_matrices
    from zoray.replica import Replica

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
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
