"""From a run's tasks to token sequences.

No tokens travel: every replica tokenises for itself.
Guarantees: an example of a split in memory is tokenised once, and a text that is too long is an error before any model
loads; a split that is read as it goes (a file of a million lines) is tokenised as it goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from zoray.engines.feedback.residual import family_of
from zoray.models.folder import embeddings, linear_matrices, load_tokenizer, max_length, quantisation
from zoray.models.tokens import Encoder
from zoray.records import WHOLE, ConfigError, Example, SettingError, Splits, TokenSequence
from zoray.tasks import mixture
from zoray.tasks.batches import Order, labels_of, part_numbers
from zoray.tasks.mixture import Mixture

if TYPE_CHECKING:
    from pathlib import Path

    from zoray.engines.base import EngineConfig
    from zoray.methods.estimators import Estimator
    from zoray.methods.spaces import Space
    from zoray.models.folder import Model
    from zoray.scoring.objectives.base import Objective
    from zoray.tasks.base import Task

Found = TypeVar("Found")
SPLITS = ("train", "dev", "test")
RECENT = 4_096  # examples of a split read as it goes whose tokens are kept
CHECKED = 256  # examples of such a split that are tokenised at start, to find mistakes in the settings


@dataclass(frozen=True)
class ReplicaSpec:
    """The part of the experiment that a replica needs, and no more. Components are configs."""

    model: Model
    task: Task
    objective: Objective
    space: Space
    estimator: Estimator
    engine: EngineConfig
    seed: int  # of the directions and of A
    data_seed: int
    batch: int
    stratify: bool = False
    tile_examples: int = 4
    too_long: str | None = None  # "refuse" or "cut" sequences over the limit; None: cut only what is read as it goes
    date: str | None = None  # that a chat template writes where it asks for today's; None for today's


@dataclass(frozen=True)
class ScoredPart:
    """A task of a run with its objective; most runs have one. In a mixture, each example names its part."""

    task: Task
    objective: Objective
    evaluator: Objective  # what measures the task's metric on dev and test
    name: str = ""
    weight: float = 1.0  # share of the training examples


@dataclass(frozen=True)
class Workload:
    """Everything about model and data that is known before the model loads."""

    folder: Path
    matrices: dict[str, tuple[int, int]]
    splits: Splits
    encoded: dict[str, Sequence[tuple[TokenSequence, ...]]]  # split -> example -> its sequences, for its objective
    parts: tuple[ScoredPart, ...] = ()
    encoder: Encoder | None = None

    @property
    def digest(self) -> str | None:
        """Hash of the tokens in memory: rows, tokenizer, template and date; None where a limit has cut some."""
        if self.encoder is None or self.encoder.shortened:
            return None
        found = hashlib.blake2b(digest_size=8)
        for split in SPLITS:
            for sequences in self.encoded[split][:CHECKED]:
                for sequence in sequences:
                    found.update(sequence.tokens.tobytes() + sequence.targets.tobytes())
        return found.hexdigest()

    @property
    def pooled(self) -> bool:
        """Whether the loss of a batch is not the mean over its examples."""
        return any(part.objective.pooled for part in self.parts)

    def example(self, split: str, index: int) -> tuple[Example, tuple[TokenSequence, ...]]:
        """An example of a split and its sequences."""
        return self.splits[split][index], self.encoded[split][index]


def load_workload(spec: ReplicaSpec) -> Workload:
    """Resolve the model's folder, load and tokenise all splits, and check what can be checked without the weights.

    Raises:
        ConfigError: model, task, objective or space is wrong; feedback does not support the model or these matrices; or
            an example is too long for model or engine.
    """
    splits = spec.task.load()
    if not len(splits.train):
        raise ConfigError("expected at least one training example; got none. Raise task.train")
    parts = _bound(spec, splits)
    folder = spec.model.resolve()
    matrices = linear_matrices(folder, spec.space.targets)
    chosen = spec.space.select(matrices)
    if spec.estimator.guided:
        family_of(folder, chosen)
    if spec.space.folds:
        _check_fold(spec, folder, chosen.keys() - linear_matrices(folder).keys(), parts)
    model_limit = max_length(folder)
    limit = spec.engine.length_limit(model_limit)
    streamed = any(len(splits[split]) > WHOLE for split in SPLITS)
    cut = spec.too_long == "cut" or (spec.too_long is None and streamed)
    encoder = Encoder(load_tokenizer(folder), limit, cut, embeddings(folder), spec.model.path, spec.date)
    whose = "the model" if limit == model_limit else "the engine (engine.max_length, engine.max_tokens)"
    encoded = Encoding(splits, parts, encoder, f"{limit} tokens, the limit of {whose}").all()
    workload = Workload(folder, matrices, splits, encoded, parts, encoder)
    if workload.pooled and (len(parts) > 1 or spec.estimator.per_example):
        raise ConfigError(
            "expected an F1 score as objective only of a single task, with estimator.centring=batch: F1 is defined on "
            "a batch, not on an example. Take objective.name=accuracy"
        )
    return workload


class Encoding:
    """All splits of a run as token sequences. All rows are checked before an error is raised.

    Args:
        splits: of the run.
        parts: with bound objectives.
        encoder: of the model.
        limit: the longest sequence, in words.
    """

    def __init__(self, splits: Splits, parts: Sequence[ScoredPart], encoder: Encoder, limit: str) -> None:
        self._splits, self._parts, self._encoder, self._limit = splits, parts, encoder, limit
        self._refused: list[tuple[int, str]] = []

    def all(self) -> dict[str, Sequence[tuple[TokenSequence, ...]]]:
        """The sequences of each split.

        Raises:
            ConfigError: an example can't be used; names the first one, why, and how many more there are.
        """
        encoded = {split: self._split(split) for split in SPLITS}
        if not self._refused:
            self._check_measured()
        if self._refused:
            first, *others = [text for _, text in sorted(self._refused, key=lambda one: one[0])]
            more = f". {len(others)} more row{'s are' if len(others) > 1 else ' is'} refused as well" if others else ""
            raise ConfigError(first + more)
        return encoded

    def _split(self, split: str) -> Sequence[tuple[TokenSequence, ...]]:
        examples = self._splits[split]
        if len(examples) > WHOLE:
            found = EncodedAsAsked(examples, lambda example: self._encode(example))
            for index in range(CHECKED):
                self._checked(split, index, lambda example: found[index])  # noqa: B023, called at once
            return found
        return tuple(self._checked(split, index, self._encode) for index in range(len(examples)))

    def _encode(self, example: Example) -> tuple[TokenSequence, ...]:
        hidden = self._encoder.control.hidden.total()
        sequences = self._placed(example, lambda: self._parts[example.part].objective.encode(example, self._encoder))
        if self._encoder.control.hidden.total() > hidden:
            self._encoder.note_literal(example)
        return sequences

    def _checked(
        self, split: str, index: int, encode: Callable[[Example], tuple[TokenSequence, ...]]
    ) -> tuple[TokenSequence, ...]:
        """An example's sequences; none if it is refused, which is noted."""
        example = self._splits[split][index]
        try:
            sequences = encode(example)
        except SettingError:
            raise
        except ConfigError as error:
            self._refuse(example, str(error))
            return ()
        longest = max(len(sequence.tokens) for sequence in sequences)
        writes = self._parts[example.part].objective.sampling is not None
        self._check_length(longest + writes, writes, split, index, example)
        return sequences

    def _check_length(self, tokens: int, writes: bool, split: str, index: int, example: Example) -> None:
        """Refuse a sequence over the limit, or a prompt that leaves no room for a token to be written."""
        limit = self._encoder.limit
        if limit is not None and tokens + writes > limit:
            place = _place(example, lambda: len(self._encoder.tokens(example.prompt)) + writes > limit)
            what = " and one to write" if writes else ""
            self._refuse(
                example,
                f"{place}expected sequences of at most {self._limit}; got {tokens} tokens{what} in {split} example "
                f"{index} ({example.asked[:50]!r}...). Shorten it, raise the limit, or set run.too_long=cut, "
                "which drops its beginning",
            )

    def _check_measured(self) -> None:
        """Refuse mistakes in dev and test that would otherwise show only once the model has loaded."""
        shortened = self._encoder.shortened
        for part in self._parts:
            if part.objective.sampling or part.evaluator.sampling:
                self._encoder.stop_ids(())
        for split in ("dev", "test"):
            count = len(self._splits[split])
            for index, example in enumerate(self._splits[split] if count <= WHOLE else ()):
                part = self._parts[example.part]
                if part.evaluator is not part.objective:
                    self._check_evaluated(part.evaluator, split, index, example)
        self._encoder.shortened = shortened

    def _check_evaluated(self, evaluator: Objective, split: str, index: int, example: Example) -> None:
        try:
            if evaluator.sampling is None:
                self._placed(example, lambda: evaluator.encode(example, self._encoder))
            else:
                room = evaluator.sampling.max_tokens
                tokens = self._placed(example, lambda: self._encoder.tokens(example.prompt, room))
                self._check_length(len(tokens), True, split, index, example)
        except ConfigError as error:
            self._refuse(example, str(error))

    def _placed(self, example: Example, call: Callable[[], Found]) -> Found:
        """`call()`; its errors say where the example comes from."""

        def prompt_fails() -> bool:
            try:
                self._encoder.tokens(example.prompt)
            except ConfigError:
                return True
            return False

        try:
            return call()
        except SettingError:
            raise
        except ConfigError as error:
            raise ConfigError(f"{_place(example, prompt_fails)}{error}") from error

    def _refuse(self, example: Example, why: str) -> None:
        row = example.where.row if example.where else None
        self._refused.append((getattr(row, "place", 0), why))


def order_of(spec: ReplicaSpec, workload: Workload) -> Order:
    """Which training examples each step sees."""
    train = workload.splits.train
    return Order(spec, labels_of(train), part_numbers(train), [part.weight for part in workload.parts] or [1.0])


def _bound(spec: ReplicaSpec, splits: Splits) -> tuple[ScoredPart, ...]:
    """A spec's parts, each with its objective bound to its task."""
    numbers, parts = part_numbers(splits.train), []
    for k, part in enumerate(spec.task.mixed if isinstance(spec.task, Mixture) else (mixture.Part(spec.task),)):
        first = splits.train[int(np.argmax(numbers == k))]
        own = (part.objective or spec.objective).bind(part.task, first)
        parts.append(ScoredPart(part.task, own, own.evaluator(part.task, first), part.name, part.weight))
    return tuple(parts)


def _check_fold(spec: ReplicaSpec, folder: Path, vocabulary: Set[str], parts: Sequence[ScoredPart]) -> None:
    """Raise ConfigError where steps can't be folded into this model's weights."""
    space, method = type(spec.space).__name__.lower(), quantisation(folder)
    if vocabulary:
        raise ConfigError(
            f"expected space.targets among the inner layers for space={space}; got {', '.join(sorted(vocabulary))}: "
            "many models share one weight between embedding and LM head, and a fold into one would move both. Take "
            "space=lora, or leave it out"
        )
    if method is not None:
        raise ConfigError(
            f"space={space} folds its steps into the base weights, and those of {spec.model.path} are quantised "
            f"({method}): each step would be rounded away. Take space=lora, which never writes the base weights, or "
            "the unquantised model"
        )
    if any(part.objective.reference for part in parts):
        raise ConfigError(
            f"space={space} folds its steps into the base weights, and this objective compares with the model as it "
            "was. Take space=lora, which never writes the base weights"
        )


def encode_split(
    examples: Sequence[Example], encode: Callable[[Example], tuple[TokenSequence, ...]]
) -> Sequence[tuple[TokenSequence, ...]]:
    """The sequences of each example of a split; made now, or on demand if there are very many."""
    return EncodedAsAsked(examples, encode) if len(examples) > WHOLE else tuple(map(encode, examples))


def _place(example: Example, prompt_fails: Callable[[], bool]) -> str:
    """Where an example comes from, in front of an error: its row; and the prompt's columns if that alone fails."""
    where = example.where
    if where is None:
        return ""
    row = getattr(where, "row", where)
    return f"{where if row is where or prompt_fails() else row}: "


class EncodedAsAsked(Sequence[tuple[TokenSequence, ...]]):
    """The sequences of many examples, made on demand; those of the most recent ones are kept."""

    def __init__(self, examples: Sequence[Example], encode: Callable[[Example], tuple[TokenSequence, ...]]) -> None:
        self._count = len(examples)
        self._encode = lru_cache(RECENT)(lambda index: encode(examples[index]))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._count)))
        if not 0 <= index < self._count:
            raise IndexError(f"expected an example from 0 to {self._count - 1}; got {index}")
        return self._encode(int(index))
