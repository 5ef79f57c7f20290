"""The tuner's answers to requests: files, conversations, jobs, versions, the live one. Jobs run in jobs.py."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError
from zoray.scoring.workload import load_workload
from zoray.serving.http.overview import gather
from zoray.serving.learning import versions
from zoray.serving.learning.conversations import Conversations
from zoray.serving.learning.experiments import experiment_of, numbers_of, settled
from zoray.serving.learning.job_requests import NewJob, Use, plainly
from zoray.serving.learning.jobs import Jobs
from zoray.serving.learning.promotion import BY_HAND
from zoray.serving.store import NotFound, Store, public, read_json
from zoray.tasks.preview import preview

if TYPE_CHECKING:
    from zoray.serving.settings import Settings

MOST_FILES, MOST_JOBS = 1000, 500  # a list reads each of them


class Tuner:
    """Jobs, versions, and which version is live; `measure`: see Jobs."""

    def __init__(self, settings: Settings, measure: Any) -> None:
        self.settings, self.store = settings, Store(settings.folder)
        self.conversations = Conversations(self.store.folder / "conversations")
        self._jobs = jobs = Jobs(settings, self.store, measure, self.promote)
        self.states, self.close, self.where = jobs.states, jobs.close, jobs.where
        # Methods of these that requests may call directly.
        self.files, self.file, self.delete_version = self.store.files, self.store.file, self.store.delete_version
        self.rated, self.unrate = self.conversations.all, self.conversations.delete
        self.is_learning, self.set_learning, self.delete = jobs.is_learning, jobs.set_learning, jobs.delete
        self.events, self.metrics = self.states.events, self.states.metrics

    def start(self) -> None:
        """Continue the jobs that an earlier server left.

        Raises:
            ConfigError: the live version can't answer on this server.
        """
        versions.check_live(self.store, self.settings)
        self._jobs.start()

    # Files and conversations.

    @public
    def add_file(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep an upload, see Store.add_file.

        Raises:
            ConfigError: it would exceed serve.max_storage_mb.
        """
        self._make_sure_of_room(len(data))
        return self.store.add_file(name, data)

    @public
    def rate(self, messages: list[dict[str, str]], up: bool, model: str, number: str | None) -> dict[str, Any]:
        """Keep a rated conversation.

        Raises:
            ConfigError: the server keeps no conversations (serve.capture=false).
        """
        if not self.settings.capture:
            raise ConfigError("this server keeps no conversations (serve.capture=false)")
        self._make_sure_of_room(sum(len(message["content"]) for message in messages))
        return self.conversations.add(messages, up, model, number)

    @public
    def file_of_conversations(self) -> dict[str, Any]:
        """An upload made of the rated conversations."""
        return self.add_file(
            f"conversations-{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl",
            self.conversations.rows(self.settings.max_upload_mb * 2**20),
        )

    @public
    def delete_all(self) -> None:
        """Delete all data that people have given, and everything learnt from them."""
        self.store.forget_live()
        with self._jobs.ended():
            self.store.forget_live()  # again: the last job may have promoted a version
            self.store.delete_everything()
            self.conversations.delete_everything()

    # Jobs.

    @public
    def create(self, request: NewJob) -> dict[str, Any]:
        """Check a job and queue it.

        Raises:
            ConfigError: the file or a setting is wrong; the message says what was expected.
        """
        source = request.task or self.store.file(request.source)["filename"]
        if len(self.store.jobs()) >= MOST_JOBS:
            raise ConfigError(f"expected at most {MOST_JOBS} jobs; delete some")
        name = request.suffix or f"job-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        experiment, now = experiment_of(self.settings, self.store, name, request), time.time()
        rows = len(load_workload(experiment.spec).splits.train)  # shows every mistake in the data before a job exists
        asked = settled(self.settings, request, experiment, rows)
        self._jobs.add(name, {**asked, "created_at": now, "filename": source})
        return self.job(name)

    @public
    def turn(self, name: str, verb: str) -> dict[str, Any]:
        """Pause, resume or cancel a job."""
        self._jobs.turn(name, verb)
        return self.job(name)

    @public
    def delete_file(self, number: str) -> None:
        """Delete an upload; jobs that learn from it are ended."""
        self.store.file(number)

        def uses(name: str) -> bool:
            request = read_json(self.store.job_folder(name) / "request.json")
            return number in (request.get("training_file"), request.get("validation_file"))

        self._jobs.end(uses)
        self.store.delete_file(number)

    @public
    def job(self, name: str, versions: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """All about a job except its events and metrics; `versions`: all versions, if they have been read."""
        folder = self.store.job_folder(name)
        request, state = read_json(folder / "request.json"), self.states[name]
        steps, evaluations = self.metrics(name)
        dev = [e for e in evaluations if e["split"] == "dev"]
        known = self.store.versions() if versions is None else versions
        own = [v for v in known if v["job"] == name and v["passed"]]
        return {
            "id": name,
            "request": request,
            **state,
            "working": self._jobs.current == name,
            "step": steps[-1]["step"] if steps else 0,
            "steps": (numbers := numbers_of(self.settings, request))["steps"],
            "numbers": numbers,
            "seed": self.settings.seed if request.get("seed") is None else request["seed"],
            "tokens": sum(step["tokens"] for step in steps),
            "best_version": own[-1]["id"] if own else None,
            "first": dev[0] if dev else None,
            "last": dev[-1] if dev else None,
        }

    @public
    def jobs(self, versions: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """All jobs, the oldest first; `versions` as in `job`."""
        found, known = [], self.store.versions() if versions is None else versions
        for name in self.store.jobs():
            with suppress(NotFound):  # deleted just now
                found.append(self.job(name, known))
        return found

    @public
    def overview(self, job: str) -> dict[str, Any]:
        """See overview.gather."""
        return gather(self, job)

    @public
    def preview(self, number: str, use: Use) -> list[str]:
        """How an upload (or task:NAME) would be used, in lines for people; ConfigError says what is wrong."""
        experiment = experiment_of(
            self.settings, self.store, "preview", NewJob.model_construct(training_file=number, use=use)
        )
        workload = load_workload(experiment.spec)
        assert workload.encoder is not None
        lines = preview(experiment.task, workload.splits, workload.encoder)
        return [self.plainly(line) for line in lines]

    def plainly(self, text: str) -> str:
        """A message for the server's users, with an upload's own name in place of its path."""
        return plainly(text, self.store.file_name)

    # Versions.

    @public
    def answering(self) -> dict[str, Any]:
        """The live version, and the names of all versions; called twice a second."""
        return {"live": self.store.live(), "names": self.store.version_names()}

    @public
    def versions(self) -> dict[str, Any]:
        """All versions, which one is live, and which have been."""
        found = {"live": self.store.live(), "data": self.store.versions(), "history": self.store.live_history()}
        return {"object": "list", **found, "folder": str(self.store.folder)}

    @public
    def file_content(self, number: str) -> bytes:
        """An upload's bytes."""
        try:
            return self.store.data_path(number).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"there is no file {number}") from None  # deleted just now

    @public
    def promote(self, version: str | None, reason: str = BY_HAND) -> None:
        """Make a version (None: the base model) live from now on; rolling back is the same.

        It may be any step of a job: a version that is not kept is made from the journal.

        Raises:
            NotFound: there is no such job, or it has not reached that step.
            ConfigError: the version was learnt from another base model, or with another space.
        """
        if version is not None:
            versions.make_sure(self.store, version, self.settings)
        self.store.set_live(version, reason)
        if version is not None:
            job = version.partition("@")[0]
            if job in self.store.jobs():
                self.states.tell(job, "promoted", f"{version} is live: {reason}", version=version)

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
