"""All that the page shows, in one answer: every open page asks for it every two seconds."""

from __future__ import annotations

from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any

from zoray.serving.http import views as shapes
from zoray.serving.store import NotFound

if TYPE_CHECKING:
    from zoray.serving.settings import Settings

MOST_SHOWN = 100  # rated conversations


def gather(tuner: Any, job: str) -> dict[str, Any]:
    """Files, jobs, versions and the rest from the Tuner, and the numbers and events of one job, if it exists."""
    versions = tuner.versions()
    jobs = tuner.jobs(versions["data"])
    numbers: dict[str, Any] = {"id": None, "steps": [], "evaluations": [], "events": []}
    if any(one["id"] == job for one in jobs):
        with suppress(NotFound):  # deleted just now
            steps, evaluations = tuner.metrics(job)
            numbers = {"id": job, "steps": steps, "evaluations": evaluations, "events": tuner.events(job)}
    talks = tuner.conversations
    return {
        "files": tuner.files(),
        "jobs": jobs,
        "versions": versions,
        "learning": tuner.is_learning(),
        "conversations": {"ids": talks.ids(), "latest": talks.latest(MOST_SHOWN)},
        "numbers": numbers,
    }


def parts(found: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The result of `gather` as the page shows it, in parts: each is sent when it has changed."""
    numbers, steps = found["numbers"], shapes.thin(found["numbers"]["steps"])
    return {
        "server": {"name": settings.name, "steps": settings.steps},
        "files": [shapes.file_of(one) for one in found["files"]],
        "jobs": [shapes.job_of(one, str(settings.name)) for one in reversed(found["jobs"])],
        "versions": found["versions"],
        "learning": found["learning"],
        "conversations": found["conversations"],
        "numbers": {
            "id": numbers["id"],
            "losses": [(step["step"], step["loss"]) for step in steps],
            "seconds_per_step": median(step["seconds"] for step in steps[-20:]) if steps else None,
            "evaluations": numbers["evaluations"],
            "events": shapes.events_of(numbers["id"], numbers["events"])[:200],
        },
    }
