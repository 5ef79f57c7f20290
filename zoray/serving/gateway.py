"""The HTTP side of a server: OpenAI's API for answers, files and tuning jobs, zoray's own for versions, and the page.

Nobody is trusted: bodies are bounded before they are read, every path is checked against patterns (store.py), requests
need the key where there is one, and only pages of this server itself may read answers (no CORS headers).
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections import OrderedDict
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from zoray.engines.vllm_openai import failure
from zoray.records import ConfigError
from zoray.serving.requests import NewJob, Rated, Use, Wish
from zoray.serving.store import NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("page")
SCRIPTS = ("app", "chat", "curve", "data", "learning", "parts", "server", "stored", "versions")
ASSETS = {"": "index.html", "style.css": "style.css", **{f"{name}.js": f"{name}.js" for name in SCRIPTS}}
MOST_JSON = 4 << 20  # bytes of a request that is no upload
RATED = 4096  # addresses whose rates are remembered
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that ends here: a status, and why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Rates:
    """Requests of an address within the last minute: a bucket that fills evenly."""

    def __init__(self, per_minute: int | None) -> None:
        self._limit = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (tokens, when)

    def take(self, address: str) -> float:
        """Seconds to wait before the next request; 0 where this one may pass."""
        if self._limit is None:
            return 0.0
        now = time.monotonic()
        left, then = self._left.pop(address, (float(self._limit), now))
        left = min(float(self._limit), left + (now - then) * self._limit / 60)
        self._left[address] = (left - 1 if left >= 1 else left, now)
        while len(self._left) > RATED:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * 60 / self._limit


async def body_of(request: Request, limit: int) -> bytes:
    """A request's body; refused as soon as it is over the limit, whatever its header says."""
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise Refused(413, f"expected at most {limit:,} bytes; got {int(declared):,}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, f"expected at most {limit:,} bytes; got more")
        parts.append(part)
    return b"".join(parts)


async def json_of(request: Request) -> dict[str, Any]:
    """A request's body as a JSON object."""
    data = await body_of(request, MOST_JSON)
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise Refused(400, "expected a body of JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "expected a JSON object")
    return found


def build_app(gateway: Any) -> FastAPI:
    """The routes. `gateway` has settings, key, engine and tuner (see app.py); handles' calls are awaited."""
    settings = gateway.settings
    app = FastAPI(title="zoray", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    rates = Rates(settings.requests_per_minute)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        path = request.url.path
        try:
            if _foreign(request, settings):
                raise Refused(403, "requests from pages of other sites are not answered")
            address = request.client.host if request.client else "?"
            if wait := rates.take(address):
                most = settings.requests_per_minute
                raise Refused(429, f"expected at most {most} requests a minute; wait {wait:.1f} s")
            is_open = path.lstrip("/") in (*ASSETS, "health")
            if gateway.key is not None and not is_open and not _holds(request, gateway.key):
                raise Refused(401, "expected the server's key: Authorization: Bearer <key>")
            response = await call_next(request)
        except Refused as refused:
            response = _refusal(refused)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)

    @app.exception_handler(ConfigError)
    async def wrong(_: Request, error: ConfigError) -> Response:
        return _refusal(Refused(404 if isinstance(error, NotFound) else 400, str(error)))

    @app.exception_handler(RayError)
    @app.exception_handler(RayServeException)
    async def gone(_: Request, error: Exception) -> Response:
        if isinstance(error, BackPressureError):
            return _refusal(Refused(503, "too many requests are waiting already; try again in a few seconds"))
        log.warning("%s: %s", type(error).__name__, error)
        return _refusal(Refused(503, "the engine or the tuner has ended and is being started anew; try again soon"))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _refusal(Refused(400, f"{where}: {first['msg']}" if where else first["msg"], where or None))

    # Answers.

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(name) for name in await gateway.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name not in await gateway.names():
            raise Refused(404, f"there is no model {name[:100]!r}", "model")
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer("chat", request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer("completions", request)

    async def answer(kind: str, request: Request) -> Response:
        body = await json_of(request)
        version = await gateway.resolve(body.get("model"))
        parts = gateway.answer(kind, body, version)
        try:
            status, streams, first = await anext(parts)
        except StopAsyncIteration:
            raise Refused(502, "the engine has ended without an answer; try again") from None
        if not streams:
            return Response(first, status, media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            async with aclosing(parts):
                yield first
                try:
                    async for _, _, data in parts:
                        yield data
                except Exception as error:  # the engine has died in the middle: a clean end that says so
                    message = failure(503, f"the engine has ended in the middle of the answer; try again ({error})")
                    yield b"data: " + message + b"\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    # Files.

    @app.post("/v1/files")
    async def upload(request: Request) -> Any:
        name, data = await _upload(request, int(settings.max_upload_mb * 2**20))
        return _file(await gateway.tuner.add_file(name, data))

    @app.get("/v1/files")
    async def files() -> Any:
        return {"object": "list", "data": [_file(one) for one in await gateway.tuner.files()], "has_more": False}

    @app.get("/v1/files/{number}")
    async def file(number: str) -> Any:
        return _file(await gateway.tuner.file(number))

    @app.delete("/v1/files/{number}")
    async def delete_file(number: str) -> Any:
        await gateway.tuner.delete_file(number)
        return {"id": number, "object": "file", "deleted": True}

    @app.post("/v1/files/{number}/preview")
    async def preview(number: str, use: Use) -> Any:
        return {"lines": await gateway.tuner.preview(number, use)}

    # Tuning jobs.

    @app.post("/v1/fine_tuning/jobs")
    async def create(job: NewJob) -> Any:
        if job.model not in (None, settings.name):
            raise Refused(400, f"expected model {settings.name!r}, which this server tunes; got {job.model!r}", "model")
        return _job(await gateway.tuner.create(job), settings.name)

    @app.get("/v1/fine_tuning/jobs")
    async def jobs(limit: int = 20, after: str | None = None) -> Any:
        found = [_job(job, settings.name) for job in reversed(await gateway.tuner.jobs())]
        ids = [job["id"] for job in found]
        start = ids.index(after) + 1 if after in ids else 0
        limit = max(1, min(limit, 100))
        return {"object": "list", "data": found[start : start + limit], "has_more": len(found) > start + limit}

    @app.get("/v1/fine_tuning/jobs/{name}")
    async def job(name: str) -> Any:
        return _job(await gateway.tuner.job(name), settings.name)

    @app.get("/v1/fine_tuning/jobs/{name}/events")
    async def events(name: str, limit: int = 100) -> Any:
        found = await gateway.tuner.events(name)
        data = [_event(name, number, event) for number, event in enumerate(found)][::-1][: max(1, min(limit, 1000))]
        return {"object": "list", "data": data, "has_more": len(found) > len(data)}

    @app.get("/v1/fine_tuning/jobs/{name}/metrics")
    async def metrics(name: str) -> Any:
        steps, evaluations = await gateway.tuner.metrics(name)
        return {"steps": thin(steps), "evaluations": evaluations}

    for verb in ("pause", "resume", "cancel"):
        app.post(f"/v1/fine_tuning/jobs/{{name}}/{verb}")(_turn(gateway, verb, settings.name))

    @app.delete("/v1/fine_tuning/jobs/{name}")
    async def delete_job(name: str) -> Any:
        await gateway.tuner.delete(name)
        return {"id": name, "deleted": True}

    # Versions.

    @app.get("/v1/versions")
    async def versions() -> Any:
        return await gateway.tuner.versions()

    @app.post("/v1/versions/{version}/promote")
    async def promote(version: str) -> Any:
        return await gateway.promote(version)

    @app.delete("/v1/versions/{version}")
    async def delete_version(version: str) -> Any:
        await gateway.tuner.delete_version(version)
        return {"id": version, "deleted": True}

    # What else is on the page.

    @app.get("/v1/learning")
    async def learning() -> Any:
        return {"on": await gateway.tuner.is_learning()}

    @app.put("/v1/learning")
    async def set_learning(wish: Wish) -> Any:
        await gateway.tuner.set_learning(wish.on)
        return {"on": wish.on}

    @app.get("/v1/conversations")
    async def conversations() -> Any:
        return {"object": "list", "data": await gateway.tuner.rated()}

    @app.post("/v1/conversations")
    async def rate(rated: Rated) -> Any:
        messages = [message.model_dump() for message in rated.messages]
        return await gateway.tuner.rate(messages, rated.up, rated.model, rated.id)

    @app.post("/v1/conversations/file")
    async def file_of_conversations() -> Any:
        return _file(await gateway.tuner.file_of_conversations())

    @app.delete("/v1/conversations/{number}")
    async def unrate(number: str) -> Any:
        await gateway.tuner.unrate(number)
        return {"id": number, "deleted": True}

    @app.delete("/v1/data")
    async def delete_all() -> Any:
        await gateway.tuner.delete_all()
        gateway.forget()
        return {"deleted": True}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/{asset}", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page(asset: str = "") -> Response:
        if asset not in ASSETS:
            raise Refused(404, "there is nothing here")
        return FileResponse(PAGE / ASSETS[asset])

    return app


def thin(rows: list[dict[str, Any]], most: int = 500) -> list[dict[str, Any]]:
    """Evenly chosen rows, the last one among them: what a curve can show."""
    every = -(-len(rows) // most) if rows else 1
    return [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % every == 0]


def _turn(gateway: Any, verb: str, base: str) -> Any:
    async def turn(name: str) -> Any:
        return _job(await getattr(gateway.tuner, verb)(name), base)

    turn.__name__ = verb
    return turn


def _refusal(error: Refused) -> Response:
    headers = {"Retry-After": "5"} if error.status in (429, 503) else None
    return Response(failure(error.status, str(error), error.param), error.status, headers, "application/json")


def _holds(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "")
    kind, _, value = given.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(value.strip().encode(), key.encode())


def _foreign(request: Request, settings: Any) -> bool:
    """Whether a browser sends this for a page of another site: a form or script there could reach a local server."""
    site = request.headers.get("sec-fetch-site")
    if site in ("cross-site", "same-site"):
        return request.url.path not in ("/", "")
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2] != host:
        return True
    # A name of a foreign site that has been made to stand for 127.0.0.1 (DNS rebinding).
    name = host.rpartition(":")[0] or host
    return settings.host in ("127.0.0.1", "localhost", "::1") and name not in ("127.0.0.1", "localhost", "[::1]")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "zoray"}


def _file(file: dict[str, Any]) -> dict[str, Any]:
    return {**file, "created_at": int(file["created_at"])}


def _job(job: dict[str, Any], base: str) -> dict[str, Any]:
    """A job as OpenAI's API shows it, with zoray's own fields beside."""
    request, last = job["request"], job["last"]
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
        "training_file": request["training_file"],
        "validation_file": None,
        "result_files": [],
        "seed": request.get("seed") or 0,
        "hyperparameters": {"n_epochs": 1, "batch_size": job["batch"]},
        "trained_tokens": job["tokens"],
        "error": {"code": "failed", "message": job["error"], "param": None} if job.get("error") else None,
        "filename": request["filename"],
        "step": job["step"],
        "steps": job["steps"],
        "first": job["first"],
        "last": last,
    }


def _event(job: str, number: int, event: dict[str, Any]) -> dict[str, Any]:
    level = "error" if event["kind"] == "failed" else "info"
    return {
        "id": f"{job}-{number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event["time"]),
        "level": level,
        "message": event["message"],
        "type": "message",
        "data": event,
    }


async def _upload(request: Request, limit: int) -> tuple[str, bytes]:
    """A file of a multipart form: its name and data."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Refused(400, "expected a multipart form with a field `file`")
    data = await body_of(request, limit + (1 << 16))

    async def stream() -> AsyncIterator[bytes]:
        yield data

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=10).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, f"expected a multipart form with a field `file`: {error}") from None
    async with aclosing(_Form(form)):
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise Refused(400, "expected a field `file` with a file", "file")
        if (purpose := form.get("purpose", "fine-tune")) != "fine-tune":
            raise Refused(400, f"expected purpose=fine-tune; got {str(purpose)[:50]!r}", "purpose")
        content = await file.read()
    if len(content) > limit:
        raise Refused(413, f"expected a file of at most {limit:,} bytes; got {len(content):,}", "file")
    return file.filename or "", content


class _Form:
    """A form to be closed."""

    def __init__(self, form: Any) -> None:
        self._form = form

    async def aclose(self) -> None:
        await self._form.close()
