"""A state's numbers as a file, so that a replica that comes late need not replay the journal from its start.

The journal stays the source of truth: a snapshot is used only where the journal holds the same digest at the same step,
and the replica that has read it shows that digest; else it replays. One file a run, the latest.
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
    """Put a state, at any step, to what `pack` has made of one before `step`."""
    from safetensors.torch import load

    state.restore(step, load(data))


def write(path: Path, data: bytes) -> Snapshot:
    """Replace the file as a whole."""
    disk.replace(path, data, sync=True)
    found = read(path)
    assert found is not None
    return found


def read(path: Path) -> Snapshot | None:
    """What the file at a path says it is; None if there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said: dict[str, Any] = file.metadata() or {}
        return Snapshot(int(said["step"]), said["digest"], path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
