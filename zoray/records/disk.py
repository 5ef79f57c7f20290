"""Files written whole or not at all, and what a file system refuses, in words.

Guarantees: an error names its file; what can't be written whole leaves nothing behind, and what was there before stays.
A refusal (a full disk, a quota, a read-only file system, a folder that is a file) is an OSError as Python has it.
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
IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers raise errors of their own, which say so


def refuses(error: BaseException) -> bool:
    """Whether an error is a refusal of the file system, and not a defect."""
    if not isinstance(error, OSError) or isinstance(error, TimeoutError | ConnectionError):
        return False
    return error.errno in FULL or (error.errno in (*LOCKED, *TAKEN, *OTHERS) and error.filename is not None)


def reason(error: OSError) -> str:
    """What the file system says: `no space left on device`."""
    said = error.strerror or str(error)
    return said[:1].lower() + said[1:]


def told(error: OSError) -> str:
    """A refusal as a message: the file, why, and what to do."""
    advice = {FULL: "Make room there", LOCKED: "Let it be written to", TAKEN: "Move away what is in its place"}
    what = next((text for kinds, text in advice.items() if error.errno in kinds), "Look at the disk")
    return f"can't write {error.filename or 'a file'}: {reason(error)}. {what}"


def check_place(path: Path, key: str) -> None:
    """Raise ConfigError, before anything is computed, where nothing can be written at a path that is not there yet."""
    parent = next(str(folder) for folder in path.absolute().parents if os.path.exists(folder))
    if not os.path.isdir(parent):
        raise ConfigError(f"expected a folder for {key}={path}; {parent} is a file. Choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"expected a folder that can be written to for {key}={path}; {parent} can't. Choose another")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Within, refusals name a path, which those of writes do not, nor those of libraries that are written in Rust."""
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
    """Write a file as a whole in the place of the one that is there.

    `partial`: what is written first, beside it, where several may write at the same time. `sync`: survive a power cut.
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
    """Append to an unbuffered file; what can't be written whole is taken back."""
    end, rest = os.fstat(file.fileno()).st_size, memoryview(line)
    with naming(path):
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise
