"""Directions in one Triton kernel, for CUDA: the bits of directions.py, without the integer tensors that torch needs.

In torch a direction is some sixty passes over 64-bit words; here each Philox block stays in registers and only the
float32 result is written. Multiplications and additions of integers alone, and a table look-up, so there is nothing to
round. Runs on the CPU under TRITON_INTERPRET=1, which is how the tests check it where there is no card.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton compiles the kernels; to Python's typing their loops and constants mean something else.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNIT = tl.constexpr(128)  # elements: directions.ALIGNMENT, so a unit lies in one tensor
UNITS = 4  # a program


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
def _fill(
    out, address, tensor_of, first_unit, numel, hash_low, hash_high, table, units, GAUSSIAN: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """out[k, e] = element e of the direction at (seed, step, probe k), with `address` (seed, step, probe 0, ...).

    0 in the padding behind a tensor. Addresses come as a tensor, as a number of its own Triton would compile for anew.
    """
    k = tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < units
    tensor = tl.load(tensor_of + unit, mask=live, other=0)
    within = unit - tl.load(first_unit + tensor)  # number of the unit in its tensor
    low = tl.load(hash_low + tensor).to(tl.uint32, bitcast=True)
    high = tl.load(hash_high + tensor).to(tl.uint32, bitcast=True)
    seed = tl.load(address).to(tl.uint32, bitcast=True)
    step = tl.load(address + 1).to(tl.uint32, bitcast=True)
    probe = tl.load(address + 2 + k).to(tl.uint32, bitcast=True)
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
    element = tl.arange(0, UNIT)[None, :]
    real = within[:, None] * UNIT + element < tl.load(numel + tensor)[:, None]
    at = (unit.to(tl.int64)[:, None] + k.to(tl.int64) * units) * UNIT + element
    tl.store(out + at, tl.where(real, values, 0.0), mask=live[:, None])


class Filler:
    """Fills flat vectors of one layout with directions; its tables live on the layout's device.

    Args:
        sizes: elements of each tensor, in the layout's order; each stands at a multiple of 128.
        hashes: the 64-bit hash of each tensor's name.
        device: where.
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
        """The directions at some probe indices, (K, size) float32; `quantiles` (65536,) makes them Gaussian."""
        out = torch.empty(len(probes), self.units * UNIT.value, dtype=torch.float32, device=self.device)
        words = [_signed(word) for word in (seed, step, *probes)]
        address = torch.tensor(words, dtype=torch.int32, device=self.device)
        table = out if quantiles is None else quantiles
        tables = (self.tensor_of, self.first_unit, self.numel, self.low, self.high, table)
        grid = (triton.cdiv(self.units, UNITS), len(probes))
        if self.units:
            _fill[grid](out, address, *tables, self.units, GAUSSIAN=quantiles is not None, UNITS=UNITS)
        return out


def _signed(word: int) -> int:
    """The low 32 bits as int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
