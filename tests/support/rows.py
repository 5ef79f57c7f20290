"""Files of rows, for tests of task=file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoray.records import Example, Splits

ROWS = [{"text": f"text {i}", "label": ["negative", "positive"][i % 2]} for i in range(50)]
WORDS = {"negative": " terrible", "positive": " great"}


def write_rows(path: Path, content: Any) -> str:
    """Write text, bytes, or rows as JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], classes: Sequence[str] = (), **options: Any) -> str:
    """Write rows as Parquet; `classes` are names of labels, as the `datasets` library has them in the file."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(rows)
    if classes:
        feature = {"label": {"names": list(classes), "_type": "ClassLabel"}, "text": {"_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    parquet.write_table(table, path, **options)
    return str(path)


def every(splits: Splits) -> list[Example]:
    """All examples; no prompt is in two splits."""
    found = [e for name in ("train", "dev", "test") for e in splits[name]]
    assert len(found) == len({e.prompt for e in found})
    return found
