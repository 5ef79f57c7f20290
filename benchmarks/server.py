"""A server for benchmarks, as a process of its own: `with running([...settings]) as url:`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def running(settings: Sequence[str], seconds: float = 300.0) -> Iterator[str]:
    """The address of `python -m zoray.serve` with these settings, once it answers; it ends with the context.

    Raises:
        RuntimeError: it has ended, or does not answer within `seconds`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "zoray.serve", f"serve.port={port}", *settings], stdout=sys.stderr
    )
    try:
        deadline = time.monotonic() + seconds
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"expected a server at {url} within {seconds:.0f} s; it has not come")
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
