"""What the speed benchmarks run on: the embedded task and model, or random weights of a real shape and random tokens.

Random prompts have lengths like the embedded task's sentences, which are of SST-2's kind: log-normal, mean 26 tokens,
from 8 to 70; the same at every call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from zoray.data import ReplicaSpec, Workload
from zoray.models import linear_matrices
from zoray.records import Example, Splits, TokenSequence


def random_examples(count: int, vocabulary: int, options: int = 2, tokens: int = 1) -> list[tuple[TokenSequence, ...]]:
    """Examples of random tokens; options of one token share a sequence, longer ones have one each."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.15, 0.45, count), 8, 70).astype(int)
    examples = []
    for length in lengths:
        prompt = rng.integers(10, vocabulary, length).astype(np.int32)
        answers = rng.integers(10, vocabulary, (options, tokens)).astype(np.int32)
        if tokens == 1:
            rows, n = np.full(options, length - 1, np.int32), np.arange(options, dtype=np.int32)
            examples.append((TokenSequence(prompt, rows, answers[:, 0], n, options),))
            continue
        rows, zeros = np.arange(length - 1, length + tokens - 1, dtype=np.int32), np.zeros(tokens, np.int32)
        examples.append(tuple(TokenSequence(np.concatenate([prompt, a[:-1]]), rows, a, zeros, 1) for a in answers))
    return examples


def random_workload(spec: ReplicaSpec, folder: Path, tokens: int, count: int = 1000) -> Workload:
    """A workload of random tokens, out of so many, for a model without tokenizer."""
    encoded: dict[str, Any] = {"train": tuple(random_examples(count, tokens)), "dev": (), "test": ()}
    train = tuple(Example("", ("a", "b"), i % 2) for i in range(count))
    return Workload(folder, linear_matrices(folder, spec.space.targets), Splits(train, ()), encoded)


def experiment(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> tuple[Any, Workload]:
    """Two-point steps as `options` say (model, dtype, batch, pairs, space), and their workload.

    `folder` is for the config of a made-up model; `where` are further settings, for tests.
    """
    from zoray.cli import build_experiment, compose
    from zoray.data import load_workload

    settings = [f"run.batch={options['batch']}", f"run.tile_examples={options['batch']}", f"space={options['space']}"]
    settings += ["estimator=two_point", f"estimator.pairs={options['pairs']}", f"model.dtype={options['dtype']}"]
    if options["space"] != "lora":
        settings += ["estimator.eps=5e-4", "optimizer.lr=1e-6"]
    path = None if options["model"] == "smollm2" else shapes.make_model(options["model"], folder / options["model"])
    if path:
        settings += ["model=hf", f"model.path={path}", "engine.load_format=dummy", "run.stratify=false"]
    e = build_experiment(compose("config", [*settings, *where]))
    return e, random_workload(e.spec, path, shapes.vocabulary(options["model"])) if path else load_workload(e.spec)
