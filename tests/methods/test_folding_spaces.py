"""The lozo and lowrank spaces: what a commit does to the base weights, to the bit and in float64, and what they refuse.

Rounding to 16 bits is fold.write_rounded's, which test_fold.py holds against NumPy; here it is only asked for by its
address.
"""

import math
import re
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pytest
import torch

from zoray.methods.directions import direction_numpy
from zoray.methods.spaces import LowRank, Lozo, fold
from zoray.records import Commit, ConfigError, JournalError, Probe

SEED = 9
# (out, in); most factors do not fill a whole number of blocks.
MATRICES = {
    "model.layers.0.self_attn.q_proj": (6, 10),
    "model.layers.0.mlp.up_proj": (11, 10),
    "model.layers.1.mlp.down_proj": (9, 7),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_rounding = pytest.mark.parametrize(  # stochastic rounding is of 16 bits
    ("dtype", "rounding"),
    [(dtype, "nearest") for dtype in DTYPES] + [(dtype, "stochastic") for dtype in DTYPES if dtype.itemsize == 2],
    ids=str,
)
each_distribution = pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
each_kind = pytest.mark.parametrize("kind", [Lozo, LowRank])

# Everything that a commit can do, in float32 values that make every product and sum round; step 4 is without momentum.
THIRD = float(np.float32(1 / 3))
COMMITS = [
    Commit(0, (0.1, -3.0e-05, 1.7)),
    Commit(1, (0.0, 0.7), decay=0.75, anchor=0.9, momentum=0.9, rate=-0.3),
    Commit(2, (-0.25, 0.0, 7.0e-06), anchor=THIRD, momentum=0.9, rate=-0.2),
    Commit(3, (), decay=0.999, momentum=0.5, rate=0.1),
    Commit(4, (THIRD, -0.1), decay=0.99),
    Commit(5, (0.0, 0.3), momentum=0.95, rate=-0.01),
    Commit(6, (-0.5,), anchor=0.97, momentum=0.95, rate=-0.02),
    Commit(7, (0.01, 0.02, 0.03, 0.04), decay=0.9),
]
PLAIN_COMMITS = [replace(commit, momentum=None, rate=1.0) for commit in COMMITS]


def base(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(0)
    return {name: torch.from_numpy(random.standard_normal(shape)).to(dtype) for name, shape in MATRICES.items()}


def clones(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def bits(tensor: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def effective(state, probe: Probe | None = None) -> dict[str, np.ndarray]:
    """W + scaling * B A in float64, of the state itself or under a probe."""
    factors = state.factors(probe or Probe(state.step, 0, 0.0))
    return {
        name: state.weights[name].double().numpy() + state.space.scaling * (b.double() @ a.double()).numpy()
        for name, a, b in factors
    }


def draw(space, step: int, index: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    return _drawn(space.distribution, step, index, name, shape)


@lru_cache(maxsize=4096)  # many tests ask for the same ones
def _drawn(distribution: str, step: int, index: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    values = direction_numpy(SEED, step, index, name, 0, math.prod(shape), distribution).reshape(shape)
    values.flags.writeable = False
    return values


def python_digest(tensors: dict[str, torch.Tensor]) -> str:
    """The digest in whole numbers, one element at a time."""
    total = 0
    for name, tensor in tensors.items():
        salt = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") + 2**63
        for position, word in enumerate(np.frombuffer(bits(tensor), f"<u{tensor.element_size()}").tolist()):
            total += word * ((position * 0x9E3779B97F4A7C15 + salt) % 2**64 | 1)
    return f"{total % 2**64:016x}"


# references in NumPy: every product and every sum is rounded to float32 (float64 where the weights are), in order


def product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    total = b[:, 0][:, None] * a[0][None, :]
    for j in range(1, b.shape[1]):
        total += b[:, j][:, None] * a[j][None, :]
    return total


def overlap(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """V_old^T V_new / n in whole multiples of 2**-42."""
    whole = [np.rint(v.astype(np.float64) * 2**21).astype(np.int64) for v in (old, new)]
    return (whole[0] @ whole[1].T / (2.0**42 * old.shape[1])).astype(np.float32)


class Weight:
    """One base weight with its copy."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.kind = weight.clone(), np.float64 if weight.dtype == torch.float64 else np.float32
        self.base = self.numbers()

    def numbers(self) -> np.ndarray:
        return self.weight.to(torch.float64).numpy().astype(self.kind)

    def fold(
        self, gains: list[np.ndarray], owed: list[tuple[float, float]], rounding: str, step: int, name: str
    ) -> None:
        """`owed`: (decay, anchor) of each step; those of one kind are taken in one go."""
        decays, anchors = zip(*owed, strict=True)
        if set(decays) == {1.0} or set(anchors) == {1.0}:
            owed = [(math.prod(decays), math.prod(anchors))]
        exact = self.numbers()
        for decay, anchor in owed:
            exact *= self.kind(decay)
            if anchor != 1:
                exact -= self.base
                exact *= self.kind(anchor)
                exact += self.base
        for gain in gains:
            exact += gain
        fold.write_rounded(self.weight, torch.from_numpy(exact), rounding, SEED, step, name)


class LozoReference:
    """The lozo space on one matrix."""

    def __init__(self, space: Lozo, name: str, weight: torch.Tensor) -> None:
        self.space, self.name, self.step, self.w = space, name, 0, Weight(weight)
        self.out, self.into = weight.shape
        self.b = np.zeros((self.out, space.rank), np.float32)
        self.momentum: np.ndarray | None = None
        self.owed: list[tuple[float, float]] = []

    def v(self, step: int) -> np.ndarray:
        first = step // self.space.interval * self.space.interval
        return draw(self.space, first, 0, f"{self.name}.lozo_V", (self.space.rank, self.into))

    def apply(self, commit: Commit) -> None:
        self.b *= np.float32(commit.decay)
        self.b *= np.float32(commit.anchor)
        target = self.b
        if commit.momentum is not None:
            self.momentum = np.zeros_like(self.b) if self.momentum is None else self.momentum
            self.momentum *= np.float32(commit.momentum)
            target = self.momentum
        for index, coefficient in enumerate(commit.coefficients):
            target += draw(self.space, self.step, index, f"{self.name}.lozo_U", self.b.shape) * np.float32(coefficient)
        if commit.momentum is not None:
            self.b += self.momentum * np.float32(commit.rate)
        self.owed.append((commit.decay, commit.anchor))
        self.step += 1
        if self.step % self.space.interval == 0:
            old, new = self.v(self.step - 1), self.v(self.step)
            gain = product(self.b, old)
            self.w.fold([gain], self.owed, self.space.fold_rounding, self.step - 1, self.name)
            if self.momentum is not None:
                self.momentum = product(self.momentum, overlap(old, new))
            self.b[:] = 0
            self.owed.clear()


class LowRankReference:
    """The lowrank space on one matrix."""

    def __init__(self, space: LowRank, name: str, weight: torch.Tensor) -> None:
        self.space, self.name, self.step, self.w = space, name, 0, Weight(weight)
        self.out, self.into = weight.shape

    def apply(self, commit: Commit) -> None:
        gains = []
        for index, coefficient in enumerate(commit.coefficients):
            if coefficient:
                u = draw(self.space, self.step, index, f"{self.name}.lowrank_U", (self.out, self.space.rank))
                v = draw(self.space, self.step, index, f"{self.name}.lowrank_V", (self.space.rank, self.into))
                gains.append(product(u, v) * np.float32(coefficient / math.sqrt(self.space.rank)))
        self.w.fold(gains, [(commit.decay, commit.anchor)], self.space.fold_rounding, self.step, self.name)
        self.step += 1


# lozo: the arithmetic


@pytest.mark.parametrize(
    ("rank", "interval", "distribution"),
    [(1, 3, "gaussian"), (3, 3, "gaussian"), (3, 2, "rademacher"), (2, 1, "gaussian"), (2, 100, "rademacher")],
)
@each_rounding
def test_lozo_equals_numpy_to_the_bit(dtype, distribution, rank, interval, rounding):
    space = Lozo(rank, interval, distribution=distribution, fold_rounding=rounding, keep_base=True)
    weights = base(dtype)
    state = space.open(MATRICES, SEED, weights=weights)
    references = {name: LozoReference(space, name, weight) for name, weight in weights.items()}
    for commit in COMMITS:
        state.apply(commit)
        for reference in references.values():
            reference.apply(commit)
        assert state.step == commit.step + 1
        parts = {}
        for name, a, b in state.tensors(state.flat):
            expected = references[name]
            assert bits(weights[name]) == bits(expected.w.weight)
            assert bits(b) == bits(expected.b) and bits(a) == bits(expected.v(state.step))
            parts |= {f"{name}.weight": weights[name], f"{name}.lozo_U": b}
            if commit.step:
                momentum = state.layout.view(state.momentum, f"{name}.lozo_U")
                assert bits(momentum) == bits(expected.momentum)
                parts[f"{name}.lozo_U.momentum"] = momentum
            else:
                assert state.momentum is None
        assert state.digest() == python_digest(parts)
    moved = [not torch.equal(weights[name], before) for name, before in base(dtype).items()]
    assert moved == [interval <= len(COMMITS)] * len(MATRICES)


@pytest.mark.parametrize("interval", [1, 3, 4])
@each_dtype
def test_lozo_is_a_sum_over_intervals(dtype, interval):
    """Against explicit matrices in float64: W + sum over intervals of (sum over its steps of c U) V^T."""
    space = Lozo(rank=2, interval=interval)
    weights, start = base(dtype), base(dtype)
    state = space.open(MATRICES, SEED, weights=weights)
    gained = {name: np.zeros(shape) for name, shape in MATRICES.items()}
    for step in range(9):
        coefficients = (0.3, -0.2 / (step + 1))
        state.apply(Commit(step, coefficients))
        for name, (out, into) in MATRICES.items():
            v = draw(space, step - step % interval, 0, f"{name}.lozo_V", (2, into)).astype(np.float64)
            for index, coefficient in enumerate(coefficients):
                gained[name] += coefficient * draw(space, step, index, f"{name}.lozo_U", (out, 2)) @ v
        folds = (step + 1) // interval
        for name, found in effective(state).items():
            expected = start[name].double().numpy() + gained[name]
            # half a unit in the last place for every fold, and the sums in float32
            bound = folds * torch.finfo(dtype).eps * np.abs(expected).max() + 3e-6 * np.abs(gained[name]).max()
            assert np.abs(found - expected).max() <= bound
            assert np.abs(gained[name]).max() > 0.3


@pytest.mark.parametrize("interval", [1, 2, 5])
@each_distribution
def test_v_changes_exactly_at_multiples_of_the_interval(distribution, interval):
    space = Lozo(rank=2, interval=interval, distribution=distribution)
    state, before, key = space.open(MATRICES, SEED, weights=base()), None, None
    for step in range(11):
        now = {name: a.clone() for name, a, _ in state.factors(Probe(step, 0, 0.0))}
        for name, a in now.items():
            expected = draw(space, step // interval * interval, 0, f"{name}.lozo_V", (2, MATRICES[name][1]))
            assert bits(a) == bits(expected)
        for probe in (Probe(step, 0, 0.5), Probe(step, 3, -0.5)):
            assert all(torch.equal(a, now[name]) for name, a, _ in state.factors(probe))
            assert state.a_key(probe) == state.a_key(Probe(step, 0, 0.0))
        if before is not None:
            changed = [not torch.equal(a, before[name]) for name, a in now.items()]
            assert changed == [step % interval == 0] * len(MATRICES)
            assert (state.a_key(Probe(step, 0, 0.5)) != key) == (step % interval == 0)
        before, key = now, state.a_key(Probe(step, 0, 0.5))
        state.apply(Commit(step, (0.1,)))


def test_u_is_new_for_every_probe_and_the_same_when_asked_again():
    state = Lozo(rank=2, interval=3).open(MATRICES, SEED, weights=base())
    first = state.direction(0, 0).clone()
    assert not torch.equal(first, state.direction(0, 1)) and not torch.equal(first, state.direction(1, 0))
    assert torch.equal(first, state.direction(0, 0))


@pytest.mark.parametrize(
    "space",
    [
        *(
            Lozo(rank, interval, distribution=d)
            for rank, interval in ((1, 3), (3, 1))
            for d in ("gaussian", "rademacher")
        ),
        *(LowRank(rank, distribution=d) for rank in (1, 3) for d in ("gaussian", "rademacher")),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.rank}-{s.distribution}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_direction_that_is_applied_is_the_one_that_was_probed(space, dtype):
    """On every step, the first and the last of an interval too; for lozo that is where other code takes another V."""
    state = space.open(MATRICES, SEED, weights=base(dtype))
    for step in range(7):
        c = (0.375, 0.0, -1.25)
        before = effective(state)
        units = [effective(state, Probe(step, k, 1.0)) for k in range(3)]
        half = effective(state, Probe(step, 0, -0.5))
        state.apply(Commit(step, c))
        after = effective(state)
        for name, w in before.items():
            directions = [unit[name] - w for unit in units]
            assert all(np.abs(direction).max() > 0.5 for direction in directions)
            assert np.abs(half[name] - w + 0.5 * directions[0]).max() < 1e-5
            expected = sum(coefficient * direction for coefficient, direction in zip(c, directions, strict=True))
            assert np.abs(after[name] - w - expected).max() < 1e-5


@each_distribution
@pytest.mark.parametrize("rank", [1, 3])
def test_momentum_is_projected_when_v_is_redrawn(rank, distribution):
    """N <- N V_old^T V_new / n, in float64, and at no other step."""
    space, beta, c = Lozo(rank, interval=3, distribution=distribution), 0.75, 0.5
    state = space.open(MATRICES, SEED, weights=base())
    expected = {name: np.zeros((out, rank)) for name, (out, _) in MATRICES.items()}
    for step in range(8):
        old = {name: a.double().numpy().copy() for name, a, _ in state.tensors(state.flat)}
        state.apply(Commit(step, (c,), momentum=beta, rate=-0.25))
        new = {name: a.double().numpy() for name, a, _ in state.tensors(state.flat)}
        for name, (out, into) in MATRICES.items():
            plain = beta * expected[name] + c * draw(space, step, 0, f"{name}.lozo_U", (out, rank))
            projected = plain @ (old[name] @ new[name].T / into)
            expected[name] = projected if step % 3 == 2 else plain
            found = state.layout.view(state.momentum, f"{name}.lozo_U").double().numpy()
            assert np.abs(found - expected[name]).max() < 1e-5
            assert step % 3 != 2 or np.abs(projected - plain).max() > 0.05


def test_momentum_carries_over_in_the_full_space():
    """With square V, which spans everything, N V^T itself is nearly kept: that is what the projection is for."""
    matrices, n = {"wide": (4, 64)}, 64
    space = Lozo(rank=n, interval=1)
    state = space.open(matrices, SEED, weights={"wide": torch.zeros(4, n)})
    state.apply(Commit(0, (1.0,), momentum=0.5, rate=1.0))
    old = state.weights["wide"].double().numpy().copy()  # the first step: N V^T
    _, a, _ = next(state.tensors(state.flat))
    now = state.momentum[: 4 * n].view(4, n).double().numpy() @ a.double().numpy()
    cosine = (old * now).sum() / np.linalg.norm(old) / np.linalg.norm(now)
    assert cosine > 0.5  # of two independent ones: 0 +- 1/16


def test_decay_reaches_b_at_once_and_w_at_the_fold():
    """Halves are exact, so all of it is to the bit."""
    weights, start = base(), base()
    state = Lozo(rank=2, interval=3).open(MATRICES, SEED, weights=weights)
    state.apply(Commit(0, (1.0,), decay=0.5))
    b = state.flat.clone()
    state.apply(Commit(1, (), decay=0.5))
    assert torch.equal(state.flat, b * 0.5) and b.any()
    assert all(torch.equal(weights[name], start[name]) for name in MATRICES)
    factors = {name: (b.numpy().copy() * np.float32(0.5), a.numpy().copy()) for name, a, b in state.tensors(state.flat)}
    state.apply(Commit(2, (), decay=0.5))
    for name in MATRICES:
        assert bits(weights[name]) == bits(start[name].numpy() * np.float32(0.125) + product(*factors[name]))
    folded = clones(weights)
    for step in (3, 4, 5):  # what was owed is paid
        state.apply(Commit(step, ()))
        assert all(torch.equal(weights[name], folded[name]) for name in MATRICES)


@pytest.mark.parametrize("change", [{"decay": 0.75}, {"anchor": 0.75}])
@pytest.mark.parametrize("space", [Lozo(2, 3, keep_base=True), Lozo(2, 1, keep_base=True), LowRank(2, keep_base=True)])
def test_decay_and_anchor_act_on_the_effective_weight(space, change):
    """Where all is folded, W is what the formula of records.Commit makes of it in float64."""
    weights = base(torch.float64)
    state = space.open(MATRICES, SEED, weights=weights)
    start = {name: weight.numpy().copy() for name, weight in weights.items()}
    expected = {name: weight.copy() for name, weight in start.items()}
    for step in range(6):
        c, at = 0.5, Commit(step, (0.5,), **change)
        before = effective(state)
        unit = effective(state, Probe(step, 0, 1.0))
        state.apply(at)
        for name, w in expected.items():
            w *= at.decay
            w[:] = start[name] + at.anchor * (w - start[name])
            w += c * (unit[name] - before[name])
        if isinstance(space, LowRank) or (step + 1) % space.interval == 0:
            assert all(np.abs(weights[name].numpy() - w).max() < 1e-5 for name, w in expected.items())
            assert all(np.abs(w - start[name]).max() > 0.3 for name, w in expected.items())


@pytest.mark.parametrize("space", [Lozo(2, 1, keep_base=True), LowRank(2, keep_base=True)])
def test_decay_comes_before_the_anchor(space):
    weights, start = base(torch.float64), base(torch.float64)
    space.open(MATRICES, SEED, weights=weights).apply(Commit(0, (), decay=0.5, anchor=0.25))
    for name, w in start.items():
        assert torch.allclose(weights[name], w + 0.25 * (0.5 * w - w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", [Lozo(2, 3, keep_base=True), LowRank(2, keep_base=True)])
@each_dtype
def test_an_anchor_of_zero_is_the_way_back_to_the_base(space, dtype):
    """To the bit, also in 16 bits: nothing is left of what was folded before, nor of B."""
    weights, start = base(dtype), base(dtype)
    state = space.open(MATRICES, SEED, weights=weights)
    for step in range(4):
        state.apply(Commit(step, (0.5, -1.0)))
    assert not any(torch.equal(weights[name], start[name]) for name in MATRICES)
    state.apply(Commit(4, (), anchor=0.0))
    state.apply(Commit(5, ()))
    assert all(bits(weights[name]) == bits(start[name]) for name in MATRICES)
    assert all(bits(state.base[name]) == bits(start[name]) for name in MATRICES)


@each_kind
def test_a_copy_of_the_base_is_kept_only_where_it_is_asked_for(kind):
    weights = base()
    assert kind().open(MATRICES, SEED, weights=weights).base is None
    kept = kind(keep_base=True).open(MATRICES, SEED, weights=weights).base
    assert all(kept[name].data_ptr() != weights[name].data_ptr() for name in MATRICES)


def numbers(factors) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (b.numpy().copy(), a.numpy().copy()) for name, (b, a) in factors.items()}


def as_bits(factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[bytes, bytes]]:
    return {name: (bits(b), bits(a)) for name, (b, a) in factors.items()}


def test_a_fold_is_seen_before_it_happens():
    """`on_fold` sees the factors that wait; afterwards W has gained their product, and B is zero."""
    weights, seen = base(), []
    state = Lozo(rank=2, interval=3).open(MATRICES, SEED, weights=weights)

    def keep(factors):
        assert all(torch.equal(weights[name], before[name]) for name in MATRICES)
        seen.append(numbers(factors))

    state.on_fold = keep
    for step in range(7):
        before, waiting = clones(weights), numbers(state.pending())
        assert as_bits(waiting) == {name: (bits(b), bits(a)) for name, a, b in state.tensors(state.flat)}
        state.apply(Commit(step, (0.5,) if step % 3 != 2 else ()))  # the last one of an interval leaves B as it is
        assert len(seen) == (step + 1) // 3
        if step % 3 == 2:
            assert as_bits(seen[-1]) == as_bits(waiting) and not state.flat.any()
            for name, (b, a) in waiting.items():
                assert b.any() and bits(weights[name]) == bits(before[name].numpy() + product(b, a))


def test_lozo_arrays_are_copies_of_what_is_not_folded_yet():
    state = Lozo(rank=2, interval=3).open(MATRICES, SEED, weights=base())
    for step in range(4):
        state.apply(Commit(step, (0.5,)))
    arrays, before = state.arrays(), state.digest()
    assert list(arrays) == [f"{name}.{part}" for name in MATRICES for part in ("lora_A", "lora_B")]
    for name, a, b in state.tensors(state.flat):
        assert bits(arrays[f"{name}.lora_A"]) == bits(a) and bits(arrays[f"{name}.lora_B"]) == bits(b) and b.any()
    for array in arrays.values():
        array[:] = 7
    assert state.digest() == before


# lowrank: the arithmetic


@pytest.mark.parametrize(("rank", "distribution"), [(1, "gaussian"), (3, "gaussian"), (3, "rademacher")])
@each_rounding
def test_lowrank_equals_numpy_to_the_bit(dtype, distribution, rank, rounding):
    space = LowRank(rank, distribution=distribution, fold_rounding=rounding, keep_base=True)
    weights = base(dtype)
    state = space.open(MATRICES, SEED, weights=weights)
    references = {name: LowRankReference(space, name, weight) for name, weight in weights.items()}
    for commit in PLAIN_COMMITS:
        state.apply(commit)
        assert state.step == commit.step + 1 and state.pending() == {}
        for name, reference in references.items():
            reference.apply(commit)
            assert bits(weights[name]) == bits(reference.w.weight)
        assert state.digest() == python_digest({f"{name}.weight": weights[name] for name in MATRICES})


@pytest.mark.parametrize("rank", [1, 3])
@each_distribution
def test_lowrank_is_a_sum_over_all_directions(rank, distribution):
    """Against explicit matrices in float64: W + sum of c U V^T / sqrt(rank), folded at every step."""
    space = LowRank(rank, distribution=distribution)
    weights, expected = base(), {name: weight.double().numpy() for name, weight in base().items()}
    state = space.open(MATRICES, SEED, weights=weights)
    for step in range(6):
        coefficients = (0.3, 0.0, -0.2 / (step + 1))
        before = clones(weights)
        state.apply(Commit(step, coefficients))
        for name, (out, into) in MATRICES.items():
            for index, coefficient in enumerate(coefficients):
                u = draw(space, step, index, f"{name}.lowrank_U", (out, rank)).astype(np.float64)
                v = draw(space, step, index, f"{name}.lowrank_V", (rank, into)).astype(np.float64)
                expected[name] += coefficient / math.sqrt(rank) * u @ v
            assert not torch.equal(weights[name], before[name])
            assert np.abs(weights[name].numpy() - expected[name]).max() < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 64, 512])
@each_distribution
def test_the_elements_of_a_direction_have_variance_1(rank, distribution):
    """At any rank; the mean square of U V^T / sqrt(r) has a standard error from the rows of U and V."""
    out, into = 300, 400
    space = LowRank(rank, distribution=distribution)
    state = space.open({"w": (out, into)}, SEED, weights={"w": torch.zeros(out, into)})
    z = effective(state, Probe(0, 0, 1.0))["w"]
    error = math.sqrt((2 / out + 2 / into) / rank + 2 / out / into)
    assert (z**2).mean() == pytest.approx(1, abs=4 * error)
    assert abs(z.mean()) < 4 * math.sqrt(1 / out / into)
    if rank == 1 and distribution == "rademacher":
        assert set(np.unique(z)) == {-1.0, 1.0}
    if rank == 512:  # a sum of many products: nearly normal
        assert (z**4).mean() == pytest.approx(3, abs=0.2)


def test_lozo_has_variance_rank():
    """1 / rank is left to the learning rate, as the published learning rates have it."""
    out, into, rank = 300, 400, 4
    state = Lozo(rank).open({"w": (out, into)}, SEED, weights={"w": torch.zeros(out, into)})
    z = effective(state, Probe(0, 0, 1.0))["w"]
    assert (z**2).mean() == pytest.approx(rank, rel=4 * math.sqrt((2 / out + 2 / into) / rank + 2 / out / into))


def test_lowrank_draws_u_and_v_for_every_probe():
    state = LowRank(rank=2).open(MATRICES, SEED, weights=base())
    name, seen = next(iter(MATRICES)), {}
    for step, index in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        _, a, b = next(state.factors(Probe(step, index, 1.0)))
        _, minus_a, minus_b = next(state.factors(Probe(step, index, -0.5)))
        assert torch.equal(minus_a, a) and torch.equal(minus_b, b * -0.5)
        assert state.a_key(Probe(step, index, 1.0)) == state.a_key(Probe(step, index, -0.5))
        assert bits(a) == bits(draw(state.space, step, index, f"{name}.lowrank_V", (2, 10)))
        assert bits(b) == bits(draw(state.space, step, index, f"{name}.lowrank_U", (6, 2)))
        seen[bits(a)] = seen[bits(b)] = state.a_key(Probe(step, index, 1.0))
    assert len(seen) == 8 and len(set(seen.values())) == 4
    assert not any(b.any() for _, _, b in state.factors(Probe(1, 0, 0.0)))  # the centre


@each_dtype
def test_a_commit_that_says_nothing_changes_no_bit(dtype):
    weights = base(dtype)
    state = LowRank(fold_rounding="stochastic").open(MATRICES, SEED, weights=weights)
    seen, before = [], state.digest()
    state.on_fold = seen.append
    state.apply(Commit(0, ()))
    state.apply(Commit(1, (0.0, -0.0)))
    assert (state.step, state.digest(), seen) == (2, before, [])
    assert all(bits(weights[name]) == bits(weight) for name, weight in base(dtype).items())


def test_lowrank_has_no_momentum_and_says_so_before_anything_changes():
    state = LowRank().open(MATRICES, SEED, weights=base())
    before = state.digest()
    with pytest.raises(ConfigError, match="space=lowrank has no momentum; take space=lozo or lora"):
        state.apply(Commit(0, (1.0,), momentum=0.0, rate=1.0))
    assert (state.step, state.digest()) == (0, before)


def test_the_factors_of_a_lowrank_step_are_seen():
    weights, seen = base(torch.float64), []
    state = LowRank(rank=2).open(MATRICES, SEED, weights=weights)
    state.on_fold = lambda factors: seen.append(numbers(factors))
    for step, coefficients in enumerate([(0.5, 0.0, -0.25), (1.0,)]):
        before = clones(weights)
        state.apply(Commit(step, coefficients))
        for name, (b, a) in seen[-1].items():
            assert b.shape[1] == a.shape[0] == 2 * sum(c != 0 for c in coefficients)
            gained = (weights[name] - before[name]).numpy()
            assert np.abs(gained - b.astype(np.float64) @ a).max() < 1e-5
    assert len(seen) == 2


def test_lowrank_keeps_no_adapter():
    state = LowRank().open(MATRICES, SEED, weights=base())
    with pytest.raises(ConfigError, match=r"space=lowrank keeps no adapter; export the run: python -m zoray\.export"):
        state.arrays()


# both: the digest


@pytest.mark.parametrize("space", [Lozo(2, 3), LowRank(2)])
@each_dtype
def test_any_bit_of_a_base_weight_changes_the_digest(space, dtype):
    """The last bit of each number, before a step and after some, and two numbers that change places."""
    commits = PLAIN_COMMITS[:1] + [Commit(step, (0.5,)) for step in range(1, 5)]

    def digest(weights, steps):
        state = space.open(MATRICES, SEED, weights=clones(weights))
        for commit in commits[:steps]:
            state.apply(commit)
        return state.digest()

    weights, word = base(dtype), {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    seen = {digest(weights, 0)}
    for name in MATRICES:
        flat = weights[name].view(word).view(-1)
        for position in range(len(flat)):
            flat[position] ^= 1
            seen.add(digest(weights, 0))
            flat[position] ^= 1
    assert len(seen) == 1 + sum(out * into for out, into in MATRICES.values())
    before = digest(weights, 5)
    assert digest(weights, 5) == before
    flat = weights[name].view(-1)
    flat[0], flat[1] = flat[1].clone(), flat[0].clone()
    assert digest(weights, 0) not in seen and digest(weights, 5) != before


def test_b_and_momentum_count_in_lozos_digest():
    state = Lozo(2, 4).open(MATRICES, SEED, weights=base())
    state.apply(Commit(0, (0.5,), momentum=0.5, rate=-0.5))
    state.apply(Commit(1, (0.5,)))
    before, seen = state.digest(), set()
    for flat in (state.flat, state.momentum):
        for name in state.layout.shapes:
            view = state.layout.view(flat, name).view(torch.int32).view(-1)
            for position in range(len(view)):
                view[position] ^= 1
                seen.add(state.digest())
                view[position] ^= 1
    assert before not in seen and len(seen) == 2 * state.layout.numel
    assert state.digest() == before


@pytest.mark.parametrize(
    ("space", "pinned"),
    [
        (Lozo(2, 3, keep_base=True), "3829b2773d27e582"),
        (Lozo(1, 2, distribution="rademacher", fold_rounding="stochastic", keep_base=True), "f2e62316c8322389"),
        (LowRank(2, keep_base=True), "7d7018743fba0ccb"),
        (LowRank(3, distribution="rademacher", fold_rounding="stochastic", keep_base=True), "146aa1123aa802cb"),
    ],
)
def test_digests_are_pinned(space, pinned):
    """A journal is worth nothing to a version that folds otherwise."""
    weights = {  # whole numbers over 8, so that no library's random numbers come in
        name: (torch.arange(out * into).view(out, into) % 41 - 20).to(torch.bfloat16) / 8
        for name, (out, into) in MATRICES.items()
    }
    state = space.open(MATRICES, SEED, weights=weights)
    for commit in COMMITS if isinstance(space, Lozo) else PLAIN_COMMITS:
        state.apply(commit)
    assert state.digest() == pinned


# both: what they share


@pytest.mark.parametrize("space", [Lozo(2, 2), LowRank(2)])
def test_the_weights_given_are_written_and_no_others(space):
    space = replace(space, targets=("layers.0.*",))
    weights, start = base(), base()
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    state = space.open(MATRICES, SEED, weights=weights)
    assert list(state.matrices) == list(MATRICES)[:2]
    assert all(torch.equal(weights[name], start[name]) for name in MATRICES)  # opening changes nothing
    for step in range(2):
        state.apply(Commit(step, (0.5,)))
    assert {name: weight.data_ptr() for name, weight in weights.items()} == places
    assert [torch.equal(weights[name], start[name]) for name in MATRICES] == [False, False, True]


@pytest.mark.parametrize("space", [Lozo(2, 2), LowRank(2)])
def test_a_matrix_moves_alike_when_others_join(space):
    name, few, all_of_them = list(MATRICES)[1], base(), base()
    states = [replace(space, targets="up_proj").open(MATRICES, SEED, weights=few)]
    states += [space.open(MATRICES, SEED, weights=all_of_them)]
    for state in states:
        for step in range(2):
            state.apply(Commit(step, (0.5,)))
    assert bits(few[name]) == bits(all_of_them[name]) != bits(base()[name])


@each_kind
@pytest.mark.parametrize("step", [0, 2, 3])
def test_commits_out_of_order_are_refused_and_change_nothing(kind, step):
    state = kind().open(MATRICES, SEED, weights=base())
    state.apply(Commit(0, (1.0,)))
    before = state.digest()
    with pytest.raises(JournalError, match=f"expected the commit of step 1, got step {step}"):
        state.apply(Commit(step, (1.0,)))
    assert (state.step, state.digest()) == (1, before)


@each_kind
def test_another_seed_is_another_run(kind):
    digests = set()
    for seed in (0, 1, 2**32 - 1):
        state = kind().open(MATRICES, seed, weights=base())
        state.apply(Commit(0, (1.0,)))
        digests.add(state.digest())
    assert len(digests) == 3


@each_kind
def test_selection_and_numbers(kind):
    space = kind(rank=3, targets=("layers.0.*",))
    assert list(space.select(MATRICES)) == list(MATRICES)[:2]
    assert space.trained(MATRICES) == 6 * 10 + 11 * 10  # whole matrices
    assert kind(rank=4).scaling == (1.0 if kind is Lozo else 0.5)
    with pytest.raises(
        ConfigError, match=r"no linear layer of this model ends in v_proj; it has down_proj, q_proj, up"
    ):
        kind(targets=("v_proj",)).open(MATRICES, 0, weights=base())


# both: what is refused


@each_kind
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dtype": torch.int8}, "int8 of shape (11, 10)"),
        ({"dtype": torch.uint8}, "uint8 of shape (11, 10)"),
        ({"shape": (10, 11)}, "float32 of shape (10, 11)"),
        ({"shape": (55, 2)}, "float32 of shape (55, 2)"),
        (None, "no plain weight"),
    ],
)
def test_quantised_and_other_weights_are_refused(kind, change, found):
    """A quantised model is told which space takes it."""
    weights, name = base(), list(MATRICES)[1]
    del weights[name]
    if change is not None:
        weights[name] = torch.zeros(change.get("shape", MATRICES[name]), dtype=change.get("dtype", torch.float32))
    says = f"{name} has {found} (expected (11, 10)). Take space=lora, which never writes the base weights"
    with pytest.raises(ConfigError, match=rf"space={kind.__name__.lower()} folds into base .*{re.escape(says)}"):
        kind().open(MATRICES, SEED, weights=weights)
    kind(targets=("q_proj", "down_proj")).open(MATRICES, SEED, weights=weights)  # which do not include it


@each_kind
def test_no_weights_are_refused(kind):
    says = f"space={kind.__name__.lower()} folds into the base weights; this caller has none to give"
    with pytest.raises(ConfigError, match=says):
        kind().open(MATRICES, SEED)


@each_kind
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(kind, seed):
    with pytest.raises(ConfigError, match=rf"expected run\.seed to fit 32 bits; got {seed}"):
        kind().open(MATRICES, seed, weights=base())


@each_kind
@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"rank": 0}, r"expected space\.rank to be a whole number from 1 to 512 .*; got 0"),
        ({"rank": 513}, "got 513"),
        ({"rank": "2"}, "got '2'"),
        ({"distribution": "normal"}, "expected distribution to be rademacher or gaussian; got 'normal'"),
        ({"targets": ()}, r"expected space\.targets to be all-linear or a list of module names; got \(\)"),
        ({"fold_rounding": "up"}, r"expected space\.fold_rounding to be one of nearest, stochastic; got 'up'"),
    ],
)
def test_bad_parameters_are_refused(kind, kwargs, says):
    with pytest.raises(ConfigError, match=says):
        kind(**kwargs)


@pytest.mark.parametrize("interval", [0, -1, 2.0, "50", None])
def test_bad_intervals_are_refused(interval):
    with pytest.raises(ConfigError, match=r"expected space\.interval to be a whole number of at least 1; got"):
        Lozo(interval=interval)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_directions_that_are_too_many_to_keep_are_made_matrix_by_matrix(monkeypatch, distribution):
    """The same bits, in memory for one matrix instead of the whole model times the population."""
    from zoray.methods.spaces import base

    space = LowRank(rank=2, distribution=distribution)
    matrices = {"a": (6, 10), "b": (7, 5)}
    digests, alone = [], []
    make = base.direction_torch
    monkeypatch.setattr(base, "direction_torch", lambda *a, **k: alone.append(a) or make(*a, **k))
    for kept in (base.CACHED_ELEMENTS, 0):
        monkeypatch.setattr(base, "CACHED_ELEMENTS", kept)
        weights = {name: torch.ones(shape) for name, shape in matrices.items()}
        state = space.open(matrices, 3, weights=weights)
        for step in range(3):
            state.apply(Commit(step, (0.1, 0.0, -0.2)))
        digests.append(state.digest())
        assert bool(alone) == (kept == 0)
    assert digests[0] == digests[1]


def test_a_stack_that_could_not_fit_is_not_made():
    space, matrices = LowRank(rank=300), {"a": (4, 4)}
    state, seen = space.open(matrices, 0, weights={"a": torch.ones(4, 4)}), []
    state.on_fold = seen.append
    state.apply(Commit(0, (0.1, 0.2)))
    state.apply(Commit(1, (0.1, 0.0)))
    assert seen[0] == 600 and seen[1]["a"][0].shape == (4, 300)
