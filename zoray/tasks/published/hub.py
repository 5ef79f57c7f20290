"""Tasks whose rows come from the Hugging Face Hub, or from a local copy of the Hub's folder.

Guarantees: the splits depend on the rows' order, the sizes and the seed alone, and no question is in two of them
(SST-2 has its own, older split). Only the rows that are drawn become examples, so that 100,000 rows take seconds; each
is checked then, and a refusal names its split and row. Not guaranteed: that the Hub's data stay as they are; a local
copy does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from zoray.records import ConfigError, Example, Splits
from zoray.records.paths import user_path
from zoray.tasks.base import Task, check_sizes, seeded_order, too_few

if TYPE_CHECKING:
    from datasets import Dataset

MOST = 1000  # rows that a size of null takes, as MeZO's script does
CONVERTED = "refs/convert/parquet"  # where the Hub keeps Parquet copies, in CONFIG/SPLIT/, of repositories with scripts


@dataclass(frozen=True)
class HubTask(Task):
    """A task on a data set of the Hub. Train and dev are drawn from its train split, test from `held_out`.

    config: which of a repository's data sets it is; its files are in the folder of this name, else in data/.
    columns: what `example` reads of a row.
    labels: what the Hub calls the labels 0, 1, ... of the column `label`.

    Args:
        train: examples to learn from; null is all that dev leaves, at most 1000.
        dev: examples for the curve and for choosing the best state.
        test: examples for the final number; null is all of the held-out split, at most 1000.
        seed: which rows go where.
        path: a Hub id, or a local copy of the Hub's folder.
    """

    config: ClassVar[str | None] = None
    held_out: ClassVar[str] = "validation"
    columns: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[tuple[str, ...]] = ()

    train: int | None = 1000
    dev: int = 500
    test: int | None = 1000
    seed: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        train, test = (1 if size is None else size for size in (self.train, self.test))
        check_sizes(train, self.dev, test, self.seed)
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"task.path must be a Hub id or {self._layout}; got {self.path!r}")

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Example:
        """The example that a row makes; raises ConfigError, which need not say where the row is."""

    def load(self) -> Splits:
        """Read the data, check their columns, draw the rows and make examples of them."""
        data, seen = self.splits(), set()
        (test,) = self._drawn(data[self.held_out], self.held_out, (self.test,), seen)
        dev, train = self._drawn(data["train"], "train", (self.dev, self.train), seen)
        return Splits(train, dev, test)

    def splits(self) -> dict[str, Dataset]:
        """The train split and the held-out one, with the columns that they must have."""
        local = user_path(self.path)
        here = self.path.startswith((".", "/", "~")) or local.exists()
        data = self._read(local) if here else self._download()
        for split, rows in data.items():
            self._check(rows, self.source(split))
        return data

    def source(self, split: str) -> str:
        """What an error calls a split."""
        return f"{self.path}{f'/{self.config}' if self.config else ''} ({split})"

    def made(self, row: Mapping[str, Any], split: str, number: int) -> Example:
        """The example of a row; an error says which row it is."""
        try:
            return self.example(row)
        except ConfigError as error:
            raise ConfigError(f"{self.source(split)}, row {number}: {error}") from error

    def label(self, row: Mapping[str, Any]) -> int:
        """The label of a row; the Hub writes -1 where it is hidden."""
        value, count = row["label"], len(self.labels)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            known = f"{', '.join(map(str, range(count - 1)))} or {count - 1}"
            raise ConfigError(f"label must be {known}; got {value!r} (-1 is a hidden label). Take data with labels")
        return value

    def _drawn(
        self, rows: Dataset, split: str, sizes: Sequence[int | None], seen: set[object]
    ) -> list[tuple[Example, ...]]:
        """Disjoint samples in the order of the seed. A repeated question is skipped."""
        examples = self._unseen(rows, split, seen)
        parts = [tuple(islice(examples, MOST if size is None else size)) for size in sizes]
        if any(len(part) < (1 if size is None else size) for part, size in zip(parts, sizes, strict=True)):
            raise too_few(sum(map(len, parts)), [1 if size is None else size for size in sizes], self.source(split))
        return parts

    def _unseen(self, rows: Dataset, split: str, seen: set[object]) -> Iterator[Example]:
        for number in seeded_order(len(rows), self.seed).tolist():
            example = self.made(rows[number], split, number)
            question = (example.prompt, example.options)  # of ReCoRD and COPA the options are part of it
            if question not in seen:
                seen.add(question)
                yield example

    @property
    def _layout(self) -> str:
        files = " and ".join(f"{self.config or 'data'}/{split}-*.parquet" for split in ("train", self.held_out))
        return f"a local folder: task.path=/path/to/folder with {files}, as on the Hub"

    def _check(self, rows: Dataset, source: str) -> None:
        """Raise ConfigError unless all columns are there, and labels mean what they should."""
        if set(self.columns) - set(rows.column_names):
            *others, last = self.columns
            raise ConfigError(
                f"{source} must have the columns {', '.join(others)} and {last}; got {rows.column_names}. "
                f"Give {self._layout}"
            )
        names = getattr(rows.features.get("label"), "names", None) if self.labels else None
        if names is not None and tuple(names) != self.labels:
            raise ConfigError(
                f"{source} must have the labels {', '.join(self.labels)}, in this order; got {names}. "
                f"Give {self._layout}"
            )

    def _read(self, local: Path) -> dict[str, Dataset]:
        data = {}
        for split in ("train", self.held_out):
            pattern = f"{self.config or 'data'}/{split}-*.parquet"
            files = sorted(map(str, local.glob(pattern)))
            if not files:
                raise ConfigError(f"task.path={self.path} has no {pattern}. Expected {self._layout}")
            data[split] = _read_parquet(files)
        return data

    def _download(self) -> dict[str, Dataset]:
        wanted = ("train", self.held_out)
        try:
            data = _load_dataset(self.path, self.config, wanted)
        except (OSError, ValueError) as error:  # no network, no such data set, nothing readable in it
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(
                f"task.path={self.path} could not be loaded from the Hugging Face Hub: {type(error).__name__}: "
                f"{reason}. Check the name and the network, or give {self._layout}"
            ) from error
        if not set(wanted) <= set(data):
            raise ConfigError(
                f"task.path={self.path} must have the splits train and {self.held_out}; got {sorted(map(str, data))}"
            )
        return {split: data[split] for split in wanted}


def texts(row: Mapping[str, Any], *columns: str, blank: bool = False) -> list[str]:
    """A row's texts in some columns; a ConfigError if one is not text, or is empty (allowed with `blank`)."""
    for column in columns:
        if not isinstance(row[column], str):
            raise ConfigError(f"the {column} must be text; got {row[column]!r}. Remove the row")
        if not blank and not row[column].strip():
            raise ConfigError(f"the {column} is empty. Remove the row")
    return [row[column] for column in columns]


def answers(known: Sequence[object]) -> tuple[str, ...]:
    """Reference answers, each once, in their order; a row without any is refused."""
    found = tuple(dict.fromkeys(answer for answer in known if isinstance(answer, str) and answer.strip()))
    if not found:
        raise ConfigError("expected an answer; got none (a hidden answer?). Take data with answers")
    return found


def _load_dataset(path: str, config: str | None, splits: Sequence[str]) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, config) if config else load_dataset(path)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
    # The repository makes its data by a script, which datasets >= 4 no longer runs. The branch of Parquet copies has
    # only folders for its configs, whose names datasets does not find.
    files = {split: f"{config or 'default'}/{split}/*.parquet" for split in splits}
    return load_dataset(path, data_files=files, revision=CONVERTED)


def _read_parquet(files: list[str]) -> Dataset:
    import pyarrow
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet

    try:
        # Fingerprints are for caches, and there are none here; to compute one takes several times the rows' memory.
        parts = [Dataset(parquet.read_table(file), fingerprint=str(i)) for i, file in enumerate(files)]
        return concatenate_datasets(parts)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"can't read {', '.join(files)} as Parquet: {error}") from error
