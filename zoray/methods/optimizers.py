"""Weights of directions -> the commit of a step: links on the weights, learning rate, schedule, momentum, decay.

Pure functions: `update(state, step, steps, weights)` gives the next state and the commit. The state is a tuple of
numbers, journalled with the step, so a resumed run goes on with it. The momentum buffer is as large as the adapter, so
it lives in the adapter state; the commit only says how it changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import Commit, is_finite, require

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEDULES = ("constant", "linear", "cosine")
LEAST_DECAY = 1e-6  # in a step: 1 - this, in float32, is still right to 3 %, and changes a float32 parameter
State = tuple[float, ...]


def to_float32(value: float) -> float:
    """The nearest float32 as its shortest decimal, which is journalled and which replicas multiply by."""
    with np.errstate(over="ignore"):  # infinity is the caller's to refuse
        return float(str(np.float32(value)))


@dataclass(frozen=True)
class Sign:
    """The sign of each weight, divided by their number.

    For one Rademacher direction this is ZO-signSGD (Liu et al., ICLR 2019): sign(w z) = sign(w) z.
    """

    def init(self) -> State:
        """No state."""
        return ()

    def update(self, state: State, weights: Sequence[float]) -> tuple[State, tuple[float, ...]]:
        """weights -> sign(weights) / K."""
        return state, tuple(math.copysign(1.0, w) / len(weights) if w else 0.0 for w in weights)


@dataclass(frozen=True)
class GlobalAdaptive:
    """One adaptive step size for all parameters (MEAZO, arXiv 2605.03869): weights / (sqrt(v_hat) + epsilon).

    v <- beta v + (1 - beta) g^2,  v_hat = v / (1 - beta^t),  g^2 = K sum_k weights[k]^2

    For one direction g is the projected gradient, as in the paper. For K it is the root mean square of the K projected
    gradients (a weight is one over K). The paper takes their mean, which can cancel by chance and always does if an
    estimator's baseline is the population's mean. A step with no nonzero weight leaves v unchanged.

    Args:
        beta: decay of the running mean of g^2.
        epsilon: keeps the step finite where the loss is flat.
    """

    beta: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        require(is_finite(self.beta) and 0 <= self.beta < 1, "optimizer.link.beta to be in [0, 1)", self.beta)
        require(is_finite(self.epsilon) and self.epsilon > 0, "optimizer.link.epsilon to be positive", self.epsilon)

    def init(self) -> State:
        """v = 0, and beta^0 = 1."""
        return (0.0, 1.0)

    def update(self, state: State, weights: Sequence[float]) -> tuple[State, tuple[float, ...]]:
        """(v, beta^t) -> the next; weights divided by the root of v_hat."""
        if not any(weights):
            return state, tuple(weights)
        v, power = state
        square = len(weights) * math.fsum(w * w for w in weights)
        v, power = self.beta * v + (1 - self.beta) * square, self.beta * power
        scale = 1 / (math.sqrt(v / (1 - power)) + self.epsilon)
        return (v, power), tuple(w * scale for w in weights)


Link = Sign | GlobalAdaptive  # `init` and `update`, as in optax, on the weights of a step


@dataclass(frozen=True)
class Sgd:
    """ZO-SGD: coefficients[k] = -lr(step) * weights[k], rounded to float32.

    With momentum beta the replicas keep m <- beta m + (1 - beta) sum_k weights[k] z_k and step by -lr(step) m (LoZO-M,
    arXiv 2410.07698). Decays are decoupled (AdamW): they act on the parameters, by lr(step) times their rate.

    Args:
        lr: peak learning rate.
        schedule: "constant", or "linear" / "cosine" decay from `lr` after the warm-up to zero just after the last step.
        warmup: steps of linear warm-up from lr / warmup to lr.
        clip: largest Euclidean norm of the weights over the directions; null for no limit.
        momentum: beta in [0, 1); 0 for none.
        weight_decay: rate of decay towards zero.
        anchor: rate of decay towards the base model (against forgetting, arXiv 2605.30148).
        link: Sign, GlobalAdaptive or none; applied before `clip`.
    """

    lr: float = 1e-2
    schedule: str = "linear"
    warmup: int = 0
    clip: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    anchor: float = 0.0
    link: Sign | GlobalAdaptive | None = None

    def __post_init__(self) -> None:
        require(is_finite(self.lr) and self.lr > 0, "optimizer.lr to be a positive number", self.lr)
        require(self.schedule in SCHEDULES, f"optimizer.schedule to be one of {', '.join(SCHEDULES)}", self.schedule)
        require(isinstance(self.warmup, int) and self.warmup >= 0, "optimizer.warmup to be 0 or more", self.warmup)
        ok = self.clip is None or (is_finite(self.clip) and self.clip > 0)
        require(ok, "optimizer.clip to be a positive number or null", self.clip)
        require(is_finite(self.momentum) and 0 <= self.momentum < 1, "optimizer.momentum in [0, 1)", self.momentum)
        for name in ("weight_decay", "anchor"):
            rate = getattr(self, name)
            ok = is_finite(rate) and (rate == 0 or LEAST_DECAY <= rate * self.lr < 1)
            require(
                ok, f"optimizer.{name} to be 0, or lr * {name} from {LEAST_DECAY:g} (less is rounded away) to 1", rate
            )
        require(
            self.link is None or isinstance(self.link, Link),
            "optimizer.link to be null or a component such as zoray.methods.Sign",
            self.link,
        )

    def init(self) -> State:
        """The state before the first step."""
        return self.link.init() if self.link else ()

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step in a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr

    def update(
        self,
        state: State,
        step: int,
        steps: int,
        weights: Sequence[float],
        gains: Sequence[float] = (),
        signs: bytes = b"",
    ) -> tuple[State, Commit]:
        """The commit of a step, from the weights of its estimate, and the state for the next step.

        `gains` are weights too, one for the `signs` of each matrix; `link` and `clip` don't act on them.

        Raises:
            FloatingPointError: a coefficient overflows float32.
        """
        if self.link:
            state, weights = self.link.update(state, weights)
            if not all(map(is_finite, state)):
                raise FloatingPointError(
                    f"step {step}: a weight is too large for optimizer.link; lower the perturbation"
                )
        norm = math.hypot(*weights)
        if self.clip is not None and norm > self.clip:
            weights = [w * (self.clip / norm) for w in weights]
        lr = self.lr_at(step, steps)
        factor = (1 - self.momentum) if self.momentum else -lr
        coefficients = tuple(to_float32(factor * weight) if weight else 0.0 for weight in weights)
        gains = tuple(to_float32(factor * gain) if gain else 0.0 for gain in gains)
        if not all(map(is_finite, (*coefficients, *gains))):
            raise FloatingPointError(f"step {step}: a coefficient overflows float32; lower optimizer.lr")
        return state, Commit(
            step,
            coefficients,
            decay=to_float32(1 - lr * self.weight_decay),
            anchor=to_float32(1 - lr * self.anchor),
            momentum=to_float32(self.momentum) if self.momentum else None,
            rate=to_float32(-lr) if self.momentum else 1.0,
            gains=gains,
            signs=signs,
        )
