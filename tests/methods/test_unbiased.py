"""The mean of an estimate over 10,000 directions is the gradient, in the numbers that each space moves.

The directions are the spaces' own (`state.factors`, `state.direction`). To draw many at once, a model here has COPIES
blocks of the same two matrices: each block has its own part of a direction, its own losses and its own estimate, but
all have the same weights, examples and gradient. All but the directions is NumPy in float64.
"""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.records import Commit, Probe

SHAPES = {"q_proj": (4, 6), "v_proj": (3, 5)}  # (out, in)
EXAMPLES = 4
COPIES, STEPS, PER_STEP = 100, 25, 4
EPS = 2.0**-10
RANDOM = np.random.default_rng(5)
WEIGHTS = {kind: RANDOM.standard_normal(shape).astype(np.float32) for kind, shape in SHAPES.items()}
INPUTS = {kind: RANDOM.standard_normal((into, EXAMPLES)) for kind, (_, into) in SHAPES.items()}
OUTPUTS = {kind: RANDOM.standard_normal((out, EXAMPLES)) for kind, (out, _) in SHAPES.items()}

SPACES = {
    "lora-B": lambda distribution: Lora(rank=2, alpha=3.0, train="B", distribution=distribution),
    "lora-AB": lambda distribution: Lora(rank=2, alpha=3.0, train="AB", distribution=distribution),
    "lozo": lambda distribution: Lozo(rank=2, distribution=distribution),
    "lowrank-1": lambda distribution: LowRank(rank=1, distribution=distribution),
    "lowrank-4": lambda distribution: LowRank(rank=4, distribution=distribution),
}
each_space = pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
each_distribution = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])


def losses_at(effective: dict[str, np.ndarray]) -> np.ndarray:
    """1/2 |W x - y|^2 of each example, summed over the two matrices: (copies, out, in) each -> (copies, EXAMPLES)."""
    return sum(0.5 * ((w @ INPUTS[kind] - OUTPUTS[kind]) ** 2).sum(axis=1) for kind, w in effective.items())


def slope_at(effective: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """dL/dW of the mean loss over the examples."""
    residuals = {kind: w @ INPUTS[kind] - OUTPUTS[kind] for kind, w in effective.items()}
    return {kind: residual @ INPUTS[kind].T / EXAMPLES for kind, residual in residuals.items()}


def moves(space) -> str:
    """The factors that a space moves: B alone, or both."""
    return space.train if isinstance(space, Lora) else "AB" if isinstance(space, LowRank) else "B"


def opened(space):
    """A state in which all copies stand at the same point, which is not the initial one: B is not zero.

    Where only B moves, the copies are blocks of rows of one matrix, so that they have the same A (in lozo: V).
    """
    if moves(space) == "B":
        matrices = {kind: (COPIES * out, into) for kind, (out, into) in SHAPES.items()}
        weights = {kind: torch.from_numpy(np.tile(weight, (COPIES, 1))) for kind, weight in WEIGHTS.items()}
    else:
        names = {f"layers.{copy}.{kind}": kind for copy in range(COPIES) for kind in SHAPES}
        matrices = {name: SHAPES[kind] for name, kind in names.items()}
        weights = {name: torch.from_numpy(WEIGHTS[kind].copy()) for name, kind in names.items()}
    state = space.open(matrices, seed=7, weights=weights if space.folds else None)
    if isinstance(space, LowRank):
        return state
    first = {}
    for name, a, b in state.tensors(state.flat):  # views
        kind = name.rsplit(".", 1)[-1]
        out = SHAPES[kind][0]
        if kind not in first:  # of lora A too: its initial values differ from matrix to matrix
            start = np.random.default_rng(out).standard_normal((out, space.rank)).astype(np.float32)
            first[kind] = (a.clone(), torch.from_numpy(start))
        a.copy_(first[kind][0])
        b.copy_(first[kind][1].repeat(len(b) // out, 1))
    return state


def by_copy(factors) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(name, A, B) of all matrices -> {kind: (A (copies or 1, rank, in), B (copies, out, rank))} in float64."""
    found = defaultdict(list)
    for name, a, b in factors:
        found[name.rsplit(".", 1)[-1]].append((a, b))
    stacked = {kind: [torch.stack(side).double().numpy() for side in zip(*s, strict=True)] for kind, s in found.items()}
    return {kind: (a, b.reshape(COPIES, SHAPES[kind][0], b.shape[-1])) for kind, (a, b) in stacked.items()}


def effective(space, factors) -> dict[str, np.ndarray]:
    """W + scaling * B A, (copies, out, in) of each kind."""
    return {kind: WEIGHTS[kind] + space.scaling * (b @ a) for kind, (a, b) in by_copy(factors).items()}


def flat(parts) -> np.ndarray:
    """The numbers of all parts side by side, (copies, numbers)."""
    return np.concatenate([np.broadcast_to(p, (COPIES, *p.shape[1:])).reshape(COPIES, -1) for p in parts], axis=1)


def direction(space, state, step: int, index: int) -> np.ndarray:
    """z in the numbers that the space moves: B, A and B, or W itself; (copies, numbers)."""
    if isinstance(space, LowRank):
        drawn = by_copy(state.factors(Probe(step, index, 1.0)))
        return flat(space.scaling * (b @ a) for a, b in drawn.values())
    return trained(space, state.tensors(state.direction(step, index)))


def trained(space, factors) -> np.ndarray:
    return flat(part for a, b in by_copy(factors).values() for part in ((b, a) if moves(space) == "AB" else (b,)))


def gradient(space, state) -> np.ndarray:
    """The gradient in the numbers that the space moves, by the chain rule through W + scaling * B A; (numbers,)."""
    centre = list(state.factors(Probe(0, 0, 0.0)))
    slope = slope_at(effective(space, centre))
    if isinstance(space, LowRank):
        whole = flat(slope.values())
    else:
        parts = []
        for kind, (a, b) in by_copy(centre).items():
            parts.append(space.scaling * slope[kind] @ a.transpose(0, 2, 1))
            if moves(space) == "AB":
                parts.append(space.scaling * b.transpose(0, 2, 1) @ slope[kind])
        whole = flat(parts)
    assert np.allclose(whole, whole[0], rtol=1e-12, atol=0)  # all copies stand at one point
    return whole[0]


def estimates(space, state, estimator) -> np.ndarray:
    """weights[k] * z(step, k) of COPIES * STEPS steps: (estimates, directions, numbers)."""
    found = []
    share = EXAMPLES if estimator.shared else EXAMPLES // estimator.directions
    for step in range(STEPS):
        probes = estimator.ask(step)
        scored = np.stack([losses_at(effective(space, state.factors(probe))) for probe in probes])
        if not estimator.shared:  # each direction its own examples
            scored = np.stack(
                [s[:, p.index * share : (p.index + 1) * share] for s, p in zip(scored, probes, strict=True)]
            )
        weights = np.array([estimator.tell(probes, scored[:, copy].tolist()).weights for copy in range(COPIES)])
        z = np.stack([direction(space, state, step, k) for k in range(estimator.directions)], axis=1)
        found.append(weights[:, :, None] * z)
    return np.concatenate(found)


def check_mean(samples: np.ndarray, expected: np.ndarray) -> None:
    """The mean of (n, numbers) samples is `expected` within its standard error, number by number and in length."""
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    deviation = (samples.mean(axis=0) - expected) / error
    length = np.linalg.norm(expected)
    assert (error < 0.03 * length).all()  # sharp enough to tell
    assert np.abs(deviation).max() < 5
    assert 0.5 < math.sqrt((deviation**2).mean()) < 1.5
    along = samples @ expected / length**2  # 1 on average
    error = along.std(ddof=1) / math.sqrt(len(along))
    assert error < 0.04 and abs(along.mean() - 1) < 5 * error


@each_distribution
@each_space
def test_the_mean_of_two_point_estimates_is_the_gradient(make, distribution):
    space = make(distribution)
    state = opened(space)
    found = estimates(space, state, TwoPoint(pairs=PER_STEP, eps=EPS))
    samples = PER_STEP * found.reshape(-1, found.shape[-1])  # directions are independent, each is a sample
    assert len(samples) == 10_000
    check_mean(samples, gradient(space, state))


@each_distribution
@pytest.mark.parametrize(
    "estimator",
    [
        OneSided(probes=PER_STEP, eps=EPS, scale="none"),
        Evolution(population=PER_STEP, sigma=EPS, antithetic=False, shaping="none"),
        Evolution(population=PER_STEP, sigma=EPS, antithetic=False, shaping="none", centring="prompt"),
        Evolution(population=2 * PER_STEP, sigma=EPS, shaping="none"),
        TwoPoint(pairs=PER_STEP, eps=EPS, shared=False),
    ],
    ids=["one-sided", "evolution", "evolution-prompt", "evolution-mirrored", "two-point-apart"],
)
def test_the_mean_of_other_estimates_is_the_gradient(estimator, distribution):
    space = SPACES["lora-B"](distribution)
    state = opened(space)
    samples = estimates(space, state, estimator).sum(axis=1)
    assert len(samples) * estimator.directions == 10_000
    check_mean(samples, gradient(space, state))


@each_distribution
@each_space
def test_a_commit_moves_along_the_directions_that_were_scored(make, distribution):
    """x moves by sum_k coefficients[k] * z(step, k), with the z of which the tests above say that it is unbiased."""
    space = make(distribution)
    state = opened(space)
    coefficients = (0.25, 0.0, -0.5, 0.125)

    def numbers(state) -> np.ndarray:
        if isinstance(space, LowRank):
            per_kind = defaultdict(list)
            for name, weight in state.weights.items():
                per_kind[name.rsplit(".", 1)[-1]].append(weight.double().numpy())
            return flat(np.stack(weights) for weights in per_kind.values())
        return trained(space, state.tensors(state.flat))

    expected = sum(c * direction(space, state, 0, k) for k, c in enumerate(coefficients))
    other = opened(space)  # one that has not drawn these directions yet
    before = numbers(other)
    other.apply(Commit(0, coefficients))
    assert np.abs(expected).max() > 0.5
    assert numbers(other) - before == pytest.approx(expected, abs=1e-5)


@each_space
def test_the_gradients_of_these_tests_are_right(make):
    """Against central differences of the mean loss, number by number, on the factors or on W."""
    space = make("gaussian")
    state = opened(space)
    start = {kind: (a[0], b[0]) for kind, (a, b) in by_copy(state.factors(Probe(0, 0, 0.0))).items()}
    base = {kind: weight.astype(np.float64) for kind, weight in WEIGHTS.items()}
    parts = []  # the arrays that move, in the order of `gradient`
    for kind, (a, b) in start.items():
        parts += [base[kind]] if isinstance(space, LowRank) else [b, a] if moves(space) == "AB" else [b]

    def loss() -> float:
        return losses_at({k: (base[k] + space.scaling * (b @ a))[None] for k, (a, b) in start.items()}).mean()

    slopes = []
    for part in parts:
        for place in np.ndindex(part.shape):
            kept, sides = part[place], []
            for step in (1e-4, -1e-4):
                part[place] = kept + step
                sides.append(loss())
            part[place] = kept
            slopes.append((sides[0] - sides[1]) / 2e-4)
    assert gradient(space, state) == pytest.approx(np.array(slopes), rel=1e-6, abs=1e-8)
