"""What clients hear from Ray Serve's proxy when the gateway is gone, whose answer has or has not begun."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from zoray.serving.deployments.proxy import GONE, middlewares
from zoray.serving.deployments.start import PROXY


def ended_after(*messages, kind="text/event-stream"):
    """A client of the proxy, whose app sends these and then no more, as Ray's does."""
    (wrapped,) = middlewares()

    async def app(scope, receive, send):
        if messages:
            headers = [(b"Content-Type", kind.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in messages:
            await send({"type": "http.response.body", "body": body, "more_body": body != b"last"})

    return TestClient(wrapped.cls(app, *wrapped.args, **wrapped.kwargs)).get("/v1/models")


def test_an_answer_that_has_not_begun_is_a_503_that_says_when_to_try_again():
    response = ended_after()
    assert (response.status_code, response.json()["error"]["message"]) == (503, GONE)
    assert response.headers["Retry-After"] == "5" and response.headers["Content-Type"] == "application/json"


def test_a_stream_that_breaks_off_ends_in_an_error():
    response = ended_after(b"data: 1\n\n", b"data: 2\n\n")
    *own, event = response.text.removesuffix("\n\n").split("\n\n")
    assert own == ["data: 1", "data: 2"] and json.loads(event.removeprefix("data: "))["error"]["message"] == GONE


@pytest.mark.parametrize(("bodies", "kind"), [((b"1", b"last"), "text/event-stream"), ((b"{}", b"last"), "text/html")])
def test_an_answer_that_is_whole_is_left_alone(bodies, kind):
    assert ended_after(*bodies, kind=kind).content == b"".join(bodies)


def test_ray_finds_it():
    module, _, name = PROXY[1].partition(":")
    assert (middlewares.__module__, middlewares.__name__) == (module, name)
    from ray.serve._private import constants

    assert hasattr(constants, PROXY[0])
