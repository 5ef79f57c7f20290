"""The protocols of spaces and states, and what spaces share: targets, digests, cached directions, flat updates.

A space is a frozen config. `open` gives its state: the numbers of one replica at a journal index. A state turns a probe
into low-rank factors for a slot and takes commits; it knows nothing of losses, engines or other replicas. The same
commits on the same start give the same bits on any device: all is elementwise float32, multiply and add in two steps.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zoray.methods.directions import Layout, Move, check_distribution, direction_torch, has_kernels, name_hash
from zoray.records import Commit, ConfigError, JournalError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from zoray.records import Probe

ALL = "all-linear"
RESIDUAL = "residual"
WRITERS = ("o_proj", "out_proj", "down_proj", "fc2")  # families' names for the matrices that write to the stream
B_PARTS = ("lora_B", "lozo_U", "lowrank_U")  # spaces' names for a factor of shape (out, rank)
MAX_RANK = 512  # the largest LoRA rank that vLLM has slots for
CACHED_ELEMENTS = 1 << 28  # of a step's directions kept between scoring and commit: 1 GiB
AT_ONCE = 1 << 24  # elements of directions made in one go; working memory is a few times as much
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embedding")  # families' names for the input's
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: odd, so i * _GOLDEN differs for every i
_DIGEST_CHUNK = 1 << 24  # elements hashed at a time, with a few int64 copies of them


class Moving(NamedTuple):
    """Factors that differ from probe to probe: x + scale * z for every tensor of a layout.

    A tensor is called `<matrix>.<part>`, and is a B (out, rank) if `is_b` says so, else an A (rank, in).
    """

    z: Directions
    x: torch.Tensor | None = None  # (size,) float32; None is zero
    scaled: bool = True  # else the factor is z alone


class State(Protocol):
    """The numbers of one replica. `step` is the next step that `apply` expects."""

    step: int
    seed: int
    matrices: Mapping[str, tuple[int, int]]

    def factors(self, probe: Probe) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, A (rank, in), B (out, rank)) of every matrix under a probe; W + scaling * B @ A acts."""
        ...

    def moving(self) -> tuple[Moving, ...]:
        """The factors of many probes at once; any other factor is the same for all probes."""
        ...

    def a_key(self, probe: Probe) -> Hashable:
        """Probes of equal keys have equal A, so a slot that holds it need not be written again."""
        ...

    def apply(self, commit: Commit) -> None:
        """Take the commit of the next step; JournalError for any other."""
        ...

    def settle(self) -> None:
        """Compute the updates that wait until the state is read, see Moved."""
        ...

    def digest(self) -> str:
        """16 hex digits over the bits of all numbers that a step can change."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32 copies, B not scaled."""
        ...

    def numbers(self) -> dict[str, torch.Tensor]:
        """All tensors that a step can change, by name; not copies."""
        ...

    def restore(self, step: int, numbers: Mapping[str, torch.Tensor]) -> None:
        """Become the state before `step` with these `numbers`; of the same space, matrices and seed."""
        ...


class Space(Protocol):
    """The config of a space."""

    @property
    def rank(self) -> int:
        """Rank of the factors in a slot."""
        ...

    @property
    def scaling(self) -> float:
        """The factor of B @ A in the effective weight."""
        ...

    @property
    def distribution(self) -> str:
        """The distribution of directions."""
        ...

    @property
    def folds(self) -> bool:
        """Whether steps write into the base weights."""
        ...

    @property
    def keep_base(self) -> bool:
        """Whether the space keeps a copy of the base weights that it writes into."""
        ...

    @property
    def takes_signs(self) -> bool:
        """Whether the signs of feedback can move a state of this space."""
        ...

    @property
    def takes_momentum(self) -> bool:
        """Whether a state of this space can have momentum."""
        ...

    @property
    def targets(self) -> str | tuple[str, ...]:
        """Which matrices move."""
        ...

    def select(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The matrices that move, {canonical name: (out, in)}."""
        ...

    def trained(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of trained numbers."""
        ...

    def drawn(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of random numbers in a direction."""
        ...

    def kept(self, matrices: Mapping[str, tuple[int, int]], momentum: bool) -> int:
        """The number of float32 numbers in a state, beside slots, directions and a copy of the base."""
        ...

    def open(
        self,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str = "cpu",
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> State:
        """The state at journal index 0. `weights`: the base weights, which a folding space writes in place."""
        ...


def check_space(rank: Any, targets: Any, distribution: str) -> str | tuple[str, ...]:
    """Check the settings that all spaces have; returns a list of targets as a tuple."""
    ok = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= MAX_RANK
    require(ok, f"space.rank to be a whole number from 1 to {MAX_RANK} (vLLM's largest LoRA rank)", rank)
    check_distribution(distribution)
    targets = targets if isinstance(targets, str) else tuple(targets)
    require(bool(targets), "space.targets to be all-linear or a list of module names", targets)
    return targets


def select(matrices: Mapping[str, tuple[int, int]], targets: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The target matrices out of a model's matrices, {canonical name: (out, in)}, in the model's order.

    A target is the last part or parts of a name (`q_proj`, `self_attn.q_proj`), with * ? [] as in file names; or
    all-linear, possibly beside the names of the LM head and the embedding; or residual, the matrices that write to the
    residual stream: all of them, or as residual:0.5 those in the upper half of the layers.
    """
    wanted = tuple(
        name for target in ((targets,) if isinstance(targets, str) else targets) for name in _residual(matrices, target)
    )
    unknown = [target for target in wanted if target != ALL and not any(_matches(name, target) for name in matrices)]
    if unknown:
        suffixes = {name.rsplit(".", 1)[-1] for name in matrices}
        raise ConfigError(
            f"space.targets: no linear layer of this model ends in {', '.join(unknown)}; "
            f"it has {', '.join(sorted(suffixes))}, or use all-linear"
        )
    chosen = wanted if ALL not in wanted else ("*",)
    return {name: shape for name, shape in matrices.items() if any(_matches(name, target) for target in chosen)}


def _residual(matrices: Mapping[str, tuple[int, int]], target: str) -> tuple[str, ...]:
    """The target itself, or for `residual` the names of the matrices that write to the residual stream."""
    if target.partition(":")[0] != RESIDUAL:
        return (target,)
    try:
        share = float(target.partition(":")[2] or 0.0)
    except ValueError:
        share = -1.0
    require(0 <= share < 1, f"space.targets={RESIDUAL}:SHARE with a share in [0, 1)", target)
    layer_of = {name: layer_number(name) for name in matrices}
    layers = 1 + max((layer for layer in layer_of.values() if layer is not None), default=0)
    names = tuple(
        name
        for name, layer in layer_of.items()
        if layer is not None and layer >= share * layers and name.rpartition(".")[2] in WRITERS
    )
    require(bool(names), f"a model with matrices called {', '.join(WRITERS)} for space.targets={target}", "none")
    return names


def layer_number(name: str) -> int | None:
    """The number of the layer that a matrix is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_embedding(name: str) -> bool:
    """Whether a matrix is the input embedding, whose input is a token, so `in` is the vocabulary."""
    return name.rpartition(".")[2] in EMBEDDINGS


def is_b(name: str) -> bool:
    """Whether a tensor of a layout is a B (out, rank)."""
    return name.rpartition(".")[2] in B_PARTS


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


class Directions:
    """z at (seed, step, index) as a flat vector of a layout; the latest step's vectors are kept until the next step."""

    def __init__(self, layout: Layout, seed: int, distribution: str) -> None:
        self.layout, self.seed, self.distribution = layout, seed, distribution
        self._fresh: dict[tuple[int, int], torch.Tensor] = {}
        self._alone: dict[str, Layout] = {}

    def __call__(self, step: int, index: int) -> torch.Tensor:
        key = (step, index)
        if key in self._fresh:
            return self._fresh[key]
        if any(kept != step for kept, _ in self._fresh):
            self._fresh.clear()
        z = self.layout.direction(self.seed, step, index, self.distribution)
        if (len(self._fresh) + 1) * self.layout.size <= CACHED_ELEMENTS:
            self._fresh[key] = z
        return z

    def prepare(self, probes: Iterable[Probe]) -> None:
        """Make the directions of a step's probes at once, if all of them will be kept."""
        addresses = {(probe.step, probe.index) for probe in probes if probe.scale != 0}
        if len({step for step, _ in addresses}) != 1:
            return
        step = next(iter(addresses))[0]
        missing = sorted(index for _, index in addresses if (step, index) not in self._fresh)
        room = CACHED_ELEMENTS // max(1, self.layout.size) - sum(of == step for of, _ in self._fresh)
        if len(missing) < 2 or len(missing) > room:
            return
        at_once = max(1, AT_ONCE // self.layout.size)
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            if any(kept != step for kept, _ in self._fresh):
                self._fresh.clear()
            flats = self.layout.directions(self.seed, step, some, self.distribution)
            self._fresh.update(zip([(step, index) for index in some], flats, strict=True))

    def part(self, step: int, index: int, name: str) -> torch.Tensor:
        """One tensor of z; made alone if the whole z would not be kept."""
        kept = sum(of == step for of, _ in self._fresh)
        if (step, index) in self._fresh or (kept + 1) * self.layout.size <= CACHED_ELEMENTS:
            return self.layout.view(self(step, index), name)
        if not has_kernels(self.layout.device):
            rows, columns = self.layout.shapes[name]
            return direction_torch(self.seed, step, index, name, (rows, columns), self.distribution)
        if name not in self._alone:
            self._alone[name] = Layout({name: self.layout.shapes[name]}, self.layout.device)
        alone = self._alone[name]
        return alone.view(alone.direction(self.seed, step, index, self.distribution), name)


class Moved:
    """A flat vector, zero at first, and the commits that it has taken but not yet applied.

    Commits wait until the vector is read, so that replaying a journal applies many steps in one pass.
    """

    def __init__(self, flat: torch.Tensor, direction: Directions) -> None:
        self._flat, self.direction = flat, direction
        self._waiting: list[Move] = []

    def take(self, commit: Commit) -> bool:
        """Take a commit if it can wait; returns whether it can."""
        chosen = [(k, c) for k, c in enumerate(commit.coefficients) if c != 0.0]
        if commit.momentum is not None or commit.anchor != 1.0 or commit.signs or not chosen:
            return False
        decays = [commit.decay] + [1.0] * (len(chosen) - 1)
        moves = (Move(commit.step, k, decay, c) for (k, c), decay in zip(chosen, decays, strict=True))
        self._waiting.extend(moves)
        return True

    @property
    def flat(self) -> torch.Tensor:
        """The vector, (size,), after all commits taken."""
        self.settle()
        return self._flat

    def settle(self) -> None:
        """Apply the commits that wait."""
        moves, self._waiting = self._waiting, []
        layout, x = self.direction.layout, self._flat
        done = layout.move(x, self.direction.seed, moves, self.direction.distribution)
        for move in moves[done:]:
            if move.decay != 1.0:
                x.mul_(move.decay)
            x.add_(self.direction(move.step, move.probe) * move.coefficient)


def fill(moving: Moving, probes: Sequence[Probe], out: torch.Tensor, name: str | None = None) -> None:
    """Write the moving factors of P probes into `out` (P, size); or one named tensor of them, (P, rows, columns)."""
    import torch

    z, x = moving.z, moving.x
    z.prepare(probes)
    for row, probe in zip(out, probes, strict=True):
        if moving.scaled and not probe.scale:
            row.zero_()
            continue
        drawn = z(probe.step, probe.index) if name is None else z.part(probe.step, probe.index, name)
        torch.mul(drawn, probe.scale if moving.scaled else 1.0, out=row)
    if x is not None:
        out.add_(x if name is None else z.layout.view(x, name))


def perturbed(x: torch.Tensor, direction: Directions, probe: Probe) -> torch.Tensor:
    """x + scale * z, flat; `x` itself for the centre (scale 0)."""
    return x + direction(probe.step, probe.index) * probe.scale if probe.scale else x


def expect(commit: Commit, step: int) -> None:
    """Raise JournalError unless the commit is that of `step`: commits come in order, each once."""
    if commit.step != step:
        raise JournalError(f"expected the commit of step {step}, got step {commit.step}")


def advance(
    x: torch.Tensor,
    momentum: torch.Tensor | None,
    commit: Commit,
    direction: Callable[[int, int], torch.Tensor],
    initial: Callable[[], torch.Tensor] | None = None,
    guide: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Apply a commit (records.Commit has the formula) to a flat vector in place; returns the momentum buffer.

    `initial` gives the vector before the first step; None if it was zero. `guide`: gains times signs, if the commit
    has any.
    """
    import torch

    if commit.decay != 1.0:
        x.mul_(commit.decay)
    if commit.anchor != 1.0:
        if initial is None:
            x.mul_(commit.anchor)
        else:
            x.sub_(initial()).mul_(commit.anchor).add_(initial())
    target = x
    if commit.momentum is not None:
        momentum = torch.zeros_like(x) if momentum is None else momentum
        target = momentum.mul_(commit.momentum)
    for index, coefficient in enumerate(commit.coefficients):
        if coefficient != 0.0:
            target.add_(direction(commit.step, index) * coefficient)
    if guide is not None:
        target.add_(guide)
    if momentum is not None and commit.momentum is not None:
        x.add_(momentum * commit.rate)
    return momentum


def as_arrays(tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> dict[str, np.ndarray]:
    """(name, A, B) of each matrix -> {`<matrix>.lora_A`, `<matrix>.lora_B`}, copies on the CPU."""
    arrays = {}
    for name, a, b in tensors:
        arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"] = a.cpu().numpy().copy(), b.cpu().numpy().copy()
    return arrays


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hex digits over the bits of named tensors; equal digests mean bit-identical replicas.

    The sum over all elements of (bits) * (odd multiplier of tensor and position), modulo 2**64. It does not depend on
    order, so any device and any sharding gives the same; a change of any single element changes it.
    """
    return f"{sum(digest_part(name, tensor) for name, tensor in tensors) & 0xFFFFFFFFFFFFFFFF:016x}"


def digest_part(name: str, tensor: torch.Tensor) -> int:
    """One tensor's part of a digest; parts add up modulo 2**64."""
    import torch

    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    mask = -1 if word is torch.int64 else (1 << 8 * tensor.element_size()) - 1
    flat = tensor.flatten().view(word)
    salt = name_hash(name) - (1 << 63)  # any bijection into int64 will do
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), _DIGEST_CHUNK):
        bits = flat[start : start + _DIGEST_CHUNK].to(torch.int64) & mask
        position = torch.arange(start, start + len(bits), dtype=torch.int64, device=bits.device)
        total += (bits * ((position * _GOLDEN + salt) | 1)).sum()
    return int(total)
