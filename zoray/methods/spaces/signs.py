"""The signs of a step's feedback: one bit for each number of a layout, and a factor for each matrix.

Guarantees: replicas add +gain or -gain to their state, exact in float32 on any device, whichever device computed the
feedback. Shapes: N numbers of a layout, tensor after tensor, without padding; M matrices.
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

ALONG = 1 << 30  # probes with an index from here on go along the guide: the momentum, each group of matrices + or -
GROUPS = 8  # groups of matrices, each a run of layers, with one trust for their feedback
_PATTERN = name_hash("zoray.feedback.pattern")


def packed(feedback: np.ndarray, step: int) -> bytes:
    """The signs of whole numbers (N,), a bit each. A zero counts as + and - in alternate steps.

    So numbers without feedback (A, while B is still zero) stay where they are.
    """
    odd = (np.arange(len(feedback)) + step) % 2 == 1
    return np.packbits((feedback > 0) | ((feedback == 0) & odd)).tobytes()


def guide(layout: Layout, signs: bytes, gains: Sequence[float]) -> torch.Tensor:
    """gains[b] * s for every number of every tensor of matrix b, and zero in the padding: (size,) float32.

    Raises:
        JournalError: the signs or gains belong to another layout.
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
    """Each tensor `<matrix>.<part>` -> the index of its matrix, counted in order of their first tensors."""
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(name.rpartition(".")[0], len(numbers)) for name in names}


def pattern(step: int, index: int) -> np.ndarray:
    """+1 or -1 for each group of matrices, (GROUPS,), under the probe at (step, index)."""
    words = philox_numpy((np.arange(GROUPS), index, step, _PATTERN >> 32), (0, _PATTERN & 0xFFFFFFFF))
    return np.where(words[:, 0] & 1, 1.0, -1.0)


def group_of(matrix: int, matrices: int) -> int:
    """The group of a matrix, by its index among the trained matrices."""
    return matrix * GROUPS // max(1, matrices)


class AlongGuide(Directions):
    """Directions of a state whose probes from ALONG on go along its momentum, each group forwards or backwards.

    `momentum`: the state's, (size,); None before the first step, when such a direction is zero.
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
