"""Plans of what an engine scores, cut into forward passes, all as flat arrays.

No loop over sequences: the host work of a step is a few NumPy calls, for ten sequences or a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from zoray.engines.prefixes import lay_out, number_prefixes, ranges, starts_of
from zoray.records import ConfigError, Probe, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


LOGITS_ELEMENTS = 1 << 25  # rows x vocabulary of one LM-head chunk: 128 MiB of float32


@dataclass(frozen=True, eq=False)
class SequenceTable:
    """Token sequences one after another, so that any selection can be packed without a loop.

    S sequences; T tokens, M targets and O outputs over all of them. See records.TokenSequence for a single one.
    """

    tokens: np.ndarray  # (T,) int64
    lengths: np.ndarray  # (S,) int64, tokens of each sequence
    rows: np.ndarray  # (M,) int64, positions in their own sequence
    targets: np.ndarray  # (M,) int64
    outputs: np.ndarray  # (M,) int64, numbered from 0 in each sequence
    n_targets: np.ndarray  # (S,) int64
    n_outputs: np.ndarray  # (S,) int64
    first_token: np.ndarray = field(init=False)  # (S + 1,)
    first_target: np.ndarray = field(init=False)  # (S + 1,)
    _prefixes: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_token", starts_of(self.lengths))
        object.__setattr__(self, "first_target", starts_of(self.n_targets))

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> SequenceTable:
        """The table of these sequences, in this order."""

        def flat(name: str) -> np.ndarray:
            parts = [getattr(sequence, name) for sequence in sequences]
            return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

        def counts(numbers: list[int]) -> np.ndarray:
            return np.array(numbers, np.int64)

        return cls(
            tokens=flat("tokens"),
            lengths=counts([len(sequence.tokens) for sequence in sequences]),
            rows=flat("rows"),
            targets=flat("targets"),
            outputs=flat("outputs"),
            n_targets=counts([len(sequence.targets) for sequence in sequences]),
            n_outputs=counts([sequence.n_outputs for sequence in sequences]),
        )

    def prefixes(self, block_size: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the blocks that chosen sequences share with others, see prefixes.number_prefixes."""
        if block_size not in self._prefixes:
            first_row, asked = np.zeros(len(self), np.int64), self.n_targets > 0
            first_row[asked] = self.rows[self.first_target[:-1][asked]]  # rows ascend
            counts, numbers = number_prefixes(self.tokens, self.first_token, first_row, block_size)
            self._prefixes[block_size] = (counts, numbers, starts_of(counts))
        counts, numbers, first = self._prefixes[block_size]
        return counts[chosen], numbers[ranges(first[chosen], counts[chosen])]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenSequence:
        """A single sequence, as views."""
        tokens = slice(self.first_token[index], self.first_token[index + 1])
        targets = slice(self.first_target[index], self.first_target[index + 1])
        asked = (self.rows[targets], self.targets[targets], self.outputs[targets])
        return TokenSequence(self.tokens[tokens], *asked, int(self.n_outputs[index]))


@dataclass(frozen=True, eq=False)
class Plan:
    """n sequences of a table, each under one probe. Outputs are numbered in this order."""

    table: SequenceTable
    probes: tuple[Probe, ...]
    probe_of: np.ndarray  # (n,) int64 into probes; -1 is the bare model, without any adapter
    chosen: np.ndarray  # (n,) int64 into the table

    @classmethod
    def of(cls, work: Sequence[tuple[Probe | None, TokenSequence]]) -> Plan:
        """The plan of (probe, sequence) pairs, where None is the bare model."""
        number: dict[Probe, int] = {}
        probe_of = [-1 if probe is None else number.setdefault(probe, len(number)) for probe, _ in work]
        table = SequenceTable.of([sequence for _, sequence in work])
        return cls(table, tuple(number), np.array(probe_of, np.int64), np.arange(len(work)))

    @property
    def first_output(self) -> np.ndarray:
        """The index of each sequence's first output, and the end of the last, (n + 1,)."""
        return starts_of(self.table.n_outputs[self.chosen])

    def by_slots(self, slots: int) -> Iterator[tuple[tuple[Probe, ...], np.ndarray, np.ndarray]]:
        """Parts with no more probes than slots: (the probes in slot order, members (k,), slot of each (k,)).

        The bare model needs no slot; its members come with the first part.
        """
        return by_slots(self.probes, self.probe_of, slots)

    def gather(
        self, slots: int, score: Callable[[tuple[Probe, ...], np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Outputs of the whole plan, in its order, from `score(probes, members, slot of each)` of each part."""
        first = self.first_output
        result = np.zeros(first[-1])
        for probes, members, slot_of in self.by_slots(slots):
            at = ranges(first[members], self.table.n_outputs[self.chosen[members]])
            result[at] = score(probes, members, slot_of)
        return result


def by_slots(
    probes: tuple[Probe, ...], probe_of: np.ndarray, slots: int
) -> Iterator[tuple[tuple[Probe, ...], np.ndarray, np.ndarray]]:
    """Cut n members, each under one of `probes` (-1: the bare model), into parts with no more probes than slots."""
    for first in range(0, max(len(probes), 1), slots):
        some = probes[first : first + slots]
        members = np.flatnonzero((probe_of >= (first or -1)) & (probe_of < first + len(some)))
        if len(members):
            yield some, members, np.where(probe_of[members] < 0, -1, probe_of[members] - first)


@dataclass(frozen=True, eq=False)
class Pack:
    """Sequences of one forward pass, one after another, ordered by slot. T tokens, S sequences, H rows, M targets.

    A pack leaves out a sequence's first `context` tokens, which an earlier sequence of the same slot has computed.
    """

    tokens: np.ndarray  # (T,) int64
    positions: np.ndarray  # (T,) int64, of each sequence from its context on
    lengths: np.ndarray  # (S,) int32, without context
    context: np.ndarray  # (S,) int32, a multiple of the block size
    blocks: np.ndarray  # (S, most) int32: KV-cache blocks of context and tokens, numbered from 1; 0 behind the last
    segments: tuple[tuple[int, int, int], ...]  # (slot, first token, last token + 1), in token order, no gaps
    rows: np.ndarray  # (H,) int64: tokens whose hidden state reaches the LM head, each once
    target_rows: np.ndarray  # (M,) int64 into rows
    targets: np.ndarray  # (M,) int64 token ids
    outputs: np.ndarray  # (M,) int64 into the flat list of all outputs of the call

    @property
    def whole(self) -> np.ndarray:
        """Tokens that each sequence attends to in the end, including its context, (S,) int32."""
        return self.lengths + self.context


def unshared_blocks(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """KV-cache blocks (S, most) of S sequences if none shares a block, as in Pack.blocks."""
    nothing = np.zeros(len(lengths), np.int64)
    return lay_out(lengths, nothing, nothing, nothing[:0], block_size)[1]


def pack(
    table: SequenceTable,
    chosen: np.ndarray,
    slots: np.ndarray,
    max_tokens: int,
    max_blocks: int | None = None,
    block_size: int = 1,
    share: bool = False,
) -> Iterator[Pack]:
    """Cut chosen sequences (n,) of a table, with a slot each (n,), into packs of bounded tokens and KV blocks.

    Outputs are numbered in the order of `chosen`, for any order in the packs. Slots stay together, so that each slot is
    one segment of a pack. With `share`, a pack holds common first blocks of a slot's sequences once; budgets are kept
    as if blocks were not shared.

    Raises:
        ConfigError: a single sequence exceeds the budget.
    """
    budget = max_tokens if max_blocks is None else min(max_tokens, max_blocks * block_size)
    first_output = starts_of(table.n_outputs[chosen])
    order = np.argsort(slots, kind="stable")  # sequences keep their order within a slot
    lengths = table.lengths[chosen[order]]
    if len(order) and lengths.max() > budget:
        raise ConfigError(
            f"a sequence of {lengths.max()} tokens is over the engine's budget of {budget} tokens a forward"
        )
    tokens, blocks = np.cumsum(lengths), np.cumsum(-(-lengths // block_size))
    begin = 0
    while begin < len(order):
        before = (tokens[begin - 1], blocks[begin - 1]) if begin else (0, 0)
        end = int(np.searchsorted(tokens, before[0] + max_tokens, side="right"))
        if max_blocks is not None:
            end = min(end, int(np.searchsorted(blocks, before[1] + max_blocks, side="right")))
        part = order[begin:end]
        yield _join(table, chosen[part], slots[part], first_output[part], block_size, share)
        begin = end


def _join(
    table: SequenceTable, chosen: np.ndarray, slots: np.ndarray, first_output: np.ndarray, block_size: int, share: bool
) -> Pack:
    none = np.zeros(len(chosen), np.int64), np.zeros(0, np.int64)
    counts, numbers = table.prefixes(block_size, chosen) if share else none
    shared, blocks = lay_out(table.lengths[chosen], slots, counts, numbers, block_size)
    context = shared * block_size
    lengths = table.lengths[chosen] - context
    starts = starts_of(lengths)
    cuts = np.flatnonzero(np.diff(slots)) + 1
    edges = np.concatenate([[0], cuts, [len(slots)]]).astype(np.int64)
    segments = zip(slots[edges[:-1]].tolist(), starts[edges[:-1]].tolist(), starts[edges[1:]].tolist(), strict=True)
    n_targets = table.n_targets[chosen]
    asked = ranges(table.first_target[chosen], n_targets)
    places = table.rows[asked] + np.repeat(starts[:-1] - context, n_targets)  # ascending
    new = np.diff(places, prepend=-1) > 0
    return Pack(
        tokens=table.tokens[ranges(table.first_token[chosen] + context, lengths)],
        positions=ranges(context, lengths),
        lengths=lengths.astype(np.int32),
        context=context.astype(np.int32),
        blocks=blocks,
        segments=tuple(segments),
        rows=places[new],
        target_rows=np.cumsum(new) - 1,
        targets=table.targets[asked],
        outputs=table.outputs[asked] + np.repeat(first_output, n_targets),
    )


def slots_of_tokens(segments: Sequence[tuple[int, int, int]], tokens: int) -> np.ndarray:
    """The slot of each token, (tokens,) int32; -1 for tokens without an adapter and for padding."""
    of_token = np.full(tokens, -1, np.int32)
    for slot, start, stop in segments:
        of_token[start:stop] = slot
    return of_token


def split_outputs(flat: np.ndarray, n_outputs: np.ndarray) -> list[np.ndarray]:
    """The flat list of outputs, cut per sequence."""
    return np.split(flat, np.cumsum(n_outputs)[:-1])[: len(n_outputs)]
