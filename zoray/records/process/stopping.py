"""Ends a run or a server between two steps: on Ctrl-C, SIGTERM, or when its terminal is closed (SIGHUP).

A process that starts with SIGHUP ignored (nohup) goes on ignoring it.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def stops() -> tuple[int, ...]:
    """The signals that ask this process to stop."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hangup)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns true after one of `stops`. A second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        print("\nstopping after this step (Ctrl-C again: at once)", flush=True)

    try:
        previous = {number: signal.signal(number, note) for number in stops()}
    except ValueError:  # not in the main thread, which owns the signals
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def children_survive_hangup() -> Iterator[None]:
    """Processes started within ignore SIGHUP, so that they live until this one has finished its step.

    Afterwards this process handles SIGHUP like SIGTERM.
    """
    try:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        now = signal.getsignal(signal.SIGTERM) if before is signal.SIG_DFL else before
        signal.signal(signal.SIGHUP, before if now is None else now)
