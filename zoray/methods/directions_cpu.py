"""Directions on the CPU in two loops that torch compiles: the bits of directions.py in a fraction of the time.

As torch operations, Philox is a hundred passes over 64-bit words; in a loop a block's words stay in registers, and only
they and their elements are written. Compiling takes seconds, so it is for processes that will make many directions;
directions.py decides. It happens once for all sizes (no length is ever 1, for which torch would compile again).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = 1 << 20  # of 128 bits, at a time; their words take 64 MiB
MOVES = 16  # directions added in one pass


class Loops:
    """Makes directions of one distribution.

    Args:
        gaussian: a block is 8 elements by table; else its 128 bits are signs.
    """

    def __init__(self, gaussian: bool) -> None:
        # the compiled code depends on the number of threads; as an option it becomes part of torch's disk cache key
        how: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": {"cpp.threads": torch.get_num_threads()}}
        self._words = torch.compile(philox, **how)
        self._elements = torch.compile(quantiles if gaussian else signs, **how)
        self._moved = None if gaussian else torch.compile(moved, **how)  # a table's look-ups gain nothing

    def __call__(
        self,
        blocks: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        seed: int,
        step: int,
        probes: Sequence[int],
        table: torch.Tensor | None,
    ) -> torch.Tensor:
        """(K, n * elements of a block) float32 for K probes and n blocks, K * n > 1.

        A block has its index in its tensor, and the tensor's hash in two halves, each (n,) int64; `table` (65536,) has
        the quantiles.
        """
        with torch.inference_mode(False), torch.no_grad():  # always the same kind of tensor, so torch compiles once
            count, total = len(probes), len(probes) * len(blocks)
            index = torch.from_numpy(np.repeat(np.array(probes, np.int64), len(blocks)))
            counters = (blocks, index, high, low)
            if count > 1:
                counters = (blocks.repeat(count), index, high.repeat(count), low.repeat(count))
            pieces, made = -(-total // BLOCKS), []
            for piece in range(pieces):
                part = slice(total * piece // pieces, total * (piece + 1) // pieces)
                c0, c1, c3, k1 = counters if pieces == 1 else (counter[part].clone() for counter in counters)
                words = self._words(c0, c1, torch.tensor(step), c3, torch.tensor(seed), k1)
                made.append(self._elements(torch.stack(words, dim=-1), table))
            return (made[0] if pieces == 1 else torch.cat(made)).view(count, -1)

    def move(
        self,
        x: torch.Tensor,
        blocks: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        seed: int,
        addresses: Sequence[tuple[int, int]],
        decays: Sequence[float],
        coefficients: Sequence[float],
    ) -> bool:
        """x <- decay * x + coefficient * z for MOVES (step, probe) in turn, x (size,) in place; returns whether it can.

        Other arguments as above. The padding behind a tensor is moved as well.
        """
        if self._moved is None:
            return False
        with torch.inference_mode(False), torch.no_grad():
            columns = (torch.tensor(column) for column in zip(*addresses, strict=True))
            steps, probes = (column.repeat_interleave(len(blocks)) for column in columns)
            c0, c3, k1 = (counter.repeat(MOVES) for counter in (blocks, high, low))
            words = self._words(c0, probes, steps, c3, torch.tensor(seed), k1)
            factors = (torch.tensor(column, dtype=torch.float32) for column in (decays, coefficients))
            bits = torch.stack(words, dim=-1).view(MOVES, len(blocks), 4)
            result = self._moved(x.clone().view(len(blocks), 4, 32), bits, *factors)
        x.copy_(result.flatten())
        return True


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, k0: torch.Tensor, k1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 on 32-bit words in int64, see directions.philox_torch."""
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = ((product0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def signs(words: torch.Tensor, _: Any) -> torch.Tensor:
    """A sign for each bit of words (m, 4), + for 0, the lowest bit first: (m, 4, 32)."""
    return 1.0 - 2.0 * ((words[..., None] >> torch.arange(32)) & 1).to(torch.float32)


def quantiles(words: torch.Tensor, table: Any) -> torch.Tensor:
    """The entries of `table` for both halves of words (m, 4), the lower first: (m, 4, 2)."""
    return table[(words[..., None] >> (16 * torch.arange(2))) & 0xFFFF]


def moved(x: torch.Tensor, words: torch.Tensor, decays: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """x (n, 4, 32), decayed and moved along the signs of words (MOVES, n, 4), one after another."""
    for k in range(MOVES):
        x = x * decays[k] + signs(words[k], None) * coefficients[k]
    return x
