"""Which parameters move, and how a direction becomes an adapter: W_eff = W + (alpha / rank) * B @ A.

A space is a frozen config. `open` gives its state: float32 master tensors in one flat vector, on whichever device holds
the adapter slots. Updates are elementwise multiply, then add, in probe order, with no fused multiply-add and no
reduction, so the state has the same bits on CPU and GPU, and after a replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoray.directions import Layout, check_distribution, name_hash
from zoray.records import Commit, ConfigError, JournalError, Probe, is_finite, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import torch

MAX_RANK = 512  # the largest LoRA rank that vLLM has slots for
_INIT_STEP = 0xFFFFFFFF  # the address step of initial values; `steps` stays below it
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: odd, so i * _GOLDEN differs for every i


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers (Hu et al., arXiv 2106.09685); MeZO-LoRA when `train` is AB.

    A starts as normal values from its init address, of variance 1 / (3 * in_features) as PEFT's default has; B as zero.
    The base weights are never written, so any quantised base works. Perturbations act on A and B themselves; the factor
    alpha / rank is applied once, when an adapter is written to a slot or exported.

    Args:
        rank: 1..512; slots are rounded up to the next rank that vLLM takes.
        alpha: LoRA's scale numerator.
        targets: "all-linear", or the last parts of module names, e.g. [q_proj, v_proj].
        train: "B" moves B only, "AB" both.
        distribution: of the directions, "rademacher" or "gaussian".
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    train: str = "B"
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        ok = isinstance(self.rank, int) and 1 <= self.rank <= MAX_RANK
        require(ok, f"space.rank to be a whole number from 1 to {MAX_RANK} (vLLM's largest LoRA rank)", self.rank)
        require(is_finite(self.alpha) and self.alpha > 0, "space.alpha to be a positive number", self.alpha)
        require(self.train in ("B", "AB"), "space.train to be B or AB", self.train)
        check_distribution(self.distribution)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        require(bool(self.targets), "space.targets to be all-linear or a list of module names", self.targets)

    @property
    def scaling(self) -> float:
        """The factor of B @ A in the effective weight."""
        return self.alpha / self.rank

    def select(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The target matrices out of a model's linear layers, {canonical name: (out, in)}, in the model's order."""
        if self.targets == "all-linear":
            return dict(matrices)
        wanted = (self.targets,) if isinstance(self.targets, str) else self.targets
        suffixes = {name.rsplit(".", 1)[-1] for name in matrices}
        unknown = [target for target in wanted if not any(_matches(name, target) for name in matrices)]
        if unknown:
            raise ConfigError(
                f"space.targets: no linear layer of this model ends in {', '.join(unknown)}; "
                f"it has {', '.join(sorted(suffixes))}, or use all-linear"
            )
        return {name: shape for name, shape in matrices.items() if any(_matches(name, t) for t in wanted)}

    def open(self, matrices: Mapping[str, tuple[int, int]], seed: int, device: torch.device | str = "cpu") -> LoraState:
        """The state at journal index 0 for the given matrices of a model, {canonical name: (out, in)}."""
        return LoraState(self, self.select(matrices), seed, device)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


class LoraState:
    """The adapter of one replica: float32 A and B, and how many steps they have seen.

    `flat` holds the trained tensors (padded, see Layout); `step` is the next step that `apply` expects.
    """

    def __init__(self, space: Lora, matrices: Mapping[str, tuple[int, int]], seed: int, device: torch.device | str):
        import torch

        require(0 <= seed < 2**32, "run.seed to fit 32 bits", seed)
        self.space, self.seed, self.step = space, seed, 0
        self.matrices = dict(matrices)
        a_shapes = {f"{name}.lora_A": (space.rank, shape[1]) for name, shape in self.matrices.items()}
        b_shapes = {f"{name}.lora_B": (shape[0], space.rank) for name, shape in self.matrices.items()}
        self.layout = Layout({**b_shapes, **a_shapes} if space.train == "AB" else b_shapes, device)
        self.flat = torch.zeros(self.layout.size, dtype=torch.float32, device=self.layout.device)
        self._a_layout = self.layout if space.train == "AB" else Layout(a_shapes, device)
        self._a_flat = self.flat if space.train == "AB" else torch.zeros(self._a_layout.size, device=device)
        initial = Layout(a_shapes, device)
        normal = initial.direction(seed, _INIT_STEP, 0, "gaussian")
        for name, shape in a_shapes.items():
            self._a_layout.view(self._a_flat, name).copy_(initial.view(normal, name) * (1 / math.sqrt(3 * shape[1])))
        self._fresh: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def numel(self) -> int:
        """How many numbers are trained."""
        return self.layout.numel

    def direction(self, step: int, index: int) -> torch.Tensor:
        """z at (run seed, step, index), flat. The directions of the latest step are kept until the next one."""
        key = (step, index)
        if key not in self._fresh:
            if any(kept != step for kept, _ in self._fresh):
                self._fresh.clear()
            self._fresh[key] = self.layout.direction(self.seed, step, index, self.space.distribution)
        return self._fresh[key]

    def perturbed(self, probe: Probe) -> torch.Tensor:
        """state + scale * z, flat; the state itself for the centre (scale 0)."""
        if probe.scale == 0:
            return self.flat
        return self.flat + self.direction(probe.step, probe.index) * probe.scale

    def tensors(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, A (rank, in), B (out, rank)) for each matrix, as views into `flat`; B is not yet scaled."""
        a_flat = flat if self.space.train == "AB" else self._a_flat
        for name in self.matrices:
            yield name, self._a_layout.view(a_flat, f"{name}.lora_A"), self.layout.view(flat, f"{name}.lora_B")

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32 copies of the state, B not scaled."""
        arrays = {}
        for name, a, b in self.tensors(self.flat):
            arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"] = a.cpu().numpy().copy(), b.cpu().numpy().copy()
        return arrays

    def apply(self, commit: Commit) -> None:
        """state <- decay * state + sum_k c_k z_k, in probe order. Commits must come in step order, each once."""
        if commit.step != self.step:
            raise JournalError(f"expected the commit of step {self.step}, got step {commit.step}")
        if commit.decay != 1.0:
            self.flat.mul_(commit.decay)
        for index, coefficient in enumerate(commit.coefficients):
            if coefficient != 0.0:
                self.flat.add_(self.direction(commit.step, index) * coefficient)
        self.step += 1

    def digest(self) -> str:
        """16 hex digits over the bits of the trained tensors; equal digests mean bit-identical replicas.

        The sum over all elements of (float32 bits) * (odd multiplier of tensor and position), modulo 2**64: free of
        order, so any device and any sharding gives the same; a change of any single element changes it.
        """
        import torch

        total = torch.zeros((), dtype=torch.int64, device=self.flat.device)
        for name in self.layout.shapes:
            bits = self.layout.view(self.flat, name).flatten().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
            salt = name_hash(name) - (1 << 63)  # any bijection into int64 will do
            position = torch.arange(len(bits), dtype=torch.int64, device=bits.device)
            total += (bits * ((position * _GOLDEN + salt) | 1)).sum()
        return f"{int(total) & 0xFFFFFFFFFFFFFFFF:016x}"


def from_record(record: Mapping[str, Any]) -> Lora:
    """A space from its record in a journal's header: {"name": class name, fields...}. Imports nothing by name."""
    fields = {key: value for key, value in record.items() if key != "name"}
    if record["name"] != Lora.__name__ or not fields.keys() <= Lora.__dataclass_fields__.keys():
        raise JournalError(
            f"expected a space that this version knows (Lora); got {record['name']!r} with {sorted(fields)}"
        )
    return Lora(**fields)
