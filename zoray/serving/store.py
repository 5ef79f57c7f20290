"""A server's data, as plain files below one folder: uploads, jobs, versions, and which version is live.

    files/<id>/       data.csv (or .tsv, .jsonl, .txt) as it came, meta.json
    jobs/<name>/      request.json, state.json, events.jsonl, run/ (a run's folder, see docs/run.md)
    versions/<name>/  a PEFT adapter and meta.json; <name> is <job>@<step>
    live.json         the version that answers, and its predecessors

Guarantees: a file is on disk whole or not at all; names consist of letters, digits and . _ - @, and never lead out of
the folder; only the owner may enter it; deleted data are gone from disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoray.records import ConfigError, disk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

F = TypeVar("F")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}@[0-9]{1,9}")
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
_appending = threading.Lock()
LONGEST = 1 << 20  # bytes of a line: a line is read, filled into a prompt and tokenised as a whole


class NotFound(ConfigError):
    """No file, job, version or conversation has that name."""


def public(method: F) -> F:
    """Mark a method that requests may reach through the Tuner; TunerServer.call accepts no other."""
    method.public = True  # type: ignore[attr-defined]
    return method


class Store:
    """The files of one server. Safe to use from several threads of one process, of which only one may `clear`."""

    def __init__(self, folder: Path | str, clear: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.lock = threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)  # private data
        for name in ("files", "jobs", "versions"):
            (self.folder / name).mkdir(exist_ok=True)
        if clear:
            self._sweep()

    # Files.

    def add_file(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep an upload; returns its record.

        Raises:
            ConfigError: the suffix is not one of SUFFIXES, or the data are not text.
        """
        suffix = Path(name).suffix.lower()
        if suffix not in SUFFIXES:
            raise ConfigError(f"expected a file of {', '.join(SUFFIXES)}; got {shown(name)}. Save it as one of these")
        _check_text(data)
        number = f"file-{uuid.uuid4().hex[:24]}"
        meta = {
            "id": number,
            "object": "file",
            "bytes": len(data),
            "created_at": time.time(),
            "filename": shown(name),
            "purpose": "fine-tune",
            "status": "processed",
        }
        with _made(self.folder / "files" / number) as partial:
            (partial / f"data{suffix}").write_bytes(data)
            write_json(partial / "meta.json", meta)
        return meta

    @public
    def files(self) -> list[dict[str, Any]]:
        """Records of all uploads, the oldest first."""
        return _sorted(read_all(self.folder.glob("files/file-*/meta.json")))

    @public
    def file(self, number: str) -> dict[str, Any]:
        """The record of an upload."""
        return read_json(self._file_folder(number) / "meta.json")

    def file_name(self, number: str) -> str:
        """An upload's original name, for messages."""
        try:
            return self.file(number)["filename"]
        except NotFound:
            return "a deleted file"

    def data_path(self, number: str) -> Path:
        """The path of an upload's data."""
        folder = self._file_folder(number)
        for path in folder.glob("data.*"):
            return path
        raise NotFound(f"there is no file {shown(number)}")  # deleted just now

    def delete_file(self, number: str) -> None:
        """Delete an upload from disk."""
        _remove(self._file_folder(number))

    def _file_folder(self, number: str) -> Path:
        return self._folder("files", number, FILE_ID, "file")

    # Versions.

    def version_folder(self, name: str) -> Path:
        """The adapter's folder of a version."""
        return self._folder("versions", name, VERSION, "version")

    def new_version(self, name: str) -> Path:
        """The folder to write a version into."""
        if not VERSION.fullmatch(name):
            raise ConfigError(f"expected a version's name, <job>@<step>; got {shown(name)}")
        return self.folder / "versions" / name

    def versions(self) -> list[dict[str, Any]]:
        """The records of all versions, the oldest first."""
        return _sorted(read_all(self.folder.glob("versions/*@*/meta.json")))

    def mark(self, name: str) -> str:
        """A mark that tells a version from an earlier, deleted one of the same name."""
        try:
            found = (self.version_folder(name) / "adapter_model.safetensors").stat()
        except FileNotFoundError:
            raise NotFound(f"there is no version {shown(name)}") from None
        return f"{found.st_ino:x}-{found.st_mtime_ns:x}"

    @public
    def delete_version(self, name: str) -> None:
        """Delete a version from disk.

        Raises:
            ConfigError: the version is live.
        """
        with self.lock:
            folder = self.version_folder(name)
            if self.live() == name:
                raise ConfigError(f"{name} is live: roll back to another version first")
            _remove(folder)

    def version_names(self) -> list[str]:
        """Names of all complete versions."""
        return [path.parent.name for path in self.folder.glob("versions/*@*/meta.json")]

    # Which one is live.

    def live(self) -> str | None:
        """The version that answers; None is the base model."""
        return self._live()["version"]

    def live_history(self) -> list[dict[str, Any]]:
        """Each change of the live version, the oldest first: version, time, reason."""
        return self._live()["history"]

    def set_live(self, version: str | None, reason: str) -> None:
        """Make a version live from now on."""
        with self.lock:
            if version is not None:
                self.version_folder(version)
            known = self._live()["history"]
            entry = {"version": version, "time": time.time(), "reason": reason}
            write_json(self.folder / "live.json", {"version": version, "history": [*known, entry][-1000:]})

    def forget_live(self) -> None:
        """Make the base model live and delete the history of live versions; works on a full disk."""
        with self.lock:
            (self.folder / "live.json").unlink(missing_ok=True)

    def _live(self) -> dict[str, Any]:
        path = self.folder / "live.json"
        return read_json(path) if path.exists() else {"version": None, "history": []}

    # Jobs.

    def job_folder(self, name: str) -> Path:
        """A job's folder."""
        return self._folder("jobs", name, NAME, "job")

    def new_job(self, name: str, request: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Create a job's folder, with its request and state.

        Raises:
            ConfigError: a job of that name exists, or the name is not allowed.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"expected a name of up to 40 small letters, digits, . _ and -, beginning with a letter or digit; got "
                f"{shown(name)}"
            )
        folder = self.folder / "jobs" / name
        with self.lock:
            if folder.exists() or any(self.folder.glob(f"versions/{name}@*")):
                raise ConfigError(f"there is a job {name} already, or versions of one; take another name")
            with _made(folder) as partial:
                write_json(partial / "request.json", dict(request))
                write_json(partial / "state.json", dict(state))
        return folder

    def jobs(self) -> list[str]:
        """Names of all jobs, the oldest first."""
        found = []
        for path in self.folder.glob("jobs/[!.]*/request.json"):
            found += [(request["created_at"], path.parent.name) for request in read_all([path])]
        return [name for _, name in sorted(found)]

    def delete_job(self, name: str) -> None:
        """Delete a job from disk, with its metrics; its versions stay, except unfinished ones."""
        with self.lock:
            _remove(self.job_folder(name))
            for path in self.folder.glob(f"versions/{name}@*"):
                if not (path / "meta.json").exists():  # else it would block the next job of that name
                    shutil.rmtree(path, ignore_errors=True)

    def delete_everything(self) -> None:
        """Delete all files, jobs and versions from disk, unfinished ones included."""
        with self.lock:
            for kind in ("files", "jobs", "versions"):
                for entry in (self.folder / kind).iterdir():
                    _remove(entry) if entry.is_dir() else entry.unlink()

    def _sweep(self) -> None:
        """Remove unfinished files of a killed server: their job writes them again, or no longer exists."""
        jobs = {path.name for path in (self.folder / "jobs").iterdir()}
        unknown = (
            path
            for path in self.folder.glob("versions/*@*")
            if path.name.partition("@")[0] not in jobs and not (path / "meta.json").exists()
        )
        hidden = (path for pattern in ("*/.*", "jobs/*/.*", ".*.json.*") for path in self.folder.glob(pattern))
        for path in [*unknown, *hidden]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _folder(self, kind: str, name: str, pattern: re.Pattern[str], what: str) -> Path:
        folder = self.folder / kind / name if pattern.fullmatch(name) else None
        if folder is None or not folder.is_dir():
            raise NotFound(f"there is no {what} {shown(name)}")
        return folder


def claim(folder: Path, patience: float = 0.0, lock: str = ".lock") -> Any:
    """Lock a server's folder for this process, as long as the returned file is open.

    Args:
        folder: of a server; it need not exist.
        patience: seconds to wait for another server to end.
        lock: the lock file's name: one for the process that writes jobs, one for the command that starts it.

    Raises:
        ConfigError: another server has the folder: both would write the same journals.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / lock).open("wb")
    except OSError as error:
        raise ConfigError(f"can't write serve.folder={folder}: {error.strerror}. Choose another") from None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                file.close()
                raise ConfigError(
                    f"expected serve.folder={folder} for this server alone; another one uses it"
                ) from None
        time.sleep(0.2)


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        NotFound: the file does not exist, or no longer.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no {path.parent.name} any more") from None


def read_all(paths: Iterable[Path]) -> Iterator[Any]:
    """The values of JSON files, skipping any that are deleted in the meantime."""
    for path in paths:
        with suppress(NotFound):
            yield read_json(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole; it is on disk when this returns."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    disk.replace(path, json.dumps(value, indent=2).encode(), partial, sync=True)


def append_json(path: Path, value: Any) -> None:
    """Append a line to a JSONL file, whole or not at all."""
    with _appending, path.open("ab", buffering=0) as file:
        disk.append(file, json.dumps(value).encode() + b"\n", path)


def read_lines(path: Path) -> list[Any]:
    """The values of a JSONL file; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def shown(text: str) -> str:
    """A name from outside, for messages: short, printable, without a path."""
    return "".join(c if c.isprintable() else "?" for c in text.replace("\\", "/").rpartition("/")[2])[:100]


def _check_text(data: bytes) -> None:
    """Raise ConfigError unless an upload can be text, in lines."""
    foreign = {
        b"PK\x03\x04": "a ZIP archive or a spreadsheet",
        b"\x1f\x8b": "a gzip archive",
        b"PAR1": "a Parquet file",
    }
    kind = next((kind for mark, kind in foreign.items() if data.startswith(mark)), None)
    if kind is None and data[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\0" in data:  # UTF-16 is told apart later
        kind = "a binary file"
    if kind is not None:
        raise ConfigError(f"expected text in UTF-8; got {kind}. Save it as CSV UTF-8")
    begin = 0
    while len(data) - begin > LONGEST:
        end = data.rfind(b"\n", begin, begin + LONGEST + 1)
        if end < 0:
            raise ConfigError(f"expected lines of at most {LONGEST:,} bytes; got a longer one. Give one example a line")
        begin = end + 1


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it is renamed to `folder` if all goes well."""
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")
    with disk.naming(folder):
        try:
            partial.mkdir()
            yield partial
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sorted(records: Any) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: (record["created_at"], record["id"]))


def _remove(folder: Path) -> None:
    """Delete a folder: hidden at once, then removed from disk."""
    doomed = folder.with_name(f".partial-{uuid.uuid4().hex[:8]}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
