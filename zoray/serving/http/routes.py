"""The HTTP side of a server: OpenAI's API for answers, files and tuning jobs, zoray's own for versions, and the page.

No client is trusted: requests pass a door that checks origin, rate, key and size (door.py), values are bounded
(chat_requests.py, job_requests.py), every name is checked against a pattern before it becomes a path (store.py), and
there are no CORS headers.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import aclosing
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.routing import APIRoute
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from zoray.engines.shared.openai import EngineGone
from zoray.records import ConfigError, disk
from zoray.serving.http import overview
from zoray.serving.http import views as shapes
from zoray.serving.http.chat_requests import Asked, Chat, Completion
from zoray.serving.http.door import Door, Refused, failure
from zoray.serving.http.fields import place, told
from zoray.serving.http.openapi import CONTENT, ERROR, FORM, STREAMED
from zoray.serving.learning.job_requests import NewJob, Rated, Use, Wish
from zoray.serving.store import NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger(__name__)
PAGE = Path(__file__).parents[1] / "page"
ASSETS = {path.name: path for path in PAGE.rglob("*.*")}  # their addresses have no folders
ASSETS |= {"": ASSETS.pop("index.html")}
OPEN = ("/health", *(f"/{asset}" for asset in ASSETS))  # without a key
UPLOAD = "/v1/files"
NOTHING = "there is nothing here"
PARTS = ("chat/completions", "completions", "models", "files", "fine_tuning/jobs")  # of OpenAI's API, served here
ELSEWHERE = (  # parts that clients may look for
    "responses", "embeddings", "images", "audio", "moderations", "batches", "assistants", "threads", "vector_stores",
    "uploads", "realtime", "evals", "videos", "containers",
)  # fmt: skip


def build_app(gateway: Any) -> FastAPI:
    """The routes. `gateway` has settings, key, engine and tuner, as application.Gateway; handles' calls are awaited."""
    settings = gateway.settings
    app = FastAPI(
        title="zoray",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": ERROR, 503: ERROR, 507: ERROR},
    )
    app.add_middleware(Door, settings=settings, key=gateway.key, open_paths=OPEN, upload_path=UPLOAD)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response

    @app.exception_handler(ConfigError)
    async def wrong(_: Request, error: ConfigError) -> Response:
        return Refused(404 if isinstance(error, NotFound) else 400, str(error)).response

    @app.exception_handler(OSError)
    async def unwritten(_: Request, error: OSError) -> Response:
        if not disk.refuses(error):
            raise error
        full = error.errno in disk.FULL
        advice = "Delete files, jobs or versions, or make room there" if full else "Allow it to write there"
        said = f"the server can't write to its folder (serve.folder): {disk.reason(error)}; nothing was changed"
        return Refused(507, f"{said}. {advice}, and try again").response

    @app.exception_handler(RayError)
    @app.exception_handler(RayServeException)
    async def gone(request: Request, error: Exception) -> Response:
        if isinstance(error, BackPressureError):
            return Refused(503, "too many requests are waiting already; try again in a few seconds").response
        if isinstance(error, RayTaskError):  # raised in the other process
            cause = error.cause
            if isinstance(cause, ConfigError):
                return await wrong(request, cause)
            if not isinstance(cause, TimeoutError | EngineGone):
                raise error
        log.warning("%s", type(error).__name__)
        return Refused(503, "the engine or the tuner has ended and is being restarted; try again soon").response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = place(first["loc"][1:])
        if first["type"] == "model_attributes_type" and not where:
            return Refused(400, "expected a JSON object, sent as Content-Type: application/json").response
        if first["type"] == "json_invalid":
            return Refused(400, "expected a body of JSON").response
        said = told(first)
        return Refused(400, f"{where}: {said}" if where else said, where or None).response

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405) and (hint := _hint(app, request.url.path)):
            return Refused(404, hint).response
        known = {404: NOTHING, 405: "this method is not allowed here", 400: "expected a body of JSON"}
        response = Refused(error.status_code, known.get(error.status_code, str(error.detail))).response
        response.headers.update(error.headers or {})
        return response

    # Answers.

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [shapes.model_of(name) for name in await gateway.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name not in await gateway.names():
            raise Refused(404, f"there is no model {name[:100]!r}", "model")
        return shapes.model_of(name)

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(asked: Chat) -> Response:
        return await answer("chat", asked)

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(asked: Completion) -> Response:
        return await answer("completions", asked)

    async def answer(kind: str, asked: Asked) -> Response:
        version = await gateway.resolve(asked.model)
        parts = gateway.answer(kind, asked.body, version)
        try:
            status, streams, first = await anext(parts)
        except StopAsyncIteration:
            raise Refused(503, "the engine has ended without an answer; try again") from None
        if not streams:
            await parts.aclose()
            return Response(first, status, media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            async with aclosing(parts):
                yield first
                try:
                    async for _, _, data in parts:
                        yield data
                except Exception:  # the engine died in the middle: end the stream cleanly with an error
                    message = failure(503, "the engine has ended in the middle of the answer; try again")
                    yield b"data: " + message + b"\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    # Files.

    @app.post(UPLOAD, openapi_extra=FORM)
    async def upload(request: Request) -> Any:
        name, data = await _upload(request, int(settings.max_upload_mb * 2**20))
        return shapes.file_of(await gateway.tuner.add_file(name, data))

    @app.get("/v1/files")
    async def files() -> Any:
        return {
            "object": "list",
            "data": [shapes.file_of(one) for one in await gateway.tuner.files()],
            "has_more": False,
        }

    @app.get("/v1/files/{number}")
    async def file(number: str) -> Any:
        return shapes.file_of(await gateway.tuner.file(number))

    @app.get("/v1/files/{number}/content", responses=CONTENT)
    async def content(number: str) -> Response:
        data = await gateway.tuner.file_content(number)
        return Response(data, media_type="application/octet-stream", headers={"Content-Disposition": "attachment"})

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
        return shapes.job_of(await gateway.tuner.create(job), settings.name)

    @app.get("/v1/fine_tuning/jobs")
    async def jobs(limit: int = 20, after: str | None = None) -> Any:
        return shapes.page(
            [shapes.job_of(job, settings.name) for job in reversed(await gateway.tuner.jobs())], limit, after, "job"
        )

    @app.get("/v1/fine_tuning/jobs/{name}")
    async def job(name: str) -> Any:
        return shapes.job_of(await gateway.tuner.job(name), settings.name)

    @app.get("/v1/fine_tuning/jobs/{name}/events")
    async def events(name: str, limit: int = 100, after: str | None = None) -> Any:
        return shapes.page(shapes.events_of(name, await gateway.tuner.events(name)), limit, after, "event", 1000)

    @app.get("/v1/fine_tuning/jobs/{name}/checkpoints")
    async def checkpoints(name: str, limit: int = 10, after: str | None = None) -> Any:
        job = await gateway.tuner.job(name)
        found = [v for v in (await gateway.tuner.versions())["data"] if v["job"] == job["id"]]
        return shapes.page([shapes.checkpoint_of(version) for version in reversed(found)], limit, after, "checkpoint")

    @app.get("/v1/fine_tuning/jobs/{name}/metrics")
    async def metrics(name: str, after: int = 0) -> Any:
        steps, evaluations = await gateway.tuner.metrics(name)
        return {"steps": shapes.thin([step for step in steps if step["step"] > after]), "evaluations": evaluations}

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

    @app.post("/v1/versions/{version:path}/promote")
    async def promote(version: str) -> Any:
        return await gateway.promote(version)

    @app.delete("/v1/versions/{version}")
    async def delete_version(version: str) -> Any:
        await gateway.tuner.delete_version(version)
        return {"id": version, "deleted": True}

    # What else is on the page.

    @app.get("/v1/overview")
    async def look(job: str = "", have: str = "") -> Any:
        parts = overview.parts(await gateway.tuner.overview(job), settings)
        marks = {name: blake2b(json.dumps(part).encode(), digest_size=6).hexdigest() for name, part in parts.items()}
        known = have.split(",")
        new = {name: part for name, part in parts.items() if f"{name}:{marks[name]}" not in known}
        return {"marks": marks, "parts": new}

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
        return shapes.file_of(await gateway.tuner.file_of_conversations())

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
        if not await gateway.ready():
            raise Refused(503, "the engine is starting")
        return {"status": "ok"}

    @app.get("/{asset}", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page(asset: str = "") -> Response:
        if asset not in ASSETS:
            raise HTTPException(404)
        return FileResponse(ASSETS[asset])

    app.openapi()  # cached now, before HEAD is added: the schema leaves it out
    for route in app.routes:
        if isinstance(route, APIRoute) and "GET" in route.methods:
            route.methods.add("HEAD")  # the door leaves the body out
    return app


def _hint(app: FastAPI, path: str) -> str | None:
    """Advice for a client with a wrong base_url, or one that wants a part of OpenAI's API that is not here."""
    last = re.sub(r"/+", "/", f"/{path}").rstrip("/").rpartition("/v1/")[2].lstrip("/")
    meant = f"/v1/{last}"
    if meant != path and any(isinstance(one, APIRoute) and one.path_regex.match(meant) for one in app.routes):
        return f"{NOTHING}; OpenAI's API is at /v1, as in base_url=http://HOST:PORT/v1. Did you mean {meant[:100]}?"
    if path.startswith("/v1/") and last.partition("/")[0] in ELSEWHERE:
        return f"there is no {path[:100]} here: expected one of {', '.join(PARTS)}"
    return None


def _turn(gateway: Any, verb: str, base: str) -> Any:
    async def turn(name: str) -> Any:
        return shapes.job_of(await gateway.tuner.turn(name, verb), base)

    turn.__name__ = verb
    return turn


async def _upload(request: Request, limit: int) -> tuple[str, bytes]:
    """A file of a multipart form: its name and data."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise Refused(400, "expected a multipart form with a field `file`")
    parser = Form(request.headers, request.stream(), max_files=1, max_fields=10, max_part_size=1000)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"expected a multipart form with a field `file`: {error.message}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refused(400, "expected a field `file` with a file", "file")
        if (purpose := form.get("purpose", "fine-tune")) != "fine-tune":
            raise Refused(400, f"expected purpose=fine-tune; got {str(purpose)[:50]!r}", "purpose")
        content = await file.read()
    finally:
        await form.close()
    if len(content) > limit:
        raise Refused(413, f"expected a file of at most {limit:,} bytes; got {len(content):,}", "file")
    return file.filename or "", content


class Form(MultiPartParser):
    """Keeps the file in memory, where it is already, so private data never reach a temporary file."""

    spool_max_size = 0
