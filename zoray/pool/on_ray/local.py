"""A run's own Ray: on loopback, with a dashboard where possible, and its files where the socket paths fit.

Guarantees: if this machine lacks something (a port, a home, a short path, room), a printed line says how it was worked
around, or a ConfigError quotes Ray. The dashboard never fails a run: another run may take its port at any moment.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError
from zoray.records.process.stopping import children_survive_hangup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONGEST = 107  # bytes of a socket's path: sockaddr_un
SOCKET = "/ray/session_2026-12-01_04-01-14_981226_4194304/sockets/plasma_store"  # the longest of Ray's; 4194304: a pid
LEAST_FREE = 16 << 20  # bytes for Ray's logs and sockets
OTHERS = ("/tmp", "/var/tmp")
LOG_LINES = 12  # a text with more lines is a log
ERROR = re.compile(r"[\w.]*(Error|Exception): ")
AGAIN = re.compile(r"address already in use|occupied|\bport\b|dashboard|timed out during startup", re.IGNORECASE)


def start(dashboard: bool, port: int, say: Callable[[str], None]) -> None:
    """Start a Ray for this process alone.

    Raises:
        ConfigError: it does not start.
    """
    homeless = _own_token()
    folder = temp_folder(say)
    try:
        address = _start(folder, dashboard, port)
    except Exception as error:
        if not AGAIN.search(str(error)):
            raise _refused(error) from error
        try:  # a free port was taken a moment later, or this machine can't start two Rays within 30 s
            address = _start(folder, False, port)
        except Exception as again:
            raise _refused(again) from again
        if dashboard:
            say(f"Ray dashboard: off ({own_words(str(error))})")
        return
    if address:
        token = " (it asks for what `ray get-auth-token` prints)"
        if homeless:
            token = " (set RAY_AUTH_TOKEN to enter it: there is no home to keep a token in)"
        elif os.environ.get("RAY_AUTH_MODE") == "disabled":
            token = ""
        moved = "" if address.endswith(f":{port}") else f", as port {port} is taken"
        say(f"Ray dashboard: http://{address}{token}{moved}")


def _start(folder: str | None, dashboard: bool, port: int) -> str | None:
    """`ray.init`; the dashboard's host and port."""
    import ray

    with _on_loopback(port), _in_folder(folder), children_survive_hangup():
        context = ray.init(
            address="local",
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.CRITICAL,  # the exception has all that Ray says of a failure
            log_to_driver=False,
            _temp_dir=folder,
        )
    logging.getLogger("ray").setLevel(logging.ERROR)
    return context.dashboard_url


@contextmanager
def _on_loopback(dashboard_port: int) -> Iterator[None]:
    """Make all servers of a Ray that starts here listen on 127.0.0.1 only; else they are open to the network.

    Ray binds to loopback where a node's own address is loopback, as it is on macOS and Windows; it turns the
    `_node_ip_address="127.0.0.1"` of `ray.init` into an address that others can reach. Its switch between the two is
    read when ray is imported. If it is given no dashboard port, it tries the default one and the next 50.
    """
    from ray._private import ray_constants

    changed: dict[str, Any] = {"ENABLE_RAY_CLUSTER": False, "DEFAULT_DASHBOARD_PORT": dashboard_port}
    before = {name: getattr(ray_constants, name) for name in changed}
    for name, value in changed.items():
        setattr(ray_constants, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(ray_constants, name, value)


@contextmanager
def _in_folder(folder: str | None) -> Iterator[None]:
    """Keep the sockets of Ray's children there as well: the dashboard's multiprocessing, a replica's vLLM."""
    before = os.environ.get("TMPDIR", "")
    if folder and before and _unfit(before):
        os.environ["TMPDIR"] = str(Path(folder).parent)
    try:
        yield
    finally:
        if before:
            os.environ["TMPDIR"] = before


def temp_folder(say: Callable[[str], None]) -> str | None:
    """Where Ray keeps logs and sockets; None for Ray's default.

    Raises:
        ConfigError: no folder has a short enough path, has room, and can be written to.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    wanted = os.environ[name] if name else OTHERS[0]
    why = _unfit(wanted)
    if not why:
        return None
    for other in OTHERS:
        if other != wanted and not _unfit(other):
            say(f"Ray's files are in {other}/ray: {wanted}{f' ({name})' if name else ''} {why}")
            return f"{other}/ray"
    most = LONGEST - len(SOCKET)
    raise ConfigError(
        f"expected a folder for Ray's files; {wanted} {why}. Set RAY_TMPDIR to a folder that you may write to, of at "
        f"most {most} characters, with {LEAST_FREE >> 20} MiB free"
    )


def _unfit(folder: str) -> str:
    """Why Ray can't keep its files below a folder; empty if it can."""
    if len(os.fsencode(folder) + SOCKET.encode()) > LONGEST:
        return f"is too long for its sockets, by {len(os.fsencode(folder) + SOCKET.encode()) - LONGEST} characters"
    if not os.path.isdir(folder):
        return "is no folder"
    below = Path(folder, "ray") if Path(folder, "ray").exists() else Path(folder)
    try:
        made = below / f".zoray-{secrets.token_hex(4)}"
        made.mkdir()
        made.rmdir()
    except OSError as error:
        return f"can't be written to ({error.strerror})"
    return "" if shutil.disk_usage(folder).free >= LEAST_FREE else "is full"


def _own_token() -> bool:
    """Give Ray a token if the home it would keep one in is missing or can't be written to; returns whether it did."""
    told = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if told or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return False
    try:
        kept = Path.home() / ".ray"
        kept.mkdir(parents=True, exist_ok=True)
        if (kept / "auth_token").exists() or os.access(kept, os.W_OK):
            return False
    except (OSError, RuntimeError):
        pass
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return True


def own_words(said: str) -> str:
    """What Ray says of a failure, as one line: a traceback's or log's last error, or all of a message."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if ERROR.match(line) or "Check failed" in line]
    line = told[-1] if told else " ".join(lines) if len(lines) <= LOG_LINES else "".join(lines[-1:])
    line = re.sub(r".*Check failed: [^A-Z]*", "", line)  # a file and a line of its C++
    return ERROR.sub("", line).rstrip(".")


def _refused(error: Exception) -> ConfigError:
    return ConfigError(
        f"expected to start Ray on this machine; it says: {own_words(str(error)) or type(error).__name__}"
    )
