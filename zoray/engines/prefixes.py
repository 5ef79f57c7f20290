"""Finds blocks of tokens that several sequences begin with, so that a forward pass computes keys and values once.

The options of an example share its prompt; examples share a template, a system prompt or few-shot examples. Only whole
blocks of the KV cache can be shared: sequences under the same adapter whose tokens agree from the start to the end of a
block have the same keys and values there, and attention finds them through the block table. Each sequence computes the
blocks with its own scored rows itself.
"""

from __future__ import annotations

import numpy as np


def starts_of(counts: np.ndarray) -> np.ndarray:
    """The start of each run, and the end of the last, (n + 1,) int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + counts[0]), then [starts[1], ...), and so on, (sum of counts,) int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def number_prefixes(
    tokens: np.ndarray, first_token: np.ndarray, first_row: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The count of blocks that each of S sequences shares with another, and their numbers: (S,), (sum of counts,).

    Equal numbers mean equal tokens from the start of the sequence to the end of the block. A loop over sequences, once
    for a dataset.

    Args:
        tokens: of all sequences, one after another.
        first_token: (S + 1,) the start of each, and the end of the last.
        first_row: (S,) the first scored position; its block and later ones are not shared.
        block_size: tokens of a block.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    of_sequence: list[list[int]] = []
    for start, blocks in zip(first_token[:-1].tolist(), (first_row // block_size).tolist(), strict=True):
        path, parent = [], -1
        for begin in range(start, start + blocks * block_size, block_size):
            key = (parent, tokens[begin : begin + block_size].tobytes())
            parent = numbers.setdefault(key, len(numbers))
            path.append(parent)
        of_sequence.append(path)
    met = np.bincount([number for path in of_sequence for number in path], minlength=1)
    shared = [[number for number in path if met[number] > 1] for path in of_sequence]
    counts = np.array([len(path) for path in shared], np.int64)
    return counts, np.array([number for path in shared for number in path], np.int64)


def lay_out(
    lengths: np.ndarray, slots: np.ndarray, counts: np.ndarray, numbers: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """KV-cache blocks of a pack's S sequences: the number of leading blocks that are shared (S,), and all (S, most).

    Args:
        lengths: (S,) tokens of each, including shared ones.
        slots: (S,) the adapter of each.
        counts: (S,) numbered blocks of each, see number_prefixes.
        numbers: (sum of counts,) their numbers.
        block_size: tokens of a block.

    Blocks are numbered from 1; 0 pads a sequence's row behind its last block. The first sequence with a prefix owns it.
    """
    of_sequence, depth = np.repeat(np.arange(len(lengths)), counts), ranges(np.zeros(len(counts), np.int64), counts)
    keys = (slots[of_sequence] + 1) * (numbers.max(initial=0) + 1) + numbers
    _, first, same = np.unique(keys, return_index=True, return_inverse=True)
    owner = first[same]
    others = owner != np.arange(len(keys))
    shared = np.bincount(of_sequence[others], minlength=len(lengths))
    blocks = -(-lengths // block_size)
    base = 1 + starts_of(blocks - shared)[:-1] - shared
    column = np.arange(blocks.max(initial=0))[None, :]
    table = np.where(column < blocks[:, None], base[:, None] + column, 0)
    table[of_sequence[others], depth[others]] = base[of_sequence[owner[others]]] + depth[others]
    return shared, table.astype(np.int32)
