"""For tests: the page of a real server in Chromium, as fixtures (a plugin of conftest.py), and what people do there."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
PATIENCE = 60_000  # milliseconds: machines that run tests are busy
CONTROLS = "button, input, select, textarea, summary"


@dataclass
class Watched:
    """What a page has said and asked for while a test went on."""

    problems: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    refused: list[tuple[int, str]] = field(default_factory=list)  # (status, path)
    expected: list[tuple[int, str]] = field(default_factory=list)

    def console(self, message: Any) -> None:
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            self.problems.append(f"{message.type}: {message.text}")

    def failed(self, request: Any) -> None:
        # Chromium tells of an abort where a script has read a stream to its end before the loader has.
        if not (request.failure == "net::ERR_ABORTED" and request.url.endswith("/v1/chat/completions")):
            self.problems.append(f"{request.method} {request.url}: {request.failure}")

    def response(self, response: Any) -> None:
        if response.status >= 400:
            self.refused.append((response.status, urlsplit(response.url).path))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome in PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def awake(server):
    """The server once its engine has answered: the page is there before."""
    server.ask("tiny", tokens=1)
    return server


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def page(browser, awake, server, watched):
    """The page, opened; nothing may go wrong on it but what a test expects, and nothing is left on the server."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    listeners = {
        "console": watched.console,
        "pageerror": lambda error: watched.problems.append(str(error)),
        "request": lambda request: watched.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))),
        "requestfailed": watched.failed,
        "response": watched.response,
    }
    for event, does in listeners.items():
        page.on(event, does)
    page.goto("/")
    said(page.locator("#name"), "tiny")
    yield page
    for event, does in listeners.items():
        page.remove_listener(event, does)
    context.close()
    server.http.put("/v1/learning", json={"on": True}).raise_for_status()
    server.http.delete("/v1/data").raise_for_status()
    assert watched.problems == []
    assert watched.origins - {"data://"} == {server.url}
    assert watched.refused == watched.expected


def upload(page: Any, name: str, data: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": data})


def drop(page: Any, name: str, text: str) -> None:
    script = "([name, text]) => { const d = new DataTransfer(); d.items.add(new File([text], name)); return d; }"
    page.dispatch_event("#drop", "drop", {"dataTransfer": page.evaluate_handle(script, [name, text])})


def chat(page: Any, text: str = "It was") -> str:
    """Ask in a new chat; who has answered."""
    page.click("#clear")
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(".rate >> nth=0")
    return page.inner_text("#turns li:last-child small")


def confirm(page: Any) -> None:
    page.click("#sure-yes")


def said(locator: Any, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect  # only where there is a browser

    expect(locator).to_contain_text(text, timeout=PATIENCE)


def fits(page: Any, width: int) -> None:
    """Nothing sticks out of the window, and what can be pressed is large enough for a finger."""
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    for control in page.locator(CONTROLS).all():
        box = control.bounding_box() if control.is_visible() else None
        if box is not None:
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, control.evaluate("e => e.outerHTML")
            assert box["height"] >= 24, control.evaluate("e => e.outerHTML")
