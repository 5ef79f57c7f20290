"""The jobs of a server: one at a time, in a thread, each a zoray run in a folder of its own.

A job's journal is the truth: a server that was killed goes on where the journal ends. After each evaluation on held-out
rows the state becomes a version, is measured, and the gate decides whether it answers people from now on.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from contextlib import suppress
from functools import partial
from traceback import format_tb
from typing import TYPE_CHECKING, Any

from zoray.pool.on_ray.cluster import own_host
from zoray.pool.sockets import Listener
from zoray.records import ConfigError
from zoray.records.signatures import record
from zoray.run.driver import tune
from zoray.run.reports.history import read_metrics
from zoray.scoring.workload import load_workload
from zoray.serving.http.overview import gather
from zoray.serving.learning import versions
from zoray.serving.learning.conversations import Conversations
from zoray.serving.learning.experiments import experiment_of, numbers_of, settled
from zoray.serving.learning.job_requests import NewJob, Use, plainly
from zoray.serving.learning.pool import start_pool
from zoray.serving.learning.promotion import BY_HAND, Promotion
from zoray.serving.learning.states import States, why
from zoray.serving.store import NotFound, Store, read_json, write_json
from zoray.tasks.preview import preview

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoray.run.experiment import Experiment
    from zoray.serving.settings import Settings

log = logging.getLogger(__name__)
GOING = ("queued", "running")
MOST_FILES, MOST_JOBS = 1000, 500  # each is looked at for a list
MOST_READ = 32  # jobs whose metrics are kept in memory
ASK_SECONDS = 5.0  # until the next job is looked for, where nobody says that there is one
ENDS_SECONDS = 120.0  # that a job may take to end after its step


class Tuner:
    """Jobs, versions, and what is live.

    `measure(stopping, version, dev)` asks an engine, see EngineServer.measure; KeyboardInterrupt tells it to stop.
    """

    def __init__(self, settings: Settings, measure: Any) -> None:
        self.settings, self.store, self._measure = settings, Store(settings.folder), measure
        self.conversations = Conversations(self.store.folder / "conversations")
        self._states, self._wake = States(self.store), threading.Condition()
        self._reading = threading.Lock()
        self._metrics: dict[str, tuple[Any, list[Any], list[Any]]] = {}  # of jobs looked at last: file's mark, numbers
        self._current: str | None = None
        self._listener: Listener | None = None
        self._closed, self._deleting = False, 0
        self._worker = threading.Thread(target=self._work, name="zoray-jobs", daemon=True)

    def start(self) -> None:
        """Go on with what a server before this one has left.

        Raises:
            ConfigError: what is live can't answer on this server.
        """
        versions.check_live(self.store, self.settings)
        for name in self.store.jobs():
            if self.state(name)["status"] == "running":
                self._states.mark(name, status="queued")
        self._worker.start()

    def close(self) -> None:
        """Stop after the step at hand; the job goes on when the server is started again."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def where(self) -> tuple[tuple[str, int], bytes] | None:
        """Where engines connect to take part in the job at hand."""
        listener = self._listener
        return None if listener is None else (listener.address, listener.key)

    @property
    def learning(self) -> bool:
        """Whether jobs may run: active learning is on."""
        path = self.store.folder / "learning.json"
        return read_json(path)["on"] if path.exists() else True

    def is_learning(self) -> bool:
        """The same, as a call."""
        return self.learning

    def set_learning(self, on: bool) -> None:
        """Let jobs run, or stop the one at hand after its step until they may again."""
        with self._wake:
            write_json(self.store.folder / "learning.json", {"on": on})
            self._wake.notify_all()

    # Files and conversations.

    def add_file(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep an upload, see Store.add_file.

        Raises:
            ConfigError: there is no room for it (serve.max_storage_mb).
        """
        self._make_sure_of_room(len(data))
        return self.store.add_file(name, data)

    def rate(self, messages: list[dict[str, str]], up: bool, model: str, number: str | None) -> dict[str, Any]:
        """Keep a rated conversation.

        Raises:
            ConfigError: the server keeps none (serve.capture=false).
        """
        if not self.settings.capture:
            raise ConfigError("this server keeps no conversations (serve.capture=false)")
        self._make_sure_of_room(sum(len(message["content"]) for message in messages))
        return self.conversations.add(messages, up, model, number)

    def rated(self) -> list[dict[str, Any]]:
        """The conversations that are kept."""
        return self.conversations.all()

    def unrate(self, number: str) -> None:
        """Delete a conversation."""
        self.conversations.delete(number)

    def file_of_conversations(self) -> dict[str, Any]:
        """An upload made of the rated conversations."""
        return self.add_file(
            f"conversations-{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl",
            self.conversations.rows(self.settings.max_upload_mb * 2**20),
        )

    def delete_all(self) -> None:
        """Delete all that people have given, and all that was learnt from it."""
        with self._wake:
            self._deleting += 1  # no job is taken up meanwhile
        try:
            self.store.forget_live()
            for name in self.store.jobs():
                with suppress(ConfigError):  # it has just ended
                    self._end(name)
            self._await_none(lambda name: True)
            with self._wake:
                self.store.forget_live()  # the last of them may have passed the gate meanwhile
                self.store.delete_everything()
                self.conversations.delete_everything()
        finally:
            with self._wake:
                self._deleting -= 1
                self._wake.notify_all()

    # Jobs.

    def create(self, request: NewJob) -> dict[str, Any]:
        """Check a job and queue it.

        Raises:
            ConfigError: the file or a setting is wrong: what was expected, what came.
        """
        source = request.task or self.store.file(request.source)["filename"]
        if len(self.store.jobs()) >= MOST_JOBS:
            raise ConfigError(f"expected at most {MOST_JOBS} jobs; delete some")
        name = request.suffix or f"job-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        experiment, now = self._experiment(name, request), time.time()
        rows = len(load_workload(experiment.spec).splits.train)  # every mistake in the data shows before there is a job
        asked = {**settled(self.settings, request, experiment, rows), "created_at": now, "filename": source}
        self.store.new_job(name, asked, {"status": "queued", "changed_at": now})
        self._states.forget(name)  # of a deleted one of that name
        self._states.tell(name, "created", f"learns from {source}")
        self._notify()
        return self.job(name)

    def pause(self, name: str) -> dict[str, Any]:
        """Stop after the step at hand, to be resumed."""
        return self._turn(name, ("queued", "running"), "paused")

    def resume(self, name: str) -> dict[str, Any]:
        """Go on with a paused job, or try a failed one again."""
        return self._turn(name, ("paused", "failed"), "queued")

    def cancel(self, name: str) -> dict[str, Any]:
        """End a job for good."""
        return self._turn(name, ("queued", "running", "paused", "failed"), "cancelled")

    def _end(self, name: str) -> None:
        """The same for what is about to be deleted, which takes no room."""
        with self._wake:
            if self.state(name)["status"] not in ("succeeded", "cancelled"):
                self._states.mark(name, status="cancelled")
                self._states.tell(name, "cancelled", BY_HAND)
            self._wake.notify_all()

    def delete(self, name: str) -> None:
        """Delete a job that has ended, with its journal and numbers."""
        with self._wake:
            if self.state(name)["status"] in GOING or self._current == name:
                raise ConfigError(f"{name} is still at work: cancel it first")
            self.store.delete_job(name)
            self._states.forget(name)

    def delete_file(self, number: str) -> None:
        """Delete an upload; jobs that learn from it are ended."""
        self.store.file(number)
        for name in self.store.jobs():
            request = read_json(self.store.job_folder(name) / "request.json")
            if number in _files_of(request) and self.state(name)["status"] in (*GOING, "paused"):
                self._end(name)
        self._await_none(lambda name: self._uses(name, number))
        self.store.delete_file(number)

    def job(self, name: str, versions: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """All there is to know about a job but its events and numbers; `versions`: all, if they have been read."""
        folder = self.store.job_folder(name)
        request, state = read_json(folder / "request.json"), self.state(name)
        steps, evaluations = self.metrics(name)
        dev = [e for e in evaluations if e["split"] == "dev"]
        known = self.store.versions() if versions is None else versions
        own = [v for v in known if v["job"] == name and v["passed"]]
        return {
            "id": name,
            "request": request,
            **state,
            "working": self._current == name,
            "step": steps[-1]["step"] if steps else 0,
            "steps": (numbers := numbers_of(self.settings, request))["steps"],
            "numbers": numbers,
            "seed": self.settings.seed if request.get("seed") is None else request["seed"],
            "tokens": sum(step["tokens"] for step in steps),
            "best_version": own[-1]["id"] if own else None,
            "first": dev[0] if dev else None,
            "last": dev[-1] if dev else None,
        }

    def jobs(self, versions: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """All jobs, the oldest first; `versions` as in `job`."""
        found, known = [], self.store.versions() if versions is None else versions
        for name in self.store.jobs():
            with suppress(NotFound):  # deleted just now
                found.append(self.job(name, known))
        return found

    def overview(self, job: str) -> dict[str, Any]:
        """See overview.gather."""
        return gather(self, job)

    def state(self, name: str) -> dict[str, Any]:
        """A job's status, and why."""
        return self._states[name]

    def events(self, name: str) -> list[dict[str, Any]]:
        """What has happened to a job, the oldest first."""
        return self._states.events(name)

    def metrics(self, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A job's steps and evaluations so far."""
        run = self.store.job_folder(name) / "run"
        try:
            stat = (run / "metrics.jsonl").stat()
        except FileNotFoundError:
            return [], []
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._reading:  # pages ask every two seconds, and most jobs have ended
            known = self._metrics.pop(name, None)
            if known is None or known[0] != mark:
                steps, evaluations = read_metrics(run)
                known = mark, [versions.plain(step) for step in steps], [versions.plain(one) for one in evaluations]
            self._metrics[name] = known
            while len(self._metrics) > MOST_READ:
                del self._metrics[next(iter(self._metrics))]
        return known[1], known[2]

    def preview(self, number: str, use: Use) -> list[str]:
        """How an upload (or task:NAME) would be used, in lines for people; ConfigError names what is wrong with it."""
        experiment = experiment_of(
            self.settings, self.store, "preview", NewJob.model_construct(training_file=number, use=use)
        )
        workload = load_workload(experiment.spec)
        assert workload.encoder is not None
        lines = preview(experiment.task, workload.splits, workload.encoder)
        return [self.plainly(line) for line in lines]

    def plainly(self, text: str) -> str:
        """A message for those who use the server, with an upload's own name in the place of where it lies."""
        return plainly(text, self.store.file_name)

    # Versions.

    def answering(self) -> dict[str, Any]:
        """What is live, and the names of all versions; asked twice a second."""
        return {"live": self.store.live(), "names": self.store.version_names()}

    def versions(self) -> dict[str, Any]:
        """All versions, which one is live, and which have been."""
        found = {"live": self.store.live(), "data": self.store.versions(), "history": self.store.live_history()}
        return {"object": "list", **found, "folder": str(self.store.folder)}

    def delete_version(self, name: str) -> None:
        """Delete a version that is not live."""
        self.store.delete_version(name)

    def files(self) -> list[dict[str, Any]]:
        """All uploads."""
        return self.store.files()

    def file(self, number: str) -> dict[str, Any]:
        """An upload's record."""
        return self.store.file(number)

    def file_content(self, number: str) -> bytes:
        """An upload as it came."""
        try:
            return self.store.data_path(number).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"there is no file {number}") from None  # deleted just now

    def promote(self, version: str | None, reason: str = BY_HAND) -> None:
        """Let a version (None: the base model) answer from now on; to roll back is the same.

        It may be any step of a job: one that is not kept is made of the journal.

        Raises:
            NotFound: there is no such job, or it has not come so far.
            ConfigError: it was learnt from another base model, or with another space.
        """
        if version is not None:
            versions.make_sure(self.store, version, self.settings)
        self.store.set_live(version, reason)
        if version is not None:
            job = version.partition("@")[0]
            if job in self.store.jobs():
                self._states.tell(job, "promoted", f"{version} is live: {reason}", version=version)

    def _make_sure_of_room(self, size: int) -> None:
        files = self.store.files()
        used, most = sum(file["bytes"] for file in files) + self.conversations.bytes, self.settings.max_storage_mb
        if used + size > most * 2**20:
            raise ConfigError(
                f"expected files and conversations of at most {most:g} MB in all (serve.max_storage_mb); there are "
                f"{used / 2**20:.0f} MB. Delete some"
            )
        if len(files) >= MOST_FILES:
            raise ConfigError(f"expected at most {MOST_FILES} files; delete some")

    # The thread.

    def _work(self) -> None:
        while not self._closed:
            try:
                with self._wake:
                    self._states.write_again()
                if (name := self._take_up()) is not None:
                    self._work_on(name)
            except Exception as error:  # a file that can't be read or written: this thread must not be the end of all
                told = error if isinstance(error, OSError) else ""  # other texts may hold what people have written
                log.error("%s: %s\n%s", type(error).__name__, told, "".join(format_tb(error.__traceback__)))
                time.sleep(ASK_SECONDS)

    def _work_on(self, name: str) -> None:
        """Run a job, and note how it has ended; what can't be noted on disk is kept in memory until it can."""
        try:
            self._put_down(name, self._run(name))
        except KeyboardInterrupt:  # asked to stop while it waited for engines
            self._put_down(name, None)
        except ConfigError as error:
            self._failed(name, self.plainly(str(error)))
        except Exception as error:  # a job's end must not be the end of all
            log.error("job %s: %s\n%s", name, type(error).__name__, "".join(format_tb(error.__traceback__)))
            self._failed(name, self.plainly(why(error)))
        finally:
            with self._wake:
                self._current = None
                with suppress(NotFound):
                    self._states.give_up(name)

    def _take_up(self) -> str | None:
        """The next job, which is at work from now on; None if there has been none for a while."""
        with self._wake:
            if (name := self._next()) is None:
                self._wake.wait(ASK_SECONDS)
                return None
            self._states.set(name, status="running")
            if not any(event["kind"] == "started" for event in self.events(name)):
                self._states.tell(name, "started", "its first step is under way")
            self._current = name
            return name

    def _put_down(self, name: str, summary: dict[str, Any] | None) -> None:
        """A job has come to its end, or has been stopped; `summary` is driver.tune's."""
        with self._wake, suppress(NotFound):
            finished = summary is not None and summary["finished"]
            if self.state(name)["status"] == "running":
                self._states.mark(name, status="succeeded" if finished else "queued")
                if finished:
                    self._states.tell(name, "succeeded", _outcome(summary))  # type: ignore[arg-type]

    def _run(self, name: str) -> dict[str, Any]:
        folder = self.store.job_folder(name)
        request = read_json(folder / "request.json")
        date = time.strftime("%Y-%m-%d", time.gmtime(request["created_at"]))
        experiment = self._experiment(name, NewJob(**_asked(request)), date)
        workload = load_workload(experiment.spec)
        (folder / "run").mkdir(exist_ok=True)
        config = {key: record(getattr(experiment, key)) for key in ("model", "task", "space", "estimator")}

        def stopping() -> bool:
            return self._closed or not self.learning or self.state(name)["status"] != "running"

        promotion = Promotion(
            *(self.settings, self.store, partial(self._measure, stopping)),
            *(partial(self._states.note, name), self.promote),
        )
        self._listener = listener = Listener(own_host(elastic=False), 0)
        try:
            return tune(
                experiment,
                workload,
                config,
                partial(start_pool, listener, self.settings.replicas, stopping),
                stopping=stopping,
                on_dev=lambda pool, found, rows: promotion.evaluated(name, self.events(name), pool, found, rows),
            )
        finally:
            self._listener = None
            listener.close()  # an engine may have connected that nobody has taken

    def _experiment(self, name: str, request: NewJob, date: str | None = None) -> Experiment:
        return experiment_of(self.settings, self.store, name, request, date)

    def _next(self) -> str | None:
        if self._deleting or not self.learning:
            return None
        for name in self.store.jobs():
            with suppress(NotFound):  # deleted just now
                if self.state(name)["status"] == "queued":
                    return name
        return None

    def _turn(self, name: str, of: tuple[str, ...], status: str) -> dict[str, Any]:
        with self._wake:
            found = self.state(name)["status"]
            if found != status:
                if found not in of:
                    raise ConfigError(f"{name} is {found}: expected one that is {' or '.join(of)}")
                self._states.set(name, status=status)
                self._states.tell(name, status, BY_HAND)
            self._wake.notify_all()
        return self.job(name)

    def _failed(self, name: str, reason: str) -> None:
        with self._wake, suppress(NotFound):
            if self.state(name)["status"] == "running":  # else people have paused or ended it meanwhile
                self._states.mark(name, status="failed", error=reason)
            self._states.tell(name, "failed", reason)

    def _await_none(self, true: Callable[[str], bool]) -> None:
        """Wait until no job of some kind is at work any more: it ends after its step."""
        deadline = time.monotonic() + ENDS_SECONDS
        while (name := self._current) is not None and true(name):
            if time.monotonic() > deadline:
                raise ConfigError(f"{name} has not ended within {ENDS_SECONDS:.0f} s; try again")
            time.sleep(0.05)

    def _uses(self, name: str, number: str) -> bool:
        return number in _files_of(read_json(self.store.job_folder(name) / "request.json"))

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()


def _files_of(request: dict[str, Any]) -> tuple[Any, Any]:
    return request.get("training_file"), request.get("validation_file")


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """A stored request without what the server has added."""
    return {key: value for key, value in request.items() if key in NewJob.model_fields}


def _outcome(summary: dict[str, Any]) -> str:
    first, final = summary["initial"], summary["final"]
    metric = next((key for key in ("accuracy", "f1", "loss") if key in first and key in final), "loss")

    def change(before: dict[str, Any], after: dict[str, Any]) -> str:
        return f"{before.get(metric, 0):.3f} -> {after.get(metric, 0):.3f}"

    told = f"{summary['steps']} steps; {metric} on held-out rows {change(first, final)}"
    if "test" in first and "test" in final:
        told += f", on test rows, which have decided nothing, {change(first['test'], final['test'])}"
    return told
