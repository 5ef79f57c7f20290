"""Directions: the published generator, the same bits everywhere and for every slice, and the right statistics."""

import gc
import hashlib
import math
from itertools import combinations, product
from statistics import NormalDist

import numpy as np
import pytest
import torch

from zoray.methods import directions
from zoray.methods.directions import (
    ALIGNMENT,
    Layout,
    compile_directions,
    direction_numpy,
    direction_torch,
    gaussian_quantiles,
    name_hash,
    philox_numpy,
    philox_torch,
)
from zoray.methods.directions_cpu import Loops
from zoray.records import ConfigError

DISTRIBUTIONS = ["rademacher", "gaussian"]
Q, V = "model.layers.0.self_attn.q_proj.lora_B", "model.layers.0.self_attn.v_proj.lora_B"

# philox4x32-10 in kat_vectors of the Random123 distribution: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# These must never change: a journal is worth nothing to a version that makes other directions. Elements 0..999.
GOLDEN = {
    ("rademacher", 0, 0, 0, Q): "d3ffc3df7d12cd74e3e21ac4b9d49541eda0c78d0c3e3569ca824681f2da95ca",
    ("rademacher", 0xFFFFFFFF, 12345, 7, V): "0c8384670f6c069f8e0490b8516347d42fe124485d89a3015bf5f03b895b31d7",
    ("gaussian", 0, 0, 0, Q): "59872ff95beb51f9ca12d030962fac198c5844ca61d7013f452f40cec35a4305",
    ("gaussian", 0xFFFFFFFF, 12345, 7, V): "664db3fa684eec61d3b51965425a5da433ad3684fd26f2dc9b1b0dbe40f01e50",
}
GOLDEN_START = {
    "rademacher": [1.0, 1.0, 1.0, 1.0, 1.0, -1.0],
    "gaussian": [-2.1662943, 0.52907133, 0.4536647, -0.3084148, 0.13954079, -0.33483812],
}
SHAPES = {Q: (5, 8), V: (16, 8), "model.layers.1.mlp.up_proj.lora_B": (33, 4), "head.lora_A": (3, 129), "tail": (1, 1)}


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """However few blocks (but one, of which no loop is compiled): what is compared with NumPy must not be NumPy."""
    monkeypatch.setattr(directions, "FEW_BLOCKS", 1)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors of two independent samples."""
    return float(np.mean(a.astype(np.float64) * b)) * math.sqrt(len(a))


# the generator


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert philox_numpy(words(counter), words(key)).tolist() == words(expected)
    tensors = [torch.tensor([word]) for word in words(counter)]
    assert philox_torch(tensors, words(key)).tolist() == [words(expected)]


def test_philox_broadcasts_and_numpy_equals_torch_on_random_words():
    random = np.random.default_rng(0)
    counter = [random.integers(0, 2**32, shape) for shape in ((7, 1), (1, 5), (7, 5), (5,))]
    key = [int(random.integers(0, 2**32)), random.integers(0, 2**32, (7, 1))]
    expected = philox_numpy(counter, key)
    assert expected.shape == (7, 5, 4)
    alone = philox_numpy([counter[0][3, 0], counter[1][0, 2], counter[2][3, 2], counter[3][2]], [key[0], key[1][3, 0]])
    assert alone.tolist() == expected[3, 2].tolist()
    found = philox_torch([torch.from_numpy(word) for word in counter], [key[0], torch.from_numpy(key[1])])
    assert (found.numpy() == expected).all()


def test_name_hash_is_the_same_in_every_process():
    assert name_hash(Q) == 16316104441275240365
    assert name_hash("") == 13020603013274838756


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in whole numbers, as the paper writes it."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_address_reaches_the_generator_as_documented(distribution):
    seed, step, probe = 123, 45, 6
    name = int.from_bytes(hashlib.blake2b(Q.encode(), digest_size=8).digest(), "little")
    expected = []
    for block in range(3):
        random = philox_python([block, probe, step, name >> 32], [seed, name % 2**32])
        if distribution == "rademacher":
            expected += [1.0 - 2.0 * (word >> bit & 1) for word in random for bit in range(32)]
        else:
            halves = [half for word in random for half in (word % 2**16, word >> 16)]
            expected += [float(np.float32(NormalDist().inv_cdf((half + 0.5) / 65536))) for half in halves]
    found = direction_numpy(seed, step, probe, Q, 0, len(expected), distribution)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


# the same bits from every implementation


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_numpy_equals_torch_at_many_addresses(distribution):
    addresses = product((0, 1, 2**31, 2**32 - 1), (0, 3, 2**32 - 1), (0, 1, 2**32 - 1), (Q, V, "ä", ""))
    for seed, step, probe, name in addresses:
        expected = direction_numpy(seed, step, probe, name, 0, 11 * 27, distribution).reshape(11, 27)
        found = direction_torch(seed, step, probe, name, (11, 27), distribution)
        assert found.dtype == torch.float32 and expected.dtype == np.float32
        assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_layout_holds_each_tensors_direction_and_zero_padding(distribution):
    layout = Layout(SHAPES)
    flat = layout.direction(7, 2, 1, distribution)
    assert flat.shape == (layout.size,) and layout.numel == sum(math.prod(shape) for shape in SHAPES.values())
    used = torch.zeros(layout.size, dtype=torch.bool)
    for name, shape in SHAPES.items():
        expected = direction_numpy(7, 2, 1, name, 0, math.prod(shape), distribution).reshape(shape)
        assert layout.view(flat, name).numpy().tobytes() == expected.tobytes()
        assert layout.offsets[name] % ALIGNMENT == 0
        assert not layout.view(used, name).any()  # no two tensors overlap
        layout.view(used, name).fill_(True)
    assert int(used.sum()) == layout.numel < layout.size
    assert (flat[~used].view(torch.int32) == 0).all()


def test_layout_view_shares_memory_and_an_empty_layout_is_empty():
    layout = Layout(SHAPES)
    flat = layout.direction(0, 0, 0, "rademacher")
    layout.view(flat, V)[2, 3] = 5.0
    assert flat[layout.offsets[V] + 2 * 8 + 3] == 5.0
    empty = Layout({})
    assert (empty.size, empty.numel) == (0, 0) and empty.direction(0, 0, 0, "gaussian").shape == (0,)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_slices_alone_equal_the_slice_of_the_whole(distribution):
    whole = direction_numpy(3, 4, 5, Q, 0, 40 * 50, distribution)
    for start, stop in [(0, 1), (1, 2), (7, 9), (127, 129), (128, 256), (5, 1999), (1992, 2000), (300, 300)]:
        part = direction_numpy(3, 4, 5, Q, start, stop, distribution)
        assert part.tobytes() == whole[start:stop].tobytes()
    matrix = whole.reshape(40, 50)
    for rows, columns in [
        (slice(None), slice(None)),
        (slice(10, 20), slice(None)),  # what a row-parallel shard needs,
        (slice(None), slice(25, 50)),  # and a column-parallel one
        (slice(39, 40), slice(49, 50)),
        (slice(3, 31, 7), slice(1, None, 2)),
        (slice(5, 5), slice(None)),
    ]:
        part = direction_torch(3, 4, 5, Q, (40, 50), distribution, rows, columns)
        expected = matrix[rows, columns]
        assert tuple(part.shape) == expected.shape
        assert part.numpy().tobytes() == expected.tobytes()


def test_an_element_does_not_depend_on_the_tensors_size():
    small, large = Layout({Q: (4, 4)}), Layout({V: (9, 9), Q: (40, 4)})
    a, b = (layout.view(layout.direction(1, 2, 3, "gaussian"), Q) for layout in (small, large))
    assert a.tolist() == b[:4].tolist()


@pytest.mark.parametrize("address", GOLDEN)
def test_directions_are_pinned(address):
    distribution, seed, step, probe, name = address
    direction = direction_numpy(seed, step, probe, name, 0, 1000, distribution)
    assert hashlib.sha256(direction.astype("<f4").tobytes()).hexdigest() == GOLDEN[address]
    if name == Q:
        assert [float(str(x)) for x in direction[:6]] == GOLDEN_START[distribution]


# statistics: everything is fixed, so a bound of 4 standard errors is no gamble


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments(distribution):
    n, fourth = 1_000_000, {"rademacher": 1.0, "gaussian": 3.0}[distribution]
    z = direction_numpy(11, 0, 0, Q, 0, n, distribution).astype(np.float64)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    if distribution == "rademacher":
        assert set(np.unique(z)) == {-1.0, 1.0}
    else:
        assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / n)
        assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
        assert abs((z**4).mean() - fourth) < 4 * math.sqrt(96 / n)
        assert (z > 1.959964).mean() == pytest.approx(0.025, abs=4 * math.sqrt(0.025 * 0.975 / n))
    for lag in (1, 2, 7, 8, 31, 32, 64, 127, 128):  # words, halves of words and blocks are independent
        assert abs(correlation(z[lag:], z[:-lag])) < 4
        assert abs(correlation(z[lag:] ** 2 - 1, z[:-lag] ** 2 - 1)) < 4 * (fourth - 1 or 1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_bit_of_a_block_is_fair(distribution):
    """Over 20,000 blocks, each position in a block has mean 0: no bit or half word is left out or used twice."""
    per_block = {"rademacher": 128, "gaussian": 8}[distribution]
    z = direction_numpy(1, 1, 1, V, 0, 20_000 * per_block, distribution).reshape(20_000, per_block).astype(np.float64)
    assert np.abs(z.mean(0)).max() < 4.5 / math.sqrt(20_000)
    between = np.abs(z.T @ z / 20_000 - np.diag((z**2).mean(0)))
    assert between.max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_two_addresses_share_noise(distribution):
    """Equal shapes, but another name, seed, step or probe. Swapped words count: (step 1, probe 2) is not (2, 1)."""
    n = 20_000
    addresses = [(0, 1, 2, Q), (0, 2, 1, Q), (1, 0, 2, Q), (2, 1, 0, Q), (0, 0, 0, Q), (0, 1, 1, Q)]
    addresses += [(0, 2, 2, Q), (0, 1, 2, V), (0, 1, 2, Q.replace("lora_B", "lora_A")), (0, 1, 2, Q + " ")]
    addresses += [(0, 1, 2, Q.replace(".0.", f".{layer}.")) for layer in range(1, 4)]
    found = [direction_numpy(*address, 0, n, distribution) for address in addresses]
    for (i, a), (j, b) in combinations(enumerate(found), 2):
        for shift in (0, 1, 8, 128):
            assert abs(correlation(a[shift:], b[: n - shift])) < 4.5, (addresses[i], addresses[j], shift)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_consecutive_steps_and_probes_are_independent(distribution):
    """8 elements over 40 steps x 40 probes: no drift, no correlation along either way."""
    layout = Layout({Q: (2, 4)})
    z = torch.stack([layout.direction(0, step, probe, distribution)[:8] for step in range(40) for probe in range(40)])
    z = z.numpy().astype(np.float64).reshape(40, 40, 8)
    n = z.size
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(n * 39 / 40)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / math.sqrt(n * 39 / 40)
    assert abs((z - z.transpose(1, 0, 2)).std() - math.sqrt(2 * 39 / 40)) < 0.05  # not symmetric in step and probe


def test_gaussian_table_is_odd_increasing_and_pinned():
    table = gaussian_quantiles()
    assert table.shape == (65536,) and table.dtype == np.float32
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    assert float(table[32768]) == pytest.approx(math.sqrt(2 * math.pi) / 131072, rel=1e-4)
    assert float((table.astype(np.float64) ** 2).mean()) == pytest.approx(0.99998, abs=1e-5)
    expected = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == expected


# what is refused


@pytest.mark.parametrize("bad", [-1, 2**32])
@pytest.mark.parametrize("what", ["seed", "step", "probe"])
def test_addresses_out_of_range_are_refused(what, bad):
    address = {"seed": 0, "step": 0, "probe": 0, what: bad}
    says = rf"expected {what} to fit 32 bits; got {bad}"
    with pytest.raises(ConfigError, match=says):
        direction_numpy(**address, name=Q, start=0, stop=8, distribution="gaussian")
    with pytest.raises(ConfigError, match=says):
        direction_torch(**address, name=Q, shape=(2, 4), distribution="gaussian")
    with pytest.raises(ConfigError, match=says):
        Layout({Q: (2, 4)}).direction(**address, distribution="gaussian")


def test_unknown_distributions_are_refused():
    says = "expected distribution to be rademacher or gaussian; got 'uniform'"
    with pytest.raises(ConfigError, match=says):
        direction_numpy(0, 0, 0, Q, 0, 8, "uniform")
    with pytest.raises(ConfigError, match=says):
        direction_torch(0, 0, 0, Q, (2, 4), "uniform")
    with pytest.raises(ConfigError, match=says):
        Layout({Q: (2, 4)}).direction(0, 0, 0, "uniform")


# few blocks by NumPy, many by loops that torch compiles


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_few_blocks_have_the_bits_that_torch_makes(distribution, monkeypatch):
    for address in ((7, 5, (0, 1, 9)), (0xFFFFFFFF, 2**31 + 5, (0xFFFFFFFF,)), (0, 0, ())):
        expected = Layout(SHAPES).directions(*address, distribution)
        monkeypatch.setattr(directions, "FEW_BLOCKS", 1 << 20)
        monkeypatch.setattr(directions, "philox_torch", None)
        found = Layout(SHAPES).directions(*address, distribution)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        monkeypatch.undo()
        monkeypatch.setattr(directions, "FEW_BLOCKS", 1)


@pytest.fixture
def uncompiled(monkeypatch):
    """No loops at first, and none of a test's own afterwards."""
    monkeypatch.setattr(directions, "_compiled", {})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_compiled_directions_have_the_same_bits_and_are_compiled_once(distribution, uncompiled, monkeypatch):
    layouts = [Layout(SHAPES), Layout({Q: (300, 70)}), Layout({"tail": (1, 1)})]
    addresses = [(7, 5, (0, 1, 9)), (0xFFFFFFFF, 2**31 + 5, (0xFFFFFFFF,)), (0, 0, (3, 2))]
    expected = [
        layout.directions(seed, step, probes, distribution) for layout in layouts for seed, step, probes in addresses
    ]
    assert compile_directions(distribution) and directions._compiled.keys() == {distribution}
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for cut in (1 << 20, 50):  # whole, and in many pieces
        monkeypatch.setattr("zoray.methods.directions_cpu.BLOCKS", cut)
        for inference in (False, True):
            with torch.inference_mode(inference):
                fresh = [Layout(layout.shapes) for layout in layouts]
                found = [
                    layout.directions(seed, step, probes, distribution)
                    for layout in fresh
                    for seed, step, probes in addresses
                ]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    made = torch.cat([layouts[1].direction(7, 5, 2, distribution), layouts[1].direction(7, 6, 2, distribution)])
    assert made.abs().sum() > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    assert compile_directions(distribution) and len(directions._compiled) == 1


def test_nothing_is_freed_while_directions_are_compiled(uncompiled, monkeypatch):
    """A destructor, as those of vLLM's packed weights, would run on the tensors that torch traces."""
    freed, seen = [], []

    class Engine:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(self)

    class Watched(Loops):
        def __init__(self, gaussian: bool) -> None:
            super().__init__(gaussian)
            seen.append((len(freed), gc.isenabled()))

    monkeypatch.setattr("zoray.methods.directions_cpu.Loops", Watched)
    Engine()
    assert compile_directions("rademacher")
    assert seen == [(1, False)] and gc.isenabled()


def test_directions_that_could_not_be_compiled_stay_as_they_are(uncompiled, monkeypatch, caplog):
    expected = Layout(SHAPES).direction(7, 5, 2, "rademacher")

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", broken)
        assert not compile_directions("rademacher") and "stay uncompiled: no compiler" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("zoray.methods.directions_cpu.signs", lambda words, _: torch.ones(len(words), 4, 32))
        assert not compile_directions("rademacher") and "they have other bits" in caplog.text
    assert not directions._compiled and torch.equal(Layout(SHAPES).direction(7, 5, 2, "rademacher"), expected)
