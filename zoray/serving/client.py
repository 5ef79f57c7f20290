"""Calls to a running server (zoray.serve): JSON in, JSON out, and clear errors."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httpx

from zoray.records import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

URL, KEY = "ZORAY_URL", "ZORAY_API_KEY"  # environment variables
DEFAULT = "http://127.0.0.1:8000"
AGAIN_SECONDS = 30.0  # how long a GET is repeated while the server asks to try again


class Client:
    """A server by its address, e.g. http://127.0.0.1:8000; null takes ZORAY_URL's. The key comes from ZORAY_API_KEY."""

    def __init__(self, url: str | None = None) -> None:
        self.url = (url or os.environ.get(URL) or DEFAULT).rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"expected a server's address such as {DEFAULT} (--url or {URL}); got {self.url!r}")
        key = os.environ.get(KEY)
        own = parts.hostname in ("127.0.0.1", "localhost", "::1")  # no proxy leads to this machine
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(600.0, connect=10.0)  # a large file is checked row by row
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=not own)

    def get(self, *path: str) -> Any:
        """The JSON at /v1/<path>; repeated for a while if the server is busy or restarting."""
        deadline = time.monotonic() + AGAIN_SECONDS
        while True:
            answer = self._send("GET", path)
            wait = float(answer.headers.get("retry-after", 1))
            if answer.status_code not in (429, 503) or time.monotonic() + wait > deadline:
                return self._read(answer)
            time.sleep(wait)

    def post(self, *path: str, json: Any = None) -> Any:
        """The server's answer to a POST."""
        return self._read(self._send("POST", path, json=json or {}))

    def put(self, *path: str, json: Any) -> Any:
        """The server's answer to a PUT."""
        return self._read(self._send("PUT", path, json=json))

    def delete(self, *path: str) -> Any:
        """The server's answer to a DELETE."""
        return self._read(self._send("DELETE", path))

    def upload(self, path: Path) -> Any:
        """Upload a file; returns its record on the server.

        Raises:
            ConfigError: the file can't be read, or the server refuses it.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"can't read {path}: {error.strerror}. Give an existing file") from None
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": (path.name, data)}}
        return self._read(self._send("POST", ("files",), **form))

    def _send(self, method: str, path: tuple[str, ...], **options: Any) -> httpx.Response:
        where = "/".join(("", "v1", *(quote(part, safe="@:") for part in path)))
        try:
            return self._http.request(method, where, **options)
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise ConfigError(
                f"expected a server at {self.url}; it does not answer ({why}). Start one with python -m zoray.serve, "
                f"or name another: --url=http://host:port or {URL}"
            ) from None

    def _read(self, answer: httpx.Response) -> Any:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.status_code >= 400:
            error = found.get("error") if isinstance(found, dict) else None
            said = error.get("message") if isinstance(error, dict) else None
            advice = f". Set {KEY} in the environment" if answer.status_code == 401 else ""
            raise ConfigError(f"{said or f'the server answers with HTTP status {answer.status_code}'}{advice}")
        if not isinstance(found, dict):
            raise ConfigError(f"expected a zoray server at {self.url}; another program answers there")
        return found
