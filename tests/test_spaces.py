"""The lora space: its start, its arithmetic to the bit, its digest, its targets, and what it refuses."""

import json
import math
import weakref
from dataclasses import asdict
from hashlib import blake2b

import numpy as np
import pytest
import torch

from zoray.directions import direction_numpy
from zoray.records import Commit, ConfigError, JournalError, Probe
from zoray.spaces import Lora, from_record

# (out, in); most tensors do not fill a whole number of blocks.
MATRICES = {
    "model.layers.0.self_attn.q_proj": (6, 10),
    "model.layers.0.mlp.up_proj": (11, 10),
    "model.layers.1.self_attn.q_proj": (6, 10),
    "model.layers.1.mlp.gate_up_proj": (9, 7),
}
SPACES = [
    Lora(rank=3, train=train, distribution=distribution)
    for train in ("B", "AB")
    for distribution in ("rademacher", "gaussian")
]
# float32 values of very different sizes, with a zero in between: sums round at every addition.
COMMITS = [
    Commit(0, (0.1, -3.0e-05, 1.7)),
    Commit(1, (0.0, 123.456, 0.0, -9.0e-08), decay=0.999),
    Commit(2, (), decay=0.5),
    Commit(3, (-0.33333334,)),
    Commit(4, tuple(float(np.float32(1 / (k + 3))) for k in range(9)), decay=0.99),
]
each_space = pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.train}-{s.distribution}")


def trained(state) -> dict[str, np.ndarray]:
    """Copies of the trained tensors by name."""
    return {name: state.layout.view(state.flat, name).numpy().copy() for name in state.layout.shapes}


def python_digest(tensors: dict[str, np.ndarray]) -> str:
    """The digest in whole numbers, one element at a time."""
    total = 0
    for name, tensor in tensors.items():
        salt = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") + 2**63
        for position, bits in enumerate(tensor.astype("<f4").reshape(-1).view("<u4").tolist()):
            total += bits * ((position * 0x9E3779B97F4A7C15 + salt) % 2**64 | 1)
    return f"{total % 2**64:016x}"


# the start


@each_space
def test_a_starts_from_its_address_and_b_as_zero(space):
    state = space.open(MATRICES, seed=5)
    assert state.step == 0
    for name, a, b in state.tensors(state.flat):
        out, into = MATRICES[name]
        normal = direction_numpy(5, 2**32 - 1, 0, f"{name}.lora_A", 0, 3 * into, "gaussian").reshape(3, into)
        assert a.numpy().tobytes() == (normal * np.float32(1 / math.sqrt(3 * into))).tobytes()
        assert tuple(b.shape) == (out, 3) and not b.any()
    assert state.numel == sum(3 * out + (3 * into if space.train == "AB" else 0) for out, into in MATRICES.values())


def test_a_has_the_variance_of_pefts_default():
    state = Lora(rank=64).open({"wide": (8, 3000), "narrow": (8, 30)}, seed=0)
    for _, a, _ in state.tensors(state.flat):
        expected = 1 / (3 * a.shape[1])
        assert float(a.double().var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / a.numel()))
        assert abs(float(a.double().mean())) < 4 * math.sqrt(expected / a.numel())


def test_a_does_not_depend_on_what_is_trained_but_on_the_seed():
    def start(space, seed):
        state = space.open(MATRICES, seed)
        return [a.tolist() for _, a, _ in state.tensors(state.flat)]

    expected = start(SPACES[0], 5)
    assert all(start(space, 5) == expected for space in SPACES)
    assert start(SPACES[0], 6) != expected


# the arithmetic


@each_space
def test_apply_equals_numpy_to_the_bit(space):
    """Decay, then for each probe in order: multiply, round, add, round."""
    state = space.open(MATRICES, seed=9)
    expected = trained(state)
    for commit in COMMITS:
        state.apply(commit)
        for name, value in expected.items():
            value *= np.float32(commit.decay)
            for index, coefficient in enumerate(commit.coefficients):
                z = direction_numpy(9, commit.step, index, name, 0, value.size, space.distribution)
                value += z.reshape(value.shape) * np.float32(coefficient)
        assert state.step == commit.step + 1
        found = trained(state)
        assert {name: found[name].tobytes() for name in found} == {k: v.tobytes() for k, v in expected.items()}
    assert len({value.tobytes() for value in found.values()}) == len(found)


def test_the_order_of_probes_matters_to_the_bits():
    """So that the test above would notice another order."""
    forward, backward = (Lora(rank=3, distribution="gaussian").open(MATRICES, seed=9) for _ in range(2))
    commit = Commit(0, COMMITS[4].coefficients)
    forward.apply(commit)
    for index, coefficient in reversed(list(enumerate(commit.coefficients))):
        backward.flat.add_(backward.direction(0, index) * coefficient)
    assert not torch.equal(forward.flat, backward.flat) and torch.allclose(forward.flat, backward.flat, atol=1e-5)
    assert forward.digest() != backward.digest()


@each_space
def test_a_itself_moves_only_when_it_is_trained(space):
    state = space.open(MATRICES, seed=9)
    before = {name: a.clone() for name, a, _ in state.tensors(state.flat)}
    state.apply(COMMITS[0])
    for name, a, b in state.tensors(state.flat):
        assert torch.equal(a, before[name]) == (space.train == "B")
        assert b.any()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_commits_out_of_order_are_refused_and_change_nothing(step):
    state = Lora(rank=3).open(MATRICES, seed=9)
    state.apply(COMMITS[0])
    before = state.digest()
    with pytest.raises(JournalError, match=f"expected the commit of step 1, got step {step}"):
        state.apply(Commit(step, (1.0,)))
    assert (state.step, state.digest()) == (1, before)


@each_space
def test_directions_are_new_every_step_and_the_same_when_asked_again(space):
    state, other = space.open(MATRICES, seed=9), space.open(MATRICES, seed=9)
    first = state.direction(0, 0).clone()
    assert not torch.equal(first, state.direction(0, 1)) and not torch.equal(first, state.direction(1, 0))
    assert torch.equal(first, state.direction(0, 0)) and torch.equal(first, other.direction(0, 0))
    assert not torch.equal(first, space.open(MATRICES, seed=10).direction(0, 0))


def test_only_the_latest_steps_directions_are_kept():
    """A step asks for each at least three times; a long run must not hold them all."""
    state = Lora(rank=3).open(MATRICES, seed=9)
    kept = [weakref.ref(state.direction(0, index)) for index in range(3)]
    assert all(ref() is state.direction(0, index) for index, ref in enumerate(kept))
    state.direction(1, 0)
    assert all(ref() is None for ref in kept)


@each_space
def test_probes_stand_around_the_state(space):
    state = space.open(MATRICES, seed=9)
    assert torch.equal(state.perturbed(Probe(0, 0, 0.0)), state.flat)
    state.apply(COMMITS[0])
    before = state.flat.clone()
    plus, minus = state.perturbed(Probe(1, 0, 0.25)), state.perturbed(Probe(1, 0, -0.25))
    z = state.direction(1, 0)
    assert torch.equal(plus, before + z * 0.25) and torch.equal(minus, before - z * 0.25)
    assert torch.allclose(plus - before, before - minus, atol=1e-6) and not torch.equal(plus, minus)
    assert torch.equal(state.perturbed(Probe(1, 3, 0.0)), before)
    assert torch.equal(state.flat, before)  # asking changes nothing
    for name, a, b in state.tensors(plus):
        moved = {"lora_A": a, "lora_B": b} if space.train == "AB" else {"lora_B": b}
        for role, tensor in moved.items():
            expected = direction_numpy(9, 1, 0, f"{name}.{role}", 0, tensor.numel(), space.distribution)
            centre = state.layout.view(before, f"{name}.{role}")
            assert torch.equal(tensor, centre + torch.from_numpy(expected).view(tensor.shape) * 0.25)


# the digest


@each_space
def test_digest_equals_whole_number_arithmetic(space):
    state = space.open(MATRICES, seed=9)
    assert state.digest() == python_digest(trained(state))
    for commit in COMMITS:
        state.apply(commit)
        assert state.digest() == python_digest(trained(state))


def test_digest_is_pinned():
    state = Lora(rank=3, train="AB", distribution="gaussian").open(MATRICES, seed=9)
    for commit in COMMITS:
        state.apply(commit)
    assert state.digest() == "2d6a5a375a956196"


def test_equal_states_have_equal_digests():
    a, b = (Lora(rank=3, train="AB").open(MATRICES, seed=9) for _ in range(2))
    for commit in COMMITS:
        assert a.digest() == b.digest()
        a.apply(commit)
        assert a.digest() != b.digest()
        b.apply(commit)
    assert a.digest() == b.digest()


def test_any_single_element_changes_the_digest():
    """The smallest change there is: the last bit of one number. And two equal numbers that change places."""
    state = Lora(rank=2, train="AB").open({"one": (3, 4), "two": (3, 4)}, seed=9)
    state.apply(COMMITS[0])
    before, seen = state.digest(), set()
    for name in state.layout.shapes:
        view = state.layout.view(state.flat, name).flatten().view(torch.int32)
        for position in range(len(view)):
            view[position] ^= 1
            seen.add(state.digest())
            view[position] ^= 1
    assert before not in seen and len(seen) == state.numel
    assert state.digest() == before
    one, two = (state.layout.view(state.flat, f"{name}.lora_A") for name in ("one", "two"))
    one[0, 0], two[0, 0] = 1.0, 2.0
    there = state.digest()
    one[0, 0], two[0, 0] = 2.0, 1.0
    assert state.digest() != there


def test_digest_does_not_depend_on_padding():
    state = Lora(rank=3).open(MATRICES, seed=9)
    state.apply(COMMITS[0])
    before = state.digest()
    used = torch.zeros(state.layout.size, dtype=torch.bool)
    for name in state.layout.shapes:
        state.layout.view(used, name).fill_(True)
    assert not used.all()
    state.flat[~used] = 7.0
    assert state.digest() == before


# the config


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [0, 1, 2, 3]),
        (["q_proj"], [0, 2]),
        ("q_proj", [0, 2]),
        (["up_proj"], [1]),  # whole parts of a name: not gate_up_proj
        (["mlp.gate_up_proj", "q_proj"], [0, 2, 3]),  # in the model's order
        (["model.layers.1.self_attn.q_proj"], [2]),
        (["layers.0.mlp.up_proj", "up_proj"], [1]),
    ],
)
def test_targets_are_the_last_parts_of_names(targets, expected):
    chosen = [list(MATRICES)[i] for i in expected]
    space = Lora(rank=2, targets=targets)
    assert list(space.select(MATRICES).items()) == [(name, MATRICES[name]) for name in chosen]
    assert list(space.open(MATRICES, 0).matrices) == chosen


def test_unknown_targets_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"ends in v_proj, proj; it has gate_up_proj, q_proj, up_proj, or use all-l"):
        Lora(targets=("q_proj", "v_proj", "proj")).select(MATRICES)


def test_a_matrix_keeps_its_direction_when_others_join():
    few, all_of_them = Lora(rank=3, targets=("up_proj",)).open(MATRICES, 1), Lora(rank=3).open(MATRICES, 1)
    name = "model.layers.0.mlp.up_proj.lora_B"
    a, b = (state.layout.view(state.direction(4, 2), name) for state in (few, all_of_them))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"rank": 0}, r"expected space\.rank to be a whole number from 1 to 512 .*; got 0"),
        ({"rank": 513}, "got 513"),
        ({"rank": 8.0}, "got 8.0"),
        ({"rank": "8"}, "got '8'"),
        ({"alpha": 0}, r"expected space\.alpha to be a positive number; got 0"),
        ({"alpha": -1.0}, "got -1.0"),
        ({"alpha": "16"}, "got '16'"),
        ({"alpha": math.nan}, "got nan"),
        ({"alpha": math.inf}, "got inf"),
        ({"train": "A"}, r"expected space\.train to be B or AB; got 'A'"),
        ({"train": None}, "got None"),
        ({"distribution": "normal"}, "expected distribution to be rademacher or gaussian; got 'normal'"),
        ({"targets": ()}, r"expected space\.targets to be all-linear or a list of module names; got \(\)"),
        ({"targets": ""}, "got ''"),
    ],
)
def test_bad_parameters_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Lora(**kwargs)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ConfigError, match=rf"expected run\.seed to fit 32 bits; got {seed}"):
        Lora().open(MATRICES, seed)


def test_scaling_is_alpha_over_rank():
    assert Lora(rank=4, alpha=6.0).scaling == 1.5


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
def test_a_space_comes_back_from_its_record(targets):
    space = Lora(rank=5, alpha=2.5, targets=targets, train="AB", distribution="gaussian")
    record = json.loads(json.dumps({"name": "Lora", **asdict(space)}))
    assert from_record(record) == space
    assert from_record({"name": "Lora"}) == Lora()


def test_a_record_of_an_unknown_space_is_refused():
    with pytest.raises(JournalError, match=r"expected a space that this version knows \(Lora\); got 'os.system'"):
        from_record({"name": "os.system", "rank": 1})
