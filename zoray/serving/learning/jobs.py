"""The jobs of a server: one at a time, in a thread, each a zoray run in its own folder.

A job's journal is the truth: a server that was killed goes on where the journal ends. After each evaluation on held-out
rows the state becomes a version, is measured, and the gate decides whether it goes live.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from traceback import format_tb
from typing import TYPE_CHECKING, Any

from zoray.pool.on_ray.cluster import own_host
from zoray.pool.sockets import Listener
from zoray.records import ConfigError
from zoray.records.signatures import record
from zoray.run.driver import tune
from zoray.scoring.workload import load_workload
from zoray.serving.learning.experiments import experiment_of
from zoray.serving.learning.job_requests import NewJob, plainly
from zoray.serving.learning.pool import start_pool
from zoray.serving.learning.promotion import BY_HAND, Promotion
from zoray.serving.learning.states import States, why
from zoray.serving.store import NotFound, public, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zoray.serving.settings import Settings
    from zoray.serving.store import Store

log = logging.getLogger(__name__)
TURNS = {  # what people can do with a job: the states that allow it, and the state that follows
    "pause": (("queued", "running"), "paused"),  # after the current step; can be resumed
    "resume": (("paused", "failed"), "queued"),
    "cancel": (("queued", "running", "paused", "failed"), "cancelled"),  # for good
}
GOING = ("queued", "running", "paused")  # jobs that have not ended
ASK_SECONDS = 5.0  # between looks for a next job, if no notification comes
ENDS_SECONDS = 120.0  # how long a job may take to end


class Jobs:
    """The thread that runs jobs, and the calls that control it.

    Args:
        settings: of the server.
        store: where the jobs are kept.
        measure: `measure(stopping, version, dev)` asks an engine, see EngineServer.measure; it raises KeyboardInterrupt
            if the job should stop.
        promote: makes a version live: its name, and the reason.
    """

    def __init__(self, settings: Settings, store: Store, measure: Any, promote: Callable[[str, str], None]) -> None:
        self._settings, self._store, self._measure, self._promote = settings, store, measure, promote
        self.states, self._wake = States(store), threading.Condition()
        self.current: str | None = None  # the job at work
        self._listener: Listener | None = None
        self._closed, self._deleting = False, 0
        self._worker = threading.Thread(target=self._work, name="zoray-jobs", daemon=True)

    def start(self) -> None:
        """Continue the jobs that an earlier server left."""
        for name in self._store.jobs():
            if self.states[name]["status"] == "running":
                self.states.mark(name, status="queued")
        self._worker.start()

    def close(self) -> None:
        """Stop after the current step; the job goes on when the server starts again."""
        self._closed = True
        self.notify()

    def where(self) -> tuple[tuple[str, int], bytes] | None:
        """Where engines connect to take part in the current job; None if there is none."""
        listener = self._listener
        return None if listener is None else (listener.address, listener.key)

    @public
    def is_learning(self) -> bool:
        """Whether jobs may run: active learning is on."""
        path = self._store.folder / "learning.json"
        return read_json(path)["on"] if path.exists() else True

    @public
    def set_learning(self, on: bool) -> None:
        """Let jobs run, or stop the current one after its step until they may run again."""
        with self._wake:
            write_json(self._store.folder / "learning.json", {"on": on})
            self._wake.notify_all()

    def notify(self) -> None:
        """Wake the thread: there may be work."""
        with self._wake:
            self._wake.notify_all()

    def add(self, name: str, request: dict[str, Any]) -> None:
        """Queue a new job; `request`: the result of experiments.settled, plus created_at and filename."""
        self._store.new_job(name, request, {"status": "queued", "changed_at": request["created_at"]})
        self.states.forget(name)  # left by a deleted job of that name
        self.states.tell(name, "created", f"learns from {request['filename']}")
        self.notify()

    def turn(self, name: str, verb: str) -> None:
        """Do one of TURNS; ConfigError if the job's state does not allow it."""
        of, status = TURNS[verb]
        with self._wake:
            found = self.states[name]["status"]
            if found != status:
                if found not in of:
                    raise ConfigError(f"{name} is {found}: expected one that is {' or '.join(of)}")
                self.states.set(name, status=status)
                self.states.tell(name, status, BY_HAND)
            self._wake.notify_all()

    def end(self, true: Callable[[str], bool]) -> None:
        """End the jobs for which `true(name)` for good, even on a full disk, and wait until none is at work."""
        for name in self._store.jobs():
            with self._wake, suppress(NotFound):  # deleted just now
                if true(name) and self.states[name]["status"] in GOING:
                    self.states.mark(name, status="cancelled")
                    self.states.tell(name, "cancelled", BY_HAND)
                self._wake.notify_all()
        deadline = time.monotonic() + ENDS_SECONDS
        while (at_work := self.current) is not None and true(at_work):
            if time.monotonic() > deadline:
                raise ConfigError(f"{at_work} has not ended within {ENDS_SECONDS:.0f} s; try again")
            time.sleep(0.05)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """End all jobs, and start none inside the context."""
        with self._wake:
            self._deleting += 1
        try:
            self.end(lambda name: True)
            with self._wake:
                yield
        finally:
            with self._wake:
                self._deleting -= 1
                self._wake.notify_all()

    @public
    def delete(self, name: str) -> None:
        """Delete an ended job, with its journal and metrics."""
        with self._wake:
            if self.states[name]["status"] in ("queued", "running") or self.current == name:
                raise ConfigError(f"{name} is still at work: cancel it first")
            self._store.delete_job(name)
            self.states.forget(name)

    # The thread.

    def _work(self) -> None:
        while not self._closed:
            try:
                with self._wake:
                    self.states.write_again()
                if (name := self._take_up()) is not None:
                    self._work_on(name)
            except Exception as error:  # a file can't be read or written, say: the thread must go on
                told = error if isinstance(error, OSError) else ""  # other texts may hold what people have written
                log.error("%s: %s\n%s", type(error).__name__, told, "".join(format_tb(error.__traceback__)))
                time.sleep(ASK_SECONDS)

    def _take_up(self) -> str | None:
        """Start the next job; returns its name, or None if there has been none for a while."""
        with self._wake:
            if (name := self._next()) is None:
                self._wake.wait(ASK_SECONDS)
                return None
            self.states.set(name, status="running")
            if not any(event["kind"] == "started" for event in self.states.events(name)):
                self.states.tell(name, "started", "its first step is under way")
            self.current = name
            return name

    def _next(self) -> str | None:
        if self._deleting or not self.is_learning():
            return None
        for name in self._store.jobs():
            with suppress(NotFound):  # deleted just now
                if self.states[name]["status"] == "queued":
                    return name
        return None

    def _work_on(self, name: str) -> None:
        """Run a job and note how it ended; if the disk refuses that, it is kept in memory until it can be written."""
        try:
            self._put_down(name, self._run(name))
        except KeyboardInterrupt:  # asked to stop while it waited for engines
            self._put_down(name, None)
        except ConfigError as error:
            self._failed(name, str(error))
        except Exception as error:  # a failed job must not end the thread
            log.error("job %s: %s\n%s", name, type(error).__name__, "".join(format_tb(error.__traceback__)))
            self._failed(name, why(error))
        finally:
            with self._wake:
                self.current = None
                with suppress(NotFound):
                    self.states.give_up(name)

    def _run(self, name: str) -> dict[str, Any]:
        folder = self._store.job_folder(name)
        request = read_json(folder / "request.json")
        date = time.strftime("%Y-%m-%d", time.gmtime(request["created_at"]))
        experiment = experiment_of(self._settings, self._store, name, NewJob.stored(request), date)
        workload = load_workload(experiment.spec)
        (folder / "run").mkdir(exist_ok=True)
        config = {key: record(getattr(experiment, key)) for key in ("model", "task", "space", "estimator")}

        def stopping() -> bool:
            return self._closed or not self.is_learning() or self.states[name]["status"] != "running"

        promotion = Promotion(
            *(self._settings, self._store, partial(self._measure, stopping)),
            *(partial(self.states.note, name), self._promote),
        )
        self._listener = listener = Listener(own_host(elastic=False), 0)
        try:
            return tune(
                experiment,
                workload,
                config,
                partial(start_pool, listener, self._settings.replicas, stopping),
                stopping=stopping,
                on_dev=lambda pool, found, rows: promotion.evaluated(name, self.states.events(name), pool, found, rows),
            )
        finally:
            self._listener = None
            listener.close()  # an engine may have connected without being admitted

    def _put_down(self, name: str, summary: dict[str, Any] | None) -> None:
        """Note that a job has finished or has been stopped; `summary` is driver.tune's."""
        with self._wake, suppress(NotFound):
            finished = summary is not None and summary["finished"]
            if self.states[name]["status"] == "running":
                self.states.mark(name, status="succeeded" if finished else "queued")
                if finished:
                    self.states.tell(name, "succeeded", _outcome(summary))  # type: ignore[arg-type]

    def _failed(self, name: str, reason: str) -> None:
        reason = plainly(reason, self._store.file_name)
        with self._wake, suppress(NotFound):
            if self.states[name]["status"] == "running":  # else people have paused or ended it
                self.states.mark(name, status="failed", error=reason)
            self.states.tell(name, "failed", reason)


def _outcome(summary: dict[str, Any]) -> str:
    first, final = summary["initial"], summary["final"]
    metric = next((key for key in ("accuracy", "f1", "loss") if key in first and key in final), "loss")

    def change(before: dict[str, Any], after: dict[str, Any]) -> str:
        return f"{before.get(metric, 0):.3f} -> {after.get(metric, 0):.3f}"

    told = f"{summary['steps']} steps; {metric} on held-out rows {change(first, final)}"
    if "test" in first and "test" in final:
        told += f", on test rows, which decided nothing, {change(first['test'], final['test'])}"
    return told
