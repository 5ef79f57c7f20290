"""The gated MLP on the CPU: the adapters of gate and up, the activation and the product in one pass over memory.

silu(x Wg^T + low Bg^T) * (x Wu^T + low Bu^T): as separate operations these write the widest tensor of a layer once more
for the adapters and read it twice for the activation, all at the speed of memory. Here the products with B wait for the
activation, and torch.compile makes one loop of everything. The wheel and its layer stay unmodified. Without a compiler,
or if an MLP does more between its products, nothing changes.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from zoray.engines.layers.lora_cpu import FUSED_ELEMENTS, FUSED_RANK, SegmentedLora, joined_b

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = 65  # of each adapter in the proof
log = logging.getLogger(__name__)


def plain(y: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for y (T, 2 * width), the gate's half first."""
    width = y.shape[-1] // 2
    return torch.nn.functional.silu(y[..., :width]) * y[..., width:]


def adapted(
    y: torch.Tensor, low_gate: torch.Tensor, low_up: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    """The same for y + low B^T under S adapters: y (S, L, 2 * width), low (S, L, rank), B^T (S, rank, width)."""
    width = y.shape[-1] // 2
    gate, up = y[..., :width], y[..., width:]
    for k in range(low_gate.shape[-1]):
        gate = gate + low_gate[..., k : k + 1] * b_gate[:, k, None]
        up = up + low_up[..., k : k + 1] * b_up[:, k, None]
    return torch.nn.functional.silu(gate) * up


@lru_cache(maxsize=1)
def compiled() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] | None:
    """`plain` and `adapted` for any sizes from two on; None if torch can't compile. Takes seconds, once a process."""
    options: dict[str, Any] = {"cpp.threads": torch.get_num_threads()}  # part of the disk cache's key
    alone = torch.compile(plain, dynamic=True, options=options)
    try:
        with torch.inference_mode():
            alone(torch.zeros(35, 128))
    except Exception as error:  # no compiler, or a broken one: activations work without it
        log.warning("activations stay uncompiled: %s", str(error).split("\n")[0])
        return None
    return alone, torch.compile(adapted, dynamic=True, options=options)


class GatedActivation:
    """Replaces vLLM's own activation between an MLP's two products."""

    def __init__(self, wrapper: SegmentedLora, before: Callable[[torch.Tensor], torch.Tensor]) -> None:
        functions = compiled()
        assert functions is not None
        self.wrapper, self.before, (self.plain, self.adapted) = wrapper, before, functions

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        held = self.wrapper.take(y)
        if held is None:
            few = len(y) == 1 or y.numel() < FUSED_ELEMENTS  # torch would compile again for one row
            return self.before(y) if few else self.plain(y)
        count = held.b[0].shape[0]
        return self.adapted(y.unflatten(0, (count, -1)), *held.low, *held.b).flatten(0, 1)


def fuse(model: Any, wrapper: SegmentedLora, rank: int) -> list[Any]:
    """Let the MLPs of a vLLM model apply the adapters of gate and up in their activation; returns those MLPs.

    `rank`: of the adapters; the loop over it is unrolled, so only small ranks gain.
    """
    mlps = [module for module in model.modules() if _is_gated(module)]
    if not mlps or rank > FUSED_RANK or compiled() is None:
        return []
    for mlp in mlps:
        linear = mlp.gate_up_proj
        if joined_b(linear.lora_b_stacked) is None:  # else its B^T already lies by rows in memory
            slots = [b[:, 0].transpose(1, 2).contiguous() for b in linear.lora_b_stacked]  # (slots, rank, width)
            linear.lora_b_stacked = tuple(b.transpose(1, 2).unsqueeze(1) for b in slots)
        mlp.act_fn._forward_method = GatedActivation(wrapper, mlp.act_fn._forward_method)
    wrapper.gated = frozenset(id(mlp.gate_up_proj.lora_b_stacked) for mlp in mlps)
    return mlps


def settle(mlps: list[Any], wrapper: SegmentedLora, slots: int) -> dict[str, float]:
    """The error measured by the proof of fused MLPs; if it fails, they are restored, with a warning, and slower."""
    try:
        return {"activation_error": prove_fused(mlps, wrapper, slots)}
    except Exception as error:  # the run can do without, whatever the error
        log.warning("activations stay as they are in vLLM: %s", str(error).split("\n")[0])
        wrapper.gated = frozenset()
        for mlp in mlps:
            mlp.act_fn._forward_method = mlp.act_fn._forward_method.before
        return {}


@torch.inference_mode()
def prove_fused(mlps: list[Any], wrapper: SegmentedLora, slots: int) -> float:
    """The largest relative error of fused MLPs under the adapters of the first and the last slots.

    It also compiles, so that no step does. The shapes of the first call decide how threads divide the loop: three
    adapters (or all, if fewer) of many tokens.

    Raises:
        ValueError: an MLP of this vLLM does something else between its two products.
    """
    worst, count = 0.0, min(3, slots)
    length = min(TOKENS, wrapper.capacity // count)
    for first in sorted({0, slots - count}):
        segments = ((first + i, i * length, (i + 1) * length) for i in range(count))
        wrapper.map_tokens(tuple(segments), 0)
        for mlp in mlps:
            a = mlp.gate_up_proj.lora_a_stacked[0]
            ramp = torch.arange(count * length * a.shape[3], dtype=torch.float32)
            x = torch.sin(ramp).view(-1, a.shape[3]).to(a.dtype)
            expected = mlp(x).float()
            with wrapper.deferring(however_small=True):
                found = mlp(x).float()
            error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not error <= (1e-3 if a.dtype == torch.float32 else 0.1):
                raise ValueError(f"an MLP with fused adapters differs by {error:.2e} relative")
            worst = max(worst, error)
    return worst


def _is_gated(module: Any) -> bool:
    activation, linear = getattr(module, "act_fn", None), getattr(module, "gate_up_proj", None)
    stacked = getattr(linear, "lora_b_stacked", None)
    return type(activation).__name__ == "SiluAndMul" and isinstance(stacked, tuple) and len(stacked) == 2
