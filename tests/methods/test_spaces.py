"""The lora space: its start, its arithmetic to the bit, its digest, its targets, and what it refuses."""

import json
import math
import re
import weakref
from dataclasses import asdict, fields, replace
from hashlib import blake2b

import numpy as np
import pytest
import torch

from zoray.methods import directions
from zoray.methods.directions import direction_numpy
from zoray.methods.spaces import Lora, LowRank, Lozo, from_record
from zoray.methods.spaces.base import fill, is_b
from zoray.records import Commit, ConfigError, JournalError, Probe

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
# Everything that a commit can do, alone and together; step 3 leaves the momentum aside, step 4 moves by it alone.
FULL_COMMITS = [
    Commit(0, (0.1, -3.0e-05, 1.7), anchor=0.9),
    Commit(1, (0.0, 12.5), decay=0.75, anchor=0.97, momentum=0.9, rate=-0.3),
    Commit(2, (-0.25, 0.0, 7.0e-06), momentum=0.9, rate=-0.2),
    Commit(3, (1.0, 2.0), decay=0.999),
    Commit(4, (), momentum=0.5, rate=0.1),
    Commit(5, (0.0, 0.3), decay=0.99, anchor=0.33333334, momentum=0.95, rate=-0.01),
    Commit(6, (), anchor=0.5),
]
each_space = pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.train}-{s.distribution}")


def trained(state) -> dict[str, np.ndarray]:
    """Copies of the trained tensors by name."""
    return {name: state.layout.view(state.flat, name).numpy().copy() for name in state.layout.shapes}


def momentum(state) -> dict[str, np.ndarray]:
    """Copies of the momentum's tensors by name; none where there is no momentum."""
    if state.momentum is None:
        return {}
    return {name: state.layout.view(state.momentum, name).numpy().copy() for name in state.layout.shapes}


def numpy_apply(commit: Commit, x: np.ndarray, x0: np.ndarray, m: np.ndarray, z: list[np.ndarray]) -> None:
    """The formula of records.Commit on one tensor, in place; every product and every sum is rounded to float32."""
    x *= np.float32(commit.decay)
    if commit.anchor != 1:  # x0 + (x - x0) may differ from x in the last bit
        x -= x0
        x *= np.float32(commit.anchor)
        x += x0
    target = x
    if commit.momentum is not None:
        target = m
        m *= np.float32(commit.momentum)
    for index, coefficient in enumerate(commit.coefficients):
        target += z[index] * np.float32(coefficient)
    if commit.momentum is not None:
        x += m * np.float32(commit.rate)


def bits(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


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


def test_a_of_an_embedding_takes_the_hidden_size_for_its_inputs():
    """Only one of its inputs is not zero, so the vocabulary says nothing of the size of A x."""
    matrices = {"model.embed_tokens": (64, 5000), "lm_head": (5000, 64), "embed.proj": (64, 5000)}
    spread = {name: float(a.std()) for name, a, _ in Lora(rank=8).open(matrices, 0).tensors(torch.zeros(10**6))}
    small, usual = 1 / math.sqrt(3 * 5000), 1 / math.sqrt(3 * 64)
    assert spread == pytest.approx({"model.embed_tokens": usual, "lm_head": usual, "embed.proj": small}, rel=0.1)


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


@each_space
def test_apply_with_anchor_and_momentum_equals_numpy_to_the_bit(space):
    state = space.open(MATRICES, seed=9)
    x, start = trained(state), trained(state)
    m = {name: np.zeros_like(value) for name, value in x.items()}
    for commit in FULL_COMMITS:
        state.apply(commit)
        for name, value in x.items():
            flat = [
                direction_numpy(9, commit.step, index, name, 0, value.size, space.distribution)
                for index in range(len(commit.coefficients))
            ]
            numpy_apply(commit, value, start[name], m[name], [z.reshape(value.shape) for z in flat])
        assert bits(trained(state)) == bits(x)
        assert bits(momentum(state)) == (bits(m) if commit.step else {})
        assert state.digest() == python_digest(x | {f"{name}.momentum": v for name, v in m.items() if commit.step})


@pytest.mark.parametrize("change", [{"decay": 1.0}, {"anchor": 1.0}, {"momentum": 0.91}, {"rate": -0.31}])
@each_space
def test_every_number_of_a_commit_counts(space, change):
    """So that the test above would notice one that is ignored."""
    state, other = (space.open(MATRICES, seed=9) for _ in range(2))
    for commit in FULL_COMMITS[:3]:
        state.apply(commit)
        other.apply(replace(commit, **change) if commit.step else commit)
    assert not torch.equal(state.flat, other.flat)


@each_space
def test_an_anchor_of_zero_is_the_way_back_to_the_start(space):
    state, start = space.open(MATRICES, seed=9), space.open(MATRICES, seed=9)
    for commit in FULL_COMMITS[:3]:
        state.apply(commit)
    assert state.flat.any() and not torch.equal(state.flat, start.flat)
    state.apply(Commit(3, (), anchor=0.0))
    assert torch.equal(state.flat, start.flat)
    assert torch.equal(state.initial(), start.flat)


@each_space
def test_an_anchor_pulls_b_towards_zero_and_a_towards_its_start(space):
    """A half is exact in float32, so B halves to the bit; decay takes A towards zero as well, the anchor does not."""
    anchored, decayed = (space.open(MATRICES, seed=9) for _ in range(2))
    start = {name: a.clone() for name, a, _ in anchored.tensors(anchored.flat)}
    for state in (anchored, decayed):
        state.apply(COMMITS[0])
    before = {name: (a.clone(), b.clone()) for name, a, b in anchored.tensors(anchored.flat)}
    anchored.apply(Commit(1, (), anchor=0.5))
    decayed.apply(Commit(1, (), decay=0.5))
    for name, a, b in anchored.tensors(anchored.flat):
        a_before, b_before = before[name]
        assert torch.equal(b, b_before * 0.5) and b.any()
        if space.train == "AB":
            assert torch.allclose(a, (a_before.double() + start[name].double()).float() / 2, rtol=0, atol=1e-6)
            assert not torch.equal(a, a_before * 0.5)
        else:
            assert torch.equal(a, start[name])
    for name, a, b in decayed.tensors(decayed.flat):
        a_before, b_before = before[name]
        assert torch.equal(b, b_before * 0.5) and torch.equal(a, a_before * (0.5 if space.train == "AB" else 1))


@each_space
def test_momentum_is_a_sum_of_all_steps_so_far(space):
    """In float64: x after t steps is the start plus rate * sum over s, t >= s, of beta^(t - s) c z(s)."""
    beta, rate, c, steps = 0.75, -0.125, 0.5, 6
    state = space.open(MATRICES, seed=9)
    expected, m = state.flat.double().clone(), torch.zeros_like(state.flat).double()
    for step in range(steps):
        m = beta * m + c * state.direction(step, 0).double()
        expected += rate * m
        state.apply(Commit(step, (c,), momentum=beta, rate=rate))
    assert torch.allclose(state.flat.double(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(state.momentum.double(), m, rtol=0, atol=1e-6)


@each_space
def test_momentum_is_kept_only_where_it_is_asked_for(space):
    plain, other = (space.open(MATRICES, seed=9) for _ in range(2))
    plain.apply(COMMITS[0])
    other.apply(replace(COMMITS[0], momentum=0.0, rate=1.0))  # B is zero at first: m = z sums, x = x0 + m
    assert plain.momentum is None and other.momentum is not None
    for name, b in trained(plain).items():
        if name.endswith("lora_B"):
            assert b.tobytes() == trained(other)[name].tobytes() == momentum(other)[name].tobytes()
    kept = other.momentum.clone()
    other.apply(Commit(1, (0.5,)))  # a commit without momentum leaves the buffer as it is
    assert torch.equal(other.momentum, kept)


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


@each_space
def test_any_single_element_of_the_momentum_changes_the_digest(space):
    """Also where the numbers themselves are equal, and where momentum and numbers change places."""
    state = space.open({"one": (3, 4), "two": (2, 3)}, seed=9)
    state.apply(Commit(0, (0.5,)))
    before = state.digest()
    state.momentum = torch.zeros_like(state.flat)
    assert state.digest() == before  # of zeros: a buffer that was never used and none are the same state
    state.momentum = state.flat * 0.5
    seen = {before, state.digest()}
    for name in state.layout.shapes:
        view = state.layout.view(state.momentum, name).flatten().view(torch.int32)
        for position in range(len(view)):
            view[position] ^= 1
            seen.add(state.digest())
            view[position] ^= 1
    assert len(seen) == state.numel + 2
    there = state.digest()
    kept = state.flat.clone()
    state.flat.copy_(state.momentum)
    state.momentum = kept
    assert state.digest() != there


def test_digest_with_momentum_is_pinned():
    state = Lora(rank=3, train="AB", distribution="gaussian").open(MATRICES, seed=9)
    for commit in FULL_COMMITS:
        state.apply(commit)
    assert state.digest() == "d9106d5711983129"


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
    state.apply(replace(COMMITS[1], momentum=0.5, rate=0.5))
    before = state.digest()
    state.momentum[~used] = 7.0
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
        (["layers.0.*"], [0, 1]),
        ("layers.0.*", [0, 1]),
        (["model.layers.1.*"], [2, 3]),
        (["layers.?.mlp.*"], [1, 3]),
        (["layers.[12].self_attn.q_proj"], [2]),
        (["layers.[!0].*"], [2, 3]),
        (["*up_proj"], [1, 3]),  # here gate_up_proj as well
        (["mlp.*", "layers.0.self_attn.*"], [0, 1, 3]),
        (["*"], [0, 1, 2, 3]),
        (["all-linear"], [0, 1, 2, 3]),
        (["up_proj", "all-linear"], [0, 1, 2, 3]),
    ],
)
def test_targets_are_the_last_parts_of_names(targets, expected):
    chosen = [list(MATRICES)[i] for i in expected]
    space = Lora(rank=2, targets=targets)
    assert list(space.select(MATRICES).items()) == [(name, MATRICES[name]) for name in chosen]
    assert list(space.open(MATRICES, 0).matrices) == chosen


def test_a_glob_of_layer_1_does_not_take_layer_10():
    matrices = {f"model.layers.{i}.q_proj": (4, 4) for i in range(25)}

    def layers(*targets):
        return [int(name.split(".")[2]) for name in Lora(targets=targets).select(matrices)]

    assert layers("layers.1.*") == [1]
    assert layers("layers.1?.*") == layers("layers.1[0-9].q_proj") == list(range(10, 20))
    assert layers("layers.1*.q_proj") == [1, *range(10, 20)]
    assert layers("layers.2[0-2].*", "layers.0.q_proj") == [0, 20, 21, 22]


def test_unknown_targets_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"ends in v_proj, proj; it has gate_up_proj, q_proj, up_proj, or use all-l"):
        Lora(targets=("q_proj", "v_proj", "proj")).select(MATRICES)


@pytest.mark.parametrize("target", ["layers.2.*", "layers.0", "ayers.0.*", "Q_PROJ", "layers.0.*.k_proj", "00*"])
def test_unknown_globs_are_named_and_nothing_is_opened(target):
    says = f"space.targets: no linear layer of this model ends in {target}; it has gate_up_proj, q_proj, up_proj, or"
    with pytest.raises(ConfigError, match=re.escape(says)):
        Lora(targets=("q_proj", target)).open(MATRICES, 0)


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


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj"), ("layers.0.*",)])
@pytest.mark.parametrize(
    "space",
    [
        Lora(rank=5, alpha=2.5, train="AB", distribution="gaussian"),
        Lozo(rank=3, interval=7, distribution="rademacher", fold_rounding="stochastic", keep_base=True),
        LowRank(rank=6, distribution="rademacher", fold_rounding="stochastic", keep_base=True),
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_space_comes_back_from_its_record(space, targets):
    kind, space = type(space), replace(space, targets=targets)
    assert all(getattr(space, field.name) != field.default for field in fields(space) if field.name != "targets")
    found = from_record(json.loads(json.dumps({"name": kind.__name__, **asdict(space)})))
    assert type(found) is kind and found == space
    assert from_record({"name": kind.__name__}) == kind()


@pytest.mark.parametrize(
    ("record", "got"),
    [
        ({"name": "os.system", "rank": 1}, "'os.system' with ['rank']"),
        ({"name": "lora"}, "'lora' with []"),
        ({"name": "Lora", "interval": 50, "rank": 1}, "'Lora' with ['interval', 'rank']"),
        ({"name": "LowRank", "alpha": 16.0}, "'LowRank' with ['alpha']"),
        ({"name": "Lozo", "scale": 1.0}, "'Lozo' with ['scale']"),
    ],
)
def test_a_record_of_an_unknown_space_or_field_is_refused(record, got):
    says = f"expected a space that this version knows (Lora, Lozo, LowRank); got {got}"
    with pytest.raises(JournalError, match=re.escape(says)):
        from_record(record)


@pytest.mark.parametrize("record", [{"name": "Lora", "folds": True}, {"name": "Lozo", "scaling": 2.0}])
def test_a_record_cannot_set_a_constant_of_its_class(record):
    with pytest.raises(JournalError, match="expected a space that this version knows"):
        from_record(record)


def test_a_record_with_a_bad_value_is_refused_as_a_config_is():
    with pytest.raises(ConfigError, match=r"expected space\.rank to be .*; got 0"):
        from_record({"name": "Lora", "rank": 0})


def test_only_lora_leaves_the_base_weights_alone():
    assert [space.folds for space in (Lora(), Lozo(), LowRank())] == [False, True, True]
    state = Lora(rank=2).open(MATRICES, 0, weights={})  # weights that it does not need are no mistake
    assert state.digest() == Lora(rank=2).open(MATRICES, 0).digest()


@pytest.mark.parametrize(
    "space",
    [
        *(Lora(rank=3, train=train, distribution="gaussian") for train in ("B", "AB")),
        *(Lozo(rank=2, interval=2), LowRank(rank=1), LowRank(rank=4, distribution="rademacher")),
    ],
    ids=str,
)
def test_factors_of_many_probes_are_those_of_each(space):
    """To the bit; whatever the state has been through."""
    weights = {name: torch.full(shape, 0.5) for name, shape in MATRICES.items()}
    state = space.open(MATRICES, 5, weights=weights)
    for step in range(3):
        state.apply(Commit(step, (0.3, -0.1)))
    probes = [Probe(3, index, scale) for index, scale in ((0, 0.1), (0, -0.1), (2, 0.3), (1, 0.0))]
    single = [list(state.factors(probe)) for probe in probes]
    assert all([name for name, _, _ in factors] == list(MATRICES) for factors in single)
    moved = set()
    for part in state.moving():
        layout = part.z.layout
        fill(part, probes, flats := torch.empty(len(probes), layout.size))
        for name, shape in layout.shapes.items():
            moved.add((matrix := name.rpartition(".")[0], is_b(name)))
            fill(part, probes, alone := torch.empty(len(probes), *shape), name)
            for k, factors in enumerate(single):
                _, a, b = factors[list(MATRICES).index(matrix)]
                assert torch.equal(layout.views(flats, name)[k], b if is_b(name) else a)
                assert torch.equal(alone[k], b if is_b(name) else a)
    assert {matrix for matrix, of_b in moved if of_b} == set(MATRICES)
    for i, matrix in enumerate(MATRICES):  # what does not move is the same for all
        assert (matrix, False) in moved or all(torch.equal(factors[i][1], single[0][i][1]) for factors in single)


LONG = [  # enough for several passes, with commits in between that can't wait
    *(Commit(step, (0.01 * (step % 7) - 0.02, 1e-4 * step), decay=1 - 1e-4 * step) for step in range(50)),
    Commit(50, (0.3,), anchor=0.9),
    *(Commit(step, tuple(float(np.float32(1 / (step + k))) for k in range(3))) for step in range(51, 70)),
    Commit(70, (0.0, 0.0), decay=0.5),
    Commit(71, (0.2,), momentum=0.9, rate=-0.2),
    *(Commit(step, (0.0, -0.1), decay=0.99) for step in range(72, 110)),
]
LONG_SPACES = [
    *SPACES,
    *(replace(lozo, interval=40) for lozo in (Lozo(rank=2), Lozo(rank=2, distribution="rademacher"))),
]


def opened(space):
    random = torch.Generator().manual_seed(0)
    return space.open(MATRICES, 5, "cpu", {n: torch.randn(shape, generator=random) for n, shape in MATRICES.items()})


@pytest.mark.parametrize("loops", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("space", LONG_SPACES, ids=str)
def test_a_long_journal_played_back_at_once_gives_the_bits_of_each_step(space, loops, monkeypatch):
    space = replace(space, keep_base=True) if isinstance(space, Lozo) else space
    compiled = dict(directions._compiled)
    monkeypatch.setattr(directions, "_compiled", {})
    looked, waited = opened(space), opened(space)
    for commit in LONG:
        looked.apply(commit)
        looked.digest()
    if loops:
        monkeypatch.setattr(directions, "_compiled", compiled)
        assert directions.compile_directions(space.distribution)
    passes, move = [], directions.Layout.move
    monkeypatch.setattr(directions.Layout, "move", lambda *a: passes.append(move(*a)) or passes[-1])
    for commit in LONG:
        waited.apply(commit)
    assert waited.digest() == looked.digest() and torch.equal(waited.flat, looked.flat)
    together = loops and space.distribution == "rademacher"
    assert sum(passes) == ((144 if isinstance(space, Lozo) else 160) if together else 0)
