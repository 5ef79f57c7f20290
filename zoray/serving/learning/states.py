"""States, events and numbers of jobs on disk; a state that a full disk does not take counts, too, until it does."""

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
    """state.json, events.jsonl and metrics of each job; to be called under the lock of Jobs but for what reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._reading = threading.Lock()
        self._metrics: dict[str, tuple[Any, list[Any], list[Any]]] = {}  # of jobs looked at last: file's mark, numbers

    def __getitem__(self, name: str) -> dict[str, Any]:
        folder = self._store.job_folder(name)
        return self._unwritten.get(name) or read_json(folder / "state.json")

    def set(self, name: str, **values: Any) -> None:
        """Change a job's state; an OSError changes nothing."""
        write_json(self._store.job_folder(name) / "state.json", {**values, "changed_at": time.time()})
        self._unwritten.pop(name, None)

    def mark(self, name: str, **values: Any) -> None:
        """The same where it is so, whether the disk takes it or not."""
        try:
            self.set(name, **values)
        except OSError as error:
            log.warning("job %s is %s, which is not written yet: %s", name, values["status"], error)
            self._unwritten[name] = {**values, "changed_at": time.time()}

    def give_up(self, name: str) -> None:
        """Let a job that nothing works on any more have failed, if even noting its end has."""
        if self[name]["status"] == "running":
            why = "how it ended could not be noted; the server's log says why. Resume it"
            self._unwritten[name] = {"status": "failed", "error": why, "changed_at": time.time()}

    def forget(self, name: str) -> None:
        """A job is deleted."""
        self._unwritten.pop(name, None)

    def write_again(self) -> None:
        """Write what the disk has not taken, if it does now."""
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
        """What has happened to a job, the oldest first."""
        return read_lines(self._store.job_folder(name) / "events.jsonl")

    def note(self, name: str, kind: str, message: str, **more: Any) -> None:
        """Append an event."""
        line = {"kind": kind, "message": message, "time": time.time(), **more}
        append_json(self._store.job_folder(name) / "events.jsonl", line)

    def tell(self, name: str, kind: str, message: str, **more: Any) -> None:
        """The same of what has been done already, and does not depend on it."""
        try:
            self.note(name, kind, message, **more)
        except OSError as error:
            log.warning("job %s: %s is not written: %s", name, kind, error)

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
