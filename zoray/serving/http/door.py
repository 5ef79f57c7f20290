"""The door: checks that every request must pass before a route sees it, and headers of every answer.

Guarantees: a request without the key, from another site's page, too frequent or too large is refused before its body
is kept; bodies in memory are bounded, each and in total; every refusal is an error in the form of OpenAI's API; nothing
of a request is logged; HEAD is answered like GET, without a body.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import re
import time
import traceback
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from zoray.serving.deployments.logs import LOG
from zoray.serving.settings import is_own, is_public

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
MOST_JSON = 4 << 20  # bytes of a request that is not an upload
FORM = 1 << 16  # bytes of an upload besides its file
MOST_HELD = 64 << 20  # bytes of all bodies in memory, besides those of four uploads
SECONDS = {"json": 60.0, "upload": 1800.0}  # time for a body to arrive
RATED = 65_536  # addresses whose rates are remembered
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A refused request: status and reason; after `after` seconds it may be tried again."""

    def __init__(self, status: int, message: str, param: str | None = None, after: float = 5.0) -> None:
        super().__init__(message)
        self.status, self.param, self.after = status, param, after

    @property
    def response(self) -> Response:
        """The answer."""
        headers = {"Retry-After": str(max(1, math.ceil(self.after)))} if self.status in (429, 503) else None
        return Response(failure(self.status, str(self), self.param), self.status, headers, "application/json")


class Rates:
    """Rate limit per address and minute: a token bucket that fills evenly."""

    def __init__(self, per_minute: int | None) -> None:
        self._limit = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (tokens, when)

    def take(self, address: str) -> float:
        """Seconds to wait before the next request; 0 if this one may pass."""
        if self._limit is None:
            return 0.0
        now, whose = time.monotonic(), _payer(address)
        left, then = self._left.pop(whose, (float(self._limit), now))
        left = min(float(self._limit), left + (now - then) * self._limit / 60)
        self._left[whose] = (left - 1 if left >= 1 else left, now)
        while len(self._left) > RATED:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * 60 / self._limit


class Door:
    """ASGI middleware.

    Args:
        app: the app behind the door.
        settings: of the server.
        key: the key that requests must present; None for none.
        open_paths: paths that need no key.
        upload_path: the path where bodies may be as large as an upload.
    """

    def __init__(
        self, app: ASGIApp, settings: Any, key: str | None, open_paths: Collection[str], upload_path: str
    ) -> None:
        self._app, self._settings, self._key = app, settings, key
        self._open, self._upload_path = frozenset(open_paths), upload_path
        self._rates = Rates(settings.requests_per_minute)
        self._upload = int(settings.max_upload_mb * 2**20) + FORM
        self._held, self._most = 0, MOST_HELD + 4 * self._upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "websocket":  # none are served, and no client is told more
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, held = False, 0

        async def out(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, headers = True, MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check(scope)
            kind = "upload" if (scope["method"], scope["path"]) == ("POST", self._upload_path) else "json"
            most, more, parts = self._upload if kind == "upload" else MOST_JSON, True, []
            try:
                async with asyncio.timeout(SECONDS[kind]):
                    _check_length(Headers(scope=scope).get("content-length"), most)
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return
                        part, more = message.get("body", b""), message.get("more_body", False)
                        parts.append(part)
                        self._held, held = self._held + len(part), held + len(part)
                        if held > most:
                            raise Refused(413, f"expected at most {most:,} bytes; got more")
                        if self._held > self._most:
                            raise Refused(503, "too much is being sent at the same time; try again in a few seconds")
            except TimeoutError:
                raise Refused(408, f"expected the whole request within {SECONDS[kind]:.0f} s") from None
            whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
            parts.clear()

            async def again() -> Message:
                return whole.pop() if whole else await receive()

            await self._app(scope, again, out)
        except Refused as refused:
            await refused.response(scope, receive, out)
        except Exception as error:  # its text may hold what people have written
            where = "".join(traceback.format_tb(error.__traceback__))
            path = getattr(scope.get("route"), "path", "")
            log.error("%s in %s %s:\n%s", type(error).__name__, scope["method"], path, where)
            if begun:
                raise
            told = f"internal server error; the server's log says where: {LOG}/ in its folder (serve.folder)"
            await Refused(500, told).response(scope, receive, out)
        finally:
            self._held -= held

    def _check(self, scope: Scope) -> None:
        headers, path, settings = Headers(scope=scope), scope["path"], self._settings
        if why := _foreign(headers, path, settings.host, settings.names):
            raise Refused(403, why)
        if wait := self._rates.take(_address(scope.get("client"), headers, bool(settings.names))):
            most = self._settings.requests_per_minute
            raise Refused(429, f"expected at most {most} requests a minute; wait {wait:.1f} s", after=wait)
        is_open = path in self._open and scope["method"] in ("GET", "HEAD")
        if self._key is not None and not is_open and not _holds(headers, self._key):
            raise Refused(401, "expected the server's key: Authorization: Bearer <key>")


def _check_length(declared: str | None, most: int) -> None:
    if declared is not None and declared.isascii() and declared.isdigit():
        digits = declared.lstrip("0")
        if len(digits) > 18 or int(digits or "0") > most:
            raise Refused(413, f"expected at most {most:,} bytes; got more")


def _holds(headers: Headers, key: str) -> bool:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(value.strip().encode("latin-1"), key.encode())


def _foreign(headers: Headers, path: str, own: str, names: Sequence[str]) -> str | None:
    """Why a request may come from another site's page in a browser, which can reach a local server; else None."""
    host = headers.get("host", "")
    found = HOST.fullmatch(host)
    if found is None:
        return _not_accepted("Host", host, "a name or an address", None)
    # A foreign site's name may be made to resolve to 127.0.0.1 (DNS rebinding); servers on other hosts need the key.
    if is_own(own) and not is_own(found[1].strip("[]")) and not is_public(host, names):
        return _not_accepted("Host", host, "of this machine (127.0.0.1, localhost), or of serve.names", found[1])
    site = headers.get("sec-fetch-site")
    if site in ("cross-site", "same-site"):
        if path == "/":  # a link to the page is harmless
            return None
        return f"requests from pages of other sites are not answered; got Sec-Fetch-Site: {site}"
    origin = headers.get("origin")
    if origin is None:
        return None
    scheme, _, name = origin.partition("://")
    if name.lower() == host.lower() or (name and is_public(name, names, scheme)):
        return None
    where = HOST.fullmatch(name)
    return _not_accepted("Origin", origin, f"that of {host}, or of serve.names", where and where[0])


def _not_accepted(header: str, got: str, expected: str, name: str | None) -> str:
    """The refusal, and the setting for a name that is the server's after all: a proxy in front has its own name."""
    shown = "".join(c if c.isprintable() else "?" for c in got[:100])
    advice = f". If that is how people reach this server, start it with 'serve.names=[\"{name}\"]'" if name else ""
    return f"expected {header} to be {expected}; got {shown!r}{advice}"


def _address(client: Sequence[Any] | None, headers: Headers, proxied: bool) -> str:
    """The address whose rate a request counts to; behind a proxy on this machine, the client that the proxy names."""
    address = client[0] if client else "?"
    named = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()  # added by the nearest proxy
    return named if proxied and named and is_own(address) else address


def _payer(address: str) -> str:
    """The network whose rate an address counts to: with IPv6, each user has a network of 2^64 addresses."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


def failure(status: int, message: str, param: str | None = None) -> bytes:
    """An error in the form of OpenAI's API."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
