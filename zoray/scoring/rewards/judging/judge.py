"""Completions in, rewards out. A reward function may do what it likes: it never harms more than its own call.

Guarantees: `submit` returns at once, and its future has a Judged for whatever the function does: raise, exit, crash,
hang (in C code, or deaf to signals), print, return nonsense. zoray's own rewards, which are quick and total, run in
this process; others run in worker processes. Each call has a time limit, after which its process is killed and
replaced. No worker outlives the judge or this process, however that ends.
Does not guard the machine: a reward function is a program that runs with your rights, see docs/rewards.md.

Each worker has a thread, which starts the process, hands it one call at a time, and waits. So a worker gets calls and
nothing else, processes share no lock, and the kernel's "kill me when my parent's thread ends" is right.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from zoray.records import is_finite, require
from zoray.scoring.rewards.json_object import has_pattern
from zoray.scoring.rewards.judging.functions import BUILT_IN, absolute, load_function, split_path
from zoray.scoring.rewards.judging.worker import Judged, failed, judged

START_S = 600.0  # for a worker to start and import the function's module, which may load a model
START = "import sys; sys.path[:] = sys.argv[3:]; from zoray.scoring.rewards.judging.worker import main; main()"
CLOSED = "the judge was closed before this completion was judged"

Call = tuple[tuple[str, str, Mapping[str, Any]], Future[Judged]]


class Judge:
    """Calls a reward function; a context manager.

    Args:
        function: a reward of zoray's own, package.module:function or path/to/file.py:function, see functions.py.
        arguments: its keyword arguments besides prompt, completion and example.
        timeout_s: the longest call, in seconds.
        workers: processes, each started when it is first needed.
    """

    def __init__(
        self, function: str, arguments: Mapping[str, Any] | None = None, timeout_s: float = 5.0, workers: int = 2
    ) -> None:
        require(is_finite(timeout_s) and timeout_s > 0, "timeout_s to be a number above 0", timeout_s)
        require(type(workers) is int and workers >= 1, "workers to be a whole number of at least 1", workers)
        self.function, self.arguments, self.timeout_s = absolute(function), dict(arguments or {}), float(timeout_s)
        place, name = split_path(function)
        built_in = load_function(function, self.arguments) if place == BUILT_IN else None
        self._here = None if built_in and _applies_patterns(name, self.arguments) else built_in
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._workers = [_Worker(self.function, self.arguments, self.timeout_s) for _ in range(workers)]
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False
        self._end = weakref.finalize(self, _end, os.getpid(), self._calls, self._workers, self._threads)  # or at exit

    def submit(self, prompt: str, completion: str, example: Mapping[str, Any]) -> Future[Judged]:
        """Judge a completion; the future never raises."""
        future: Future[Judged] = Future()
        if self._here:
            future.set_result(judged(self._here, self.function, prompt, completion, example, self.arguments))
            return future
        with self._lock:
            if self._closed:
                raise RuntimeError("the judge is closed")
            if len(self._threads) < len(self._workers):  # one more worker may help
                worker = self._workers[len(self._threads)]
                thread = threading.Thread(target=_serve, args=(worker, self._calls), name="zoray-judge", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._calls.put(((prompt, completion, example), future))
        return future

    def close(self) -> None:
        """End all workers, at once; calls that are not done fail."""
        with self._lock:
            self._closed = True
        self._end()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _applies_patterns(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the user's regular expressions are involved, which can run forever."""
    return name == "format" or (name == "json_schema" and has_pattern(arguments["schema"]))


def _serve(worker: _Worker, calls: SimpleQueue[Call | None]) -> None:
    """A worker's thread: one call after the other."""
    while (call := calls.get()) is not None:
        request, future = call
        if future.set_running_or_notify_cancel():
            future.set_result(worker.call(request))
    worker.stop()


def _end(owner: int, calls: SimpleQueue[Call | None], workers: list[_Worker], threads: list[threading.Thread]) -> None:
    """Close a judge, or clean up after one that was garbage-collected."""
    if os.getpid() != owner:  # in a fork
        return
    waiting = []
    with suppress(Empty):
        while call := calls.get_nowait():
            waiting.append(call)
    for worker in workers:
        worker.close()
    for _ in threads:
        calls.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the last future it set may have held the last reference
            thread.join()
    for _, future in waiting:
        if future.set_running_or_notify_cancel():
            future.set_result(failed(CLOSED))


class _Worker:
    """A process, started when a call needs it and restarted after it is lost. Only one thread may use `call`."""

    def __init__(self, function: str, arguments: Mapping[str, Any], timeout_s: float) -> None:
        self._function, self._arguments, self._timeout_s = function, arguments, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.RLock()  # of starting, killing and closing; a judge may be collected in any thread
        self._closed = False

    def call(self, request: tuple[str, str, Mapping[str, Any]]) -> Judged:
        """The function's answer to a request; a process that is lost, or too late, is given up."""
        try:
            connection = self._connection or self._start()
            connection.send(request)
            if connection.poll(self._timeout_s):
                return Judged(*connection.recv())
            failure = f"timed out after {self._timeout_s:g} s"
        except _Slow:
            failure = f"was not imported within {START_S:g} s"
        except (EOFError, ConnectionError):  # it closed its end, most likely by ending
            failure = ""
        except Exception as error:  # no process could start, the example can't be sent, the bytes are no answer
            failure = f"could not be called: {error!r}"
        code = self.stop()
        return failed(CLOSED if self._closed else f"{self._function} {failure or f'ended its process: {_how(code)}'}")

    def _start(self) -> Connection:
        """Start the process, which inherits nothing but its end of a socket and stderr; wait until it can be called."""
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        with theirs, self._lock:
            if self._closed:
                raise EOFError
            command = [sys.executable, "-c", START, str(theirs.fileno()), str(os.getpid()), *map(str, sys.path)]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
            self._connection = connection
        connection.send((self._function, self._arguments))
        if not connection.poll(START_S):
            raise _Slow
        connection.recv()
        return connection

    def stop(self) -> int:
        """Kill the process and what it started, if any; its exit code, negative for a signal's."""
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if connection:
            connection.close()
        if not process:
            return 0
        with suppress(ProcessLookupError):  # the group keeps its number until we wait
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def close(self) -> None:
        """Kill the process from another thread; the call that waits for it returns."""
        with self._lock:
            self._closed = True
            if self._process:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)


class _Slow(Exception):
    """A worker was not ready in time."""


def _how(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
