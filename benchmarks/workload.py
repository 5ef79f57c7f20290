"""What the speed benchmarks run on: the embedded task and model, or random weights of a real shape and random tokens.

Random prompts have lengths like the embedded task's sentences, which are of SST-2's kind: log-normal, mean 26 tokens,
from 8 to 70; the same at every call.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from zoray.models.folder import linear_matrices, max_length
from zoray.records import Example, Splits, TokenSequence
from zoray.scoring.workload import ReplicaSpec, Workload

GUIDED = ["estimator=feedback", "optimizer=feedback", "space.rank=8", "space.alpha=16"]
GUIDED += ["space.targets=residual:0.5", "space.train=AB"]


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


def completions(workload: Workload) -> Workload:
    """The same training sequences in pairs: the first is a prompt, and of the second every token is asked for.

    Of each as many tokens as let a pair fit the model.
    """
    half = max_length(workload.folder) // 2
    tokens = [some[0].tokens[:half] for some in workload.encoded["train"]]
    pairs = []
    for i, prompt in enumerate(tokens):
        whole = np.concatenate([prompt, tokens[(i + 1) % len(tokens)]])
        rows = np.arange(len(prompt) - 1, len(whole) - 1, dtype=np.int32)
        pairs.append((TokenSequence(whole[:-1], rows, whole[rows + 1], np.zeros_like(rows), 1),))
    return replace(workload, encoded={**workload.encoded, "train": tuple(pairs)})


def experiment(options: dict[str, str], folder: Path, where: tuple[str, ...] = ()) -> tuple[Any, Workload]:
    """Two-point steps as `options` say (model, dtype, batch, pairs, space), and their workload.

    With estimator=feedback its steps, on adapters of rank 8 on the writers of the upper half; with task=text on prompts
    and completions, of which every token is asked for. `folder` is for the config of a made-up model; `where` are
    further settings, for tests.
    """
    from zoray.run.config import build_experiment, compose
    from zoray.scoring.workload import load_workload

    guided, text = options.get("estimator") == "feedback", options.get("task") == "text"
    settings = [f"run.batch={options['batch']}", f"run.tile_examples={options['batch']}", f"space={options['space']}"]
    settings += [f"model.dtype={options['dtype']}", *(["objective=answer_nll"] if text else [])]
    settings += GUIDED if guided else ["estimator=two_point", f"estimator.pairs={options['pairs']}"]
    if options["space"] != "lora":
        settings += ["estimator.eps=5e-4", "optimizer.lr=1e-6"]
    path = None if options["model"] == "smollm2" else shapes.make_model(options["model"], folder / options["model"])
    if path:
        settings += ["model=hf", f"model.path={path}", "engine.load_format=dummy", "run.stratify=false"]
    e = build_experiment(compose("config", [*settings, *where]))
    workload = random_workload(e.spec, path, shapes.vocabulary(options["model"])) if path else load_workload(e.spec)
    return e, completions(workload) if text else workload
