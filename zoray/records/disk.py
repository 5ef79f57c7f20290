"""Writes files whole or not at all, and puts what a file system refuses into words.

Guarantees: an error names its file; a failed write leaves nothing behind, and the earlier file stays.
A refusal (a full disk, a quota, a read-only file system, a folder that is a file) is Python's own OSError.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)
TAKEN = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
OTHERS = (errno.EIO, errno.EFBIG, errno.ENAMETOOLONG, errno.ESTALE, errno.ENXIO)
IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers raise their own errors, with this text


def refuses(error: BaseException) -> bool:
    """Whether the file system refused, as opposed to a defect."""
    if not isinstance(error, OSError) or isinstance(error, TimeoutError | ConnectionError):
        return False
    return error.errno in FULL or (error.errno in (*LOCKED, *TAKEN, *OTHERS) and error.filename is not None)


def reason(error: OSError) -> str:
    """What the file system says: `no space left on device`."""
    said = error.strerror or str(error)
    return said[:1].lower() + said[1:]


def told(error: OSError) -> str:
    """A refusal as a message: the file, why, and what to do."""
    advice = {FULL: "Make room there", LOCKED: "Make it writable", TAKEN: "Move whatever is in its place"}
    what = next((text for kinds, text in advice.items() if error.errno in kinds), "Check the disk")
    return f"can't write {error.filename or 'a file'}: {reason(error)}. {what}"


def check_place(path: Path, key: str) -> None:
    """Raise ConfigError, before anything is computed, if a path that does not exist yet can't be created."""
    parent = next(str(folder) for folder in path.absolute().parents if os.path.exists(folder))
    if not os.path.isdir(parent):
        raise ConfigError(f"expected a folder for {key}={path}; {parent} is a file. Choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"expected a writable folder for {key}={path}; {parent} is not writable. Choose another")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Let refusals within name a path; the system's errors for writes don't, nor do those of libraries in Rust."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, *LOCKED, *TAKEN, *OTHERS):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if (found := IN_RUST.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def replace(path: Path, data: bytes, partial: Path | None = None, sync: bool = False) -> None:
    """Replace a file as a whole.

    `partial`: the file written first, beside it, if several processes may write at once. `sync`: survive a power cut.
    """
    partial = path.with_name(f"{path.name}.partial") if partial is None else partial
    with naming(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def append(file: IO[bytes], line: bytes, path: Path) -> None:
    """Append to an unbuffered file; a line that can't be written whole is taken back."""
    end, rest = os.fstat(file.fileno()).st_size, memoryview(line)
    with naming(path):
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise
