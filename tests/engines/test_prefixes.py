"""Shared prefixes: every sequence finds its tokens in the KV cache, and nothing that can be shared is there twice."""

from __future__ import annotations

import numpy as np
import pytest

from zoray.engines.packing import Pack, SequenceTable, pack
from zoray.records import TokenSequence


def sequence(tokens: list[int], first_row: int) -> TokenSequence:
    rows = np.arange(first_row, len(tokens), dtype=np.int32)
    return TokenSequence(np.array(tokens, np.int32), rows, rows + 1000, np.zeros(len(rows), np.int32), 1)


def random_table(random: np.random.Generator) -> SequenceTable:
    """Sequences that agree with an earlier one up to a random place, some of them copies."""
    sequences: list[TokenSequence] = []
    for _ in range(random.integers(1, 25)):
        old = sequences[random.integers(len(sequences))].tokens.tolist() if sequences else []
        tokens = old[: random.integers(0, len(old) + 1)] + random.integers(0, 2, random.integers(1, 12)).tolist()
        sequences.append(sequence(tokens, int(random.integers(0, len(tokens)))))
    return SequenceTable.of(sequences)


def through_the_cache(packed: Pack, slots: np.ndarray, block_size: int) -> list[list[tuple[int, int, int]]]:
    """What each sequence of a pack reads from the KV cache once all have written: (slot, token, position)."""
    starts = np.concatenate([[0], np.cumsum(packed.lengths)])
    cache: dict[tuple[int, int], tuple[int, int, int]] = {}
    for s, slot in enumerate(slots.tolist()):
        for t in range(starts[s], starts[s + 1]):
            position = int(packed.positions[t])
            place = (int(packed.blocks[s, position // block_size]), position % block_size)
            assert place[0] > 0 and place not in cache, "each place is written once"
            cache[place] = (slot, int(packed.tokens[t]), position)
    whole = packed.lengths + packed.context
    return [
        [cache[int(packed.blocks[s, i // block_size]), i % block_size] for i in range(whole[s])]
        for s in range(len(whole))
    ]


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_finds_its_own_tokens_and_computes_its_asked_rows(seed, block_size):
    random = np.random.default_rng(seed)
    table = random_table(random)
    chosen = random.integers(0, len(table), 30)
    slots = random.integers(-1, 3, 30)
    order = np.argsort(slots, kind="stable")
    done = 0
    for packed in pack(table, chosen, slots, int(random.integers(60, 400)), 1000, block_size, share=True):
        part = order[done : done + len(packed.lengths)]
        done += len(part)
        assert (packed.lengths > 0).all() and not (packed.context % block_size).any()
        found = through_the_cache(packed, slots[part], block_size)
        starts = np.concatenate([[0], np.cumsum(packed.lengths)])
        target = 0
        for s, (member, slot) in enumerate(zip(chosen[part], slots[part], strict=True)):
            original = table[member]
            assert found[s] == [(slot, token, i) for i, token in enumerate(original.tokens.tolist())]
            for row in original.rows:  # in this sequence's own part of the pack
                at = packed.rows[packed.target_rows[target]]
                assert starts[s] <= at < starts[s + 1] and packed.positions[at] == row
                target += 1
        # nothing that could be shared is computed twice: prefixes that two sequences of the table have, before a row
        counts, _ = table.prefixes(block_size, np.arange(len(table)))
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for s, (member, slot) in enumerate(zip(chosen[part], slots[part], strict=True)):
            tokens, shared = table[member].tokens.tolist(), 0
            for k in range(1, counts[member] + 1):
                prefix = (int(slot), tuple(tokens[: k * block_size]))
                shared += prefix in seen
                seen.add(prefix)
            assert packed.context[s] == shared * block_size
    assert done == 30


def prefixes(sequences: list[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
    return SequenceTable.of(sequences).prefixes(2, np.arange(len(sequences)))


def test_prefixes_are_counted_up_to_the_first_asked_row_and_only_where_two_have_them():
    prompt = [5, 6, 7, 8, 9]
    options = [sequence([*prompt, 1, 2], 4), sequence([*prompt, 3, 4], 4), sequence([5, 6, 7, 9, 9], 4)]
    counts, numbers = prefixes(options)
    assert counts.tolist() == [2, 2, 1] and numbers[:2].tolist() == numbers[2:4].tolist()
    assert numbers[4] == numbers[0]
    assert prefixes([sequence(list(range(10)), 9)])[0].tolist() == [
        0
    ]  # and so a batch that repeats an example computes it each time
    assert prefixes([sequence(prompt, 0), sequence(prompt, 0)])[0].tolist() == [0, 0]
