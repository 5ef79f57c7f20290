"""Address -> direction. Every random number zoray uses for a parameter is a pure function of its address.

Guarantees: the same bits from NumPy and from torch, on CPU and on every GPU, for any slice taken alone. Nothing here
keeps a stream position, and torch's own generators are never used: CUDA `randn` depends on the number of SMs.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
    key     = (run seed, low half of the tensor's name hash)
    counter = (block, probe, step, high half of the tensor's name hash)
A block is 128 bits: 128 `rademacher` elements (1 bit each) or 8 `gaussian` ones (a 16-bit word each, mapped to the
normal quantile at (word + 1/2) / 65536 by table, because log and cos differ in the last bit between devices).
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from zoray.records import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from zoray.methods.directions_cpu import Loops
    from zoray.methods.directions_cuda import Filler

Distribution = Literal["rademacher", "gaussian"]
BLOCK_ELEMENTS: dict[str, int] = {"rademacher": 128, "gaussian": 8}
MANY_ELEMENTS = 1 << 18  # of a direction; from here on compiling pays
FEW_BLOCKS = 1 << 10  # up to here NumPy is faster than torch, whose operations cost more to call
ALIGNMENT = 128  # elements: a multiple of every distribution's block, so that tensors of a Layout share no block

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_compiled: dict[str, Loops] = {}  # distribution -> its compiled loops in this process
log = logging.getLogger(__name__)
_QUANTILES_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"


def name_hash(name: str) -> int:
    """64-bit hash of a tensor's canonical name; the same in every process and version (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def check_distribution(distribution: str) -> None:
    """Raise ConfigError unless this module can generate `distribution`."""
    require(distribution in get_args(Distribution), "distribution to be rademacher or gaussian", distribution)


def philox_numpy(counter: Sequence[np.ndarray | int], key: Sequence[np.ndarray | int], rounds: int = 10) -> np.ndarray:
    """Philox4x32 on broadcastable unsigned words: 4 counter words and 2 key words -> (..., 4) uint32.

    Both halves of a round go through one operation each, (c2, c0) being the even words and (c1, c3) the odd ones.
    """
    c0, c1, c2, c3, k0, k1 = (np.asarray(word, np.uint64) for word in (*counter, *key))
    shape = np.broadcast_shapes(*(word.shape for word in (c0, c1, c2, c3, k0, k1)))
    even, odd, keys, multipliers, weyl = np.empty((5, 2, *shape), np.uint64)
    pairs = ((even, c2, c0), (odd, c1, c3), (keys, k0, k1), (multipliers, *_MULTIPLIERS[::-1]), (weyl, *_WEYL))
    for pair, first, second in pairs:
        pair[0], pair[1] = first, second
    mask, shift = np.uint64(_MASK), np.uint64(32)
    for _ in range(rounds):
        product = even * multipliers
        even = ((product >> shift) ^ odd ^ keys)[::-1]
        odd = product & mask
        keys = (keys + weyl) & mask
    return np.stack([even[1], odd[0], even[0], odd[1]], axis=-1).astype(np.uint32)


def philox_torch(counter: Sequence[torch.Tensor | int], key: Sequence[torch.Tensor | int], rounds: int = 10):
    """The same in torch: int64 tensors holding 32-bit words -> (..., 4) int64. At least one word must be a tensor.

    A product of two 32-bit words wraps in int64, but its bit pattern is right; masking after the shift drops the sign.
    Both halves of a round go through one operation each, (c2, c0) being the even words and (c1, c3) the odd ones.
    """
    import torch

    device = next(word.device for word in (*counter, *key) if isinstance(word, torch.Tensor))
    words = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in (*counter, *key))
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*words)
    even, odd, keys = torch.stack([c2, c0]), torch.stack([c1, c3]), torch.stack([k0, k1])
    column = (2, *(1,) * c0.ndim)
    multipliers = torch.tensor(_MULTIPLIERS[::-1], device=device).view(column)
    weyl = torch.tensor(_WEYL, device=device).view(column)
    for _ in range(rounds):
        product = even * multipliers
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(keys).bitwise_and_(_MASK).flip(0)
        odd = product.bitwise_and_(_MASK)
        keys = keys.add_(weyl).bitwise_and_(_MASK)
    return torch.stack([even[1], odd[0], even[0], odd[1]], dim=-1)


@lru_cache(maxsize=1)
def gaussian_quantiles() -> np.ndarray:
    """(65536,) float32: the standard normal quantile at (i + 1/2) / 65536; odd-symmetric, variance 0.99998.

    Built with the platform's `math.log`, so it is checked against a pinned hash: a platform that rounds one entry
    differently fails here, rather than drifting away from the other replicas.
    """
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)], dtype=np.float32)
    table = np.concatenate([-upper[::-1], upper])
    found = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    if found != _QUANTILES_SHA256:
        raise ConfigError(f"this platform's normal quantiles differ ({found[:12]}); use distribution=rademacher")
    return table


def _words(seed: int, step: int, probe: int) -> None:
    for what, word in (("seed", seed), ("step", step), ("probe", probe)):
        require(0 <= word <= _MASK, f"{what} to fit 32 bits", word)


def direction_numpy(
    seed: int, step: int, probe: int, name: str, start: int, stop: int, distribution: str
) -> np.ndarray:
    """Elements [start, stop) of the flattened tensor `name` of the direction at (seed, step, probe), float32."""
    check_distribution(distribution)
    _words(seed, step, probe)
    per_block, tensor = BLOCK_ELEMENTS[distribution], name_hash(name)
    first = start // per_block
    blocks = np.arange(first, -(-stop // per_block), dtype=np.uint64)
    words = philox_numpy((blocks, probe, step, tensor >> 32), (seed, tensor & _MASK))
    values = _elements_numpy(words, distribution)
    return values[start - first * per_block : stop - first * per_block]


def _elements_numpy(words: np.ndarray, distribution: str) -> np.ndarray:
    """(..., n, 4) words -> (..., n * elements of a block) float32."""
    words = np.ascontiguousarray(words, "<u4").reshape(*words.shape[:-2], 4 * words.shape[-2])
    if distribution == "gaussian":
        return gaussian_quantiles()[words.view("<u2")]
    signs = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(np.float32)
    return np.subtract(np.float32(1), np.multiply(signs, np.float32(2), out=signs), out=signs)


def _elements_torch(words: torch.Tensor, distribution: str) -> torch.Tensor:
    """(..., n, 4) words -> (..., n * elements of a block) float32."""
    import torch

    if distribution == "rademacher":
        octets = torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
        return _signs_on(words.device)[octets].flatten(-4)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return _quantiles_on(words.device)[halves].flatten(-3)


@lru_cache(maxsize=8)
def _signs_on(device: torch.device) -> torch.Tensor:
    """(256, 8) float32: +1 for each bit of a byte that is 0, -1 for each that is 1, the lowest first."""
    import torch

    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (1.0 - 2.0 * bits.to(torch.float32)).to(device)


@lru_cache(maxsize=8)
def _quantiles_on(device: torch.device) -> torch.Tensor:
    import torch

    with torch.inference_mode(False):  # else torch would compile again, for inference tensors
        return torch.from_numpy(gaussian_quantiles()).to(device)


def table_of(distribution: str, device: torch.device) -> torch.Tensor | None:
    """The table that a kernel needs besides an address: the normal quantiles if `distribution` is gaussian."""
    return _quantiles_on(device) if distribution == "gaussian" else None


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of directions_cuda.py make the directions."""
    return device.type == "cuda"


def compile_directions(distribution: str) -> bool:
    """Let torch compile the loops for a distribution's directions on the CPU; returns whether it could.

    The loops are several times as fast. Their bits are checked on the spot. Compiling takes seconds, once a process.
    """
    import torch

    from zoray.methods.directions_cpu import Loops

    check_distribution(distribution)
    layout = Layout({"a": (3, 129), "b": (FEW_BLOCKS + 1, BLOCK_ELEMENTS[distribution])})
    address = (7, 2**31 + 5, (0, 2**32 - 1), distribution)
    kept = _compiled.pop(distribution, None)
    expected, why = layout.directions(*address), "they have other bits"
    collects = gc.isenabled()
    gc.collect()  # now, not while torch traces: vLLM's packed weights run operations when they are freed
    gc.disable()
    try:
        _compiled[distribution] = kept or Loops(distribution == "gaussian")
        if torch.equal(layout.directions(*address), expected):
            return True
    except Exception as error:  # no compiler, or a broken one: directions work without it
        why = str(error).split("\n")[0]
    finally:
        if collects:
            gc.enable()
    log.warning("directions stay uncompiled: %s", why)
    _compiled.pop(distribution, None)
    return False


class Move(NamedTuple):
    """x <- decay * x + coefficient * z of a (step, probe)."""

    step: int
    probe: int
    decay: float
    coefficient: float


class Layout:
    """The places of an adapter's tensors in one flat float32 vector; fills that vector with a direction.

    Each tensor starts at a multiple of ALIGNMENT; the padding in between is always zero. One call generates the whole
    adapter, so a direction costs a few kernels for any number of modules.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu") -> None:
        import torch

        self.shapes = dict(shapes)
        self.device = torch.device(device)
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        self.numel = sum(int(np.prod(shape)) for shape in self.shapes.values())
        self._padding = self._padding_index()
        self._counters: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._filler: Filler | None = None

    def _padding_index(self) -> torch.Tensor:
        import torch

        ends = [*self.offsets.values(), self.size][1:]
        spans = [
            torch.arange(self.offsets[name] + int(np.prod(shape)), end)
            for (name, shape), end in zip(self.shapes.items(), ends, strict=True)
        ]
        return torch.cat(spans or [torch.empty(0, dtype=torch.int64)]).to(self.device)

    def _block_counters(self, distribution: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each block of the flat vector: its index in its tensor, and the tensor's hash in two halves; each (n,)."""
        import torch

        if distribution not in self._counters:
            per_block = BLOCK_ELEMENTS[distribution]
            starts = [*self.offsets.values(), self.size]
            counts = torch.tensor([(b - a) // per_block for a, b in pairwise(starts)], dtype=torch.int64)
            hashes = [name_hash(name) for name in self.shapes]
            blocks = torch.cat([torch.arange(int(n)) for n in counts] or [torch.empty(0, dtype=torch.int64)])
            low = torch.tensor([h & _MASK for h in hashes], dtype=torch.int64).repeat_interleave(counts)
            high = torch.tensor([h >> 32 for h in hashes], dtype=torch.int64).repeat_interleave(counts)
            with torch.inference_mode(False):  # as for the quantiles
                parts = (part.clone().to(self.device) for part in (blocks, low, high))
                self._counters[distribution] = tuple(parts)  # type: ignore[assignment]
        return self._counters[distribution]

    def direction(self, seed: int, step: int, probe: int, distribution: str) -> torch.Tensor:
        """The direction at (seed, step, probe) for all tensors: (size,) float32 on the layout's device."""
        return self.directions(seed, step, (probe,), distribution)[0]

    def directions(self, seed: int, step: int, probes: Sequence[int], distribution: str) -> torch.Tensor:
        """The directions of K probe indices at once: (K, size) float32 on the layout's device."""
        import torch

        check_distribution(distribution)
        for probe in probes:
            _words(seed, step, probe)
        if has_kernels(self.device):
            return self.filler()(seed, step, probes, table_of(distribution, self.device))
        blocks, low, high = self._block_counters(distribution)
        loops = _compiled.get(distribution) if self.device.type == "cpu" else None
        if self.device.type == "cpu" and len(probes) * len(blocks) <= FEW_BLOCKS:
            index = np.array(probes, np.uint64)[:, None]
            words = philox_numpy((blocks.numpy(), index, step, high.numpy()), (seed, low.numpy()))
            flats = torch.from_numpy(_elements_numpy(words, distribution))
        elif loops is not None:
            flats = loops(blocks, low, high, seed, step, probes, table_of(distribution, self.device))
        else:
            index = torch.tensor(list(probes), dtype=torch.int64, device=self.device)[:, None]
            flats = _elements_torch(philox_torch((blocks, index, step, high), (seed, low)), distribution)
        if len(self._padding):
            flats.index_fill_(1, self._padding, 0.0)
        return flats

    def move(self, x: torch.Tensor, seed: int, moves: Sequence[Move], distribution: str) -> int:
        """x <- decay * x + coefficient * z for the first moves in turn, x (size,) in place; returns how many it made.

        Compiled loops make MOVES of them in each pass over x; the bits are the same as one at a time.
        """
        from zoray.methods.directions_cpu import MOVES

        done, loops = 0, _compiled.get(distribution) if self.device.type == "cpu" else None
        while loops is not None and len(moves) - done >= MOVES:
            some = moves[done : done + MOVES]
            for move in some:
                _words(seed, move.step, move.probe)
            addresses = [(move.step, move.probe) for move in some]
            factors = [move.decay for move in some], [move.coefficient for move in some]
            if not loops.move(x, *self._block_counters(distribution), seed, addresses, *factors):
                break
            x.index_fill_(0, self._padding, 0.0)
            done += MOVES
        return done

    def filler(self) -> Filler:
        """The kernel that fills vectors of this layout; only if has_kernels."""
        from zoray.methods.directions_cuda import Filler

        if self._filler is None:
            sizes = [math.prod(shape) for shape in self.shapes.values()]
            self._filler = Filler(sizes, [name_hash(name) for name in self.shapes], self.device)
        return self._filler

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The tensor `name` as a view into a flat vector of this layout."""
        shape, offset = self.shapes[name], self.offsets[name]
        return flat[offset : offset + math.prod(shape)].view(shape)

    def views(self, flats: torch.Tensor, name: str) -> torch.Tensor:
        """The same for P flat vectors, (P, size) -> (P, *shape)."""
        shape, offset = self.shapes[name], self.offsets[name]
        return flats[:, offset : offset + math.prod(shape)].unflatten(1, shape)


def direction_torch(
    seed: int,
    step: int,
    probe: int,
    name: str,
    shape: tuple[int, int],
    distribution: str,
    rows: slice = slice(None),
    columns: slice = slice(None),
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The part [rows, columns] of a matrix's direction, generated alone, as a tensor-parallel shard needs it.

    Computes only the blocks that the part touches. Equals the slice of the whole, bit for bit.
    """
    import torch

    check_distribution(distribution)
    _words(seed, step, probe)
    per_block, tensor = BLOCK_ELEMENTS[distribution], name_hash(name)
    row = torch.arange(shape[0], device=device)[rows]
    column = torch.arange(shape[1], device=device)[columns]
    index = (row[:, None] * shape[1] + column[None, :]).flatten()
    blocks, position = torch.unique(index // per_block, return_inverse=True)
    words = philox_torch((blocks, probe, step, tensor >> 32), (seed, tensor & _MASK))
    elements = _elements_torch(words, distribution)
    return elements[position * per_block + index % per_block].view(len(row), len(column))


def uniform_torch(
    seed: int, step: int, probe: int, name: str, n: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n numbers (i + 1/2) / 65536, (n,) float32 in (0, 1), from 16 random bits each: those of `name` at the address."""
    import torch

    _words(seed, step, probe)
    tensor = name_hash(name)
    blocks = torch.arange(-(-n // 8), dtype=torch.int64, device=device)
    words = philox_torch((blocks, probe, step, tensor >> 32), (seed, tensor & _MASK))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()[:n]
    return (halves.to(torch.float32) + 0.5) * (1 / 65536)
