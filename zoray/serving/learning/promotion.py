"""After an evaluation a job's state becomes a version, is measured, judged by the gate, and perhaps promoted.

Guarantees: a version is on disk before it is measured, and measured before it is judged; the gate does not undo what
people have chosen by hand since a job began (or was resumed).
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

BY_HAND = "by hand"  # the reason noted when people choose the live version
KEPT = 20  # versions kept per job that have never been live


class Promotion:
    """The evaluations of one job, from its start until it ends or stops.

    Args:
        settings: of the server, with its gate.
        store: keeps the versions and the name of the live one.
        measure: asks an engine to measure a version (None: the base model), with or without the dev rows, see
            EngineServer.measure.
        note: appends an event to the job: kind, message, more.
        promote: makes a version live: its name, and the reason.
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
        """Make the evaluated state a version, measure it, and let the gate decide; once per step.

        `rows`: the worth of each held-out row (see evaluation.evaluate), so that none is scored twice; None if unknown.
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
                if store.live() == live:  # else the live version was deleted in the meantime
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
        """Promote a version that passed, unless people have chosen another."""
        if overruled(events, self._store.live_history()):
            waits = f"{version} waits for you: the live version has been chosen by hand since"
            self._note("held", waits, version=version)
        else:
            self._promote(version, why)

    def _followed(self, events: list[dict[str, Any]], version: str) -> bool:
        """Whether a due version has been dealt with: it has been live or held, or people have deleted it."""
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
        """Keep a job's last few versions, and those that have been live."""
        been = {entry["version"] for entry in self._store.live_history()}
        own = [v["id"] for v in self._store.versions() if v["job"] == job and v["id"] not in been]
        for version in own[:-KEPT]:
            with suppress(ConfigError):  # promoted or deleted just now
                self._store.delete_version(version)


def overruled(events: list[dict[str, Any]], history: list[dict[str, Any]]) -> bool:
    """Whether people have chosen the live version since a job began, or since they resumed it."""
    began = max((event["time"] for event in events if event["kind"] in ("started", "queued")), default=0.0)
    return any(entry["reason"] == BY_HAND and entry["time"] > began for entry in history)


def _plain(found: Measured) -> dict[str, Any]:
    return {**versions.plain(found), "rows": len(found.rows)}
