"""What Ray Serve's proxy, which holds the clients' connections, says when the gateway ends in the middle of a request.

By itself it says nothing: an answer that has not begun becomes a bare 500, and one that has breaks off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from zoray.serving.http.door import Refused, failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE = "the server's gateway has ended and is being started again; try again soon"


class Told:
    """A 503 in the place of an answer that never began, and an error event behind a stream that broke off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = streams = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended, streams
            if message["type"] == "http.response.start":
                kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
                begun, streams = True, any(value.startswith(b"text/event-stream") for value in kinds)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if not begun:
            await Refused(503, GONE).response(scope, receive, send)
        elif streams and not ended:
            event = b"data: " + failure(503, GONE) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy is to wrap its app in; a variable of Ray's names it, see start.PROXY."""
    return [Middleware(Told)]
