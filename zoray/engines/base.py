"""What every engine is, and the packing that all of them share.

An engine holds a frozen model and one adapter state. It writes probes into adapter slots, runs sequences under them,
and returns sums of log-probabilities. It knows nothing of losses, tasks, steps or other replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from zoray.records import ConfigError, Probe, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zoray.records import Commit


class Engine(Protocol):
    """A model with adapter slots, and the adapter state that fills them."""

    self_test: dict[str, float]
    dtype: str  # of the base weights as loaded, "float32" for example

    def apply(self, commits: Sequence[Commit]) -> None:
        """Advance the adapter state; commits come in step order."""
        ...

    def score(self, work: Sequence[tuple[Probe, TokenSequence]]) -> list[np.ndarray]:
        """For each (probe, sequence) the sums of log-probabilities, (n_outputs,) float64; any number of tokens."""
        ...

    def reset(self) -> None:
        """Back to journal index 0, base weights included."""
        ...

    def step(self) -> int:
        """The journal index of the state: how many steps it has applied."""
        ...

    def digest(self) -> str:
        """Digest of the trained tensors."""
        ...

    def adapter(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32, not scaled."""
        ...


@dataclass(frozen=True, eq=False)
class Pack:
    """Sequences of one forward pass, one after another, ordered by slot. T tokens, S sequences, H rows, M targets."""

    tokens: np.ndarray  # (T,) int64
    positions: np.ndarray  # (T,) int64, each sequence from 0
    lengths: np.ndarray  # (S,) int32
    segments: tuple[tuple[int, int, int], ...]  # (slot, first token, last token + 1), in token order, no gaps
    rows: np.ndarray  # (H,) int64: tokens whose hidden state reaches the LM head, each once
    target_rows: np.ndarray  # (M,) int64 into rows
    targets: np.ndarray  # (M,) int64 token ids
    outputs: np.ndarray  # (M,) int64 into the flat list of all outputs of the call


def blocks_needed(lengths: np.ndarray, block_size: int) -> int:
    """KV-cache blocks that sequences of these lengths take, when none shares a block."""
    return int((-(-lengths // block_size)).sum())


def pack(
    work: Sequence[tuple[int, TokenSequence]], max_tokens: int, max_blocks: int | None = None, block_size: int = 1
) -> Iterator[Pack]:
    """Split (slot, sequence) pairs into packs of at most `max_tokens` tokens and `max_blocks` KV blocks.

    Outputs are numbered in the order of `work`, whatever the order inside the packs. Slots stay together, so that each
    slot is one segment of a pack.

    Raises:
        ConfigError: one sequence alone is over the budget.
    """
    first_output = np.cumsum([0] + [sequence.n_outputs for _, sequence in work])
    order = sorted(range(len(work)), key=lambda i: work[i][0])  # stable: sequences keep their order within a slot
    begin, tokens, blocks = 0, 0, 0
    for end, i in enumerate(order):
        length = len(work[i][1].tokens)
        need = -(-length // block_size)
        budget = max_tokens if max_blocks is None else min(max_tokens, max_blocks * block_size)
        if length > budget:
            raise ConfigError(f"a sequence of {length} tokens is over the engine's budget of {budget} tokens a forward")
        if end > begin and (tokens + length > max_tokens or (max_blocks is not None and blocks + need > max_blocks)):
            yield _join([(work[j], first_output[j]) for j in order[begin:end]])
            begin, tokens, blocks = end, 0, 0
        tokens, blocks = tokens + length, blocks + need
    if begin < len(order):
        yield _join([(work[j], first_output[j]) for j in order[begin:]])


def _join(items: list[tuple[tuple[int, TokenSequence], int]]) -> Pack:
    lengths = np.array([len(sequence.tokens) for (_, sequence), _ in items], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    slots = [slot for (slot, _), _ in items]
    cuts = [k for k in range(1, len(slots)) if slots[k] != slots[k - 1]]
    segments = tuple(
        (slots[a], int(starts[a]), int(starts[b])) for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True)
    )
    at = [sequence.rows + start for ((_, sequence), _), start in zip(items, starts[:-1], strict=True)]
    rows, target_rows = np.unique(np.concatenate(at), return_inverse=True)
    return Pack(
        tokens=np.concatenate([sequence.tokens for (_, sequence), _ in items]).astype(np.int64),
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        lengths=lengths,
        segments=segments,
        rows=rows,
        target_rows=target_rows.astype(np.int64),
        targets=np.concatenate([sequence.targets for (_, sequence), _ in items]).astype(np.int64),
        outputs=np.concatenate([sequence.outputs + first for (_, sequence), first in items]).astype(np.int64),
    )


def by_slot_groups(work: Sequence[tuple[Probe, TokenSequence]], slots: int) -> Iterator[tuple[list[Probe], list[int]]]:
    """Split work so that no group has more probes than slots: (the probes in slot order, indices into work)."""
    members: dict[Probe, list[int]] = {}
    for i, (probe, _) in enumerate(work):
        members.setdefault(probe, []).append(i)
    probes = list(members)
    for first in range(0, len(probes), slots):
        group = probes[first : first + slots]
        yield group, [i for probe in group for i in members[probe]]


def split_outputs(flat: np.ndarray, work: Sequence[tuple[object, TokenSequence]]) -> list[np.ndarray]:
    """The flat list of outputs, cut per (probe, sequence)."""
    return np.split(flat, np.cumsum([sequence.n_outputs for _, sequence in work])[:-1])[: len(work)]
