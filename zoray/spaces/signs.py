"""The signs of a step's feedback: one bit for each number of a layout, and a factor for each matrix.

Guarantees: what replicas add to their state is +gain or -gain, exact in float32 on any device, whatever the feedback
was computed on. Shapes: N numbers of a layout, tensor after tensor, without padding; M matrices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import JournalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from zoray.directions import Layout


def packed(feedback: np.ndarray, step: int) -> bytes:
    """The signs of whole numbers (N,), a bit each. A zero, which has none, is + and - in turn over the steps.

    So what has no feedback (A, while B is still zero) stays where it is.
    """
    odd = (np.arange(len(feedback)) + step) % 2 == 1
    return np.packbits((feedback > 0) | ((feedback == 0) & odd)).tobytes()


def guide(layout: Layout, signs: bytes, gains: Sequence[float]) -> torch.Tensor:
    """gains[b] * s for every number of every tensor of matrix b, and zero in the padding: (size,) float32.

    Raises:
        JournalError: the signs or gains are those of another layout.
    """
    import torch

    matrix, begin = numbers_of(layout.shapes), 0
    count = 1 + max(matrix.values(), default=-1)
    if len(signs) != -(-layout.numel // 8) or len(gains) != count:
        raise JournalError(
            f"expected the signs of {layout.numel} numbers, {-(-layout.numel // 8)} bytes, and {count} gains; got "
            f"{len(signs)} bytes and {len(gains)} gains"
        )
    data = torch.frombuffer(bytearray(signs), dtype=torch.uint8).to(layout.device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=layout.device)
    bits = ((data[:, None] >> shifts) & 1).flatten()
    flat = torch.zeros(layout.size, dtype=torch.float32, device=layout.device)
    for name, shape in layout.shapes.items():
        end = begin + math.prod(shape)
        layout.view(flat, name).copy_(bits[begin:end].view(shape)).mul_(2.0).sub_(1.0).mul_(gains[matrix[name]])
        begin = end
    return flat


def numbers_of(names: Iterable[str]) -> dict[str, int]:
    """The number of the matrix that each tensor `<matrix>.<part>` belongs to; in order of their first tensor."""
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(name.rpartition(".")[0], len(numbers)) for name in names}
