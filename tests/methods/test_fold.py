"""Folding: products and overlaps with the same bits everywhere, and rounding that is right to the bit and in the mean.

The references are in NumPy and in whole numbers; float16 is NumPy's own, bfloat16 the upper half of a float32.
"""

import hashlib
import math
import re

import numpy as np
import pytest
import torch

from zoray.methods.directions import direction_numpy, gaussian_quantiles, philox_numpy, uniform_torch
from zoray.methods.spaces import fold
from zoray.records import ConfigError

NAME = "model.layers.0.mlp.up_proj"
HALVES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# uniform numbers


def uniform_by_hand(seed: int, step: int, probe: int, name: str, n: int) -> np.ndarray:
    tensor = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    numbers = []
    for block in range(-(-n // 8)):
        words = philox_numpy([block, probe, step, tensor >> 32], [seed, tensor % 2**32]).tolist()
        numbers += [half for word in words for half in (word % 2**16, word >> 16)]
    return np.array([(number + 0.5) / 65536 for number in numbers[:n]])


@pytest.mark.parametrize(
    "address", [(0, 0, 0, NAME), (2**32 - 1, 12345, 7, f"{NAME}.round"), (1, 2**32 - 1, 2**32 - 1, "")]
)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100])
def test_uniform_numbers_are_the_halves_of_the_words_at_their_address(address, n):
    found = uniform_torch(*address, n)
    assert found.dtype == torch.float32 and found.shape == (n,)
    assert found.double().tolist() == uniform_by_hand(*address, n).tolist()  # 17 bits: no rounding on the way


def test_uniform_numbers_are_pinned():
    found = uniform_torch(5, 6, 7, f"{NAME}.round", 1000)
    assert (found[:4] * 65536).tolist() == [53642.5, 33768.5, 1298.5, 12388.5]
    assert (
        hashlib.sha256(found.numpy().astype("<f4").tobytes()).hexdigest()
        == "685863a50bc849a35328520796e05f12c3b2990327f3cfc599fc1635ad684d94"
    )


def test_uniform_numbers_and_normal_ones_share_their_bits():
    """One more witness to the order of words and halves: the quantile of the uniform number is the normal one."""
    u = uniform_torch(3, 4, 5, NAME, 999).numpy().astype(np.float64)
    quantiles = gaussian_quantiles()[(u * 65536 - 0.5).astype(np.int64)]
    assert quantiles.tobytes() == direction_numpy(3, 4, 5, NAME, 0, 999, "gaussian").tobytes()


def test_a_shorter_call_gives_the_first_numbers_of_a_longer_one():
    whole = uniform_torch(1, 2, 3, NAME, 1001)
    for n in (0, 1, 2, 7, 8, 9, 64, 999, 1000):
        assert torch.equal(uniform_torch(1, 2, 3, NAME, n), whole[:n])


def test_uniform_numbers_are_inside_0_and_1_and_uniform():
    n = 1 << 20
    u = uniform_torch(0, 0, 0, NAME, n).double()
    assert float(u.min()) == 0.5 / 65536 and float(u.max()) == 65535.5 / 65536  # all of them occur in so many
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    counts = np.histogram(u.numpy(), bins=256, range=(0, 1))[0]
    assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 4 * math.sqrt(2 * 255)
    for lag in (1, 2, 4, 8):
        assert abs(float(((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean()) * 12) < 4 / math.sqrt(n)


def test_no_two_addresses_share_uniform_numbers():
    addresses = [(0, 1, 2, NAME), (1, 0, 2, NAME), (0, 2, 1, NAME), (0, 1, 2, NAME + "."), (1, 1, 2, NAME)]
    found = [uniform_torch(*address, 10_000).double() - 0.5 for address in addresses]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert abs(float((a * b).mean()) * 12) < 4.5 / 100


@pytest.mark.parametrize("bad", [-1, 2**32])
@pytest.mark.parametrize("what", ["seed", "step", "probe"])
def test_addresses_out_of_range_are_refused(what, bad):
    with pytest.raises(ConfigError, match=rf"expected {what} to fit 32 bits; got {bad}"):
        uniform_torch(**{"seed": 0, "step": 0, "probe": 0, what: bad}, name=NAME, n=8)


# products


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (33, 17)])
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 64])
def test_a_product_is_a_sum_of_rank_one_terms_in_order(rank, shape):
    """float32, rounded after every product and every sum; what it is given stays as it is."""
    b, a = normal(shape[0], rank), normal(rank, shape[1], seed=1)
    expected = b[:, 0][:, None] * a[0][None, :]
    for j in range(1, rank):
        expected = expected + b[:, j][:, None] * a[j][None, :]
    assert expected.dtype == np.float32
    given = torch.from_numpy(b.copy()), torch.from_numpy(a.copy())
    for distribution in (None, "gaussian"):
        found = fold.product(*given, distribution)
        assert found.dtype == torch.float32 and found.numpy().tobytes() == expected.tobytes()
    assert given[0].numpy().tobytes() == b.tobytes() and given[1].numpy().tobytes() == a.tobytes()
    assert np.abs(expected - b.astype(np.float64) @ a).max() < 1e-5


def test_the_order_of_terms_matters_to_the_bits():
    """So that the test above would notice another order."""
    b, a = torch.from_numpy(normal(33, 64)), torch.from_numpy(normal(64, 17, seed=1))
    assert not torch.equal(fold.product(b, a), fold.product(b.flip(1), a.flip(0)))


def test_a_product_of_views_is_that_of_copies():
    """Factors come as views of a flat vector, and transposed ones must not matter."""
    b, a = torch.from_numpy(normal(5, 9)).t(), torch.from_numpy(normal(3, 5)).t()
    assert torch.equal(fold.product(b, a), fold.product(b.contiguous(), a.contiguous()))


@pytest.mark.parametrize("rank", [1, 3, 128, 512])
def test_a_rademacher_product_is_the_plain_product(rank):
    b = direction_numpy(0, 0, 0, "b", 0, 33 * rank, "rademacher").reshape(33, rank)
    a = direction_numpy(0, 0, 0, "a", 0, rank * 17, "rademacher").reshape(rank, 17)
    expected = (b.astype(np.int64) @ a.astype(np.int64)).astype(np.float32)
    given = torch.from_numpy(b), torch.from_numpy(a)
    for found in (fold.product(*given, "rademacher"), fold.product(*given), given[0] @ given[1]):
        assert found.numpy().tobytes() == expected.tobytes()


# overlaps


@pytest.mark.parametrize("n", [64, 1000, 4099])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_an_overlap_is_that_of_float64(rank, n):
    old, new = (direction_numpy(0, s, 0, NAME, 0, rank * n, "gaussian").reshape(rank, n) for s in (0, 50))
    found = fold.overlap(torch.from_numpy(old), torch.from_numpy(new))
    expected = old.astype(np.float64) @ new.astype(np.float64).T / n  # V_old^T V_new / n, with V^T stored
    assert found.dtype == torch.float32 and found.shape == (rank, rank)
    assert np.abs(found.numpy() - expected).max() < 1e-6
    if rank > 1:
        assert np.abs(found.numpy().T - expected).max() > 0.01  # the other way round is another matrix


@pytest.mark.parametrize("n", [1, 100, 4099])
def test_an_overlap_of_rademacher_factors_is_exact(n):
    old, new = (direction_numpy(0, s, 0, NAME, 0, 3 * n, "rademacher").reshape(3, n) for s in (0, 50))
    found = fold.overlap(torch.from_numpy(old), torch.from_numpy(new))
    expected = (old.astype(np.int64) @ new.astype(np.int64).T / n).astype(np.float32)
    assert found.tolist() == expected.tolist()
    assert fold.overlap(torch.from_numpy(old), torch.from_numpy(old)).diag().tolist() == [1.0, 1.0, 1.0]


def test_an_overlap_does_not_depend_on_the_order_of_its_terms():
    old, new = torch.from_numpy(normal(3, 5000)), torch.from_numpy(normal(3, 5000, seed=1))
    expected, order = fold.overlap(old, new), torch.from_numpy(np.random.default_rng(2).permutation(5000))
    assert torch.equal(fold.overlap(old[:, order], new[:, order]), expected)
    assert torch.equal(fold.overlap(old.flip(1), new.flip(1)), expected)
    assert torch.equal(fold.overlap(new, old), expected.t())


def test_the_largest_overlap_fits_its_integers():
    """2**16 columns that all hold the largest quantile there is."""
    largest = float(gaussian_quantiles()[-1])
    row = torch.full((1, 1 << 16), largest)
    assert float(fold.overlap(row, row)) == pytest.approx(largest**2, rel=1e-6)
    assert float(fold.overlap(row, -row)) == pytest.approx(-(largest**2), rel=1e-6)


# the two floats of 16 bits, by other means


def ordered(bits: np.ndarray) -> np.ndarray:
    """Bits of 16-bit floats -> whole numbers in the order of the floats; both zeros are 0."""
    bits = bits.astype(np.int64)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def step_bits(bits: np.ndarray, up: bool) -> np.ndarray:
    """Bits of the next 16-bit float above or below. A number that reaches zero keeps its sign there."""
    place = ordered(bits) + (1 if up else -1)
    negative = (place < 0) | ((place == 0) & (bits & 0x8000 != 0))
    return np.where(negative, 0x8000 | -place, place).astype(np.uint16)


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def floats_of(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype)


def to_float64(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The values of 16-bit floats, without torch."""
    if dtype == torch.float16:
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def neighbours(values: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the 16-bit floats just below and above float32 values, both of them that value where it is one."""
    if dtype == torch.float16:
        near = values.astype(np.float16)
        with np.errstate(over="ignore"):
            lower, higher = (np.nextafter(near, np.float16(end)) for end in (-np.inf, np.inf))
        below = np.where(near.astype(np.float32) > values, lower, near)
        above = np.where(near.astype(np.float32) < values, higher, near)
        return below.view(np.uint16), above.view(np.uint16)
    words = values.view(np.uint32)
    towards_zero, rest = (words >> 16).astype(np.uint16), words & 0xFFFF
    away = np.where(rest > 0, towards_zero + 1, towards_zero).astype(np.uint16)
    negative = words >> 31 == 1
    return np.where(negative, away, towards_zero), np.where(negative, towards_zero, away)


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bits of the nearest 16-bit float; ties go to even."""
    if dtype == torch.float16:
        return values.astype(np.float16).view(np.uint16)
    words = values.view(np.uint32).astype(np.uint64)
    return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)


FINITE = {
    torch.float16: np.array([b for b in range(65536) if b & 0x7C00 != 0x7C00], np.uint16),
    torch.bfloat16: np.array([b for b in range(65536) if b & 0x7F80 != 0x7F80], np.uint16),
}


def test_the_references_agree_where_they_meet():
    bits = FINITE[torch.float16]
    values = bits.view(np.float16)
    with np.errstate(over="ignore"):
        assert (np.nextafter(values, np.float16(np.inf)).view(np.uint16) == step_bits(bits, True)).all()
        assert (np.nextafter(values, np.float16(-np.inf)).view(np.uint16) == step_bits(bits, False)).all()
    for dtype in HALVES:
        assert (to_float64(FINITE[dtype], dtype) == floats_of(FINITE[dtype], dtype).double().numpy()).all()


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_neighbour_of_every_finite_number(dtype, far, up):
    """`exact` is the next float32 on that side (near), or far beyond: only the side counts."""
    near = floats_of(FINITE[dtype], dtype)
    towards = torch.tensor(math.inf if up else -math.inf)
    exact = torch.nextafter(near.float(), towards)
    if far:
        exact = torch.full_like(exact, 3.4e38 if up else -3.4e38)
    found = bits_of(fold._neighbour(near, exact))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            expected = np.nextafter(near.numpy(), np.float16(math.inf if up else -math.inf)).view(np.uint16)
    else:
        expected = step_bits(FINITE[dtype], up)
        largest = near.float().abs() == near.float().abs().max()  # beyond which 3.4e38 is not
        keep = ~(largest & (torch.sign(near.float()) == (1 if up else -1))).numpy() if far else slice(None)
        found, expected = found[keep], expected[keep]
    assert (found == expected).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_number_that_is_exact_is_its_own_neighbour(dtype):
    near = floats_of(FINITE[dtype], dtype)
    assert (bits_of(fold._neighbour(near, near.float())) == FINITE[dtype]).all()


# rounding to nearest


def awkward(dtype: torch.dtype) -> np.ndarray:
    """Every finite 16-bit float, and float32 values a quarter, a half and three quarters of the way to the next one."""
    bits = FINITE[dtype]
    bits = bits[(bits & 0x7FFF) < (bits & 0x7FFF).max()]  # the next one is finite too
    here, there = to_float64(bits, dtype), to_float64(step_bits(bits, True), dtype)
    values = [here + part * (there - here) for part in (0, 0.25, 0.49, 0.5, 0.51, 0.75)]
    return np.concatenate(values).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nearest_is_the_nearest_with_ties_to_even(dtype):
    values = np.concatenate([awkward(dtype), normal(10_000), normal(10_000, seed=1) * np.float32(1e-6)])
    weight = torch.full((1, len(values)), 7.0, dtype=dtype)
    place = weight.data_ptr()
    fold.write_rounded(weight, torch.from_numpy(values)[None], "nearest", 0, 0, NAME)
    assert weight.data_ptr() == place and weight.dtype == dtype
    assert (bits_of(weight[0]) == nearest(values, dtype)).all()


@pytest.mark.parametrize("rounding", fold.ROUNDINGS)
def test_a_float32_weight_takes_the_exact_bits(rounding):
    values = np.concatenate([normal(1000), np.array([0.0, -0.0, 1e-45, -3.4e38], np.float32)])
    weight = torch.zeros(1, len(values))
    fold.write_rounded(weight, torch.from_numpy(values)[None], rounding, 0, 0, NAME)
    assert weight.numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("rounding", fold.ROUNDINGS)
def test_a_float64_weight_takes_all_bits_of_a_float64_sum(rounding):
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 50)))
    weight = torch.zeros_like(values)
    fold.write_rounded(weight, values, rounding, 0, 0, NAME)
    assert torch.equal(weight, values)


# stochastic rounding


def rounded(values: np.ndarray, dtype: torch.dtype, columns: int, seed: int = 0, step: int = 0, name: str = NAME):
    """Bits of `columns` draws of each value, (values, columns)."""
    exact = torch.from_numpy(values)[:, None].repeat(1, columns)
    weight = torch.full_like(exact, 7.0, dtype=dtype)
    fold.write_rounded(weight, exact, "stochastic", seed, step, name)
    assert weight.dtype == dtype
    return bits_of(weight)


# Parts of the way from a 16-bit float to the next one outwards, and those floats: powers of two, where the distance
# changes, and their neighbours inwards; plain ones; subnormals and both zeros.
PARTS = (1 / 1024, 0.125, 0.3, 0.5, 0.7, 1 - 1 / 64)
PLAIN = {
    torch.float16: [0x0000, 0x0001, 0x0002, 0x0100, 0x03FF, 0x0400, 0x0401, 0x3555, 0x3BFF, 0x3C00, 0x6BFF, 0x7BFE],
    torch.bfloat16: [0x0000, 0x0001, 0x0002, 0x0040, 0x007F, 0x0080, 0x0081, 0x3EAB, 0x3F7F, 0x3F80, 0x4480, 0x7F7E],
}


def between(dtype: torch.dtype) -> np.ndarray:
    """float32 values between 16-bit floats, of both signs."""
    bits = np.array(PLAIN[dtype], np.uint16)
    here, there = to_float64(bits, dtype), to_float64(bits + 1, dtype)
    values = np.concatenate([here + part * (there - here) for part in PARTS])
    return np.concatenate([values, -values]).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_has_the_right_mean(dtype):
    """Over 40 addresses (seed, step) of 512 elements each; the mean of 16 bits is right to 2**-17 of the distance."""
    values = between(dtype)
    below, above = (to_float64(bits, dtype)[:, None] for bits in neighbours(values, dtype))
    addresses = [(seed, step) for seed in range(4) for step in range(10)]
    found = np.concatenate([to_float64(rounded(values, dtype, 512, *address), dtype) for address in addresses], 1)
    assert ((found == below) | (found == above)).all()  # nothing but the two neighbours
    exact, distance = values.astype(np.float64)[:, None], above - below
    assert (distance > 0).all()
    share = (exact - below) / distance  # of those that go up
    went_up, n = (found == above).mean(axis=1, keepdims=True), found.shape[1]
    error = np.sqrt(share * (1 - share) / n)
    assert (np.abs(went_up - share) < 4.5 * error + 2.0**-16).all()
    assert np.abs((went_up - share) / error).std() < 1.5
    drift = ((found.mean(axis=1, keepdims=True) - exact) / distance / error).sum() / math.sqrt(len(values))
    assert abs(drift) < 4  # nor do all of them together lean to one side
    outwards = np.where(exact > 0, went_up - share, share - went_up) / error
    assert abs(outwards.sum() / math.sqrt(len(values))) < 4  # or away from zero


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_both_neighbours_occur_on_either_side_of_a_power_of_two(dtype):
    """Below 1 the distance is half of that above: a wrong neighbour or distance would show as a wrong share."""
    epsilon = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    values = np.array([1 + epsilon / 4, 1 - epsilon / 8, -1 - epsilon / 4, -1 + epsilon / 8], np.float32)
    found = to_float64(rounded(values, dtype, 20_000), dtype)
    for row, other in zip(found, (1 + epsilon, 1 - epsilon / 2, -1 - epsilon, -1 + epsilon / 2), strict=True):
        assert set(row) == {round(other), other}
        assert (row == other).mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20_000))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_between_the_zeros_and_the_smallest_number(dtype):
    """A value next to zero goes to a zero of its own sign or to the smallest number of that sign."""
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    values = np.array([0.25 * smallest, -0.25 * smallest, 0.75 * smallest, -0.75 * smallest], np.float32)
    found = rounded(values, dtype, 20_000)
    for row, sign, share in zip(found, (0, 0x8000, 0, 0x8000), (0.25, 0.25, 0.75, 0.75), strict=True):
        assert set(row.tolist()) == {sign, sign | 1}
        assert (row == (sign | 1)).mean() == pytest.approx(share, abs=4 * math.sqrt(0.25 * 0.75 / 20_000))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_representable_stays(dtype):
    """All finite numbers, at several addresses: the same bits, the sign of zero too."""
    values = floats_of(FINITE[dtype], dtype).float().numpy()
    for step in range(3):
        assert (rounded(values, dtype, 2, step=step) == FINITE[dtype][:, None]).all()


def test_a_tiny_step_is_kept_in_the_mean_only_by_stochastic_rounding():
    """What it is for: 400 steps of a hundredth of the distance to the next float16."""
    step, total = 2.0**-10 / 100, {}
    for rounding in fold.ROUNDINGS:
        weight = torch.ones(1, 400, dtype=torch.float16)
        for number in range(400):
            fold.write_rounded(weight, weight.float() + step, rounding, 0, number, NAME)
        total[rounding] = float(weight.double().mean()) - 1
    assert total["nearest"] == 0.0
    assert total["stochastic"] == pytest.approx(400 * step, rel=0.05)


def test_a_finite_number_does_not_become_infinite_by_chance():
    """Just above the largest float16 the other neighbour is infinite; its distance is too, so its share is 0."""
    values = np.array([65504.0, 65505.0, 65519.0, -65519.0], np.float32)
    found = to_float64(rounded(values, torch.float16, 10_000), torch.float16)
    assert (found == np.array([[65504.0], [65504.0], [65504.0], [-65504.0]])).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_equals_numpy_to_the_bit(dtype):
    """Element i takes the other neighbour where number i of its address is below the share."""
    values = np.concatenate([between(dtype), normal(999)])
    found = rounded(values, dtype, 3, seed=8, step=9, name=NAME)
    u = uniform_by_hand(8, 9, 0, f"{NAME}.round", 3 * len(values)).reshape(-1, 3)
    below, above = neighbours(values, dtype)
    near = nearest(values, dtype)
    other = np.where(near == below, above, below)
    gap = np.abs(to_float64(above, dtype) - to_float64(below, dtype))
    share = np.abs(values - to_float64(near, dtype)) / np.where(gap > 0, gap, 1)
    expected = np.where(u < share[:, None], other[:, None], near[:, None])
    assert (found == expected).all()
    assert (found != near[:, None]).mean() > 0.1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_same_address_gives_the_same_bits_and_another_one_others(dtype):
    values = normal(1000)
    first = rounded(values, dtype, 4, seed=1, step=2, name=NAME)
    assert (rounded(values, dtype, 4, seed=1, step=2, name=NAME) == first).all()
    for address in [(0, 2, NAME), (1, 3, NAME), (2, 1, NAME), (1, 2, NAME.replace("up", "down"))]:
        changed = (rounded(values, dtype, 4, *address) != first).mean()
        assert changed == pytest.approx(1 / 3, abs=0.05)  # 2 p (1 - p), with p uniform in 0..1


# what is refused


@pytest.mark.parametrize("rounding", ["", "up", "Nearest", None])
def test_unknown_roundings_are_refused(rounding):
    says = rf"expected space\.fold_rounding to be one of nearest, stochastic; got {rounding!r}"
    with pytest.raises(ConfigError, match=says):
        fold.check_rounding(rounding)


MATRICES = {"one": (3, 4), "two": (5, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_plain_weights_are_taken_as_they_are(dtype):
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in {**MATRICES, "three": (1, 1)}.items()}
    assert fold.check_weights(MATRICES, weights, "lozo") is weights


@pytest.mark.parametrize(
    ("two", "found"),
    [
        (torch.zeros(5, 2, dtype=torch.int8), "int8 of shape (5, 2)"),
        (torch.zeros(5, 1, dtype=torch.uint8), "uint8 of shape (5, 1)"),
        (torch.zeros(5, 2, dtype=torch.float8_e4m3fn), "float8_e4m3fn of shape (5, 2)"),
        (torch.zeros(2, 5), "float32 of shape (2, 5)"),
        (torch.zeros(10), "float32 of shape (10,)"),
        (None, "no plain weight"),
    ],
)
def test_other_weights_are_refused_by_name(two, found):
    weights = {"one": torch.zeros(3, 4)} | ({} if two is None else {"two": two})
    says = f"; two has {found} (expected (5, 2)). Take space=lora, which never writes the base weights"
    with pytest.raises(ConfigError, match=rf"space=lozo folds into base weights of .*{re.escape(says)}"):
        fold.check_weights(MATRICES, weights, "lozo")


def test_a_caller_without_weights_is_refused():
    with pytest.raises(ConfigError, match="space=lowrank folds into the base weights; this caller has none to give"):
        fold.check_weights(MATRICES, None, "lowrank")


# many terms at once


@pytest.mark.parametrize("distribution", [None, "gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("block", [1, 100, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_added_in_blocks_have_the_bits_of_a_product_each(distribution, rank, block, dtype, monkeypatch):
    monkeypatch.setattr(fold, "CACHE_ELEMENTS", block)
    signs = np.sign if distribution == "rademacher" else np.positive
    terms = [
        (
            torch.from_numpy(signs(normal(37, rank, seed=2 * k))),
            torch.from_numpy(signs(normal(rank, 29, seed=2 * k + 1))),
            0.003 * (k - 1.5),
        )
        for k in range(4)
    ]
    start = torch.from_numpy(normal(37, 29, seed=99)).to(dtype)
    expected, found = start.clone(), start.clone()
    for b, a, factor in terms:
        expected += fold.product(b, a, distribution) * factor
    fold.add_products(found, terms, distribution)
    assert torch.equal(found, expected) and not torch.equal(found, start)
