"""The lora space: low-rank adapters beside frozen base weights. Works on any base, quantised or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from zoray.methods.directions import Layout
from zoray.methods.spaces.base import (
    Moved,
    Moving,
    advance,
    as_arrays,
    check_space,
    digest,
    expect,
    is_embedding,
    perturbed,
    select,
)
from zoray.methods.spaces.signs import AlongGuide, guide
from zoray.records import is_finite, require

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    import numpy as np
    import torch

    from zoray.records import Commit, Probe

_INIT_STEP = 0xFFFFFFFF  # the step in the address of initial values; `steps` stays below it


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers (Hu et al., arXiv 2106.09685); MeZO-LoRA when `train` is AB.

    A starts as normal values from its init address, of variance 1 / (3 * in_features) as in PEFT's default (an
    embedding's 1 / (3 * hidden), since only one of its inputs is not zero); B starts as zero.
    The base weights are never written, so any quantised base works. Perturbations act on A and B themselves; the factor
    alpha / rank is applied once, when an adapter is written to a slot or exported.

    Args:
        rank: 1..512; slots are rounded up to the next rank that vLLM takes.
        alpha: LoRA's scale numerator.
        targets: "all-linear", or the last parts of module names, e.g. [q_proj, v_proj]; * ? [] as in file names, e.g.
            ["layers.1?.*.v_proj"]. The LM head and the input embedding must be named: [all-linear, lm_head].
        train: "B" moves B only, "AB" both.
        distribution: of the directions, "rademacher" or "gaussian".
    """

    folds: ClassVar[bool] = False
    keep_base: ClassVar[bool] = False
    takes_signs: ClassVar[bool] = True
    takes_momentum: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    train: str = "B"
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_space(self.rank, self.targets, self.distribution))
        require(is_finite(self.alpha) and self.alpha > 0, "space.alpha to be a positive number", self.alpha)
        require(self.train in ("B", "AB"), "space.train to be B or AB", self.train)

    @property
    def scaling(self) -> float:
        """The factor of B @ A in the effective weight."""
        return self.alpha / self.rank

    def select(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The matrices with an adapter, {canonical name: (out, in)}."""
        return select(matrices, self.targets)

    def trained(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of trained numbers."""
        return sum(self.rank * (out + into * (self.train == "AB")) for out, into in self.select(matrices).values())

    def drawn(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of random numbers in a direction: one for each trained number."""
        return self.trained(matrices)

    def kept(self, matrices: Mapping[str, tuple[int, int]], momentum: bool) -> int:
        """A, B, and the momentum of the trained ones."""
        adapter = sum(self.rank * (out + into) for out, into in self.select(matrices).values())
        return adapter + self.trained(matrices) * momentum

    def open(
        self,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str = "cpu",
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> LoraState:
        """The state at journal index 0 for the given matrices of a model, {canonical name: (out, in)}."""
        return LoraState(self, self.select(matrices), seed, device)


class LoraState:
    """The adapter of one replica: float32 A and B, and their number of steps."""

    def __init__(self, space: Lora, matrices: Mapping[str, tuple[int, int]], seed: int, device: torch.device | str):
        import torch

        require(0 <= seed < 2**32, "run.seed to fit 32 bits", seed)
        self.space, self.seed, self.step = space, seed, 0
        self.matrices = dict(matrices)
        a_shapes = {f"{name}.lora_A": (space.rank, shape[1]) for name, shape in self.matrices.items()}
        b_shapes = {f"{name}.lora_B": (shape[0], space.rank) for name, shape in self.matrices.items()}
        self._a_initial = Layout(a_shapes, device)
        self.layout = Layout({**b_shapes, **a_shapes} if space.train == "AB" else b_shapes, device)
        self._a_layout = self.layout if space.train == "AB" else self._a_initial
        self.direction = AlongGuide(self.layout, seed, space.distribution, lambda: self.momentum)
        flat = torch.zeros(self.layout.size, dtype=torch.float32, device=self.layout.device)
        self._moved = Moved(flat, self.direction)
        self._a_flat = flat if space.train == "AB" else torch.zeros(self._a_layout.size, device=device)
        self._write_initial_a(self._a_flat)
        self._initial: torch.Tensor | None = None
        self.momentum: torch.Tensor | None = None

    @property
    def flat(self) -> torch.Tensor:
        """The trained tensors, see Layout."""
        return self._moved.flat

    def _write_initial_a(self, flat: torch.Tensor) -> None:
        normal = self._a_initial.direction(self.seed, _INIT_STEP, 0, "gaussian")
        for matrix, (out, into) in self.matrices.items():
            width, name = out if is_embedding(matrix) else into, f"{matrix}.lora_A"
            self._a_layout.view(flat, name).copy_(self._a_initial.view(normal, name) * (1 / math.sqrt(3 * width)))

    def initial(self) -> torch.Tensor:
        """`flat` before the first step; made on first use."""
        import torch

        if self._initial is None:
            self._initial = torch.zeros_like(self.flat)
            if self.space.train == "AB":
                self._write_initial_a(self._initial)
        return self._initial

    @property
    def numel(self) -> int:
        """The number of trained numbers."""
        return self.layout.numel

    def perturbed(self, probe: Probe) -> torch.Tensor:
        """state + scale * z, flat; the state itself for the centre (scale 0)."""
        return perturbed(self.flat, self.direction, probe)

    def tensors(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, A (rank, in), B (out, rank)) for each matrix, as views into `flat`; B is not yet scaled."""
        a_flat = flat if self.space.train == "AB" else self._a_flat
        for name in self.matrices:
            yield name, self._a_layout.view(a_flat, f"{name}.lora_A"), self.layout.view(flat, f"{name}.lora_B")

    def factors(self, probe: Probe) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, A (rank, in), B (out, rank)) of every matrix under a probe."""
        return self.tensors(self.perturbed(probe))

    def moving(self) -> tuple[Moving, ...]:
        """The trained tensors."""
        return (Moving(self.direction, self.flat),)

    def a_key(self, probe: Probe) -> Hashable:
        """A never moves if only B is trained."""
        return 0 if self.space.train == "B" else (self.step, probe)

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32 copies of the state, B not scaled."""
        return as_arrays(self.tensors(self.flat))

    def apply(self, commit: Commit) -> None:
        """Take the commit of the next step."""
        expect(commit, self.step)
        if not self._moved.take(commit):
            guided = guide(self.layout, commit.signs, commit.gains) if commit.signs else None
            self.momentum = advance(self.flat, self.momentum, commit, self.direction, self.initial, guided)
        self.step += 1

    def numbers(self) -> dict[str, torch.Tensor]:
        """The trained tensors, and their momentum."""
        return {"flat": self.flat, **({} if self.momentum is None else {"momentum": self.momentum})}

    def restore(self, step: int, numbers: Mapping[str, torch.Tensor]) -> None:
        """Become the state before `step` with these `numbers`."""
        self.flat.copy_(numbers["flat"])
        self.momentum = numbers["momentum"].to(self.flat.device) if "momentum" in numbers else None
        self.step = step

    def settle(self) -> None:
        """Compute the updates that wait until the state is read."""
        self._moved.settle()

    def digest(self) -> str:
        """Over the trained tensors, and the momentum if there is one."""
        parts = [(name, self.layout.view(self.flat, name)) for name in self.layout.shapes]
        if self.momentum is not None:
            parts += [(f"{name}.momentum", self.layout.view(self.momentum, name)) for name in self.layout.shapes]
        return digest(parts)
