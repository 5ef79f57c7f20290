"""A real server for tests: `python -m zoray.serve` as a process of its own, on a tiny chat model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = (  # a tiny model's: seconds to start, milliseconds a step
    "engine.kv_cache_gib=0.1",
    "engine.max_tokens=512",
    "serve.name=tiny",
    "serve.steps=40",
    "serve.batch=4",
    "serve.eval_every=10",
    "serve.gate.max_forgetting=10",  # a random model knows nothing that it could forget
    "serve.requests_per_minute=null",
    "serve.max_slowdown=1000",  # requests take milliseconds here: half of that is too little for any slice
    "optimizer.lr=0.01",
    "space.targets=residual",
)


class Served:
    """One server, its settings, and clients of it."""

    def __init__(self, model: Path, folder: Path, *settings: str, key: str | None = None) -> None:
        self.folder, self.port, self.key = folder, _free_port(), key
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.with_name(f"{folder.name}.log")
        self.command = [
            *(sys.executable, "-m", "zoray.serve", f"model.path={model}", f"serve.folder={folder}"),
            *(f"serve.port={self.port}", *SMALL, *settings),
        ]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=headers)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)
        self.process: subprocess.Popen[Any] | None = None

    def start(self) -> Served:
        """Start it and wait until it answers."""
        environment = {**os.environ, "HYDRA_FULL_ERROR": "1", **({"ZORAY_API_KEY": self.key} if self.key else {})}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        try:
            self.wait(self.answers, 280)
        except BaseException:
            self.kill()
            raise
        return self

    def answers(self) -> bool:
        """Whether the server is there; what it has said is shown where it ends."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, true: Callable[[], Any], seconds: float = 60.0) -> Any:
        """What `true` returns, once that is true."""
        deadline = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < deadline, (
                f"not within {seconds} s: {self.log.read_text(errors='replace')[-4000:]}"
            )
            time.sleep(0.1)
        return found

    def processes(self, name: str) -> list[psutil.Process]:
        """The server's processes whose title has this in it: ServeReplica:zoray:Engine, EngineCore, ..."""
        assert self.process is not None
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """End it as a crash of the machine would: the server and all that it has started, at once."""
        assert self.process is not None
        everything = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in everything:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(30)

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it as Ctrl-C does; its exit status."""
        if self.process is None or self.process.poll() is not None:
            return 0
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def upload(self, name: str, data: bytes) -> str:
        """An uploaded file's id."""
        return self.openai.files.create(file=(name, data), purpose="fine-tune").id

    def ask(self, model: str, text: str = "It was", tokens: int = 8) -> str:
        """A greedy answer."""
        messages: Any = [{"role": "user", "content": text}]
        found = self.openai.chat.completions.create(model=model, messages=messages, max_tokens=tokens, temperature=0)
        return found.choices[0].message.content or ""

    def job(self, name: str) -> dict[str, Any]:
        """A job's record."""
        return self.http.get(f"/v1/fine_tuning/jobs/{name}").raise_for_status().json()


def labelled(rows: int = 200) -> bytes:
    """Short texts of two kinds as CSV, with columns text and label."""
    words = [["a dull and lifeless story", "far too long", "I did not like the plot"]]
    words.append(["one of the best movies of the year", "a wonderful thing to see", "I liked the music"])
    lines = [f"{words[i % 2][i // 2 % 3]} number {i},{('bad', 'good')[i % 2]}" for i in range(rows)]
    return ("text,label\n" + "\n".join(lines) + "\n").encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
