"""The signs of a step's feedback: one bit for each number of a layout, and a factor for each matrix.

Guarantees: what replicas add to their state is +gain or -gain, exact in float32 on any device, whatever the feedback
was computed on. Shapes: N numbers of a layout, tensor after tensor, without padding; M matrices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoray.methods.directions import name_hash, philox_numpy
from zoray.methods.spaces.base import Directions
from zoray.records import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from zoray.methods.directions import Layout
    from zoray.records import Probe

ALONG = 1 << 30  # indices of probes from here on are along the guide: the momentum, each group of matrices + or -
GROUPS = 8  # of matrices, each a run of layers, whose feedback is trusted alike
_PATTERN = name_hash("zoray.feedback.pattern")


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


def pattern(step: int, index: int) -> np.ndarray:
    """+1 or -1 for each group of matrices, (GROUPS,), under the probe at (step, index)."""
    words = philox_numpy((np.arange(GROUPS), index, step, _PATTERN >> 32), (0, _PATTERN & 0xFFFFFFFF))
    return np.where(words[:, 0] & 1, 1.0, -1.0)


def group_of(matrix: int, matrices: int) -> int:
    """The group of a matrix, by its number among those that move."""
    return matrix * GROUPS // max(1, matrices)


class AlongGuide(Directions):
    """Directions of a state whose probes from ALONG on go along its momentum, group by group forth or back.

    `momentum`: the state's, (size,); None before its first step, when such a direction is zero.
    """

    def __init__(
        self, layout: Layout, seed: int, distribution: str, momentum: Callable[[], torch.Tensor | None]
    ) -> None:
        super().__init__(layout, seed, distribution)
        self._momentum = momentum

    def __call__(self, step: int, index: int) -> torch.Tensor:
        return super().__call__(step, index) if index < ALONG else self._along(step, index)

    def prepare(self, probes: Iterable[Probe]) -> None:
        """See Directions.prepare."""
        super().prepare([probe for probe in probes if probe.index < ALONG])

    def part(self, step: int, index: int, name: str) -> torch.Tensor:
        """See Directions.part."""
        if index < ALONG:
            return super().part(step, index, name)
        return self.layout.view(self._along(step, index), name)

    def _along(self, step: int, index: int) -> torch.Tensor:
        import torch

        momentum = self._momentum()
        if momentum is None:
            return torch.zeros(self.layout.size, dtype=torch.float32, device=self.layout.device)
        signs, flat, numbers = pattern(step, index), momentum.clone(), numbers_of(self.layout.shapes)
        count = 1 + max(numbers.values())
        for name, number in numbers.items():
            if signs[group_of(number, count)] < 0:
                self.layout.view(flat, name).neg_()
        return flat
