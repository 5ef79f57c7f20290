"""Standard streams that can't end a run, and Python's UTF-8 mode: a main works whatever its shell has set up.

Guarantees: a character that a stream's encoding lacks is written as an escape; output to a closed pipe or a full disk
is dropped; a stream that the shell has closed leads nowhere, so that no file of a run takes its number. Text files are
UTF-8 by `encoding="utf-8"` where they are opened, not by this.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    from _typeshed import ReadableBuffer

_refused: set[int] = set()  # numbers of streams
ERRORS = "backslashreplace"  # as Python's own stderr does


def settle() -> None:
    """Prepare this process and its children; mains call this before they print anything."""
    use_utf8()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout, sys.stderr = _lenient(sys.stdout, 1), _lenient(sys.stderr, 2)
    if sys.stdout.encoding.lower() != "utf-8":  # for Ray's workers and users' functions too
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:{ERRORS}"


def lost() -> bool:
    """Whether a disk refused what was written to stdout; for mains that print their results."""
    sys.stdout.flush()
    return 1 in _refused


def use_utf8() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding.

    File names and command lines are UTF-8 almost everywhere, whatever LC_ALL says. A command line that is not UTF-8
    comes from a shell that really has another encoding, which is then kept.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    typed = b" ".join(map(os.fsencode, sys.orig_argv))
    try:
        typed.decode("utf-8")
    except UnicodeDecodeError:
        return
    changed = {"PYTHONUTF8": "1"}
    if typed.isascii() and "PYTHONIOENCODING" not in os.environ:  # nothing says that the terminal is UTF-8
        changed["PYTHONIOENCODING"] = f"{sys.getfilesystemencoding()}:{ERRORS}"
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **changed})


def _lenient(stream: TextIO | None, number: int) -> TextIO:
    """The stream, made so that writing to it never fails. One that is not a system file, as in a test, is kept."""
    if stream is not None:
        try:
            if stream.fileno() != number:
                return stream
        except (AttributeError, OSError, ValueError):
            return stream
        stream.flush()
    raw, encoding = _Droppable(number, "wb", closefd=False), stream.encoding if stream is not None else "utf-8"
    if getattr(stream, "write_through", False):  # python -u
        return io.TextIOWrapper(raw, encoding, ERRORS, write_through=True)  # type: ignore[type-var]  # as Python does
    lines = getattr(stream, "line_buffering", True)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, ERRORS, line_buffering=lines)


class _Droppable(io.FileIO):
    """A file whose writes always succeed; what the system refuses (closed pipe, lost terminal, full disk) is lost."""

    lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write the data, or drop it if the system refuses; the first time a disk does, a line on stderr says so."""
        try:
            while (written := super().write(data)) is None:  # the file was made non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            told = error.errno in (errno.EPIPE, errno.EIO) or self.lost or self.fileno() == 2
            self.lost = True
            if not told:
                _refused.add(self.fileno())
                print(f"output is lost: {error.strerror}", file=sys.stderr)
            return memoryview(data).nbytes
