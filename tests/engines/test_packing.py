"""Packing: whatever the sequences, slots and budgets, every token, row and output is where it belongs, once."""

from collections.abc import Iterator

import numpy as np
import pytest

from zoray.engines import packing
from zoray.engines.packing import Pack, Plan, SequenceTable, ranges, split_outputs, starts_of, unshared_blocks
from zoray.records import ConfigError, Probe, TokenSequence

SEEDS = range(40)


def random_sequence(random: np.random.Generator, longest: int) -> TokenSequence:
    """1 to `longest` tokens, with some ascending rows (equal ones too) and outputs that may share or skip numbers."""
    length = int(random.integers(1, longest + 1))
    asked, n_outputs = int(random.integers(1, 6)), int(random.integers(1, 4))
    return TokenSequence(
        tokens=random.integers(0, 1000, length).astype(np.int32),
        rows=np.sort(random.integers(0, length, asked)).astype(np.int32),
        targets=random.integers(0, 1000, asked).astype(np.int32),
        outputs=random.integers(0, n_outputs, asked).astype(np.int32),
        n_outputs=n_outputs,
    )


def pack(work: list[tuple[int, TokenSequence]], *budget: int | None) -> Iterator[Pack]:
    """The packs of (slot, sequence) pairs; the table holds the sequences in another order than they are asked for."""
    table = SequenceTable.of([sequence for _, sequence in work[::-1]])
    slots = np.array([slot for slot, _ in work], np.int64)
    return packing.pack(table, np.arange(len(work))[::-1], slots, *budget)  # type: ignore[arg-type]


def random_case(seed: int) -> tuple[list[tuple[int, TokenSequence]], int, int | None, int]:
    """(work, max_tokens, max_blocks, block_size), from roomy to tight."""
    random = np.random.default_rng(seed)
    longest = int(random.integers(1, 20))
    slots = random.permutation(10)[: random.integers(1, 6)] - 1  # -1 is the bare model
    work = [(int(random.choice(slots)), random_sequence(random, longest)) for _ in range(random.integers(1, 30))]
    block_size = int(random.choice([1, 4, 16]))
    tightest = -(-longest // block_size)
    max_blocks = None if random.random() < 0.3 else tightest + int(random.integers(0, 20))
    return work, longest + int(random.integers(0, 60)), max_blocks, block_size


def sequences_of(packed: Pack) -> list[tuple[int, tuple[int, ...], list[tuple[int, int, int]]]]:
    """(slot, tokens, [(row in the sequence, target, output of the call)]) of each sequence, read off the pack alone."""
    found, start = [], 0
    for length in packed.lengths:
        stop = start + int(length)
        (slot,) = [slot for slot, first, last in packed.segments if first <= start and stop <= last]
        asked = [
            (int(packed.rows[row]) - start, int(target), int(output))
            for row, target, output in zip(packed.target_rows, packed.targets, packed.outputs, strict=True)
            if start <= packed.rows[row] < stop
        ]
        found.append((slot, tuple(packed.tokens[start:stop].tolist()), asked))
        assert packed.positions[start:stop].tolist() == list(range(int(length)))
        start = stop
    assert start == len(packed.tokens) == len(packed.positions)
    return found


def expected_sequences(work: list[tuple[int, TokenSequence]]):
    first = 0
    for slot, s in work:
        asked = [(int(r), int(t), first + int(o)) for r, t, o in zip(s.rows, s.targets, s.outputs, strict=True)]
        yield slot, tuple(s.tokens.tolist()), asked
        first += s.n_outputs


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sequence_is_packed_once_and_whole(seed):
    work, *budget = random_case(seed)
    found = [sequence for packed in pack(work, *budget) for sequence in sequences_of(packed)]
    assert found == sorted(expected_sequences(work), key=lambda sequence: sequence[0])  # stable within a slot


@pytest.mark.parametrize("seed", SEEDS)
def test_budgets_are_respected_and_used(seed):
    work, max_tokens, max_blocks, block_size = random_case(seed)
    packs = list(pack(work, max_tokens, max_blocks, block_size))
    tokens = [len(packed.tokens) for packed in packs]
    blocks = [sum(-(-int(n) // block_size) for n in packed.lengths) for packed in packs]
    assert blocks == [packed.blocks.max() for packed in packs]  # numbered from 1 without gaps
    for packed in packs:
        assert (packed.blocks == unshared_blocks(packed.lengths, block_size)).all() and not packed.context.any()
    assert all(0 < count <= max_tokens for count in tokens)
    assert max_blocks is None or all(count <= max_blocks for count in blocks)
    for k in range(1, len(packs)):  # a pack ends only when the next sequence does not fit
        following = int(packs[k].lengths[0])
        too_many = max_blocks is not None and blocks[k - 1] + -(-following // block_size) > max_blocks
        assert tokens[k - 1] + following > max_tokens or too_many


@pytest.mark.parametrize("seed", SEEDS)
def test_segments_cover_the_tokens_and_name_each_slot_once(seed):
    work, *budget = random_case(seed)
    for packed in pack(work, *budget):
        slots, starts, stops = zip(*packed.segments, strict=True)
        assert len(set(slots)) == len(slots) and list(slots) == sorted(slots)
        assert (0, *stops) == (*starts, len(packed.tokens))
        assert all(start < stop for start, stop in zip(starts, stops, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_distinct_and_all_used(seed):
    work, *budget = random_case(seed)
    for packed in pack(work, *budget):
        assert (np.diff(packed.rows) > 0).all()  # ascending, each once
        assert set(packed.target_rows.tolist()) == set(range(len(packed.rows)))
        assert len(packed.target_rows) == len(packed.targets) == len(packed.outputs)
        for array in (packed.tokens, packed.positions, packed.rows, packed.target_rows, packed.targets, packed.outputs):
            assert array.dtype == np.int64


def fake_engine(work: list[tuple[int, TokenSequence]], *budget) -> list[np.ndarray]:
    """Scores that depend on slot, token, position and target; summed into outputs as an engine does."""
    sums = np.zeros(sum(sequence.n_outputs for _, sequence in work))
    for packed in pack(work, *budget):
        slot_of = np.concatenate([np.full(stop - start, slot) for slot, start, stop in packed.segments])
        hidden = (slot_of + 2) * 1e8 + packed.tokens * 1e4 + packed.positions * 10
        np.add.at(sums, packed.outputs, hidden[packed.rows][packed.target_rows] + packed.targets / 1024)
    return split_outputs(sums, np.array([sequence.n_outputs for _, sequence in work]))


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_do_not_depend_on_the_packing(seed):
    work, *budget = random_case(seed)
    expected = []
    for slot, s in work:
        outputs = np.zeros(s.n_outputs)
        scores = (slot + 2) * 1e8 + s.tokens[s.rows].astype(np.int64) * 1e4 + s.rows * 10.0 + s.targets / 1024
        np.add.at(outputs, s.outputs, scores)
        expected.append(outputs.tolist())
    assert [outputs.tolist() for outputs in fake_engine(work, *budget)] == expected
    assert [outputs.tolist() for outputs in fake_engine(work, 10_000)] == expected  # all in one pack


def sequence_of(length: int) -> TokenSequence:
    one = np.zeros(1, np.int32)
    return TokenSequence(np.zeros(length, np.int32), one, one, one, 1)


def test_a_sequence_over_the_token_budget_is_refused():
    assert [len(packed.tokens) for packed in pack([(0, sequence_of(10))] * 2, 10)] == [10, 10]
    with pytest.raises(ConfigError, match="a sequence of 11 tokens is over the engine's budget of 10 tokens a forward"):
        list(pack([(0, sequence_of(3)), (1, sequence_of(11))], 10))


def test_a_sequence_over_the_block_budget_is_refused_with_the_budget_in_tokens():
    assert [len(packed.tokens) for packed in pack([(0, sequence_of(8))] * 2, 100, 2, 4)] == [8, 8]
    with pytest.raises(ConfigError, match="a sequence of 9 tokens is over the engine's budget of 8 tokens a forward"):
        list(pack([(0, sequence_of(9))], 100, 2, 4))


def test_no_work_makes_no_packs():
    assert list(pack([], 10)) == []
    assert split_outputs(np.zeros(0), np.zeros(0, np.int64)) == []
    assert list(Plan.of([]).by_slots(4)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_is_cut_by_slots_with_every_member_once_and_few_enough_probes(seed):
    random = np.random.default_rng(seed)
    probes = [None, *(Probe(5, k // 2, 0.01 if k % 2 else -0.01) for k in range(random.integers(1, 12)))]
    asked = [probes[i] for i in random.integers(0, len(probes), random.integers(1, 40))]
    plan, slots = Plan.of([(probe, sequence_of(2)) for probe in asked]), int(random.integers(1, 6))
    parts = list(plan.by_slots(slots))
    assert sorted(np.concatenate([members for _, members, _ in parts]).tolist()) == list(range(len(asked)))
    written = [probe for group, _, _ in parts for probe in group]
    assert sorted(map(str, written)) == sorted(map(str, set(asked) - {None}))  # each once
    for group, members, slot_of in parts:
        assert len(group) <= slots and (np.diff(members) > 0).all()
        assert [group[slot] if slot >= 0 else None for slot in slot_of] == [asked[i] for i in members]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_gives_back_its_sequences_and_their_outputs(seed):
    random = np.random.default_rng(seed)
    sequences = [random_sequence(random, 5) for _ in range(random.integers(1, 10))]
    plan = Plan.of([(None, sequence) for sequence in sequences])
    assert len(plan.table) == len(sequences) and plan.probe_of.tolist() == [-1] * len(sequences)
    for found, sequence in zip((plan.table[i] for i in plan.chosen), sequences, strict=True):
        for name in ("tokens", "rows", "targets", "outputs"):
            assert getattr(found, name).tolist() == getattr(sequence, name).tolist()
        assert found.n_outputs == sequence.n_outputs
    flat = random.standard_normal(plan.first_output[-1])
    parts = split_outputs(flat, plan.table.n_outputs)
    assert [len(part) for part in parts] == [sequence.n_outputs for sequence in sequences]
    assert np.concatenate(parts).tolist() == flat.tolist()


def test_ranges_and_starts():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert starts_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
