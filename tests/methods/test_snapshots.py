"""Snapshots: what a space's state is after one, and when one is not to be used."""

from __future__ import annotations

import json

import pytest

from zoray.methods import snapshots
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.records import Commit
from zoray.run.journal import StepRecord, usable_snapshot

MATRICES = {"layers.0.q_proj": (48, 32), "layers.0.up_proj": (64, 32)}
SPACES = {
    "lora": Lora(rank=2, train="AB"),
    "lozo": Lozo(rank=2, interval=3),
    "lozo-anchored": Lozo(rank=1, interval=4, keep_base=True),
    "lowrank": LowRank(rank=1),
}


def commit(step: int, momentum: bool, anchor: float) -> Commit:
    decay = 0.99 if step % 2 else 1.0
    if momentum:
        return Commit(step, (0.01, -0.02), decay, anchor, 0.9, 0.5)
    return Commit(step, (0.01, -0.02), decay, anchor)


def weights():
    import torch

    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in MATRICES.items()}


@pytest.mark.parametrize(
    ("name", "momentum"), [(name, momentum) for name in SPACES for momentum in (False, True)[: 1 + (name != "lowrank")]]
)
def test_a_state_goes_on_from_a_snapshot_as_if_it_had_been_there(name, momentum):
    space, anchor = SPACES[name], 0.98 if name == "lozo-anchored" else 1.0
    state = space.open(MATRICES, 5, weights=weights())
    for step in range(5):  # lozo: two steps into an interval, with decays owed to the base weights
        state.apply(commit(step, momentum, anchor))
    data, digest = snapshots.pack(state, 1 << 30), state.digest()
    assert data is not None
    late = space.open(MATRICES, 5, weights=weights())
    late.apply(commit(0, momentum, anchor))  # wherever it is
    snapshots.unpack(late, data, 5)
    assert (late.step, late.digest()) == (5, digest)
    for step in range(5, 13):
        state.apply(commit(step, momentum, anchor))
        late.apply(commit(step, momentum, anchor))
        assert late.digest() == state.digest()
    snapshots.unpack(late, data, 5)  # it was no view of the state
    assert late.digest() == digest


def test_a_large_state_has_none():
    state = Lora(rank=2).open(MATRICES, 5)
    assert snapshots.pack(state, 100) is None


def test_only_a_snapshot_that_the_journal_knows_is_used(tmp_path):
    state = Lora(rank=2).open(MATRICES, 5)
    steps = []
    for step in range(6):
        if step == 4:
            data = snapshots.pack(state, 1 << 30)
        steps.append(StepRecord(Commit(step, (0.1,)), (1.0,), state.digest() if step % 2 == 0 else None))
        state.apply(steps[-1].commit)
    path = tmp_path / snapshots.FILE_NAME
    assert usable_snapshot(path, steps) is None  # there is none
    found = snapshots.write(path, data)
    assert (found.step, found.digest) == (4, steps[4].digest)
    assert usable_snapshot(path, steps) == found
    assert usable_snapshot(path, steps[:4]) is None  # of a journal that has lost the step
    other = [*steps[:4], StepRecord(Commit(4, (0.1,)), (1.0,), "0" * 16)]
    assert usable_snapshot(path, other) is None  # of another run
    path.write_bytes(path.read_bytes()[:100])
    assert usable_snapshot(path, steps) is None  # torn
    path.write_text(json.dumps({}))
    assert usable_snapshot(path, steps) is None
