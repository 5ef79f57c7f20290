"""The lozo space: full matrices move along U V^T, with V kept for an interval and the sum folded into the base.

Chen et al., "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures" (LoZO, arXiv 2410.07698),
Algorithm 1, and LoZO-M, Algorithm 2. Unlike in the official script, a commit always applies the probed direction, also
on the steps that redraw V. As in the official script and the published learning rates, the factor 1 / rank of equation
(6) is left to the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import zoray.methods.spaces.fold as fold
from zoray.methods.directions import Layout
from zoray.methods.spaces.base import (
    Directions,
    Moved,
    Moving,
    advance,
    as_arrays,
    check_space,
    digest_part,
    expect,
    perturbed,
    select,
)
from zoray.records import require

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    import numpy as np
    import torch

    from zoray.records import Commit, Probe


@dataclass(frozen=True)
class Lozo:
    """W_eff = W + B V^T with B = 0 at first; a direction is U V^T, U fresh for every probe, V for every interval.

    After the last step of an interval, B V^T is folded into W (float32 product, one rounding), B starts again at zero,
    and V is redrawn. With optimizer.momentum the buffer N lives in the subspace and is carried over by
    N <- N V_old^T V_new / n (LoZO-M). Weight decay acts on B at once and on W at the fold.

    Args:
        rank: of U and V, 1..512; published: 1, 2, 4.
        interval: steps between redraws; published: 50, 100.
        targets: "all-linear", or the last parts of module names.
        distribution: of U and V; "gaussian" in the paper.
        fold_rounding: "nearest" or "stochastic", for 16-bit base weights.
        keep_base: keep a copy of the base weights; optimizer.anchor needs it.
    """

    folds: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = False
    takes_momentum: ClassVar[bool] = True
    scaling: ClassVar[float] = 1.0

    rank: int = 2
    interval: int = 50
    targets: str | tuple[str, ...] = "all-linear"
    distribution: str = "gaussian"
    fold_rounding: str = "nearest"
    keep_base: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_space(self.rank, self.targets, self.distribution))
        ok = isinstance(self.interval, int) and self.interval >= 1
        require(ok, "space.interval to be a whole number of at least 1", self.interval)
        fold.check_rounding(self.fold_rounding)

    def select(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The matrices that move, {canonical name: (out, in)}."""
        return select(matrices, self.targets)

    def trained(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of trained numbers: whole matrices, over several intervals."""
        return sum(out * into for out, into in self.select(matrices).values())

    def drawn(self, matrices: Mapping[str, tuple[int, int]]) -> int:
        """The number of random numbers in a direction: U."""
        return sum(self.rank * out for out, _ in self.select(matrices).values())

    def kept(self, matrices: Mapping[str, tuple[int, int]], momentum: bool) -> int:
        """B, V, and the momentum of B."""
        return sum(self.rank * (out * (1 + momentum) + into) for out, into in self.select(matrices).values())

    def open(
        self,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str = "cpu",
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> LozoState:
        """The state at journal index 0. `weights`: {canonical name: (out, in)} of the base, written in place."""
        return LozoState(self, self.select(matrices), seed, device, weights)


class LozoState:
    """B, V and the base weights of one replica. `on_fold` sees the factors of each fold before it happens."""

    def __init__(
        self,
        space: Lozo,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        device: torch.device | str,
        weights: Mapping[str, torch.Tensor] | None,
    ) -> None:
        import torch

        require(0 <= seed < 2**32, "run.seed to fit 32 bits", seed)
        self.space, self.seed, self.step = space, seed, 0
        self.matrices = dict(matrices)
        self.weights = fold.check_weights(self.matrices, weights, "lozo")
        self.base = {name: self.weights[name].clone() for name in self.matrices} if space.keep_base else None
        self.layout = Layout({f"{name}.lozo_U": (out, space.rank) for name, (out, _) in matrices.items()}, device)
        self._v_layout = Layout({f"{name}.lozo_V": (space.rank, into) for name, (_, into) in matrices.items()}, device)
        self.momentum: torch.Tensor | None = None
        self.direction = Directions(self.layout, seed, space.distribution)
        flat = torch.zeros(self.layout.size, dtype=torch.float32, device=self.layout.device)
        self._moved = Moved(flat, self.direction)
        self._draw_v = Directions(self._v_layout, seed, space.distribution)
        self._owed: list[tuple[float, float]] = []  # (decay, anchor) of the steps since the last fold, for the base
        self.on_fold: Callable[[fold.Factors], None] | None = None
        self._weights_digest: int | None = None

    @property
    def flat(self) -> torch.Tensor:
        """B, see Layout."""
        return self._moved.flat

    @property
    def _v(self) -> torch.Tensor:
        """V of the current interval, flat; its address is the interval's first step."""
        return self._draw_v(self.step - self.step % self.space.interval, 0)

    def perturbed(self, probe: Probe) -> torch.Tensor:
        """B + scale * U, flat."""
        return perturbed(self.flat, self.direction, probe)

    def tensors(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, V^T (rank, in), B (out, rank)) for each matrix."""
        v = self._v
        for name in self.matrices:
            yield name, self._v_layout.view(v, f"{name}.lozo_V"), self.layout.view(flat, f"{name}.lozo_U")

    def factors(self, probe: Probe) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(canonical name, A (rank, in), B (out, rank)) of every matrix under a probe."""
        return self.tensors(self.perturbed(probe))

    def moving(self) -> tuple[Moving, ...]:
        """The trained tensor, B."""
        return (Moving(self.direction, self.flat),)

    def a_key(self, probe: Probe) -> Hashable:
        """V is the same for all probes of an interval."""
        return self.step // self.space.interval

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: V^T, `<matrix>.lora_B`: B} of the change that is not folded yet."""
        return as_arrays(self.tensors(self.flat))

    def apply(self, commit: Commit) -> None:
        """Take the commit of the next step; fold and redraw after the last one of an interval."""
        expect(commit, self.step)
        if not self._moved.take(commit):
            self.momentum = advance(self.flat, self.momentum, commit, self.direction)
        self._owed.append((commit.decay, commit.anchor))
        if (self.step + 1) % self.space.interval == 0:
            self._fold()
        else:
            self.step += 1

    def _fold(self) -> None:
        old = self.pending()
        if self.on_fold is not None:
            self.on_fold(old)
        for name, (b, a) in old.items():
            exact = fold.decayed(self.weights[name], self._owed, self.base[name] if self.base else None)
            exact += fold.product(b, a)
            fold.write_rounded(self.weights[name], exact, self.space.fold_rounding, self.seed, self.step, name)
        self.step += 1
        if self.momentum is not None:
            new = {name: a for name, a, _ in self.tensors(self.flat)}
            for name, (_, a) in old.items():
                n = self.layout.view(self.momentum, f"{name}.lozo_U")
                n.copy_(fold.product(n, fold.overlap(a, new[name])))
        self.flat.zero_()
        self._owed.clear()
        self._weights_digest = None

    def pending(self) -> fold.Factors:
        """B and V^T of the change that is not folded yet."""
        return {name: (b, a) for name, a, b in self.tensors(self.flat)}

    def numbers(self) -> dict[str, torch.Tensor]:
        """B and its momentum, the base weights, and the decays that are still to act on them."""
        import torch

        owed = torch.tensor(self._owed, dtype=torch.float64).reshape(-1, 2)
        momentum = {} if self.momentum is None else {"momentum": self.momentum}
        weights = {f"{name}.weight": self.weights[name] for name in self.matrices}
        return {"flat": self.flat, **momentum, "owed": owed, **weights}

    def restore(self, step: int, numbers: Mapping[str, torch.Tensor]) -> None:
        """Become the state before `step` with these `numbers`."""
        self.flat.copy_(numbers["flat"])
        self.momentum = numbers["momentum"].to(self.flat.device) if "momentum" in numbers else None
        self._owed = [(float(decay), float(anchor)) for decay, anchor in numbers["owed"].tolist()]
        for name in self.matrices:
            self.weights[name].copy_(numbers[f"{name}.weight"])
        self._weights_digest = None
        self.step = step

    def settle(self) -> None:
        """Compute the updates that wait until the state is read."""
        self._moved.settle()

    def digest(self) -> str:
        """Over B, the momentum, and the base weights."""
        if self._weights_digest is None:
            self._weights_digest = sum(digest_part(f"{name}.weight", self.weights[name]) for name in self.matrices)
        total = self._weights_digest
        for kind, flat in (("", self.flat), (".momentum", self.momentum)):
            if flat is not None:
                total += sum(digest_part(name + kind, self.layout.view(flat, name)) for name in self.layout.shapes)
        return f"{total & 0xFFFFFFFFFFFFFFFF:016x}"
