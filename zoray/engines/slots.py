"""Fills adapter slots: writes the factors of probes in place on the device, all matrices at once.

On CUDA one kernel makes the directions, adds the state and writes the slots (directions_cuda.py); elsewhere factors are
made in a buffer and copied, or made tensor by tensor if the buffer would be too large. An A that is the same for all
probes is written only to slots that do not hold it yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zoray.methods.directions import has_kernels, table_of
from zoray.methods.spaces.base import fill, is_b
from zoray.methods.spaces.signs import ALONG

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    import numpy as np
    import torch

    from zoray.methods.directions import Layout
    from zoray.methods.directions_cuda import SlotWriter
    from zoray.methods.spaces.base import Moving, Space, State
    from zoray.records import Probe


STAGED_ELEMENTS = 1 << 26  # of the buffer that slots are copied from: 256 MiB
KERNELS = "zoray_lora_kernels"  # in vLLM's additional_config: dense or punica
FEEDBACK = "zoray_feedback"  # also there: names of the matrices with residual feedback; none by default
BLOCKS = "zoray_blocks"  # also there: number of KV blocks reserved for scoring, from block 1 on; all by default
PROBES = "zoray_probe_slots"  # also there: number of slots for probes, from the first on; all by default
SLOWDOWN = "zoray_max_slowdown"  # also there: maximum factor by which scoring slows a step of requests
SCORING = "tune-score-"  # prefix of the names of requests that score (vllm/piggyback.py)
DENSE_COLUMNS = 128  # largest slots * rank with dense products on CUDA (lora_cuda.py); not yet measured on a GPU


class Site(NamedTuple):
    """All slots of one matrix in one worker, as views into vLLM's tensors, and the part of the matrix they hold."""

    a: torch.Tensor  # (slots, 1, max rank, columns)
    b: torch.Tensor  # (slots, 1, rows, max rank)
    rows: range  # of B (out, rank): all of them, but under tensor parallelism
    columns: range  # of A (rank, in)


class Slots:
    """The slots of one worker.

    Args:
        space: the space of the factors.
        sites: {canonical matrix name: its slots}.
    """

    def __init__(self, space: Space, sites: Mapping[str, Site]) -> None:
        self.space, self.sites = space, sites
        self._a_in: dict[int, Hashable] = {}  # slot -> `State.a_key` of the A in it
        self._writers: dict[Layout, SlotWriter] = {}
        self._staged: dict[tuple[Layout, int, int], Staged] = {}

    def forget(self, *slots: int) -> None:
        """Note that these slots were overwritten, or all if none is named; then the state may be another one too."""
        for slot in slots or list(self._a_in):
            self._a_in.pop(slot, None)
        if not slots:
            self._writers.clear()
            self._staged.clear()

    def one_a(self, slots: Iterable[int]) -> bool:
        """Whether these slots hold the same A."""
        return len({self._a_in.get(slot, (None, slot)) for slot in slots}) == 1

    def write(self, state: State, probes: Sequence[Probe], first: int = 0) -> None:
        """Write the factors of P probes into the slots from `first` on. B is scaled here and only here."""
        import torch

        with torch.inference_mode():  # cached buffers and views keep the mode that they were made in
            self._write(state, probes, first)

    def put(self, slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write an adapter to a slot: {`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)}, not scaled."""
        import torch

        self._a_in.pop(slot, None)
        rank = self.space.rank
        with torch.inference_mode():
            for name, site in self.sites.items():
                a, b = (torch.from_numpy(arrays[f"{name}.lora_{part}"]) for part in "AB")
                site.a[slot, 0, :rank].copy_(a[:, _slice(site.columns)])
                site.b[slot, 0, :, :rank].copy_(b[_slice(site.rows)] * self.space.scaling)

    def _write(self, state: State, probes: Sequence[Probe], first: int) -> None:
        keys = {slot: state.a_key(probe) for slot, probe in enumerate(probes, start=first)}
        a_is_there = all(self._a_in.get(slot) == key for slot, key in keys.items())
        moving = state.moving()
        device = next(iter(self.sites.values())).a.device
        drawn = all(probe.index < ALONG for probe in probes)
        if drawn and has_kernels(device) and len({probe.step for probe in probes}) == 1:
            for part in moving:
                self._by_kernel(part, probes, first)
        elif len(probes) * sum(part.z.layout.size for part in moving) <= STAGED_ELEMENTS:
            for part in moving:
                self._by_stage(part, probes, first)
        else:
            for part in moving:
                self._one_by_one(part, probes, first, a_is_there)
        if not a_is_there and all(is_b(name) for part in moving for name in part.z.layout.shapes):
            for name, a, _ in state.factors(probes[0]._replace(scale=0.0)):
                site = self.sites[name]
                site.a[first : first + len(probes), 0, : self.space.rank].copy_(a[:, _slice(site.columns)])
        self._a_in.update(keys)

    def _one_by_one(self, part: Moving, probes: Sequence[Probe], first: int, a_is_there: bool) -> None:
        """Write tensor by tensor, if all at once would take too much memory."""
        import torch

        rank, slots, layout = self.space.rank, slice(first, first + len(probes)), part.z.layout
        for name, shape in layout.shapes.items():
            if a_is_there and not is_b(name):
                continue
            site = self.sites[name.rpartition(".")[0]]
            values = torch.empty(len(probes), *shape, dtype=torch.float32, device=layout.device)
            fill(part, probes, values, name)
            if is_b(name):
                site.b[slots, 0, :, :rank].copy_(values[:, _slice(site.rows)] * self.space.scaling)
            else:
                site.a[slots, 0, :rank].copy_(values[..., _slice(site.columns)])

    def _by_stage(self, part: Moving, probes: Sequence[Probe], first: int) -> None:
        """Write all matrices at once: make them in a cached buffer, and copy from cached views of it."""
        import torch

        key = (part.z.layout, first, len(probes))
        if key not in self._staged:
            self._staged[key] = self._stage(*key)
        stage = self._staged[key]
        fill(part, probes, stage.flats)
        if self.space.scaling != 1.0 and stage.b:
            torch._foreach_mul_(stage.b, self.space.scaling)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(stage.places, stage.sources)  # pyright: ignore[reportPrivateImportUsage]

    def _stage(self, layout: Layout, first: int, count: int) -> Staged:
        import torch

        flats = torch.empty(count, layout.size, dtype=torch.float32, device=layout.device)
        slots, rank = slice(first, first + count), self.space.rank
        staged = Staged(flats, [], [], [])
        for name in layout.shapes:
            site, view = self.sites[name.rpartition(".")[0]], layout.views(flats, name)
            if is_b(name):
                staged.b.append(view)
                staged.sources.append(view[:, _slice(site.rows)])
                staged.places.append(site.b[slots, 0, :, :rank])
            else:
                staged.sources.append(view[..., _slice(site.columns)])
                staged.places.append(site.a[slots, 0, :rank])
        return staged

    def _by_kernel(self, part: Moving, probes: Sequence[Probe], first: int) -> None:
        layout = part.z.layout
        if layout not in self._writers:
            self._writers[layout] = self._writer(layout)
        self._writers[layout](
            part.z.seed,
            probes[0].step,
            [probe.index for probe in probes],
            [probe.scale if part.scaled else 1.0 for probe in probes],
            first,
            part.x,
            table_of(part.z.distribution, layout.device),
        )

    def _writer(self, layout: Layout) -> SlotWriter:
        from zoray.methods.directions_cuda import Place, SlotWriter

        rank, places = range(self.space.rank), []
        for name, shape in layout.shapes.items():
            site = self.sites[name.rpartition(".")[0]]
            if is_b(name):
                places.append(Place(site.b[:, 0, :, : len(rank)], shape[1], site.rows, rank, self.space.scaling))
            else:
                places.append(Place(site.a[:, 0, : len(rank)], shape[1], rank, site.columns, 1.0))
        return SlotWriter(layout.filler(), places)


class Staged(NamedTuple):
    """A buffer for the moving factors of some slots, with the views to copy from and their places in the slots."""

    flats: torch.Tensor  # (slots, size)
    b: list[torch.Tensor]  # views of all B in it
    sources: list[torch.Tensor]
    places: list[torch.Tensor]


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
