"""For tests: a small file system of one's own, that can be filled up and emptied. Needs the right to mount."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Disk:
    """A small file system at `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Take all room but `leave` pages of 4 KiB."""
        self.free()
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"0" * 4096)
            except OSError:
                file.truncate(max(0, file.tell() // 4096 - leave) * 4096)

    def free(self) -> None:
        """Give it back."""
        self._ballast.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Read-only within."""
        _mount("-o", "remount,ro", str(self.path))
        try:
            yield
        finally:
            _mount("-o", "remount,rw", str(self.path))

    def names(self) -> list[str]:
        """All files and folders below, but for the ballast."""
        found = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path != self._ballast)
        return sorted(found)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, size: str = "400k") -> Iterator[Disk]:
    """A file system of some size, mounted at a folder that is made; the test is skipped where that is not permitted."""
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield Disk(path)
    finally:
        os.sync()
        subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)
