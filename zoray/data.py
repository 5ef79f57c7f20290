"""From a task's text to token sequences, and which examples a step sees.

No tokens travel: every replica does all of this itself.
Guarantees: the examples of a step depend on (data seed, step, batch size, number of examples) alone; every example is
tokenised once; a text that is too long is an error before any model loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.directions import name_hash, philox_numpy
from zoray.models import linear_matrices, load_tokenizer, max_length, quantisation
from zoray.records import ConfigError, Example, Splits, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SHUFFLE = name_hash("zoray.data.shuffle")


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is made of; the part of the experiment that it needs, and no more. Components are configs."""

    model: Any
    task: Any
    objective: Any
    space: Any
    estimator: Any
    engine: Any
    seed: int  # of the directions and of A
    data_seed: int
    batch: int
    stratify: bool = False
    tile_examples: int = 4


@dataclass(frozen=True)
class Workload:
    """Everything about model and data that is known before the model loads."""

    folder: Path
    matrices: dict[str, tuple[int, int]]
    splits: Splits
    encoded: dict[str, tuple[tuple[TokenSequence, ...], ...]]  # split -> example -> its sequences

    def example(self, split: str, index: int) -> tuple[Example, tuple[TokenSequence, ...]]:
        """An example of a split and its sequences."""
        return self.splits[split][index], self.encoded[split][index]


def load_workload(spec: ReplicaSpec) -> Workload:
    """Resolve the model's folder, load and tokenise all splits, and check what can be checked without the weights.

    Raises:
        ConfigError: as the model, task, objective and space say; or an example is too long for model and engine.
    """
    splits = spec.task.load()
    folder = spec.model.resolve()
    matrices = linear_matrices(folder, spec.space.targets)
    chosen = spec.space.select(matrices)
    if spec.space.folds and (vocabulary := chosen.keys() - linear_matrices(folder).keys()):
        raise ConfigError(
            f"expected space.targets among the inner layers for space={type(spec.space).__name__.lower()}; got "
            f"{', '.join(sorted(vocabulary))}: many models share one weight between embedding and LM head, and a fold "
            "into one would move both. Take space=lora, or leave it out"
        )
    method = quantisation(folder)
    if spec.space.folds and method is not None:
        raise ConfigError(
            f"space={type(spec.space).__name__.lower()} folds its steps into the base weights, and those of "
            f"{spec.model.path} are quantised ({method}): each step would be rounded away. Take space=lora, which "
            "never writes the base weights, or the unquantised model"
        )
    tokenizer = load_tokenizer(folder)
    model_limit = max_length(folder)
    limit = spec.engine.length_limit(model_limit)
    encoded = {}
    for split in ("train", "dev", "test"):
        encoded[split] = tuple(spec.objective.encode(example, tokenizer) for example in splits[split])
        for index, sequences in enumerate(encoded[split]):
            longest = max(len(sequence.tokens) for sequence in sequences)
            if longest > limit:
                whose = "the model" if limit == model_limit else "the engine (engine.max_length, engine.max_tokens)"
                raise ConfigError(
                    f"expected sequences of at most {limit} tokens, the limit of {whose}; got {longest} tokens in "
                    f"{split} example {index} ({splits[split][index].prompt[:50]!r}...). Shorten it, or raise the limit"
                )
    if not splits.train:
        raise ConfigError("expected at least one training example; got none. Raise task.train")
    return Workload(folder, matrices, splits, encoded)


def batch_indices(data_seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of n training examples step `step` sees, (batch,): epoch after epoch, each in an order of its own."""
    positions = np.arange(step * batch, (step + 1) * batch)
    order = {epoch: _permutation(data_seed, int(epoch), n) for epoch in np.unique(positions // n)}
    return np.array([order[p // n][p % n] for p in positions])


def stratified_indices(data_seed: int, step: int, batch: int, labels: Sequence[int]) -> np.ndarray:
    """The same with labels in turn, (batch,): batches of a multiple of the number of labels have equally many of each.

    Each label's examples come epoch after epoch on their own, so a rare label comes round more often.
    """
    strata = _strata(tuple(labels))
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        own, place = strata[position % len(strata)], position // len(strata)
        seed = (data_seed + position % len(strata)) % 2**32  # labels of equal counts get orders of their own
        chosen.append(own[batch_indices(seed, place, 1, len(own))[0]])
    return np.array(chosen)


def step_indices(spec: Any, step: int, labels: Sequence[int]) -> np.ndarray:
    """Which training examples a step sees, (batch,), by a spec; `labels` are those of all examples."""
    address = (spec.data_seed, step, spec.batch)
    return stratified_indices(*address, labels) if spec.stratify else batch_indices(*address, len(labels))


@lru_cache(maxsize=4)
def _strata(labels: tuple[int, ...]) -> list[np.ndarray]:
    """The positions of each label, labels in ascending order."""
    return [np.flatnonzero(np.asarray(labels) == label) for label in sorted(set(labels))]


@lru_cache(maxsize=64)
def _permutation(data_seed: int, epoch: int, n: int) -> np.ndarray:
    """An order of n examples: they are sorted by 64 random bits each, so that it is the same on every machine."""
    words = philox_numpy((np.arange(n), epoch, 0, _SHUFFLE >> 32), (data_seed, _SHUFFLE & 0xFFFFFFFF)).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
