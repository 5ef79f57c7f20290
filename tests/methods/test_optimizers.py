"""SGD on weights: schedules at their ends, links, clipping, momentum, decays, and commits that are exactly float32."""

import json
import math
import warnings

import numpy as np
import pytest

from zoray.methods.optimizers import SCHEDULES, GlobalAdaptive, Sgd, Sign, to_float32
from zoray.records import Commit, ConfigError


def commit_of(optimizer: Sgd, step: int, steps: int, weights) -> Commit:
    """The commit of a step, as the first one."""
    return optimizer.update(optimizer.init(), step, steps, weights)[1]


def constant(lr: float = 1.0, **kwargs) -> Sgd:
    return Sgd(lr=lr, schedule="constant", **kwargs)


def random_weights(steps: int, directions: int, seed: int = 0) -> list[tuple[float, ...]]:
    return [tuple(row) for row in np.random.default_rng(seed).standard_normal((steps, directions)).tolist()]


# schedules


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [  # learning rates of a run of 8 steps
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        ("linear", 1, [1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("linear", 16, [(k + 1) / 16 for k in range(8)]),  # a warm-up longer than the run never ends
    ],
)
def test_schedules(schedule, warmup, expected):
    optimizer = Sgd(lr=0.5, schedule=schedule, warmup=warmup)
    assert [optimizer.lr_at(step, 8) for step in range(8)] == pytest.approx([0.5 * rate for rate in expected])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
def test_the_learning_rate_is_positive_on_every_step_and_the_peak_is_lr(schedule, warmup, steps):
    rates = [Sgd(lr=2.0, schedule=schedule, warmup=warmup).lr_at(step, steps) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    if steps >= max(warmup, 1):
        assert max(rates) == 2.0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_commit_has_the_learning_rate_of_its_step(schedule):
    optimizer = Sgd(lr=0.5, schedule=schedule, warmup=3)
    for step in range(10):
        commit = commit_of(optimizer, step, 10, (1.0,))
        assert commit == Commit(step, (to_float32(-optimizer.lr_at(step, 10)),))


# coefficients


def test_commit_scales_the_weights_and_rounds_to_float32():
    weights = (1.0, -2.5, 0.0, 1 / 3)
    optimizer = Sgd(lr=0.1, schedule="linear")
    state, commit = optimizer.update(optimizer.init(), 5, 10, weights)
    assert state == ()
    assert commit == Commit(5, (-0.05, 0.125, 0.0, -0.016666668), decay=1.0)
    assert all(float(np.float32(c)) == pytest.approx(c, rel=1e-7) for c in commit.coefficients)
    assert [np.float32(c) for c in commit.coefficients] == [np.float32(-0.05 * weight) for weight in weights]


def test_a_plain_commit_does_nothing_but_add():
    commit = commit_of(Sgd(), 0, 10, (1.0, 2.0))
    assert (commit.decay, commit.anchor, commit.momentum, commit.rate) == (1.0, 1.0, None, 1.0)


def test_to_float32_is_the_nearest_float32_in_its_shortest_form():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = [0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x3F800000, 0x33800000, 0x4B800000, 0x80000001, 0x80000000]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    values = values[np.isfinite(values)]
    assert len(values) > 19_000
    for value in values:
        plain = to_float32(float(value))
        assert np.float32(plain).tobytes() == value.tobytes()  # what replicas multiply by has these bits
        assert to_float32(plain) == plain
        assert float(json.loads(json.dumps(plain))) == plain
        digits = repr(plain).split("e")[0].lstrip("-").replace(".", "").strip("0")
        assert len(digits) <= 9
    for value in random.standard_normal(1000):  # not float32 to begin with
        assert np.float32(to_float32(value)) == np.float32(value)
    assert (to_float32(0.1), to_float32(1 / 3), to_float32(16777217.0)) == (0.1, 0.33333334, 16777216.0)


@pytest.mark.parametrize("weight", [1e39, -1e39, math.inf, math.nan])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_an_overflow_fails_the_step(weight, momentum):
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"step 3: .*overflow.*lower optimizer\.lr"):
        warnings.simplefilter("error")  # said once, by us
        commit_of(constant(momentum=momentum), 3, 10, (0.5, weight))


@pytest.mark.parametrize("optimizer", [constant(clip=1.0), constant(link=GlobalAdaptive())], ids=["clip", "adaptive"])
@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan])
def test_neither_a_clip_nor_a_link_hides_a_weight_that_is_not_finite(optimizer, weight):
    with pytest.raises(FloatingPointError, match="step 3"):
        commit_of(optimizer, 3, 10, (0.5, weight))


def test_an_underflow_is_a_zero():
    assert commit_of(constant(1e-30), 0, 1, (1e-30, 1e-8)).coefficients == (0.0, -1e-38)


def test_update_is_pure():
    optimizer = Sgd(clip=0.1, momentum=0.5, link=GlobalAdaptive())
    weights, state = [3.0, -4.0], (0.5, 0.25)
    assert optimizer.update(state, 2, 10, weights) == optimizer.update(state, 2, 10, tuple(weights))
    assert weights == [3.0, -4.0] and state == (0.5, 0.25)


# clipping


def test_clip_shortens_the_vector_of_weights_and_keeps_its_direction():
    assert commit_of(constant(clip=2.5), 0, 1, (3.0, 0.0, -4.0)).coefficients == (-1.5, 0.0, 2.0)  # norm 5
    for weights in random_weights(20, 6):
        norm = math.sqrt(sum(w * w for w in weights))
        expected = [np.float32(-0.3 * 0.5 / norm * w) for w in weights]
        found = commit_of(constant(0.3, clip=0.5), 0, 1, weights).coefficients
        assert norm > 0.5 and found == pytest.approx(expected, rel=1e-6)
        assert math.hypot(*found) == pytest.approx(0.15, rel=1e-6)  # the rate comes after


@pytest.mark.parametrize("clip", [None, 5.0, 1e9])
def test_clip_leaves_a_shorter_vector_as_it_is(clip):
    assert commit_of(constant(clip=clip), 0, 1, (3.0, 0.0, -4.0)).coefficients == (-3.0, 0.0, 4.0)
    assert commit_of(constant(clip=clip), 0, 1, (0.0, 0.0)).coefficients == (0.0, 0.0)


def test_clip_of_weights_whose_squares_overflow():
    assert commit_of(constant(clip=1.0), 0, 1, (3e200, -4e200)).coefficients == (to_float32(-0.6), to_float32(0.8))


# momentum


def test_momentum_is_left_to_the_replicas():
    """They keep m <- beta m + (1 - beta) sum_k w_k z_k and step by -lr m."""
    weights = (1.0, -2.5, 0.0, 1 / 3)
    state, commit = Sgd(lr=0.1, schedule="linear", momentum=0.9).update((), 5, 10, weights)
    beta = 1 - 0.9
    assert state == ()
    assert commit == Commit(5, tuple(to_float32(beta * w) for w in weights), momentum=0.9, rate=-0.05)
    assert commit.coefficients == pytest.approx((0.1, -0.25, 0.0, 1 / 30), rel=1e-7)


@pytest.mark.parametrize("beta", [0.9, 1 / 3, 0.95, 0.5])
def test_momentum_and_rate_are_float32(beta):
    commit = commit_of(Sgd(lr=0.1, schedule="cosine", momentum=beta), 3, 7, (1.0,))
    for value in (commit.momentum, commit.rate, *commit.coefficients):
        assert to_float32(value) == value
    assert np.float32(commit.momentum) == np.float32(beta)
    assert np.float32(commit.rate) == np.float32(-Sgd(lr=0.1, schedule="cosine").lr_at(3, 7))


def test_momentum_commits_applied_are_the_running_mean_of_the_gradient():
    """Commit's formula, against the same with learning rate and decays written out; along one direction."""
    optimizer = Sgd(lr=0.25, schedule="linear", momentum=0.75, weight_decay=0.5, anchor=0.25, clip=1.0)
    x, m, start = 3.0, 0.0, 3.0
    y, mean = 3.0, 0.0
    for step, (weight,) in enumerate(random_weights(16, 1)):
        commit = commit_of(optimizer, step, 16, (weight,))
        x *= commit.decay
        x = start + commit.anchor * (x - start)
        m = commit.momentum * m + commit.coefficients[0]
        x += commit.rate * m
        lr = 0.25 * (1 - step / 16)
        y -= lr * 0.5 * y
        y -= lr * 0.25 * (y - start)
        mean = 0.75 * mean + 0.25 * max(-1.0, min(1.0, weight))
        y -= lr * mean
    assert x == pytest.approx(y, rel=1e-5)
    assert abs(y - start) > 0.5


# decays


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("weight_decay", "anchor"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.1, 0.3), (3.0, 7.0)])
def test_decays_are_by_the_learning_rate_of_the_step(weight_decay, anchor, momentum):
    optimizer = Sgd(lr=0.1, schedule="linear", warmup=2, momentum=momentum, weight_decay=weight_decay, anchor=anchor)
    for step in range(10):
        lr = optimizer.lr_at(step, 10)
        commit = commit_of(optimizer, step, 10, (1.0,))
        assert commit.decay == to_float32(1 - lr * weight_decay)
        assert commit.anchor == to_float32(1 - lr * anchor)
        assert (commit.decay < 1, commit.anchor < 1) == (weight_decay > 0, anchor > 0)
        plain = commit_of(Sgd(lr=0.1, schedule="linear", warmup=2, momentum=momentum), step, 10, (1.0,))
        assert (commit.coefficients, commit.rate) == (plain.coefficients, plain.rate)  # decoupled


def test_decays_in_numbers():
    commit = commit_of(constant(0.1, weight_decay=0.1, anchor=1 / 3), 0, 1, (0.0,))
    assert (commit.decay, commit.anchor) == (0.99, 0.96666664)


def test_parameters_decay_although_no_direction_is_kept():
    assert commit_of(constant(0.5, weight_decay=0.5), 0, 1, (0.0, 0.0)) == Commit(0, (0.0, 0.0), decay=0.75)


# links


def test_sign_keeps_the_sign_of_each_weight_over_their_number():
    state, weights = Sign().update(Sign().init(), (3.0, -0.001, 0.0, -1e300))
    assert state == Sign().init() == ()
    assert weights == (0.25, -0.25, 0.0, -0.25)
    assert Sign().update((), (-1e-300,)) == ((), (-1.0,))
    assert Sign().update((), (0.0, -0.0)) == ((), (0.0, 0.0))
    commit = commit_of(constant(0.5, link=Sign()), 0, 1, (3.0, -0.001, 0.0, -1e300))
    assert commit == Commit(0, (-0.125, 0.125, 0.0, 0.125))


def test_a_link_comes_before_the_clip():
    """Sign makes a vector of norm 1/2 of four weights, however long it was."""
    huge, tiny = (1e9, -1e9, 1e9, 1e9), (1e-9, -1e-9, 1e-9, 1e-9)
    for weights in (huge, tiny):
        assert commit_of(constant(link=Sign(), clip=0.5), 0, 1, weights).coefficients == (-0.25, 0.25, -0.25, -0.25)
        assert commit_of(constant(link=Sign(), clip=0.25), 0, 1, weights).coefficients == (
            -0.125,
            0.125,
            -0.125,
            -0.125,
        )


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize(("beta", "epsilon"), [(0.99, 1e-8), (0.9, 0.5), (0.0, 1e-8)])
def test_global_adaptive_written_out(beta, epsilon, directions):
    """20 steps; the 7th and 8th kept no direction and leave v, and its age, as they are."""
    link = GlobalAdaptive(beta=beta, epsilon=epsilon)
    optimizer = Sgd(lr=0.1, schedule="linear", link=link)
    weights = random_weights(20, directions)
    weights[6] = weights[7] = (0.0,) * directions
    state = own = link.init()
    assert own == optimizer.init() == (0.0, 1.0)
    v, t = 0.0, 0
    for step, row in enumerate(weights):
        before = own
        own, scaled = link.update(own, row)
        state, commit = optimizer.update(state, step, 20, row)
        if step in (6, 7):
            assert own == before and scaled == row and commit.coefficients == (0.0,) * directions
        else:
            t += 1
            projected = [directions * w for w in row]  # a weight is a projected gradient over their number
            v = beta * v + (1 - beta) * sum(g**2 for g in projected) / directions
            scale = 1 / (math.sqrt(v / (1 - beta**t)) + epsilon)
            assert scaled == pytest.approx([w * scale for w in row], rel=1e-10)
            assert own == pytest.approx((v, beta**t), rel=1e-10)
        assert state == own
        lr = 0.1 * (1 - step / 20)
        assert commit.coefficients == tuple(to_float32(-lr * w) if w else 0.0 for w in scaled)
    assert t == 18


def test_global_adaptive_starts_at_a_step_of_the_learning_rate():
    """v_hat of the first step is g^2 itself, whatever beta; weights keep their ratio."""
    for beta in (0.0, 0.9, 0.999):
        link = GlobalAdaptive(beta=beta)
        assert link.update(link.init(), (-250.0,))[1] == pytest.approx((-1.0,), rel=1e-6)
        found = link.update(link.init(), (1e-3, 3e-3))[1]
        assert found == pytest.approx((1 / math.sqrt(20), 3 / math.sqrt(20)), rel=1e-4)
        (v, power), flat = link.update(link.init(), (0.0, 0.0))
        assert (v, power, flat) == (0.0, 1.0, (0.0, 0.0))


def test_global_adaptive_does_not_let_directions_cancel():
    """Weights that add up to nothing are no flat loss: the step is as long as with other signs, and finite."""
    link = GlobalAdaptive()
    state, found = link.update(link.init(), (0.5, -0.5))
    other, expected = link.update(link.init(), (0.5, 0.5))
    assert found == pytest.approx((0.5, -0.5)) and expected == pytest.approx((0.5, 0.5))
    assert state == other and state[0] > 0


def test_global_adaptive_takes_any_unit_of_the_loss():
    rows = random_weights(20, 3)
    link = GlobalAdaptive(epsilon=1e-30)
    one = many = link.init()
    for row in rows:
        one, expected = link.update(one, row)
        many, found = link.update(many, tuple(1e6 * w for w in row))
        assert found == pytest.approx(expected, rel=1e-9)


# the state


@pytest.mark.parametrize("link", [None, Sign(), GlobalAdaptive(), GlobalAdaptive(0.9, 1e-3)], ids=str)
def test_the_state_is_plain_numbers_that_survive_json_and_resume_the_same_commits(link):
    optimizer = Sgd(lr=0.3, schedule="cosine", warmup=2, clip=2.0, momentum=0.9, weight_decay=0.1, link=link)
    weights = random_weights(20, 4)
    states, commits = [optimizer.init()], []
    for step, row in enumerate(weights):
        state, commit = optimizer.update(states[-1], step, 20, row)
        assert type(state) is tuple and all(type(value) is float for value in state)
        states.append(state)
        commits.append(commit)
    assert len({len(state) for state in states}) == 1
    for start in (0, 1, 7, 19):
        state = tuple(json.loads(json.dumps(states[start])))
        assert state == states[start]
        for step in range(start, 20):
            state, commit = optimizer.update(state, step, 20, weights[step])
            assert commit == commits[step]
        assert state == states[-1]
    if isinstance(link, GlobalAdaptive):  # it matters: from the initial state the same step is another
        assert optimizer.update(optimizer.init(), 19, 20, weights[19])[1] != commits[19]


# bad parameters


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"lr": 0.0}, r"expected optimizer\.lr to be a positive number; got 0.0"),
        ({"lr": -1e-3}, "got -0.001"),
        ({"lr": math.nan}, "got nan"),
        ({"lr": math.inf}, "got inf"),
        ({"lr": "1e-3x"}, "got '1e-3x'"),
        ({"schedule": "step"}, r"expected optimizer\.schedule to be one of constant, linear, cosine; got 'step'"),
        ({"schedule": None}, "got None"),
        ({"warmup": -1}, r"expected optimizer\.warmup to be 0 or more; got -1"),
        ({"warmup": 0.5}, "got 0.5"),
        ({"clip": 0.0}, r"expected optimizer\.clip to be a positive number or null; got 0.0"),
        ({"clip": -1.0}, "got -1.0"),
        ({"clip": math.inf}, "got inf"),
        ({"clip": math.nan}, "got nan"),
        ({"clip": "1"}, "got '1'"),
        ({"momentum": 1.0}, r"expected optimizer\.momentum in \[0, 1\); got 1.0"),
        ({"momentum": -0.1}, "got -0.1"),
        ({"momentum": math.nan}, "got nan"),
        ({"momentum": None}, "got None"),
        (
            {"weight_decay": -0.1},
            r"expected optimizer\.weight_decay to be 0, or lr \* weight_decay from 1e-06 .* to 1; got -0.1",
        ),
        ({"weight_decay": 2.0, "lr": 0.5}, "got 2.0"),
        ({"weight_decay": math.inf}, "got inf"),
        ({"weight_decay": 0.1, "lr": 1e-7}, "got 0.1"),
        ({"anchor": -0.1}, r"expected optimizer\.anchor to be 0, or lr \* anchor from 1e-06 .* to 1; got -0.1"),
        ({"anchor": 9.9, "lr": 1e-7}, "got 9.9"),
        ({"anchor": 2.5, "lr": 0.5}, "got 2.5"),
        ({"anchor": "1"}, "got '1'"),
        (
            {"link": "Sign"},
            r"expected optimizer\.link to be null or a component such as zoray\.methods\.Sign; got 'Si",
        ),
        ({"link": Sign}, "optimizer.link to be null or a component"),
        ({"link": {"beta": 0.9}}, r"got \{'beta': 0.9\}"),
    ],
)
def test_bad_parameters_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Sgd(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"beta": 1.0}, r"expected optimizer\.link\.beta to be in \[0, 1\); got 1.0"),
        ({"beta": -0.1}, "got -0.1"),
        ({"beta": math.nan}, "got nan"),
        ({"beta": "0.9"}, "got '0.9'"),
        ({"epsilon": 0.0}, r"expected optimizer\.link\.epsilon to be positive; got 0.0"),
        ({"epsilon": -1e-8}, "got -1e-08"),
        ({"epsilon": math.inf}, "got inf"),
    ],
)
def test_bad_parameters_of_global_adaptive_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        GlobalAdaptive(**kwargs)
