"""Estimators: each formula written out again, convergence on a quadratic, and losses that are not finite or tie."""

import math
import pickle
import statistics
from functools import cache

import numpy as np
import pytest
from loop import by_direction, tile_grid

from zoray.methods.directions import direction_numpy
from zoray.methods.estimators import Estimate, Evolution, OneSided, TwoPoint
from zoray.methods.optimizers import Sgd
from zoray.records import ConfigError, Probe, Scores
from zoray.records.tiles import losses_of, summed

DISTRIBUTIONS = ["rademacher", "gaussian"]
SIZE = 16
CURVATURE = np.linspace(0.2, 2.0, SIZE)
MINIMUM = np.linspace(-1.0, 2.0, SIZE)
NAN, INF = math.nan, math.inf
NOT_FINITE = [NAN, INF, -INF]
SHAPINGS = ["none", "zscore", "centred_rank"]
CENTRINGS = ["batch", "prompt"]

# Every estimator and variant at a number of directions.
VARIANTS = {
    "two-point": lambda k: TwoPoint(pairs=k, eps=0.5),
    "two-point-apart": lambda k: TwoPoint(pairs=k, eps=0.5, shared=False),
    "one-sided": lambda k: OneSided(probes=k, eps=0.5),
    "one-sided-none": lambda k: OneSided(probes=k, eps=0.5, scale="none"),
    **{
        f"{'mirrored' if antithetic else 'plain'}-{shaping}-{centring}": (
            lambda k, a=antithetic, s=shaping, c=centring: Evolution(
                population=k * (2 if a else 1), sigma=0.5, antithetic=a, shaping=s, centring=c
            )
        )
        for antithetic in (True, False)
        for shaping in SHAPINGS
        for centring in CENTRINGS
    },
}
each_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
each_shaping = pytest.mark.parametrize("shaping", SHAPINGS)
each_centring = pytest.mark.parametrize("centring", CENTRINGS)
mirrored_or_not = pytest.mark.parametrize("antithetic", [True, False], ids=["mirrored", "plain"])


def quadratic(x: np.ndarray) -> float:
    return float(0.5 * (CURVATURE * (x - MINIMUM) ** 2).sum())


def gradient(x: np.ndarray) -> np.ndarray:
    return CURVATURE * (x - MINIMUM)


def direction(probe: Probe, distribution: str) -> np.ndarray:
    return z_at(probe.step, probe.index, distribution)


@cache
def z_at(step: int, index: int, distribution: str) -> np.ndarray:
    return direction_numpy(1, step, index, "x", 0, SIZE, distribution).astype(np.float64)


def rows(*losses: float, examples: int = 1) -> list[tuple[float, ...]]:
    """Every probe has the same loss on each of its examples."""
    return [(loss,) * examples for loss in losses]


def tell(estimator, losses, noise: float = 0.0) -> Estimate:
    return estimator.tell(estimator.ask(0), losses, noise)


def random_losses(probes: int, examples: int = 5, seed: int = 0) -> list[tuple[float, ...]]:
    """Losses of which each example has its own level and spread."""
    random = np.random.default_rng(seed)
    level, spread = random.uniform(0, 3, examples), random.uniform(0.1, 2, examples)
    return [tuple(row) for row in (level + spread * random.standard_normal((probes, examples))).tolist()]


def column_means(losses) -> list[float]:
    return [statistics.fmean(row) for row in losses]


def mirrored_or_plain(shaped: list[float], antithetic: bool, members: int) -> list[float]:
    """sum over the members of a direction of (sign * s) / members."""
    if antithetic:
        return [(plus - minus) / members for plus, minus in zip(shaped[::2], shaped[1::2], strict=True)]
    return [s / members for s in shaped]


def z_scores(values: list[float]) -> list[float]:
    centre, spread = statistics.fmean(values), statistics.pstdev(values)
    return [(value - centre) / spread for value in values]


def centred_ranks(values: list[float]) -> list[float]:
    """Rank = number of smaller values + half the number of other equal ones."""
    ranks = [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
    return [rank / (len(values) - 1) - 0.5 for rank in ranks]


# what every estimator asks


@each_variant
@pytest.mark.parametrize("count", [2, 3, 7])
def test_ask_gives_unique_probes_of_one_step_and_as_many_directions_as_it_says(make, count):
    estimator = make(count)
    probes = estimator.ask(11)
    assert isinstance(probes, tuple) and len(set(probes)) == len(probes)
    assert {probe.step for probe in probes} == {11}
    assert estimator.directions == count
    on_directions = {index: group for index, group in by_direction(probes).items() if index >= 0}
    assert sorted(on_directions) == list(range(count))
    assert [estimator.group(11, k) for k in range(estimator.groups)] == list(by_direction(probes).values())
    assert {abs(probe.scale) for group in on_directions.values() for probe in group} == {0.5}
    assert estimator.ask(11) == probes
    assert not set(estimator.ask(12)) & set(probes)
    losses = random_losses(len(probes))
    assert len(estimator.tell(probes, losses).weights) == count


@each_variant
def test_probes_estimators_and_estimates_pickle(make):
    estimator = make(3)
    probes = estimator.ask(5)
    estimate = estimator.tell(probes, random_losses(len(probes)))
    for thing in (estimator, probes, estimate):
        copy = pickle.loads(pickle.dumps(thing))
        assert copy == thing and type(copy) is type(thing)
    assert {type(value) for value in (*estimate.weights, estimate.loss)} == {float}
    assert {type(value) for value in (estimate.dropped, estimate.ties, estimate.buried)} == {int}


def test_only_two_point_can_share_the_batch_out():
    assert TwoPoint().shared and OneSided().shared and Evolution().shared
    assert not TwoPoint(shared=False).shared


def test_ask_gives_plus_and_minus_of_each_pair_in_order():
    assert TwoPoint(pairs=2, eps=0.5).ask(7) == (
        Probe(7, 0, 0.5),
        Probe(7, 0, -0.5),
        Probe(7, 1, 0.5),
        Probe(7, 1, -0.5),
    )
    assert TwoPoint(pairs=3).directions == 3 and len(TwoPoint(pairs=3).ask(0)) == 6


def test_one_sided_asks_for_the_centre_first():
    assert OneSided(probes=2, eps=0.5).ask(7) == (Probe(7, 0, 0.0), Probe(7, 0, 0.5), Probe(7, 1, 0.5))
    assert OneSided(probes=3).directions == 3 and len(OneSided(probes=3).ask(0)) == 4


def test_evolution_asks_for_its_population():
    mirrored = Evolution(population=4, sigma=0.5)
    assert mirrored.ask(7) == TwoPoint(pairs=2, eps=0.5).ask(7) and mirrored.directions == 2
    plain = Evolution(population=3, sigma=0.5, antithetic=False)
    assert plain.ask(7) == (Probe(7, 0, 0.5), Probe(7, 1, 0.5), Probe(7, 2, 0.5)) and plain.directions == 3


@pytest.mark.parametrize("name", [name for name in VARIANTS if "prompt" not in name])
def test_the_order_of_the_examples_makes_no_difference_to_the_last_bit(name):
    estimator = VARIANTS[name](8)
    losses = random_losses(len(estimator.ask(0)), examples=30)
    order = np.random.default_rng(1).permutation(30)
    assert tell(estimator, [tuple(row[i] for i in order) for row in losses]) == tell(estimator, losses)


# two-point


def test_tell_is_the_central_difference_averaged_over_pairs():
    estimator = TwoPoint(pairs=4, eps=0.25)
    estimate = estimator.tell(estimator.ask(0), rows(1.5, 1.0, 2.0, 3.0, 1.0, 1.0, 0.0, 0.5))
    assert estimate == Estimate((0.25, -0.5, 0.0, -0.25), loss=1.25, dropped=0, ties=1)
    single = TwoPoint(eps=0.25)
    assert single.tell(single.ask(0), rows(1.5, 1.0)) == Estimate((1.0,), loss=1.25)


def test_two_point_takes_the_mean_over_the_examples():
    estimator = TwoPoint(pairs=2, eps=0.25)
    several = [(1.0, 2.0), (0.5, 1.5), (4.0, 0.0), (4.0, 2.0)]
    assert tell(estimator, several) == tell(estimator, rows(1.5, 1.0, 2.0, 3.0)) == Estimate((0.5, -1.0), loss=1.875)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_of_the_estimate_is_the_gradient(distribution):
    """Over 10,000 directions, within 4.5 standard errors in each of 16 places; central differences are exact here."""
    count, x = 10_000, np.linspace(1.0, -1.0, SIZE)
    estimator = TwoPoint(pairs=count, eps=1e-3)
    probes = estimator.ask(0)
    z = np.stack([direction(probe, distribution) for probe in probes[::2]])
    losses = rows(*(quadratic(x + sign * estimator.eps * row) for row in z for sign in (+1, -1)))
    estimate = estimator.tell(probes, losses)
    weights = np.array(estimate.weights)
    samples = weights[:, None] * z * count
    errors = samples.std(0) / math.sqrt(count)
    deviation = (weights @ z - gradient(x)) / errors
    assert np.abs(deviation).max() < 4.5
    assert (errors < 0.015 * np.linalg.norm(gradient(x))).all()  # the test is sharp enough to tell
    assert estimate.loss == pytest.approx(quadratic(x), rel=1e-3)
    assert estimate.dropped == 0


def test_pairs_that_share_the_batch_out_are_weighed_by_their_own_examples():
    """Through the grid: pair k of 3 sees examples 4k..4k+3 only, plus and minus the same ones."""
    estimator = TwoPoint(pairs=3, eps=0.25, shared=False)
    probes = estimator.ask(0)
    random = np.random.default_rng(3)
    table = {probe: random.uniform(0, 3, 12).tolist() for probe in probes}  # of all examples
    tiles = tile_grid(probes, 12, 2, shared=estimator.shared)
    parts = [table[probe][tile.start : tile.stop] for tile in tiles for probe in tile.probes]
    flat = np.concatenate(parts)
    each, _ = losses_of(probes, tiles, Scores(flat, 0.0, 0), per_example=True)
    assert [list(row) for row in each] == [
        table[probe][4 * probe.index : 4 * (probe.index + 1)] for probe in probes
    ]  # 4 examples each, none seen by two pairs
    losses, examples = losses_of(probes, tiles, Scores(summed(tiles, flat), 0.0, 0))
    assert examples == 4
    estimate = estimator.tell(probes, losses)
    for k, weight in enumerate(estimate.weights):
        plus, minus = (statistics.fmean(table[Probe(0, k, s * 0.25)][4 * k : 4 * k + 4]) for s in (+1, -1))
        assert weight == pytest.approx((plus - minus) / 0.5 / 3, rel=1e-11)
    assert estimate.loss == pytest.approx(statistics.fmean(loss for row in losses for loss in row))


def test_sharing_the_batch_out_changes_who_sees_what_and_not_the_formula():
    losses = random_losses(8)
    assert tell(TwoPoint(pairs=4, shared=False), losses) == tell(TwoPoint(pairs=4), losses)


# one-sided


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_fzoo_written_out(count, eps):
    losses = random_losses(count + 1, seed=count)
    found = tell(OneSided(probes=count, eps=eps), losses)
    centre, *perturbed = np.array(losses, np.float64).mean(axis=1)
    middle = sum(perturbed) / count
    sigma = math.sqrt(sum((loss - middle) ** 2 for loss in perturbed) / (count - 1))
    assert found.weights == pytest.approx([(loss - centre) / (count * sigma) for loss in perturbed], rel=1e-12)
    assert found.loss == pytest.approx(centre)
    assert (found.dropped, found.ties, found.buried) == (0, 0, 0)


def test_fzoo_in_numbers():
    """Losses 1, 2, 3 around 2 have sigma 1; from a centre of 1.5 they are -1/2, 1/2 and 3/2 away."""
    assert tell(OneSided(probes=3), rows(1.5, 1.0, 2.0, 3.0)).weights == pytest.approx((-1 / 6, 1 / 6, 1 / 2))


def test_fzoo_is_free_of_the_unit_and_the_level_of_the_loss():
    losses = np.array(random_losses(6))
    expected = tell(OneSided(probes=5), losses.tolist()).weights
    assert tell(OneSided(probes=5), (1000 * losses + 7).tolist()).weights == pytest.approx(expected, rel=1e-9)
    assert tell(OneSided(probes=5), (-losses).tolist()).weights == pytest.approx([-w for w in expected], rel=1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_scale_none_is_the_forward_difference(count):
    estimator = OneSided(probes=count, eps=0.25, scale="none")
    perturbed = [1.5, 0.5, 1.0, 3.0][:count]
    estimate = tell(estimator, rows(1.0, *perturbed))
    assert estimate.weights == tuple((loss - 1.0) / 0.25 / count for loss in perturbed)
    assert estimate.loss == 1.0
    assert estimate.ties == (count == 4)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("loss", [0.0, 0.5, 0.1, 0.7])
@pytest.mark.parametrize("count", [2, 3, 6, 8])
def test_one_sided_losses_all_equal_give_zero_weights(scale, loss, count):
    estimate = tell(OneSided(probes=count, scale=scale), rows(*[loss] * (count + 1), examples=3))
    assert estimate == Estimate((0.0,) * count, loss=pytest.approx(loss), ties=count)


@pytest.mark.parametrize("loss", [0.5, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("count", [2, 3, 6, 8])
def test_one_sided_losses_equal_but_for_the_centre_have_no_spread_to_divide_by(loss, count):
    """Their standard deviation is zero, also where their mean is rounded: with losses that are shares of a batch this
    happens, and a spread of rounding errors would make weights of 1e15."""
    assert tell(OneSided(probes=count), rows(loss + 0.1, *[loss] * count)).weights == (0.0,) * count


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_centre_that_is_not_finite_fails_the_step(scale, bad):
    estimator = OneSided(probes=4, scale=scale, max_dropped=0.99)
    with pytest.raises(FloatingPointError, match=r"step 17: 4 of 4 directions .*lower optimizer\.lr"):
        estimator.tell(estimator.ask(17), rows(bad, 1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_fzoo_counts_only_the_probes_that_it_keeps(bad):
    """Of 4 probes one is dropped: N is 3 in the mean, and in sigma."""
    found = tell(OneSided(probes=4), rows(1.5, 1.0, bad, 2.0, 3.0))
    assert found.weights == pytest.approx((-1 / 6, 0.0, 1 / 6, 1 / 2))
    assert (found.dropped, found.loss) == (1, 1.5)


# evolution


@each_centring
def test_mirrored_evolution_without_shaping_is_two_point(centring):
    """Exactly, where sums are exact; else up to the rounding of the mean that is taken away."""
    evolution = Evolution(population=8, sigma=0.25, shaping="none", centring=centring)
    two_point = TwoPoint(pairs=4, eps=0.25)
    losses = rows(1.5, 1.0, 2.0, 3.0, 1.0, 1.0, 0.0, 0.5, examples=2)
    assert tell(evolution, losses) == tell(two_point, losses)
    for seed in range(20):
        losses = random_losses(8, seed=seed)
        found, expected = tell(evolution, losses), tell(two_point, losses)
        assert found.weights == pytest.approx(expected.weights, rel=0, abs=2e-15)
        assert (found.loss, found.ties, found.dropped) == (expected.loss, expected.ties, expected.dropped)


@each_centring
@pytest.mark.parametrize("population", [2, 5, 8])
def test_plain_evolution_without_shaping_has_n_minus_1(population, centring):
    losses = random_losses(population, seed=population)
    evolution = Evolution(population=population, sigma=0.25, antithetic=False, shaping="none", centring=centring)
    values = column_means(losses)
    expected = [(value - statistics.fmean(values)) / ((population - 1) * 0.25) for value in values]
    assert tell(evolution, losses).weights == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_plain_evolution_without_shaping_is_unbiased():
    """Of a linear loss exactly, over all of {-1, 1}^2 as directions of two members: the mean over them is the slope."""
    slope = np.array([0.75, -2.0])
    evolution = Evolution(population=2, sigma=0.5, antithetic=False, shaping="none")
    corners = [np.array(corner) for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    total = np.zeros(2)
    for first in corners:
        for second in corners:
            weights = tell(evolution, rows(*(3 + slope @ (0.5 * z) for z in (first, second)))).weights
            total += weights[0] * first + weights[1] * second
    assert total / 16 == pytest.approx(slope, rel=1e-12)


@mirrored_or_not
def test_z_scores_written_out(antithetic):
    losses = random_losses(8)
    expected = mirrored_or_plain(z_scores(column_means(losses)), antithetic, 8)
    found = tell(Evolution(population=8, antithetic=antithetic, shaping="zscore"), losses)
    assert found.weights == pytest.approx(expected, rel=1e-12)
    assert found.loss == pytest.approx(statistics.fmean(column_means(losses)))


@mirrored_or_not
def test_z_scores_per_prompt_are_divided_by_one_spread_over_all(antithetic):
    losses = random_losses(8)
    columns = [list(column) for column in zip(*losses, strict=True)]
    centred = [[value - statistics.fmean(column) for value in column] for column in columns]
    spread = math.sqrt(statistics.fmean(value**2 for column in centred for value in column))
    shaped = [statistics.fmean(column[i] / spread for column in centred) for i in range(8)]
    found = tell(Evolution(population=8, antithetic=antithetic, shaping="zscore", centring="prompt"), losses)
    assert found.weights == pytest.approx(mirrored_or_plain(shaped, antithetic, 8), rel=1e-12)
    by_column = [z_scores(column) for column in columns]  # not what is meant: a spread for each prompt
    wrong = [statistics.fmean(scores[i] for scores in by_column) for i in range(8)]
    assert found.weights != pytest.approx(mirrored_or_plain(wrong, antithetic, 8), rel=1e-2)
    assert found.weights != pytest.approx(
        tell(Evolution(population=8, antithetic=antithetic, shaping="zscore"), losses).weights, rel=1e-2
    )


@mirrored_or_not
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("population", [2, 8])
def test_centred_ranks_written_out(population, coarse, antithetic):
    losses = random_losses(population)
    if coarse:
        losses = rows(*(round(loss) for loss in column_means(losses)))
        assert population == 2 or len(set(losses)) < population
    values = column_means(losses)
    expected = mirrored_or_plain(centred_ranks(values), antithetic, population)
    found = tell(Evolution(population=population, antithetic=antithetic, shaping="centred_rank"), losses)
    assert found.weights == pytest.approx(expected, rel=1e-14, abs=1e-16)


def test_centred_ranks_in_numbers():
    evolution = Evolution(population=5, antithetic=False, shaping="centred_rank")
    assert tell(evolution, rows(3.0, 1.0, 2.0, 9.0, 5.0)).weights == (0.0, -0.1, -0.05, 0.1, 0.05)
    assert tell(evolution, rows(3.0, 1.0, 1.0, 1.0, 5.0)).weights == (0.05, -0.05, -0.05, -0.05, 0.1)  # mean rank 1


@mirrored_or_not
def test_ranks_per_prompt_are_taken_within_each_prompt(antithetic):
    losses = [tuple(round(2 * loss) / 2 for loss in row) for row in random_losses(8)]  # with ties
    columns = [centred_ranks(list(column)) for column in zip(*losses, strict=True)]
    shaped = [statistics.fmean(column[i] for column in columns) for i in range(8)]
    found = tell(Evolution(population=8, antithetic=antithetic, shaping="centred_rank", centring="prompt"), losses)
    assert found.weights == pytest.approx(mirrored_or_plain(shaped, antithetic, 8), rel=1e-12, abs=1e-15)


@mirrored_or_not
@each_centring
@pytest.mark.parametrize(("factor", "shift"), [(8.0, 0.0), (1.0, 5.0), (1e-3, -2.0), (300.0, 1e3)])
def test_z_scores_are_free_of_unit_and_level(factor, shift, centring, antithetic):
    evolution = Evolution(population=8, antithetic=antithetic, shaping="zscore", centring=centring)
    losses = np.array(random_losses(8))
    expected = tell(evolution, losses.tolist()).weights
    assert tell(evolution, (factor * losses + shift).tolist()).weights == pytest.approx(expected, rel=1e-9, abs=1e-12)


@mirrored_or_not
def test_ranks_are_free_of_monotone_maps(antithetic):
    """Of the members' means; taken prompt by prompt, of each prompt's losses by another map."""
    losses = np.array(random_losses(8))
    maps = [np.exp, np.cbrt, np.tanh, lambda v: 3 * v - 1, lambda v: v**3]
    batch = Evolution(population=8, antithetic=antithetic, shaping="centred_rank")
    prompt = Evolution(population=8, antithetic=antithetic, shaping="centred_rank", centring="prompt")
    means = losses.mean(axis=1, keepdims=True)
    for change in maps:
        assert tell(batch, change(means).tolist()).weights == tell(batch, means.tolist()).weights
    mapped = np.stack([change(column) for change, column in zip(maps, losses.T, strict=True)], axis=1)
    assert tell(prompt, mapped.tolist()).weights == tell(prompt, losses.tolist()).weights
    assert tell(batch, mapped.tolist()).weights != tell(batch, losses.tolist()).weights
    expected = [-w for w in tell(prompt, losses.tolist()).weights]
    assert tell(prompt, (-losses).tolist()).weights == pytest.approx(expected, rel=1e-12, abs=1e-15)


@mirrored_or_not
@each_shaping
def test_prompt_centring_does_not_see_how_hard_a_prompt_is(shaping, antithetic):
    """A constant added to an example's losses changes nothing; the loss reported is that of the batch all the same."""
    evolution = Evolution(population=8, antithetic=antithetic, shaping=shaping, centring="prompt")
    losses = np.array(random_losses(8))
    hard = losses + np.array([0.0, 100.0, -3.0, 1e4, 0.25])
    found, expected = tell(evolution, hard.tolist()), tell(evolution, losses.tolist())
    assert found.weights == pytest.approx(expected.weights, rel=1e-7, abs=1e-9)
    if shaping == "centred_rank":
        assert found.weights == expected.weights
    assert found.loss == pytest.approx(hard.mean())


@mirrored_or_not
@each_centring
@each_shaping
@pytest.mark.parametrize("loss", [0.0, 0.5, 0.1, 0.7])
@pytest.mark.parametrize("directions", [2, 6, 9, 14])
def test_evolution_of_equal_losses_is_zero(directions, loss, shaping, centring, antithetic):
    """Also where a mean is rounded: rounding errors have a spread too, and must not be divided by it."""
    population = directions * (2 if antithetic else 1)
    evolution = Evolution(population=population, antithetic=antithetic, shaping=shaping, centring=centring)
    estimate = tell(evolution, [(loss, loss + 0.1, loss / 3)] * population)
    assert estimate.weights == (0.0,) * directions
    assert (estimate.ties, estimate.buried, estimate.dropped) == (directions, 0, 0)


@mirrored_or_not
@each_centring
@pytest.mark.parametrize("shaping", ["none", "zscore"])
def test_a_member_alone_weighs_nothing(shaping, centring, antithetic):
    """All others dropped: a population of one has no spread; a pair of two has one."""
    evolution = Evolution(
        population=4, sigma=0.25, antithetic=antithetic, shaping=shaping, centring=centring, max_dropped=0.9
    )
    losses = rows(2.0, 1.0, NAN, NAN) if antithetic else rows(2.0, NAN, NAN, NAN)
    expected = {"none": 2.0, "zscore": 1.0}[shaping] if antithetic else 0.0
    assert tell(evolution, losses).weights == (expected,) + (0.0,) * (evolution.directions - 1)


# convergence

CONVERGING = {
    "two-point-1": (TwoPoint(pairs=1, eps=1e-3), 0.04, 400),
    "two-point-8": (TwoPoint(pairs=8, eps=1e-3), 0.25, 60),
    "fzoo": (OneSided(probes=8, eps=1e-3), 0.5, 120),
    "forward-difference": (OneSided(probes=8, eps=1e-3, scale="none"), 0.25, 60),
    **{
        f"{'mirrored' if antithetic else 'plain'}-{shaping}-{centring}": (
            Evolution(population=16, sigma=1e-2, antithetic=antithetic, shaping=shaping, centring=centring),
            {"none": 0.2, "zscore": 0.3, "centred_rank": 1.0}[shaping],
            120,
        )
        for antithetic in (True, False)
        for shaping in SHAPINGS
        for centring in CENTRINGS
    },
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("estimator", "lr", "steps"), CONVERGING.values(), ids=CONVERGING)
def test_converges_on_a_quadratic(estimator, lr, steps, distribution):
    """Two examples, whose mean is the quadratic."""
    optimizer = Sgd(lr=lr, schedule="linear")
    x, state = np.zeros(SIZE), optimizer.init()
    tilt = np.linspace(0.1, -0.2, SIZE)
    first = quadratic(x)
    for step in range(steps):
        probes = estimator.ask(step)
        at = [x + probe.scale * direction(probe, distribution) for probe in probes]
        losses = [(quadratic(y) + tilt @ y, quadratic(y) - tilt @ y) for y in at]
        state, commit = optimizer.update(state, step, steps, estimator.tell(probes, losses).weights)
        for index, coefficient in enumerate(commit.coefficients):
            x += coefficient * direction(Probe(step, index, 1.0), distribution)
    assert first > 3
    assert quadratic(x) < 0.02 * first


# losses that are not finite


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("where", [0, 1])
def test_a_pair_that_is_not_finite_is_dropped_and_the_others_averaged(bad, where):
    estimator = TwoPoint(pairs=3, eps=0.5)
    losses = [2.0, 1.0, 5.0, 7.0, 4.0, 1.0]
    losses[2 + where] = bad
    kept = TwoPoint(pairs=2, eps=0.5)
    expected = kept.tell(kept.ask(0), rows(2.0, 1.0, 4.0, 1.0))
    found = estimator.tell(estimator.ask(0), rows(*losses))
    assert found.weights == (expected.weights[0], 0.0, expected.weights[1])
    assert (found.dropped, found.ties) == (1, 0)
    finite = [loss for loss in losses if loss != bad and not math.isnan(loss)]
    assert found.loss == pytest.approx(sum(finite) / 5)


@each_variant
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("lost", [0, 2, 4])
def test_a_direction_with_a_loss_that_is_not_finite_counts_as_not_asked(make, bad, lost):
    """One bad example of one of its probes is enough; the rest is as if there had been a direction less, to the bit."""
    estimator, fewer = make(5), make(4)
    probes = estimator.ask(0)
    losses = random_losses(len(probes))
    on_it = [i for i, probe in enumerate(probes) if probe.index == lost and probe.scale]
    rest = tell(fewer, [row for i, row in enumerate(losses) if i not in on_it], noise=0.5)
    for i in on_it:
        spoilt = list(losses)
        spoilt[i] = (*losses[i][:3], bad, losses[i][4])
        found = tell(estimator, spoilt, noise=0.5)
        assert found.weights == (*rest.weights[:lost], 0.0, *rest.weights[lost:])
        assert (found.dropped, found.ties, found.buried) == (1, rest.ties, rest.buried)
        assert math.isfinite(found.loss)


@each_variant
def test_both_infinities_in_one_row_are_dropped_too(make):
    estimator = make(3)
    losses = random_losses(len(estimator.ask(0)))
    losses[-1] = (INF, -INF, *losses[-1][2:])
    assert tell(estimator, losses).dropped == 1


def test_the_loss_reported_is_of_the_finite_probes():
    assert tell(Evolution(population=4, antithetic=False), rows(1.0, NAN, 2.0, 6.0)).loss == 3.0
    assert tell(Evolution(population=4), rows(1.0, 3.0, NAN, 5.0)).loss == 3.0
    assert tell(OneSided(probes=3), rows(1.0, 8.0, 9.0, INF)).loss == 1.0  # the centre is the state itself


def test_equal_infinities_are_dropped_and_no_tie():
    estimator = TwoPoint(pairs=2, eps=0.5)
    assert estimator.tell(estimator.ask(0), rows(INF, INF, 2.0, 1.0)) == Estimate((0.0, 1.0), loss=1.5, dropped=1)


@pytest.mark.parametrize(
    ("max_dropped", "pairs", "bad", "fails"),
    [(0.5, 4, 2, False), (0.5, 4, 3, True), (0.5, 1, 1, True), (0.0, 10, 1, True), (0.99, 4, 3, False)],
)
def test_too_many_dropped_pairs_fail_the_step(max_dropped, pairs, bad, fails):
    estimator = TwoPoint(pairs=pairs, max_dropped=max_dropped)
    losses = rows(*([NAN, 1.0] * bad + [2.0, 1.0] * (pairs - bad)))
    if fails:
        said = rf"step 17: {bad} of {pairs} directions .*nan.*lower optimizer\.lr"
        with pytest.raises(FloatingPointError, match=said):
            estimator.tell(estimator.ask(17), losses)
    else:
        assert estimator.tell(estimator.ask(17), losses).dropped == bad


@each_variant
def test_half_may_be_dropped_unless_told_otherwise(make):
    estimator = make(4)
    probes = estimator.ask(9)
    good = random_losses(len(probes))
    for bad in range(5):
        losses = [
            (NAN,) * 5 if probe.scale > 0 and probe.index < bad else row
            for probe, row in zip(probes, good, strict=True)
        ]
        if bad <= 2:
            estimate = estimator.tell(probes, losses)
            assert estimate.dropped == bad and estimate.weights[:bad] == (0.0,) * bad
            assert any(estimate.weights[bad:])
        else:
            with pytest.raises(FloatingPointError, match=f"step 9: {bad} of 4 directions"):
                estimator.tell(probes, losses)


# ties, and differences that the score noise buries


def test_ties_are_counted():
    estimator = TwoPoint(pairs=3, eps=0.5)
    estimate = estimator.tell(estimator.ask(0), rows(0.5, 0.5, 0.25, 0.25, 1.0, 0.5))
    assert estimate.ties == 2 and estimate.weights[:2] == (0.0, 0.0)


# Each with the gaps 0, 1/4, -1/4, 3/8, -1/8 (or, around the mean, the same).
GAPS = {
    "two-point": (TwoPoint(pairs=5), (1.0, 1.0, 1.25, 1.0, 0.75, 1.0, 1.375, 1.0, 0.875, 1.0)),
    "two-point-apart": (TwoPoint(pairs=5, shared=False), (1.0, 1.0, 1.25, 1.0, 0.75, 1.0, 1.375, 1.0, 0.875, 1.0)),
    "one-sided": (OneSided(probes=5), (1.0, 1.0, 1.25, 0.75, 1.375, 0.875)),
    "one-sided-none": (OneSided(probes=5, scale="none"), (1.0, 1.0, 1.25, 0.75, 1.375, 0.875)),
    "mirrored": (Evolution(population=10), (1.0, 1.0, 1.25, 1.0, 0.75, 1.0, 1.375, 1.0, 0.875, 1.0)),
    "plain": (Evolution(population=6, antithetic=False), (1.25, 1.0, 0.75, 1.375, 0.875, 0.75)),  # another -1/4
}


@pytest.mark.parametrize(("estimator", "losses"), GAPS.values(), ids=GAPS)
def test_the_noise_floor_is_that_of_a_difference_of_two_means(estimator, losses):
    """sqrt(2 / n) * noise; at 8 examples half the noise, at 2 all of it. A gap of that size is buried; a tie is not."""
    more = isinstance(estimator, Evolution) and not estimator.antithetic
    for examples, noise, buried in [
        (8, 0.0, 0),
        (8, 0.2, 0),
        (8, 0.25, 1),
        (8, 0.49, 1),
        (8, 0.5, 3 + more),
        (8, 0.74, 3 + more),
        (8, 0.75, 4 + more),
        (2, 0.125, 1),
        (2, 0.24, 1),
        (2, 0.25, 3 + more),
        (2, 100.0, 4 + more),
    ]:
        estimate = tell(estimator, rows(*losses, examples=examples), noise)
        assert (estimate.ties, estimate.buried) == (1, buried), (examples, noise)
        assert estimate.weights == tell(estimator, rows(*losses, examples=examples)).weights  # counted, not changed


@pytest.mark.parametrize("noise", [0.0, 10.0])
def test_dropped_directions_are_neither_ties_nor_buried(noise):
    for bad in (NAN, INF):
        pairs = tell(TwoPoint(pairs=4), rows(bad, bad, 1.0, 1.0, bad, 1.0, 2.0, 1.0), noise)
        assert (pairs.dropped, pairs.ties, pairs.buried) == (2, 1, int(noise > 0))
        mirrored = tell(Evolution(population=8), rows(bad, bad, 1.0, 1.0, bad, 1.0, 2.0, 1.0), noise)
        assert (mirrored.dropped, mirrored.ties, mirrored.buried) == (2, 1, int(noise > 0))
        one_sided = tell(OneSided(probes=4), rows(1.0, bad, 1.0, bad, 2.0), noise)
        assert (one_sided.dropped, one_sided.ties, one_sided.buried) == (2, 1, int(noise > 0))
        plain = tell(Evolution(population=6, antithetic=False), rows(bad, 1.0, 2.0, 3.0, bad, bad), noise)
        assert (plain.dropped, plain.ties, plain.buried) == (3, 1, 2 * int(noise > 0))


def test_the_noise_of_pairs_that_share_the_batch_out_is_that_of_their_few_examples():
    """8 examples over 4 pairs: 2 each, so that the floor is the noise itself."""
    losses = [(1.0, 1.5), (1.0, 1.0)] * 4
    assert tell(TwoPoint(pairs=4, shared=False), losses, 0.25).buried == 4
    assert tell(TwoPoint(pairs=4, shared=False), losses, 0.24).buried == 0


# bad parameters


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"pairs": 0}, r"expected estimator\.pairs to be a whole number of at least 1; got 0"),
        ({"pairs": 1.5}, "got 1.5"),
        ({"pairs": True}, "got True"),
        ({"pairs": "4"}, "got '4'"),
        ({"eps": 0.0}, r"expected estimator\.eps to be a positive number; got 0.0"),
        ({"eps": -1e-3}, "got -0.001"),
        ({"eps": NAN}, "got nan"),
        ({"eps": INF}, "got inf"),
        ({"eps": "small"}, "got 'small'"),
        ({"shared": "no"}, r"expected estimator\.shared to be true or false; got 'no'"),
        ({"shared": None}, "got None"),
        ({"max_dropped": 1.0}, r"expected estimator\.max_dropped to be a share in \[0, 1\); got 1.0"),
        ({"max_dropped": -0.1}, "got -0.1"),
        ({"max_dropped": None}, "got None"),
    ],
)
def test_bad_parameters_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        TwoPoint(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"probes": 1}, r"expected estimator\.probes to be a whole number of at least 2; got 1"),
        ({"probes": 0, "scale": "none"}, r"expected estimator\.probes to be a whole number of at least 1; got 0"),
        ({"probes": 2.0}, "got 2.0"),
        ({"eps": 0}, r"expected estimator\.eps to be a positive number; got 0"),
        ({"eps": NAN}, "got nan"),
        ({"scale": "sigma"}, r"expected estimator\.scale to be std or none; got 'sigma'"),
        ({"scale": None}, "got None"),
        ({"max_dropped": 1.0}, r"expected estimator\.max_dropped to be a share in \[0, 1\); got 1.0"),
    ],
)
def test_bad_parameters_of_one_sided_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        OneSided(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"population": 1}, r"expected estimator\.population to be a whole number of at least 2; got 1"),
        ({"population": 1, "antithetic": False}, "of at least 2; got 1"),
        ({"population": 7}, r"an even estimator\.population for mirrored pairs; got 7.*antithetic=false"),
        ({"population": 8.0}, "got 8.0"),
        ({"antithetic": "yes"}, r"expected estimator\.antithetic to be true or false; got 'yes'"),
        ({"sigma": 0.0}, r"expected estimator\.sigma to be a positive number; got 0.0"),
        ({"sigma": INF}, "got inf"),
        ({"shaping": "rank"}, r"expected estimator\.shaping to be one of none, zscore, centred_rank; got 'rank'"),
        ({"shaping": None}, "got None"),
        ({"centring": "example"}, r"expected estimator\.centring to be one of batch, prompt; got 'example'"),
        ({"max_dropped": -1}, r"expected estimator\.max_dropped to be a share in \[0, 1\); got -1"),
    ],
)
def test_bad_parameters_of_evolution_are_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Evolution(**kwargs)


def test_an_odd_population_is_fine_without_mirroring():
    assert Evolution(population=7, antithetic=False).directions == 7
