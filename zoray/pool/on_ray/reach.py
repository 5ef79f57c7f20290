"""Whether a Ray cluster answers at an address; an unreachable one is reported within CONNECT_SECONDS."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from typing import Any

from zoray.pool.on_ray import local as local_ray
from zoray.records import ConfigError

CONNECT_SECONDS = 30
TOKEN = re.compile(r"auth\w* token|AuthToken|RAY_AUTH", re.IGNORECASE)
_answered: set[str] = set()  # addresses that have answered this process; asking takes seconds


def check_reachable(address: str | None) -> None:
    """Raise ConfigError within CONNECT_SECONDS unless a Ray cluster answers at `address` ("host:port"); null is fine.

    `ray.init` alone may wait for minutes. "auto" and "local" are left to it: it knows at once.
    """
    if address in (None, "auto", "local") or address in _answered:
        return
    check_address(address)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS / 3).close()
    except (OSError, UnicodeError) as error:  # refused, unreachable, no such host
        raise ConfigError(
            f"expected a Ray cluster at {address} (cluster.address or RAY_ADDRESS); it does not answer ({error}). "
            "Start one with `ray start --head`, or leave both unset for a local one"
        ) from None
    deadline = time.monotonic() + CONNECT_SECONDS
    said = _ask(address, deadline)
    if TOKEN.search(said) and "RAY_AUTH_MODE" not in os.environ and not _ask(address, deadline, RAY_AUTH_MODE="token"):
        os.environ["RAY_AUTH_MODE"] = "token"  # as `auto` does: this machine has a token, and it is the right one
        if "ray._raylet" in sys.modules:  # it has read the variable already
            sys.modules["ray._raylet"].Config.initialize("")
        said = ""
    if said:
        remedy = "Is it the address that `ray start --head` printed, by default with port 6379?"
        if TOKEN.search(said):
            remedy = (
                "Put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN on this machine (`ray "
                "get-auth-token` prints it on the head), and set RAY_AUTH_MODE=token"
            )
        raise ConfigError(
            f"expected a Ray cluster at {address} (cluster.address or RAY_ADDRESS); Ray says: {said}. {remedy}"
        )
    _answered.add(address)


def _ask(address: str, deadline: float, **variables: str) -> str:
    """Why Ray can't use a cluster from this process, in Ray's words; empty if it can."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    options: dict[str, Any] = {"env": {**os.environ, **variables}, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=max(1.0, deadline - time.monotonic()), capture_output=True, **options)
    except subprocess.TimeoutExpired as late:
        words = local_ray.own_words((late.stderr or b"").decode(errors="replace"))
        return f"nothing: a connection is accepted, but no answer came within {CONNECT_SECONDS} s. {words}".rstrip(". ")
    if not done.returncode:
        return ""
    return local_ray.own_words(done.stderr + done.stdout) or f"nothing (its health-check ends with {done.returncode})"


def check_address(address: str) -> None:
    """Raise ConfigError unless `address` looks like that of a Ray cluster."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"expected cluster.address as host:port; got {address!r}. The Ray Client protocol is not used: "
            "run this command on a node of the cluster, or through `ray job submit -- python -m zoray.launch ...`"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"expected cluster.address (or RAY_ADDRESS) as host:port or auto; got {address!r}. "
            "`ray start --head` prints the address, by default port 6379; 8265 is the dashboard's"
        )
