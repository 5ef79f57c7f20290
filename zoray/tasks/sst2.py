"""SST-2 (Socher et al., 2013; GLUE), as MeZO uses it (Malladi et al., 2023).

Train and dev are disjoint samples of the Hub's train split; test is the Hub's validation split, because the labels of
the Hub's test split are hidden. With `test` below 872 it is a seeded sample of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoray.records import ConfigError, Example, Splits
from zoray.tasks.base import Task, check_sizes, check_template, check_words, distinct, fill, seeded_split

if TYPE_CHECKING:
    from datasets import Dataset

LOCAL = (
    "a local folder: task.path=/path/to/folder with data/train-*.parquet and data/validation-*.parquet, as on the Hub"
)


@dataclass(frozen=True)
class SST2(Task):
    """Is a sentence negative (0) or positive (1)? `path` is a Hub id or a local copy of the Hub's folder."""

    train: int = 1000
    dev: int = 500
    test: int = 872
    seed: int = 0
    path: str = "stanfordnlp/sst2"
    template: str = "{text} It was"
    words: tuple[str, ...] = (" terrible", " great")

    def __post_init__(self) -> None:
        check_sizes(self.train, self.dev, self.test, self.seed)
        check_template(self.template)
        object.__setattr__(self, "words", check_words(self.words, 2))
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"task.path must be a Hub id or {LOCAL}; got {self.path!r}")

    def load(self) -> Splits:
        """Read, check and split the sentences."""
        data = _load(self.path)
        pool = distinct(self._examples(data["train"], "train"))
        held_out = self._examples(data["validation"], "validation")
        dev, train = seeded_split(pool, (self.dev, self.train), self.seed, f"{self.path} (train)")
        (test,) = seeded_split(held_out, (self.test,), self.seed, f"{self.path} (validation, our test split)")
        return Splits(train, dev, test)

    def _examples(self, rows: Dataset, split: str) -> list[Example]:
        source = f"{self.path} ({split})"
        missing = {"sentence", "label"} - set(rows.column_names)
        if missing:
            raise ConfigError(f"{source} must have the columns sentence and label; got {rows.column_names}")
        examples = []
        for number, (text, label) in enumerate(zip(rows["sentence"], rows["label"], strict=True)):
            if label not in (0, 1):
                raise ConfigError(f"{source}, row {number}: label must be 0 or 1; got {label!r} (-1 is a hidden label)")
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"{source}, row {number}: the sentence is empty")
            examples.append(Example(fill(self.template, text.strip()), self.words, label))
        return examples


def _load(path: str) -> dict[str, Dataset]:
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) or local.exists():
        files = {split: sorted(map(str, local.glob(f"data/{split}-*.parquet"))) for split in ("train", "validation")}
        for split, found in files.items():
            if not found:
                raise ConfigError(f"task.path={path} has no data/{split}-*.parquet. Expected {LOCAL}")
        return {split: _read_parquet(found) for split, found in files.items()}
    return _download(path)


def _read_parquet(files: list[str]) -> Dataset:
    import pyarrow
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet

    try:
        return concatenate_datasets([Dataset(parquet.read_table(file)) for file in files])
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"can't read {', '.join(files)} as Parquet: {error}") from error


def _download(path: str) -> dict[str, Dataset]:
    from datasets import load_dataset

    try:
        splits = load_dataset(path)
    except (OSError, ValueError) as error:  # no network, no such data set, nothing readable in it
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"task.path={path} could not be loaded from the Hugging Face Hub: {type(error).__name__}: {reason}. "
            f"Check the name and the network, or give {LOCAL}"
        ) from error
    if not {"train", "validation"} <= set(splits):
        raise ConfigError(f"task.path={path} must have the splits train and validation; got {sorted(map(str, splits))}")
    return {split: splits[split] for split in ("train", "validation")}
