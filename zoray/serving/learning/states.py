"""States, events and metrics of jobs on disk; a state that a full disk refuses counts all the same, from memory."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.records import disk
from zoray.run.reports.history import read_metrics
from zoray.serving.learning.versions import plain
from zoray.serving.store import NotFound, append_json, public, read_json, read_lines, write_json

if TYPE_CHECKING:
    from zoray.serving.store import Store

log = logging.getLogger(__name__)
MOST_READ = 32  # jobs whose metrics are kept in memory


class States:
    """state.json, events.jsonl and metrics of each job; call under the lock of Jobs, except for reading."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._reading = threading.Lock()
        self._metrics: dict[str, tuple[Any, list[Any], list[Any]]] = {}  # recently read jobs: file's mark, metrics

    def __getitem__(self, name: str) -> dict[str, Any]:
        folder = self._store.job_folder(name)
        return self._unwritten.get(name) or read_json(folder / "state.json")

    def set(self, name: str, **values: Any) -> None:
        """Change a job's state; after an OSError it is unchanged."""
        write_json(self._store.job_folder(name) / "state.json", {**values, "changed_at": time.time()})
        self._unwritten.pop(name, None)

    def mark(self, name: str, **values: Any) -> None:
        """Change a job's state even if the disk refuses: then it is kept in memory."""
        try:
            self.set(name, **values)
        except OSError as error:
            log.warning("job %s is %s, not written to disk yet: %s", name, values["status"], error)
            self._unwritten[name] = {**values, "changed_at": time.time()}

    def give_up(self, name: str) -> None:
        """Mark a job as failed that no thread works on any more and whose end could not be noted."""
        if self[name]["status"] == "running":
            why = "how it ended could not be noted; the server's log says why. Resume it"
            self._unwritten[name] = {"status": "failed", "error": why, "changed_at": time.time()}

    def forget(self, name: str) -> None:
        """Drop the state in memory of a deleted job."""
        self._unwritten.pop(name, None)

    def write_again(self) -> None:
        """Write the states that the disk has refused, if it accepts them now."""
        for name, values in list(self._unwritten.items()):
            try:
                write_json(self._store.job_folder(name) / "state.json", values)
            except NotFound:  # deleted
                pass
            except OSError:
                return
            self._unwritten.pop(name)

    @public
    def events(self, name: str) -> list[dict[str, Any]]:
        """A job's events, the oldest first."""
        return read_lines(self._store.job_folder(name) / "events.jsonl")

    def note(self, name: str, kind: str, message: str, **more: Any) -> None:
        """Append an event."""
        line = {"kind": kind, "message": message, "time": time.time(), **more}
        append_json(self._store.job_folder(name) / "events.jsonl", line)

    def tell(self, name: str, kind: str, message: str, **more: Any) -> None:
        """Append an event of something done already; if the disk refuses it, only warn."""
        try:
            self.note(name, kind, message, **more)
        except OSError as error:
            log.warning("job %s: event %s is not written: %s", name, kind, error)

    @public
    def metrics(self, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A job's steps and evaluations so far."""
        run = self._store.job_folder(name) / "run"
        try:
            stat = (run / "metrics.jsonl").stat()
        except FileNotFoundError:
            return [], []
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._reading:  # pages ask every two seconds, and most jobs have ended
            known = self._metrics.pop(name, None)
            if known is None or known[0] != mark:
                steps, evaluations = read_metrics(run)
                known = mark, [plain(step) for step in steps], [plain(one) for one in evaluations]
            self._metrics[name] = known
            while len(self._metrics) > MOST_READ:
                del self._metrics[next(iter(self._metrics))]
        return known[1], known[2]


def why(error: Exception) -> str:
    """Why a job has failed, and what to do."""
    if not isinstance(error, OSError) or not disk.refuses(error):
        return f"{type(error).__name__}: {error}"
    file = f" ({Path(error.filename).name})" if error.filename else ""
    advice = "Make room on the server's disk" if error.errno in disk.FULL else "Let the server write to its folder"
    return f"{disk.reason(error)}{file}. {advice}, then resume the job"
