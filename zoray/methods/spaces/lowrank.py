"""The lowrank space: fresh U and V for every probe, folded into the base weights at every step.

Rank 1 is EGGROLL (Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652): E = U V^T / sqrt(r). At
rank 128-512 the direction is close to MeZO's full one (the "MeZO-like" factorised runs of arXiv 2605.28760).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

import zoray.methods.spaces.fold as fold
from zoray.methods.directions import Layout
from zoray.methods.spaces.base import MAX_RANK, Directions, Moving, check_space, digest, expect, select
from zoray.records import ConfigError, Probe, require

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    import torch

    from zoray.records import Commit


@dataclass(frozen=True)
class LowRank:
    """W moves along U V^T / sqrt(rank); nothing but W itself is kept from step to step.

    Args:
        rank: of U and V, 1..512. Elements of a direction have variance 1 at any rank.
        targets: "all-linear", or the last parts of module names.
        distribution: of U and V. "rademacher" folds a high rank much faster: its products are exact in any order.
        fold_rounding: "nearest" or "stochastic", for 16-bit base weights; small steps vanish when rounded to nearest.
        keep_base: keep a copy of the base weights; optimizer.anchor needs it.
    """

    folds: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = False
    takes_momentum: ClassVar[bool] = False  # it would be as large as the model

    rank: int = 1
    targets: str | tuple[str, ...] = "all-linear"
    distribution: str = "gaussian"
    fold_rounding: str = "nearest"
    keep_base: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_space(self.rank, self.targets, self.distribution))
        fold.check_rounding(self.fold_rounding)

    @property
    def scaling(self) -> float:
        """The factor of B @ A in the effective weight."""
        return 1 / math.sqrt(self.rank)

    def select(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The matrices that move, {canonical name: (out, in)}."""
        return select(matrices, self.targets)

    def trained(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of trained numbers: whole matrices."""
        return sum(out * into for out, into in self.select(matrices).values())

    def drawn(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of random numbers in a direction: U and V."""
        return sum(self.rank * (out + into) for out, into in self.select(matrices).values())

    def kept(self, matrices: Mapping[str, tuple[int, int]], momentum: bool) -> int:
        """Nothing: every step is folded."""
        return 0

    def open(
        self,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str = "cpu",
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> LowRankState:
        """The state at journal index 0. `weights`: {canonical name: (out, in)} of the base, written in place."""
        return LowRankState(self, self.select(matrices), seed, device, weights)


class LowRankState:
    """The base weights of one replica.

    `on_fold` sees the factors of each step before they are folded, or only their rank if it exceeds MAX_RANK.
    """

    def __init__(
        self,
        space: LowRank,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str,
        weights: Mapping[str, torch.Tensor] | None,
    ) -> None:
        require(0 <= seed < 2**32, "run.seed to fit 32 bits", seed)
        self.space, self.seed, self.step = space, seed, 0
        self.matrices = dict(matrices)
        self.weights = fold.check_weights(self.matrices, weights, "lowrank")
        self.base = {name: self.weights[name].clone() for name in self.matrices} if space.keep_base else None
        self._u_layout = Layout({f"{name}.lowrank_U": (out, space.rank) for name, (out, _) in matrices.items()}, device)
        v_shapes = {f"{name}.lowrank_V": (space.rank, into) for name, (_, into) in matrices.items()}
        self._v_layout = Layout(v_shapes, device)
        self._draw_u = Directions(self._u_layout, seed, space.distribution)
        self._draw_v = Directions(self._v_layout, seed, space.distribution)
        self.on_fold: Callable[[fold.Factors | int], None] | None = None

    def _raw(self, step: int, index: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        u, v = self._draw_u(step, index), self._draw_v(step, index)
        for name in self.matrices:
            yield name, self._v_layout.view(v, f"{name}.lowrank_V"), self._u_layout.view(u, f"{name}.lowrank_U")

    def factors(self, probe: Probe) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, V^T (rank, in), scale * U (out, rank)) of every matrix under a probe."""
        for name, a, b in self._raw(probe.step, probe.index):
            yield name, a, b * probe.scale

    def moving(self) -> tuple[Moving, ...]:
        """U and V; the scale multiplies U."""
        return Moving(self._draw_u), Moving(self._draw_v, scaled=False)

    def a_key(self, probe: Probe) -> Hashable:
        """V belongs to the direction's address."""
        return (probe.step, probe.index)

    def arrays(self) -> dict[str, np.ndarray]:
        """Nothing is kept beside the base weights."""
        raise ConfigError(
            "space=lowrank keeps no adapter; export the run: python -m zoray.export run=DIR format=merged"
        )

    def apply(self, commit: Commit) -> None:
        """Take the commit of the next step and fold it.

        Raises:
            ConfigError: the commit has momentum, whose buffer would be as large as the model.
        """
        expect(commit, self.step)
        if commit.momentum is not None:
            raise ConfigError("space=lowrank has no momentum; take space=lozo or lora")
        moving = {k: self._factor(c) for k, c in enumerate(commit.coefficients) if c != 0.0}
        if self.on_fold is not None and moving:
            rank = self.space.rank * len(moving)
            self.on_fold(self._stack(moving) if rank <= MAX_RANK else rank)
        for draw in (self._draw_u, self._draw_v):
            draw.prepare([Probe(self.step, k, 1.0) for k in moving])
        if moving or commit.decay != 1.0 or commit.anchor != 1.0:
            for name in self.matrices:
                owed = [(commit.decay, commit.anchor)]
                exact = fold.decayed(self.weights[name], owed, self.base[name] if self.base else None)
                terms = [(*self._pair(k, name), factor) for k, factor in moving.items()]
                fold.add_products(exact, terms, self.space.distribution)
                fold.write_rounded(self.weights[name], exact, self.space.fold_rounding, self.seed, self.step, name)
        self.step += 1

    def pending(self) -> fold.Factors:
        """Nothing waits: every step is folded."""
        return {}

    def _factor(self, coefficient: float) -> float:
        """coefficient / sqrt(rank) as float32, the same on every device."""
        return float(np.float32(coefficient * self.space.scaling))

    def _pair(self, k: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """U (out, rank) and V^T (rank, in) of one matrix, since those of all matrices can be larger than the model."""
        return (
            self._draw_u.part(self.step, k, f"{name}.lowrank_U"),
            self._draw_v.part(self.step, k, f"{name}.lowrank_V"),
        )

    def _stack(self, moving: Mapping[int, float]) -> fold.Factors:
        import torch

        stack = {}
        for name in self.matrices:
            pairs = {k: self._pair(k, name) for k in moving}
            stack[name] = (
                torch.cat([pairs[k][0] * factor for k, factor in moving.items()], dim=1),
                torch.cat([v for _, v in pairs.values()]),
            )
        return stack

    def numbers(self) -> dict[str, torch.Tensor]:
        """The base weights."""
        return {f"{name}.weight": self.weights[name] for name in self.matrices}

    def restore(self, step: int, numbers: Mapping[str, torch.Tensor]) -> None:
        """Become the state before `step` with these `numbers`."""
        for name in self.matrices:
            self.weights[name].copy_(numbers[f"{name}.weight"])
        self.step = step

    def settle(self) -> None:
        """Nothing waits."""

    def digest(self) -> str:
        """Over the base weights."""
        return digest((f"{name}.weight", self.weights[name]) for name in self.matrices)
