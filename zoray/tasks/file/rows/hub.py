"""Rows of data sets on the Hugging Face Hub, through the `datasets` library, which maps them into memory."""

from __future__ import annotations

from typing import Any

from zoray.records import ConfigError
from zoray.tasks.file.rows.parquet import ArrowRows
from zoray.tasks.file.rows.text import check_names

DEV, TEST = ("validation", "valid", "val", "dev"), ("test",)  # what a data set's own splits are called


def hub_rows(path: str) -> dict[str, ArrowRows]:
    """The splits train, dev and test that a data set has; `path` is org/name, or org/name:configuration.

    Raises:
        ConfigError: it can't be loaded, or has no training split.
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
    return {name: _rows(f"{path} ({key})", splits[key]) for name, key in chosen.items()}


def _rows(name: str, dataset: Any) -> ArrowRows:
    """The rows of a split, which messages call `name`."""
    columns = tuple(dataset.column_names)
    check_names(columns, name)
    words = {
        column: {str(label): str(text) for label, text in enumerate(feature.names)}
        for column, feature in dataset.features.items()
        if hasattr(feature, "names")
    }
    return ArrowRows(name, [(name, dataset.with_format("arrow"))], columns, words)  # no image is decoded


def _reason(error: BaseException) -> str:
    """`datasets` wraps what went wrong in several layers; the innermost says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('. ') or 'no reason given'}"
