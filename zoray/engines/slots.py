"""What adapter slots hold: the factors of probes, written in place on the device.

On CUDA one kernel for all matrices and probes makes the directions, adds the state and writes the slots (kernels.py);
elsewhere it is a copy or two a matrix. A that is the same for all probes is written where a slot does not hold it yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zoray.directions import has_kernels, table_of
from zoray.spaces.base import B_PARTS, CACHED_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

    from zoray.directions import Layout
    from zoray.kernels import SlotWriter
    from zoray.records import Probe
    from zoray.spaces.base import Space, State


class Site(NamedTuple):
    """All slots of one matrix in one worker, views into vLLM's tensors, and which part of the matrix they hold."""

    a: torch.Tensor  # (slots, 1, max rank, columns)
    b: torch.Tensor  # (slots, 1, rows, max rank)
    rows: range  # of B (out, rank): all of them, but under tensor parallelism
    columns: range  # of A (rank, in)


class Slots:
    """The slots of one worker.

    Args:
        space: whose factors go in.
        sites: {canonical matrix name: its slots}.
    """

    def __init__(self, space: Space, sites: Mapping[str, Site]) -> None:
        self.space, self.sites = space, sites
        self._a_in: dict[int, Hashable] = {}  # slot -> what `State.a_key` said of the A in it
        self._writers: dict[Layout, SlotWriter] = {}

    def forget(self, *slots: int) -> None:
        """Somebody else has written some slots, or all if none is named; then the state may be another one as well."""
        for slot in slots or list(self._a_in):
            self._a_in.pop(slot, None)
        if not slots:
            self._writers.clear()

    @property
    def one_a(self) -> bool:
        """Whether all slots that have been written hold the same A."""
        return len(set(self._a_in.values())) == 1

    def write(self, state: State, probes: Sequence[Probe], first: int = 0) -> None:
        """Put the factors of P probes into the slots from `first` on. The scaling enters B here and only here."""
        keys = {slot: state.a_key(probe) for slot, probe in enumerate(probes, start=first)}
        a_is_there = all(self._a_in.get(slot) == key for slot, key in keys.items())
        device = next(iter(self.sites.values())).a.device
        if has_kernels(device) and len({probe.step for probe in probes}) == 1:
            self._write_at_once(state, probes, first, a_is_there)
        else:
            self._write_each(state, probes, first, a_is_there)
        self._a_in.update(keys)

    def write_all(self, state: State, probes: Sequence[Probe]) -> None:
        """Put probes into the slots from the first on, so many at a time as memory allows."""
        at_once = max(1, CACHED_ELEMENTS // state.stack_size)
        for start in range(0, len(probes), at_once):
            self.write(state, probes[start : start + at_once], start)

    def _write_each(self, state: State, probes: Sequence[Probe], first: int, a_is_there: bool) -> None:
        rank, slots = self.space.rank, slice(first, first + len(probes))
        for name, a, b in state.stacked(probes):
            site = self.sites[name]
            if not a_is_there:
                site.a[slots, 0, :rank].copy_(a[..., _slice(site.columns)])  # one for all where they share it
            site.b[slots, 0, :, :rank].copy_(b[:, _slice(site.rows)] * self.space.scaling)

    def _write_at_once(self, state: State, probes: Sequence[Probe], first: int, a_is_there: bool) -> None:
        rank, slots, moving = self.space.rank, slice(first, first + len(probes)), state.moving()
        for part in moving:
            if part.layout not in self._writers:
                self._writers[part.layout] = self._writer(part.layout)
            self._writers[part.layout](
                state.seed,
                probes[0].step,
                [probe.index for probe in probes],
                [probe.scale if part.scaled else 1.0 for probe in probes],
                first,
                part.x,
                table_of(self.space.distribution, part.layout.device),
            )
        if not a_is_there and all(name.rpartition(".")[2] in B_PARTS for part in moving for name in part.layout.shapes):
            for name, a, _ in state.factors(probes[0]._replace(scale=0.0)):
                site = self.sites[name]
                site.a[slots, 0, :rank].copy_(a[:, _slice(site.columns)])

    def _writer(self, layout: Layout) -> SlotWriter:
        from zoray.kernels import Place, SlotWriter

        rank, places = range(self.space.rank), []
        for tensor, shape in layout.shapes.items():
            matrix, _, part = tensor.rpartition(".")
            site = self.sites[matrix]
            if part in B_PARTS:
                view = site.b[:, 0, :, : len(rank)]
                places.append(Place(view, shape[1], site.rows, rank, self.space.scaling))
            else:
                places.append(Place(site.a[:, 0, : len(rank)], shape[1], rank, site.columns, 1.0))
        return SlotWriter(layout.filler(), places)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
