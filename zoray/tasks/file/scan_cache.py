"""What a large file was found to hold, kept in the cache folder: replicas and resumed runs need not read it all again.

Kept are the places of the rows, their labels and the schema, for as long as the files, the task's settings and zoray's
own code are the same; no text. Small files are read anew each time.
"""

from __future__ import annotations

import hashlib
import pickle
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.models.folder import cache_dir
from zoray.records import disk

if TYPE_CHECKING:
    from zoray.tasks.file.rows.text import Stamps

LARGE = 1 << 24  # bytes of all files together from which on it is worth it
KEPT = 8  # files of this cache; the oldest go first


def recall(task: Any, stamps: Stamps) -> Any | None:
    """What `keep` was given for this task and these files, in this process or another; None if there is nothing."""
    path = _path(task, stamps)
    if path is None:
        return None
    try:
        return pickle.loads(path.read_bytes())
    except Exception:  # not there, or cut short: the file itself has it all
        return None


def keep(task: Any, stamps: Stamps, found: Any) -> None:
    """Let the next one find it; a folder that can't be written to is no trouble."""
    path = _path(task, stamps)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(path, pickle.dumps(found, pickle.HIGHEST_PROTOCOL), path.with_name(f".{uuid.uuid4().hex}"))
        for old in sorted(path.parent.glob("*.pickle"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)


def _path(task: Any, stamps: Stamps) -> Path | None:
    if sum(size for size, _ in stamps.known) < LARGE:
        return None
    code = [(file.name, file.stat().st_mtime_ns) for file in sorted(Path(__file__).parent.rglob("*.py"))]
    known = repr((task, [str(path.absolute()) for path in stamps.paths], stamps.known, code))
    return cache_dir() / "scans" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.pickle"
