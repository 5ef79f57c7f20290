"""One Triton kernel for directions on CUDA and one that fills slots: the bits of directions.py and spaces/.

In torch a direction is some sixty passes over 64-bit words; here each Philox block stays in registers, and the kernel
writes only the float32 result, or x + scale * z in the slots' own dtype, straight into vLLM's slots: no direction is
ever in memory. Directions need only integer multiplications, additions and a table look-up, so there is nothing to
round; a slot's value is rounded after every operation, as torch does. Runs on the CPU under TRITON_INTERPRET=1, which
is how the tests check it without a GPU.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# Triton compiles the kernels; their loops and constants are not what Python's type checkers take them for.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNIT = tl.constexpr(128)  # elements: directions.ALIGNMENT, so a unit lies in one tensor
UNITS = 4  # per program
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors of one shape: 4 counter words, 2 key words -> 4 words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _quantile(table, half):
    return tl.load(table + half.to(tl.int32))


@triton.jit
def _elements(within, low, high, seed, step, probe, table, GAUSSIAN: tl.constexpr):
    """(units, 128) float32: the elements of some units of a direction; `within`: each unit's index in its tensor."""
    if GAUSSIAN:  # 16 blocks of 8 elements a unit
        block = (within[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.uint32)
        low, high = block * 0 + low[:, None], block * 0 + high[:, None]
        w0, w1, w2, w3 = _philox(block, block * 0 + probe, block * 0 + step, high, block * 0 + seed, low)
        even = tl.interleave(
            tl.interleave(_quantile(table, w0 & 0xFFFF), _quantile(table, w2 & 0xFFFF)),
            tl.interleave(_quantile(table, w1 & 0xFFFF), _quantile(table, w3 & 0xFFFF)),
        )
        odd = tl.interleave(
            tl.interleave(_quantile(table, w0 >> 16), _quantile(table, w2 >> 16)),
            tl.interleave(_quantile(table, w1 >> 16), _quantile(table, w3 >> 16)),
        )
        values = tl.interleave(even, odd)
    else:  # one block of 128 bits a unit
        block = within.to(tl.uint32)
        w0, w1, w2, w3 = _philox(block, block * 0 + probe, block * 0 + step, high, block * 0 + seed, low)
        bit = tl.arange(0, UNIT)[None, :]
        word = tl.where(
            bit < 64,
            tl.where(bit < 32, w0[:, None], w1[:, None]),
            tl.where(bit < 96, w2[:, None], w3[:, None]),
        )
        values = 1.0 - 2.0 * ((word >> (bit % 32).to(tl.uint32)) & 1).to(tl.float32)
    return values


@triton.jit
def _fill(
    out, address, tensor_of, first_unit, numel, hash_low, hash_high, table, units, GAUSSIAN: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """out[k, e] = element e of the direction at (seed, step, probe k), with `address` (seed, step, probe 0, ...).

    0 in the padding behind a tensor. The address is a tensor, because Triton may compile again for another number.
    """
    k = tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < units
    tensor = tl.load(tensor_of + unit, mask=live, other=0)
    within = unit - tl.load(first_unit + tensor)  # index of the unit in its tensor
    low = tl.load(hash_low + tensor).to(tl.uint32, bitcast=True)
    high = tl.load(hash_high + tensor).to(tl.uint32, bitcast=True)
    seed = tl.load(address).to(tl.uint32, bitcast=True)
    step = tl.load(address + 1).to(tl.uint32, bitcast=True)
    probe = tl.load(address + 2 + k).to(tl.uint32, bitcast=True)
    values = _elements(within, low, high, seed, step, probe, table, GAUSSIAN)
    element = tl.arange(0, UNIT)[None, :]
    real = within[:, None] * UNIT + element < tl.load(numel + tensor)[:, None]
    at = (unit.to(tl.int64)[:, None] + k.to(tl.int64) * units) * UNIT + element
    tl.store(out + at, tl.where(real, values, 0.0), mask=live[:, None])


@triton.jit
def _write(
    x, address, scales, tensor_of, first_unit, numel, hash_low, hash_high, table, pointers, slot_stride, row_stride,
    column_stride, width, first_row, rows, first_column, columns, factor, units, GAUSSIAN: tl.constexpr,
    UNITS: tl.constexpr, HAS_X: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """slot[k] = factor * (x + scale[k] * z(k)) for each tensor of a layout, at the tensor's own place in the slots.

    Only a window of rows and columns of a tensor with `width` columns is written; nothing outside it is generated.
    """
    k = tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < units
    tensor = tl.load(tensor_of + unit, mask=live, other=0)
    within = unit - tl.load(first_unit + tensor)
    lane = tl.arange(0, UNIT)[None, :]
    element = within[:, None] * UNIT + lane
    of = tl.load(width + tensor)[:, None]
    row = element // of - tl.load(first_row + tensor)[:, None]
    column = element % of - tl.load(first_column + tensor)[:, None]
    mine = live[:, None] & (element < tl.load(numel + tensor)[:, None])
    mine = mine & (row >= 0) & (row < tl.load(rows + tensor)[:, None])
    mine = mine & (column >= 0) & (column < tl.load(columns + tensor)[:, None])
    if tl.max(tl.max(mine.to(tl.int32), 1), 0) > 0:
        low = tl.load(hash_low + tensor).to(tl.uint32, bitcast=True)
        high = tl.load(hash_high + tensor).to(tl.uint32, bitcast=True)
        seed = tl.load(address).to(tl.uint32, bitcast=True)
        step = tl.load(address + 1).to(tl.uint32, bitcast=True)
        probe = tl.load(address + 2 + k).to(tl.uint32, bitcast=True)
        values = _elements(within, low, high, seed, step, probe, table, GAUSSIAN) * tl.load(scales + k)
        if HAS_X:
            values += tl.load(x + unit.to(tl.int64)[:, None] * UNIT + lane, mask=mine, other=0.0)
        values *= tl.load(factor + tensor)[:, None]
        offset = k.to(tl.int64) * tl.load(slot_stride + tensor)[:, None]
        offset += row.to(tl.int64) * tl.load(row_stride + tensor)[:, None]
        offset += column.to(tl.int64) * tl.load(column_stride + tensor)[:, None]
        place = tl.load(pointers + tensor)
        if tl.uint16 == DTYPE:  # bfloat16, rounded to nearest even by hand: Triton's interpreter truncates
            bits = values.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(place.to(tl.pointer_type(tl.uint16))[:, None] + offset, bits.to(tl.uint16), mask=mine)
        else:
            tl.store(place.to(tl.pointer_type(DTYPE))[:, None] + offset, values.to(DTYPE), mask=mine)


class Filler:
    """Fills flat vectors of one layout with directions; its tables live on the layout's device.

    Args:
        sizes: elements of each tensor, in the layout's order; each stands at a multiple of 128.
        hashes: the 64-bit hash of each tensor's name.
        device: the layout's.
    """

    def __init__(self, sizes: Sequence[int], hashes: Sequence[int], device: torch.device) -> None:
        if max(sizes, default=0) >= 2**31 - UNIT.value:
            raise ConfigError(f"expected tensors of less than 2**31 elements; got one of {max(sizes)}")
        units = torch.tensor([-(-size // UNIT.value) for size in sizes], dtype=torch.int64)
        self.units = int(units.sum())
        self.tensor_of = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(units).to(device)
        self.first_unit = (units.cumsum(0) - units).to(torch.int32).to(device)
        self.numel = torch.tensor(list(sizes), dtype=torch.int32, device=device)
        self.low, self.high = (
            torch.tensor([_signed(h >> shift) for h in hashes], dtype=torch.int32, device=device) for shift in (0, 32)
        )
        self.device = device

    def __call__(self, seed: int, step: int, probes: Sequence[int], quantiles: torch.Tensor | None) -> torch.Tensor:
        """The directions of K probe indices, (K, size) float32; `quantiles` (65536,) makes them Gaussian."""
        out = torch.empty(len(probes), self.units * UNIT.value, dtype=torch.float32, device=self.device)
        words = [_signed(word) for word in (seed, step, *probes)]
        address = torch.tensor(words, dtype=torch.int32, device=self.device)
        table = out if quantiles is None else quantiles
        tables = (self.tensor_of, self.first_unit, self.numel, self.low, self.high, table)
        grid = (triton.cdiv(self.units, UNITS), len(probes))
        if self.units:
            _fill[grid](out, address, *tables, self.units, GAUSSIAN=quantiles is not None, UNITS=UNITS)
        return out


class Place(NamedTuple):
    """The destination of a layout's tensor: the worker's part of it, in all slots."""

    slots: torch.Tensor  # (slots, rows, columns) with any strides
    width: int  # columns of the whole tensor
    rows: range  # of the whole tensor
    columns: range
    factor: float  # multiplies the final value


class SlotWriter:
    """Writes probes' x + scale * z into slots, for all tensors of a layout at once.

    Args:
        filler: the layout's.
        places: one for each tensor of the layout, in its order.
    """

    def __init__(self, filler: Filler, places: Sequence[Place]) -> None:
        dtypes = {place.slots.dtype for place in places}
        if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
            raise ConfigError(f"expected slots of one dtype out of {', '.join(map(str, DTYPES))}; got {dtypes}")
        self.filler, self.places, self.dtype = filler, tuple(places), DTYPES[dtypes.pop()]  # places stay alive

        def table(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=filler.device)

        self.pointers = table([place.slots.data_ptr() for place in places])
        self.strides = [table([place.slots.stride(dim) for place in places]) for dim in range(3)]
        windows = [(p.width, p.rows.start, len(p.rows), p.columns.start, len(p.columns)) for p in places]
        self.windows = [table(column, torch.int32) for column in zip(*windows, strict=True)]
        self.factors = torch.tensor([place.factor for place in places], dtype=torch.float32, device=filler.device)

    def __call__(
        self,
        seed: int,
        step: int,
        probes: Sequence[int],
        scales: Sequence[float],
        first: int,
        x: torch.Tensor | None,
        quantiles: torch.Tensor | None,
    ) -> None:
        """Write x (size,), or zero, plus scales[k] * probe k of a step into slot first + k; see Filler for the rest."""
        filler = self.filler
        words = [_signed(word) for word in (seed, step, *probes)]
        address = torch.tensor(words, dtype=torch.int32, device=filler.device)
        scale = torch.tensor(list(scales), dtype=torch.float32, device=filler.device)
        pointers = self.pointers + self.strides[0] * (first * self.places[0].slots.element_size())
        unused = self.factors
        tables = (filler.tensor_of, filler.first_unit, filler.numel, filler.low, filler.high)
        grid = (triton.cdiv(filler.units, UNITS), len(probes))
        _write[grid](
            unused if x is None else x,
            address,
            scale,
            *tables,
            unused if quantiles is None else quantiles,
            pointers,
            *self.strides,
            *self.windows,
            self.factors,
            filler.units,
            GAUSSIAN=quantiles is not None,
            UNITS=UNITS,
            HAS_X=x is not None,
            DTYPE=self.dtype,
            enable_fp_fusion=False,  # torch rounds the product before it adds
        )


def _signed(word: int) -> int:
    """The low 32 bits as int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
