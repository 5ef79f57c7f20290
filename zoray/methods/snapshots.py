"""A state's numbers as a file, so that a late replica need not replay the journal from its start.

The journal stays the source of truth: a snapshot is used only if the journal holds its digest at its step, and the
replica that reads it must show that digest; else it replays. A run keeps one file, the latest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from zoray.records import disk

if TYPE_CHECKING:
    from pathlib import Path

    from zoray.methods.spaces.base import State

FILE_NAME = "snapshot.safetensors"


class Snapshot(NamedTuple):
    """The state before `step`, as safetensors at `path`."""

    step: int
    digest: str
    path: Path


def pack(state: State, limit: int) -> bytes | None:
    """A state as safetensors; None if its numbers take more than `limit` bytes."""
    from safetensors.torch import save

    numbers = state.numbers()
    if sum(tensor.numel() * tensor.element_size() for tensor in numbers.values()) > limit:
        return None
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in numbers.items()}
    return save(own, {"step": str(state.step), "digest": state.digest()})


def unpack(state: State, data: bytes, step: int) -> None:
    """Set a state, at any step, to the state before `step` that `pack` has written."""
    from safetensors.torch import load

    state.restore(step, load(data))


def write(path: Path, data: bytes) -> Snapshot:
    """Replace the file as a whole."""
    disk.replace(path, data, sync=True)
    found = read(path)
    assert found is not None
    return found


def read(path: Path) -> Snapshot | None:
    """The snapshot in a file, by its own metadata; None if there is no readable file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said: dict[str, Any] = file.metadata() or {}
        return Snapshot(int(said["step"]), said["digest"], path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
