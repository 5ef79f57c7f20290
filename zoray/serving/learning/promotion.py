"""What becomes of a job's state after an evaluation: a version, measured, judged by the gate, and perhaps what is live.

Guarantees: a version is on disk before it is measured, and measured before it is judged; what people have chosen by
hand since a job began (or was resumed) is not undone by the gate.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoray.models.folder import weights_hash
from zoray.records import ConfigError
from zoray.serving.learning import versions
from zoray.serving.store import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from zoray.pool.pool import Pool
    from zoray.records import Evaluation
    from zoray.serving.gate import Gate, Measured
    from zoray.serving.settings import Settings
    from zoray.serving.store import Store

BY_HAND = "by hand"  # why something became live that people have chosen
KEPT = 20  # versions of a job that have never been live


class Promotion:
    """The evaluations of one job, from when it is taken up until it ends or is put down.

    Args:
        settings: of the server, with its gate.
        store: where versions are kept, and what is live.
        measure: asks an engine what a version (None: the base model) is worth, on the dev rows too or not, see
            EngineServer.measure.
        note: appends an event to the job: kind, message, more.
        promote: lets a version answer: its name, and why.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        measure: Callable[[str | None, bool], Measured],
        note: Callable[..., None],
        promote: Callable[[str, str], None],
    ) -> None:
        self._settings, self._store, self._measure = settings, store, measure
        self._note, self._promote = note, promote
        self._gate: Gate = settings.gate
        self._known: dict[str | None, Measured] = {}
        self._evaluated: dict[str | None, tuple[Evaluation, np.ndarray]] = {}

    def evaluated(
        self, job: str, events: list[dict[str, Any]], pool: Pool, evaluation: Evaluation, rows: np.ndarray | None
    ) -> None:
        """Make a version of the state that has been evaluated, measure it, and let the gate decide; once a step.

        `rows`: what each held-out row is worth (see measure.evaluate), so that none is scored twice; None if unknown.
        """
        version, store = f"{job}@{evaluation.step}" if evaluation.step else None, self._store
        if rows is not None:
            self._evaluated[version] = evaluation, rows
        if version is None:
            return
        if (noted := next((event for event in events if event.get("step") == evaluation.step), None)) is not None:
            if noted.get("due") and not self._followed(events, version):  # the disk was full, or the server was killed
                self._let_answer(events, version, noted["message"])
            return
        arrays, digest = pool.adapter()
        folder = versions.write(store, version, arrays, self._settings.space, self._settings.model.path)
        while True:
            live = store.live()
            try:
                new, base, current = (self._measured(one) for one in (version, None, live))
                break
            except NotFound:
                if not folder.exists():
                    self._note(
                        "evaluated", f"step {evaluation.step}: deleted before it was judged", step=evaluation.step
                    )
                    return
                if store.live() == live:  # else what was live has been deleted meanwhile
                    raise
        verdict = self._gate.judge(new, current, base.perplexity)
        versions.describe(
            folder,
            weights_hash(self._settings.model.resolve()),
            digest,
            measured=_plain(new),
            compared_with={"version": live, **_plain(current)},
            passed=verdict.promote,
            reason=verdict.reason,
        )
        said = "passed" if verdict.promote else "did not pass"
        due = verdict.promote and self._gate.automatic
        message = f"step {evaluation.step} {said}: {verdict.reason}"
        self._note("evaluated", message, step=evaluation.step, **({"due": True} if due else {}))
        if due:
            self._let_answer(events, version, f"passed the gate: {verdict.reason}")
        self._prune(job)

    def _let_answer(self, events: list[dict[str, Any]], version: str, why: str) -> None:
        """Promote what has passed, unless people have chosen something else."""
        if overruled(events, self._store.live_history()):
            waits = f"{version} waits for you: what is live has been chosen by hand meanwhile"
            self._note("held", waits, version=version)
        else:
            self._promote(version, why)

    def _followed(self, events: list[dict[str, Any]], version: str) -> bool:
        """Whether what was due to a version has been done: it has been live or held, or people have deleted it."""
        been = {entry["version"] for entry in self._store.live_history()}
        done = version in been or any(event.get("version") == version for event in events)
        return done or version not in self._store.version_names()

    def _measured(self, version: str | None) -> Measured:
        """A version never changes, nor do a job's held-out rows: each is measured once.

        The job's own states have just been evaluated on these rows, and step 0 is the base model.
        """
        if version not in self._known:
            done = self._evaluated.pop(version, None)
            found = self._measure(version, done is None)
            if done is not None:
                e, rows = done
                found = replace(found, score=e.score, loss=e.loss, metric=e.metric, rows=tuple(rows.tolist()))
            self._known[version] = found
        return self._known[version]

    def _prune(self, job: str) -> None:
        """Keep the last few versions of a job, and those that have been live."""
        been = {entry["version"] for entry in self._store.live_history()}
        own = [v["id"] for v in self._store.versions() if v["job"] == job and v["id"] not in been]
        for version in own[:-KEPT]:
            with suppress(ConfigError):  # promoted or deleted by somebody just now
                self._store.delete_version(version)


def overruled(events: list[dict[str, Any]], history: list[dict[str, Any]]) -> bool:
    """Whether people have chosen what is live since a job began, or since they have resumed it."""
    began = max((event["time"] for event in events if event["kind"] in ("started", "queued")), default=0.0)
    return any(entry["reason"] == BY_HAND and entry["time"] > began for entry in history)


def _plain(found: Measured) -> dict[str, Any]:
    return {**versions.plain(found), "rows": len(found.rows)}
