"""Rows of data sets on the Hugging Face Hub, through the `datasets` library, which maps them into memory.

A place is a row's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError
from zoray.tasks.file.rows.faults import WrongRow
from zoray.tasks.file.rows.parquet import plain_rows
from zoray.tasks.file.rows.text import Row, check_names

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows that are made plain values at a time
DEV, TEST = ("validation", "valid", "val", "dev"), ("test",)  # what a data set's own splits are called


class HubRows:
    """The rows of a `datasets.Dataset`.

    Args:
        name: what messages call it.
        dataset: its rows.
    """

    cells = False

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name = self.header = name
        self.columns = tuple(dataset.column_names)
        check_names(self.columns, name)
        self.words: Mapping[str, Mapping[str, str]] = {
            column: {str(label): str(text) for label, text in enumerate(feature.names)}
            for column, feature in dataset.features.items()
            if hasattr(feature, "names")
        }
        self._dataset = dataset.with_format("arrow")  # no image or sound is decoded

    def __iter__(self) -> Iterator[tuple[int, str, Row | WrongRow]]:
        place = 0
        for batch in self._dataset.iter(BATCH):
            for row in plain_rows(batch, lambda number, first=place: self.where(first + number)):
                yield place, self.where(place), row
                place += 1

    def row(self, place: int) -> Row:
        (row,) = plain_rows(self._dataset[place], lambda _: self.where(place))
        if isinstance(row, WrongRow):
            raise row
        return row

    def where(self, place: int) -> str:
        return f"{self.name}, row {place} (from 0)"


def hub_rows(path: str) -> dict[str, HubRows]:
    """The splits train, dev and test that a data set has; `path` is org/name, or org/name:configuration.

    Raises:
        ConfigError: it can't be had, or has no training split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, configuration = path.partition(":")
    try:
        splits: Any = load_dataset(name, configuration) if configuration else load_dataset(name)
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such data set, nothing readable in it
        raise ConfigError(
            f"task.path={path} could not be loaded from the Hugging Face Hub: {_reason(error)}. Check name and "
            "network; name a configuration as org/name:configuration if there are several; or give a local file"
        ) from error
    if "train" not in splits:
        raise ConfigError(
            f"task.path={path} must have a split train; got {sorted(map(str, splits))}. Save the one you want as a "
            "Parquet file and give that"
        )
    held_out = {"dev": DEV, "test": TEST}
    own = {name: next((key for key in keys if key in splits), None) for name, keys in held_out.items()}
    chosen = {"train": "train", **{name: key for name, key in own.items() if key}}
    return {name: HubRows(f"{path} ({key})", splits[key]) for name, key in chosen.items()}


def _reason(error: BaseException) -> str:
    """`datasets` wraps what went wrong in several layers; the innermost says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('. ') or 'no reason given'}"
