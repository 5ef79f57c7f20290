"""Files, jobs, versions and events in the form of OpenAI's API, plus zoray's own fields."""

from __future__ import annotations

from typing import Any

from zoray.serving.http.door import Refused


def page(found: list[dict[str, Any]], limit: int, after: str | None, what: str, most: int = 100) -> dict[str, Any]:
    """A page of a list, after the item with the id `after`."""
    ids = [one["id"] for one in found]
    if after is not None and after not in ids:
        raise Refused(404, f"there is no {what} {after[:100]!r}", "after")
    start = 0 if after is None else ids.index(after) + 1
    some = found[start : start + max(1, min(limit, most))]
    ends = {"first_id": some[0]["id"], "last_id": some[-1]["id"]} if some else {"first_id": None, "last_id": None}
    return {"object": "list", "data": some, **ends, "has_more": len(found) > start + len(some)}


def model_of(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "zoray"}


def file_of(file: dict[str, Any]) -> dict[str, Any]:
    return {**file, "created_at": int(file["created_at"])}


def job_of(job: dict[str, Any], base: str) -> dict[str, Any]:
    """A job in the form of OpenAI's API, plus zoray's own fields."""
    request, last, numbers, way = job["request"], job["last"], job["numbers"], job["request"].get("learns_by")
    ended = job["status"] in ("succeeded", "failed", "cancelled")
    return {
        "id": job["id"],
        "object": "fine_tuning.job",
        "created_at": int(request["created_at"]),
        "finished_at": int(job["changed_at"]) if ended else None,
        "model": base,
        "fine_tuned_model": job["best_version"],
        "organization_id": "local",
        "status": job["status"],
        "training_file": request.get("training_file") or f"task:{request['task']}",
        "validation_file": request.get("validation_file"),
        "result_files": [],
        "seed": job["seed"],
        "hyperparameters": numbers,
        "method": way and {"type": way, way: {"hyperparameters": numbers}},
        "metadata": request.get("metadata"),
        "integrations": [],
        "trained_tokens": job["tokens"],
        "error": {"code": "failed", "message": job["error"], "param": None} if job.get("error") else None,
        "filename": request["filename"],
        "working": job["working"],
        "step": job["step"],
        "steps": job["steps"],
        "first": job["first"],
        "last": last,
    }


def checkpoint_of(version: dict[str, Any]) -> dict[str, Any]:
    """A version in the form of an OpenAI checkpoint, plus its own record."""
    measured = version["measured"]
    return {
        "id": version["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(version["created_at"]),
        "fine_tuned_model_checkpoint": version["id"],
        "fine_tuning_job_id": version["job"],
        "step_number": version["step"],
        "metrics": {"step": version["step"], "full_valid_loss": measured["loss"]},
        "version": version,
    }


def events_of(job: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A job's events in the form of OpenAI's API, the latest first."""
    return [
        {
            "id": f"{job}-{number}",
            "object": "fine_tuning.job.event",
            "created_at": int(event["time"]),
            "level": "error" if event["kind"] == "failed" else "info",
            "message": event["message"],
            "type": "message",
            "data": event,
        }
        for number, event in reversed(list(enumerate(events)))
    ]


def thin(rows: list[dict[str, Any]], most: int = 500) -> list[dict[str, Any]]:
    """Evenly spaced rows, including the last: as many as a curve can show."""
    every = -(-len(rows) // most) if rows else 1
    return [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % every == 0]
