"""What Ray Serve's proxy, which holds the clients' connections, answers if the gateway ends during a request.

By default it says nothing: an answer that has not begun becomes a bare 500, and one that has begun breaks off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from zoray.serving.http.door import Refused, failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE = "the server's gateway has ended and is being restarted; try again soon"


class Told:
    """Sends a 503 for an answer that never began, and an error event after a stream that broke off."""

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
    """The middlewares for Ray Serve's proxy; one of Ray's variables names this function, see start.PROXY."""
    return [Middleware(Told)]
