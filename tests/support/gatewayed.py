"""For tests: the HTTP routes of a server in this process. Its tuner is real, but no job runs; answers are made up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
from starlette.routing import Route

from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators import TwoPoint
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora
from zoray.models.folder import Model
from zoray.serving.deployments.application import Calls, TunerServer
from zoray.serving.http.door import Refused
from zoray.serving.http.routes import build_app
from zoray.serving.learning.tuner import Tuner
from zoray.serving.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KEY = "0123456789abcdef-key"
JSON_TYPE = b"application/json"
JSON = {"Content-Type": JSON_TYPE.decode()}
SAID = b'{"object": "chat.completion", "choices": []}'


def settings_of(model: Path, folder: Path, **changes: Any) -> Settings:
    """A server's settings."""
    parts = (
        Model(str(model)),
        Vllm(max_tokens=256, kv_cache_gib=0.1),
        Lora(rank=2, alpha=4.0),
        TwoPoint(pairs=2, eps=0.02),
        Sgd(lr=0.1),
    )
    return replace(Settings(*parts, name="tiny", folder=str(folder), requests_per_minute=None), **changes)


class FakeGateway:
    """In the place of app.Gateway: answers are made up, all else is as it is."""

    def __init__(self, settings: Settings, key: str | None = None) -> None:
        self.settings, self.key = settings, key
        self.inner = Tuner(settings, None)
        self.inner.set_learning(False)
        server: Any = object.__new__(TunerServer)  # without Ray
        server.tuner = self.inner
        self.tuner = Calls(SimpleNamespace(call=SimpleNamespace(remote=server.call)))
        self.asked: list[tuple[str, dict[str, Any]]] = []  # what has reached the engine

    async def ready(self) -> bool:
        return True

    async def names(self) -> list[str]:
        return ["tiny", "live", *(version["id"] for version in self.inner.versions()["data"])]

    async def resolve(self, model: Any) -> str | None:
        if model not in (None, "", *(await self.names())):
            raise Refused(404, f"The model `{str(model)[:100]}` does not exist.", "model")
        return None

    async def promote(self, version: str) -> dict[str, Any]:
        chosen = None if version == "tiny" else version
        self.inner.promote(chosen)
        return {"live": chosen}

    def forget(self) -> None:
        pass

    async def answer(self, kind: str, body: dict[str, Any], version: str | None) -> AsyncIterator[Any]:
        json.dumps(body).encode()
        self.asked.append((kind, body))
        if body.get("stream"):
            for _ in range(3):
                yield 200, True, b"data: {}\n\n"
        else:
            yield 200, False, SAID


class Client:
    """Requests to an app in this process, as a script would send them: `client.post(path, json=...)`."""

    def __init__(self, gateway: FakeGateway, key: str | None = None, address: str = "127.0.0.1") -> None:
        self.app = build_app(gateway)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True, client=(address, 1))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)
        self._loop = asyncio.new_event_loop()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, and its whole answer."""
        return self._loop.run_until_complete(self.http.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", path, **options)

    def upload(self, data: bytes, name: str = "mail.csv") -> httpx.Response:
        """A file, as the openai client sends it."""
        return self.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})

    def raw(self, scope: dict[str, Any], *messages: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """What no client would send: status, headers and body of the answer to an ASGI scope and its messages."""
        return self._loop.run_until_complete(self._raw(scope, list(messages)))

    async def _raw(self, scope: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        sent: list[Any] = []
        messages = messages or [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        known = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "scheme": "http"}
        known |= {"headers": [(b"host", b"127.0.0.1:8000")], "client": ("127.0.0.1", 1), "http_version": "1.1"}
        known |= {"raw_path": b"", "root_path": "", "server": ("127.0.0.1", 8000), "asgi": {"version": "3.0"}}
        await self.app(known | scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def error_of(response: httpx.Response) -> dict[str, Any]:
    """An error's fields, if it is one as OpenAI's API has it."""
    found = response.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    assert found["error"]["code"] == response.status_code and response.headers["content-type"] == "application/json"
    return found["error"]


def routes(client: Client) -> list[tuple[str, str, str]]:
    """(method, path with made-up names, pattern) of every route."""
    found = []
    for route in client.app.routes:
        assert isinstance(route, Route) or hasattr(route, "methods"), route
        path = route.path.replace("{asset}", "app.js").replace("{name:path}", "x")
        for name in ("number", "name", "version"):
            path = path.replace(f"{{{name}}}", "x")
        found += [(method, path, route.path) for method in route.methods]
    assert len(found) > 25
    return found


def rows(count: int = 100, label: str = "label") -> bytes:
    """A labelled file."""
    return f"text,{label}\n".encode() + b"".join(b"film %d,%s\n" % (i, (b"good", b"bad")[i % 2]) for i in range(count))
