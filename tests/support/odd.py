"""For tests: a seeded source of odd requests to a server, from almost right to nonsense."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

TEXTS = ("", "a", "a film", "\x00", "é", "😀" * 3, "\ud800", "\u202e", "x" * 300, "x" * 20_000, "{text}",
    "{0.__class__}",
         "../../etc/passwd", "null", "<script>", "'; --", "\n", " ", "true", "-1", "NaN", "live", "tiny",
             "fuzz")  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    16,
    17,
    10**6,
    2**31,
    2**63,
    2**64,
    10**40,
    -(10**40),
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
)
NAMES = (
    "fuzz",
    "x",
    "..",
    "../..",
    "file-" + "0" * 24,
    "fuzz@1",
    "tiny",
    "live",
    ".",
    "*",
    "a" * 300,
    "\x00",
    "😀",
    "%2e%2e%2f",
)
FILES = (
    "a.csv",
    "a.jsonl",
    "a.txt",
    "a.tsv",
    "a.exe",
    "",
    "../a.csv",
    "a.csv\x00",
    "A.CSV",
    "😀.csv",
    "x" * 300 + ".csv",
)
ROUTES = (  # method, path, how often
    ("POST", "/v1/chat/completions", 12), ("POST", "/v1/completions", 12), ("POST", "/v1/files", 5),
    ("GET", "/v1/files", 1), ("GET", "/v1/files/{}", 2), ("DELETE", "/v1/files/{}", 2),
    ("POST", "/v1/files/{}/preview", 4), ("POST", "/v1/fine_tuning/jobs", 4), ("GET", "/v1/fine_tuning/jobs", 2),
    ("GET", "/v1/fine_tuning/jobs/{}", 2), ("GET", "/v1/fine_tuning/jobs/{}/events", 1),
    ("GET", "/v1/fine_tuning/jobs/{}/metrics", 1), ("POST", "/v1/fine_tuning/jobs/{}/pause", 1),
    ("POST", "/v1/fine_tuning/jobs/{}/resume", 1), ("POST", "/v1/fine_tuning/jobs/{}/cancel", 2),
    ("DELETE", "/v1/fine_tuning/jobs/{}", 2), ("GET", "/v1/versions", 1), ("POST", "/v1/versions/{}/promote", 1),
    ("DELETE", "/v1/versions/{}", 1), ("GET", "/v1/models", 1), ("GET", "/v1/models/{}", 1), ("GET", "/v1/learning",
        1),
    ("PUT", "/v1/learning", 1), ("GET", "/v1/conversations", 1), ("POST", "/v1/conversations", 3),
    ("DELETE", "/v1/conversations/{}", 1), ("POST", "/v1/conversations/file", 1), ("GET", "/openapi.json", 1),
    ("GET", "/", 1), ("GET", "/{}", 1), ("GET", "/health", 1), ("PATCH", "/v1/files", 1), ("OPTIONS", "/v1/data", 1),
    ("GET", "/v1/{}", 1),
)  # fmt: skip

MAKES = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/conversations", "/v1/conversations/file")  # what has an id


@dataclass
class Asked:
    """A request, as an HTTP client takes it."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    streams: bool = False  # whether its answer is a stream, if there is one


class Odd:
    """Requests, one after another; the same for the same seed. `known` are names that the server has made."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.known: list[str] = []

    def request(self) -> Asked:
        """The next one."""
        draw = self._random
        method, path, _ = draw.choices(ROUTES, [often for *_, often in ROUTES])[0]
        name = draw.choice(self.known) if self.known and draw.random() < 0.7 else draw.choice(NAMES)
        asked = Asked(method, path.replace("{}", _quoted(name)))
        if "jobs" in path and method == "GET" and draw.random() < 0.5:
            asked.path += f"?limit={draw.choice(NUMBERS)}&after={_quoted(draw.choice(NAMES))}"
        if path == "/v1/files" and method == "POST":
            self._upload(asked)
        elif method in ("POST", "PUT", "PATCH"):
            body = self._body(path)
            asked.streams = isinstance(body, dict) and body.get("stream") is True
            self._json(asked, body)
        return asked

    def hangs_up(self) -> bool:
        """Whether the next answer is not waited for to its end."""
        return self._random.random() < 0.03

    def _json(self, asked: Asked, body: Any) -> None:
        draw, content = self._random, json.dumps(body).encode()
        if draw.random() < 0.08:  # broken on the way
            cut = draw.randrange(len(content))
            content = draw.choice((content[:cut], content[:cut] + b"\xff" + content[cut:], content + b"}", b"[" * 5000))
        kind = "application/json" if draw.random() < 0.95 else draw.choice(("text/plain", "multipart/form-data", ""))
        asked.headers, asked.content = {"Content-Type": kind}, content

    def _body(self, path: str) -> Any:
        draw = self._random
        if draw.random() < 0.04:
            return self._value()
        if path == "/v1/chat/completions":
            body: dict[str, Any] = {"messages": [self._message() for _ in range(draw.choice((1, 1, 1, 2, 3, 0)))]}
        elif path == "/v1/completions":
            body = {"prompt": draw.choice(("a film", "It was", [5, 6, 7], ["a", "b"], [[5], [6]], self._value()))}
        elif path == "/v1/fine_tuning/jobs":
            body = {"training_file": draw.choice([*self.known, "x"]), "suffix": f"fuzz{draw.randrange(30)}",
                    "hyperparameters": {"steps": draw.choice((1, 2, 3)), "batch_size": draw.choice((1,
                        2))}}  # fmt: skip
        elif path.endswith("/preview"):
            body = {}
        elif path == "/v1/learning":
            body = {"on": draw.choice((True, True, 1, "x", None))}
        elif path == "/v1/conversations":
            body = {"messages": [{"role": role, "content": self._text()} for role in ("user", "assistant")], "up": True}
        else:
            return {}
        answers = path in ("/v1/chat/completions", "/v1/completions")
        if answers:
            body |= {"max_tokens": draw.choice((1, 2, 4)), "stream": draw.random() < 0.3}
        for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
            self._change(body, answers, path)
        return body

    def _change(self, body: dict[str, Any], answers: bool, path: str) -> None:
        draw = self._random
        if draw.random() < 0.2:
            body[draw.choice([*body, "x"])] = self._value()
        elif answers:
            name, value = draw.choice(self._sampling())
            body[name] = value
        elif path in ("/v1/fine_tuning/jobs", "/v1/files/{}/preview"):
            use = {"kind": draw.choice(("choice", "completion", "chat", "x")), "template": draw.choice((*TEXTS,
                "{text}: ")),
                   "text_column": self._text(), "words": {self._text(): self._text()}, "chat": draw.random() < 0.5,
                   "dev": draw.choice(NUMBERS), "test": draw.choice(NUMBERS)}  # fmt: skip
            few = dict(draw.sample(sorted(use.items(), key=lambda pair: pair[0]), 2))
            body |= few if path.endswith("preview") else {"use": few}

    def _sampling(self) -> list[tuple[str, Any]]:
        draw, number = self._random, self._random.choice(NUMBERS)
        schema = draw.choice(
            ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"enum": [1, "b"]}, {}, self._value())
        )
        form = draw.choice(({"type": "json_object"}, {"type": "text"}, {"type": "x"}, self._value(),
                            {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}))  # fmt: skip
        return [
            ("n", draw.choice((1, 2, 4, number))), ("temperature", draw.choice((0, 0.7, 1, 2, number))),
            ("top_p", draw.choice((0.1, 0.9, 1, number))), ("max_tokens", number), ("max_completion_tokens", number),
            ("stop", draw.choice(("a", ["a", "b"], self._text(), [self._text()] * 20))), ("seed", number),
            ("logprobs", draw.choice((True, False, 1, 5, number))), ("top_logprobs", draw.choice((1, 5, number))),
            ("logit_bias", {str(draw.choice((5, 6, number))): draw.choice((1, -100, number))}), ("echo",
                draw.random() < 0.5),
            ("presence_penalty", draw.choice((-2, 2, number))), ("frequency_penalty", draw.choice((-2, 2, number))),
            ("response_format", form), ("stream_options", {"include_usage": True}), ("user", self._text()),
            ("suffix", self._text()), ("best_of", number), ("model", draw.choice(("tiny", "live", self._text()))),
            ("chat_template", "{{ 1 }}"), ("cache_salt", self._text()), ("stream", draw.random() < 0.7),
        ]  # fmt: skip

    def _message(self) -> dict[str, Any]:
        draw = self._random
        message: dict[str, Any] = {"role": "user", "content": self._text() if draw.random() < 0.3 else "a film"}
        if draw.random() < 0.1:
            message |= {"role": draw.choice(("system", "assistant", "tool", "x"))}
        if draw.random() < 0.1:
            message |= {
                "content": draw.choice(([{"type": "text", "text": self._text()}], [{"type": "image_url"}], None, 5))
            }
        return message

    def _upload(self, asked: Asked) -> None:
        draw = self._random
        rows = [f"{draw.choice(('a film', 'a plot', 'music'))} {i},{draw.choice(('good', 'bad'))}" for i in range(30)]
        values = "\n".join(json.dumps(self._value()) for _ in range(20))
        tables = [f"{header}\n" + "\n".join(rows) for header in ("text,label", "prompt,completion")]
        data = draw.choice((*tables, self._text(), values)).encode(errors="replace")
        if draw.random() < 0.1:
            data = bytes(draw.randrange(256) for _ in range(200))
        name = draw.choice(FILES) if draw.random() < 0.4 else "a.csv"
        part = f'Content-Disposition: form-data; name="{draw.choice(("file",) * 9 + ("x",))}"; filename="{name}"'
        content = b"--b\r\n" + part.encode() + b"\r\n\r\n" + data + b"\r\n--b--\r\n"
        if draw.random() < 0.1:
            content = content[: draw.randrange(len(content))]
        kind = (
            "multipart/form-data; boundary=b"
            if draw.random() < 0.95
            else draw.choice(("text/csv", "multipart/form-data"))
        )
        asked.headers, asked.content = {"Content-Type": kind}, content

    def _text(self) -> str:
        return self._random.choice(TEXTS)

    def _value(self, depth: int = 0) -> Any:
        draw = self._random
        kind = draw.randrange(7 if depth < 4 else 4)
        if kind < 4:
            return (draw.choice(TEXTS), draw.choice(NUMBERS), None, draw.random() < 0.5)[kind]
        if kind == 4:
            return {
                draw.choice((*TEXTS, "type", "text", "label")): self._value(depth + 1) for _ in range(draw.randrange(4))
            }
        return [self._value(depth + 1) for _ in range(draw.randrange(4))]


def _quoted(name: str) -> str:
    return name if "%" in name else quote(name, safe="")


async def ask(http: Any, odd: Odd, count: int, parallel: int = 1) -> Counter[int]:
    """Send `count` requests, some at a time; how often each status came. 0 is a request that no client would send.

    Raises:
        AssertionError: the server has made a mistake, or an answer is not as it is to be.
    """
    statuses: Counter[int] = Counter()

    async def one() -> None:
        asked = odd.request()
        try:
            request = http.build_request(asked.method, asked.path, headers=asked.headers, content=asked.content)
        except httpx.InvalidURL:
            statuses[0] += 1
            return
        response = await http.send(request, stream=True)
        try:
            if odd.hangs_up():  # in the middle, or before
                return
            text = (await response.aread()).decode()
        finally:
            statuses[response.status_code] += 1
            await response.aclose()
        said = f"{asked}: {response.status_code} {text[:500]}"
        assert response.status_code < 500 or (response.status_code == 503 and "retry-after" in response.headers), said
        if response.status_code >= 400 and text:
            assert response.json()["error"]["code"] == response.status_code, said
        assert "Traceback" not in text and "access-control-allow-origin" not in response.headers, said
        assert '"code": 5' not in text, said  # in the middle of a stream
        if response.status_code == 200 and asked.method == "POST" and asked.path in MAKES:
            odd.known = [*odd.known[-20:], response.json()["id"]]

    for begin in range(0, count, parallel):
        await asyncio.gather(*(one() for _ in range(min(parallel, count - begin))))
    return statuses
