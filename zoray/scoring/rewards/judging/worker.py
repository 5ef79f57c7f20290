"""A process that calls a reward function, one completion after the other; judge.py starts and ends it.

It knows nothing of its parent but sys.path: it imports neither the parent's __main__ nor torch, vLLM, Ray or
transformers, unless the function's module does. What the function prints goes to stderr. It ends with its parent,
however that ends: at its next read, or at once by the kernel.
"""

from __future__ import annotations

import ctypes
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from zoray.records import ConfigError, is_finite
from zoray.scoring.rewards.judging.functions import load_function

LONGEST = 4000  # characters of a failure that are reported
PR_SET_PDEATHSIG = 1


class Judged(NamedTuple):
    """A completion's reward. With a `failure`, which says what went wrong, `value` is nan."""

    value: float
    failure: str = ""


def judged(
    function: Callable[..., Any],
    path: str,
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    arguments: Mapping[str, Any],
    caught: type[BaseException] = Exception,
) -> Judged:
    """Call a reward function; whatever it does instead of returning a finite number becomes a failure."""
    try:
        value = function(prompt, completion, example, **arguments)
    except ConfigError as error:
        return failed(f"{path}: {error}")
    except caught as error:
        return failed(f"{path} raised:\n{_traceback(error)}")
    try:
        number = float(value) if hasattr(type(value), "__float__") else None
    except caught:  # an array, a whole number beyond all floats
        number = None
    if number is None:
        return failed(f"{path} returned {reprlib.repr(value)}, expected a number")
    return Judged(number) if is_finite(number) else failed(f"{path} returned {number}")


def failed(failure: str) -> Judged:
    """A failure; a long one is cut to its beginning and its end."""
    middle = "\n...\n" if len(failure) > LONGEST else ""
    return Judged(float("nan"), failure[: LONGEST // 2] + middle + failure[-LONGEST // 2 :] if middle else failure)


def _traceback(error: BaseException) -> str:
    """From the function's own frame on."""
    first = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        return "".join(traceback.format_exception(type(error), error, first)).rstrip()
    except Exception:  # an exception that can't be shown
        return type(error).__name__


def main() -> None:
    """`python -c ... <fd> <parent> <sys.path>...`, see judge.py."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    os.set_inheritable(connection.fileno(), False)
    del sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even if it is busy in C code
    if os.getppid() != parent:  # the parent has already ended
        return
    with suppress(OSError):  # if the machine runs out of memory, this process is killed first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    path, arguments = connection.recv()
    function, failure = None, ""
    try:
        function = load_function(path, arguments)
    except ConfigError as error:
        failure = str(error)
    connection.send(())  # ready: loading does not count as part of a call
    while True:
        try:
            prompt, completion, example = connection.recv()
        except EOFError:
            return
        request = (prompt, completion, example, arguments, BaseException)  # SystemExit, too: the code is foreign
        found = judged(function, path, *request) if function else failed(failure)
        connection.send(tuple(found))
