"""Folding: add a low-rank update into base weights, with the same bits on every device.

W <- round(decay * W + B @ A), the product and the sum in float32, one rounding to the dtype of W. A matrix product adds
in an order that depends on device and threads, so rank-one terms are added in a fixed order; if both factors hold only
-1 and 1 (Rademacher), every order gives the same whole numbers and a plain product will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from zoray.methods.directions import uniform_torch
from zoray.records import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Factors = Mapping[str, "tuple[torch.Tensor, torch.Tensor]"]  # name -> B (out, r), A (r, in)
ROUNDINGS = ("nearest", "stochastic")
FOLDABLE = ("float32", "float16", "bfloat16", "float64")
CACHE_ELEMENTS = 1 << 17  # in a block of rows: 512 KiB of float32
_FIXED_POINT = 1 << 21  # of normal quantiles (|z| < 4.4): products of 2**16 pairs of them still fit 63 bits


def check_rounding(rounding: str) -> None:
    """Raise ConfigError for an unknown rounding."""
    require(rounding in ROUNDINGS, f"space.fold_rounding to be one of {', '.join(ROUNDINGS)}", rounding)


def check_weights(
    matrices: Mapping[str, tuple[int, int]], weights: Mapping[str, torch.Tensor] | None, space: str
) -> Mapping[str, torch.Tensor]:
    """The base weights that a space folds into, checked.

    Raises:
        ConfigError: there are no weights, or some are quantised or have another shape.
    """
    if weights is None:
        raise ConfigError(f"space={space} folds into the base weights; this caller has none to give")
    for name, shape in matrices.items():
        weight = weights.get(name)
        dtype = None if weight is None else str(weight.dtype).removeprefix("torch.")
        if weight is None or dtype not in FOLDABLE or tuple(weight.shape) != shape:
            found = "no plain weight" if weight is None else f"{dtype} of shape {tuple(weight.shape)}"
            raise ConfigError(
                f"space={space} folds into base weights of {', '.join(FOLDABLE)}; {name} has {found} (expected "
                f"{shape}). Take space=lora, which never writes the base weights"
            )
    return weights


def decayed(weight: torch.Tensor, owed: Sequence[tuple[float, float]], base: torch.Tensor | None) -> torch.Tensor:
    """w <- base + anchor * (decay * w - base) for each (decay, anchor), starting from the weight.

    A new tensor in float32 (float64 for a float64 weight). Steps that only decay, or only anchor, are joined in one.
    """
    import torch

    if all(anchor == 1 for _, anchor in owed) or all(decay == 1 for decay, _ in owed):
        owed = [(math.prod(decay for decay, _ in owed), math.prod(anchor for _, anchor in owed))]
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for decay, anchor in owed:
        if decay != 1.0:
            exact.mul_(decay)
        if anchor != 1.0:
            assert base is not None, "Experiment checks that keep_base goes with an anchor"
            origin = base.to(exact.dtype)
            exact.sub_(origin).mul_(anchor).add_(origin)
    return exact


def product(b: torch.Tensor, a: torch.Tensor, distribution: str | None = None) -> torch.Tensor:
    """B @ A, (out, r) x (r, in) float32, the same bits everywhere. `distribution`: of both factors, if both are raw."""
    if distribution == "rademacher":
        return b @ a  # sums of at most 512 times +-1: exact in any order
    total = b[:, :1] * a[:1]
    for j in range(1, b.shape[1]):
        total += b[:, j : j + 1] * a[j : j + 1]
    return total


def add_products(
    exact: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    distribution: str | None = None,
) -> None:
    """exact += product(b, a) * factor for each (b, a, factor), in that order and in place, with exactly those bits.

    On a CPU, works in blocks of rows that stay in the cache, since each term is a pass over the matrix.
    """
    import torch

    height, width = exact.shape
    rows = max(1, CACHE_ELEMENTS // width) if exact.device.type == "cpu" else height
    scratch, more = torch.empty(2, rows, width, dtype=torch.float32, device=exact.device)
    for start in range(0, height, rows):
        block = exact[start : start + rows]
        term, extra = scratch[: len(block)], more[: len(block)]
        for b, a, factor in terms:
            b = b[start : start + rows]
            if distribution == "rademacher":
                torch.mm(b, a, out=term)
            else:
                torch.mul(b[:, :1], a[:1], out=term)
                for j in range(1, b.shape[1]):
                    term.add_(torch.mul(b[:, j : j + 1], a[j : j + 1], out=extra))
            block.add_(term.mul_(factor))


def overlap(a_old: torch.Tensor, a_new: torch.Tensor) -> torch.Tensor:
    """V_old^T V_new / n, (r, r) float32, from factors stored as (r, n); exact integer sums, so any order will do."""
    import torch

    old, new = ((a.double() * _FIXED_POINT).round().to(torch.int64) for a in (a_old, a_new))
    sums = torch.stack([(old[i] * new).sum(dim=1) for i in range(len(old))])
    return (sums.double() / (float(_FIXED_POINT) ** 2 * a_old.shape[1])).float()


def write_rounded(weight: torch.Tensor, exact: torch.Tensor, rounding: str, seed: int, step: int, name: str) -> None:
    """weight <- exact, (out, in) float32, rounded once to the weight's dtype.

    Stochastic rounding goes to one of the two neighbours with a probability that makes the mean exact (to 2**-16 of
    their distance); its bits have the address (seed, step, 0, `<name>.round`). A wider weight takes `exact` unchanged.
    """
    import torch

    near = exact.to(weight.dtype)
    if rounding == "stochastic" and weight.element_size() == 2:
        other = _neighbour(near, exact)
        distance = (other.float() - near.float()).abs()
        share = torch.where(distance > 0, (exact - near.float()).abs() / distance, torch.zeros_like(exact))
        draw = uniform_torch(seed, step, 0, f"{name}.round", exact.numel(), exact.device).view(exact.shape)
        near = torch.where(draw < share, other, near)
    weight.copy_(near)


def _neighbour(near: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The 16-bit float next to `near` on the side of `exact`; `near` itself where they are equal."""
    import torch

    bits = near.view(torch.int16).to(torch.int32)
    magnitude, negative = bits & 0x7FFF, bits < 0
    difference = exact - near.float()
    outward = (difference > 0) != negative  # away from zero
    zero_negative = (magnitude == 0) & (difference < 0)  # from either zero the first step down is a negative number
    moved = torch.where(magnitude == 0, torch.ones_like(magnitude), magnitude + torch.where(outward, 1, -1))
    sign = torch.where(magnitude == 0, zero_negative, negative)
    result = torch.where(difference == 0, bits, torch.where(sign, moved - 0x8000, moved))
    return result.to(torch.int16).view(near.dtype)
