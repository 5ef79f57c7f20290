"""The gated MLP on the CPU: the adapters of gate and up, the activation and the product in one pass over memory.

silu(x Wg^T + low Bg^T) * (x Wu^T + low Bu^T): as operations of their own these write the widest tensor of a layer once
more for the adapters and read it twice for the activation, all at the speed of memory. Here the products with B wait
until the activation comes, and torch.compile makes one loop of everything. The layer is used as it is on an unmodified
wheel; where there is no compiler, or an MLP is of another kind, nothing changes.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from zoray.engines.cpu_lora import FUSED_RANK, SegmentedLora
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


def plain(y: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for y (T, 2 * width), the gate's half first."""
    width = y.shape[-1] // 2
    return torch.nn.functional.silu(y[..., :width]) * y[..., width:]


def adapted(
    y: torch.Tensor, low_gate: torch.Tensor, low_up: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    """The same of y + low B^T under S adapters: y (S, L, 2 * width), low (S, L, rank), B^T (S, rank, width)."""
    width = y.shape[-1] // 2
    gate, up = y[..., :width], y[..., width:]
    for k in range(low_gate.shape[-1]):
        gate = gate + low_gate[..., k : k + 1] * b_gate[:, k, None]
        up = up + low_up[..., k : k + 1] * b_up[:, k, None]
    return torch.nn.functional.silu(gate) * up


@lru_cache(maxsize=1)
def compiled() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] | None:
    """`plain` and `adapted` for any shape of two and more; None where torch can't compile. Seconds, once a process."""
    options: dict[str, Any] = {"cpp.dynamic_threads": True}  # else those of whoever compiled it first are in the code
    alone = torch.compile(plain, dynamic=True, options=options)
    try:
        with torch.inference_mode():
            alone(torch.zeros(35, 128))
    except Exception as error:  # no compiler, a broken one: what it would have sped up works without
        log.warning("activations stay uncompiled: %s", str(error).split("\n")[0])
        return None
    return alone, torch.compile(adapted, dynamic=True, options=options)


class GatedActivation:
    """What an MLP calls between its two products, in place of vLLM's own."""

    def __init__(self, wrapper: SegmentedLora) -> None:
        functions = compiled()
        assert functions is not None
        self.wrapper, (self.plain, self.adapted) = wrapper, functions

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        held = self.wrapper.take(y)
        if held is None:
            return self.plain(y) if len(y) > 1 else plain(y)  # one row would be compiled for anew
        count = held.b[0].shape[0]
        return self.adapted(y.unflatten(0, (count, -1)), *held.low, *held.b).flatten(0, 1)


def fuse(model: Any, wrapper: SegmentedLora, rank: int) -> list[Any]:
    """Let the MLPs of a model of vLLM take the adapters of gate and up in their activation; which ones did.

    `rank` of the adapters: a loop over it is unrolled, so that only small ones gain.
    """
    mlps = [module for module in model.modules() if _is_gated(module)]
    if not mlps or rank > FUSED_RANK or compiled() is None:
        return []
    for mlp in mlps:
        slots = [b[:, 0].transpose(1, 2).contiguous() for b in mlp.gate_up_proj.lora_b_stacked]  # (slots, rank, width)
        mlp.gate_up_proj.lora_b_stacked = tuple(b.transpose(1, 2).unsqueeze(1) for b in slots)
        mlp.act_fn._forward_method = GatedActivation(wrapper)
    wrapper.gated = frozenset(id(mlp.gate_up_proj.lora_b_stacked) for mlp in mlps)
    return mlps


def prove_fused(mlps: list[Any], wrapper: SegmentedLora, slots: int) -> float:
    """The largest relative error of fused MLPs with the adapters that are in the slots, three tokens each.

    Raises:
        ConfigError: an MLP of this vLLM does something else between its two products.
    """
    worst, rows = 0.0, 3 * slots
    wrapper.map_tokens(tuple((slot, 3 * slot, 3 * slot + 3) for slot in range(slots)), 0)
    for mlp in mlps:
        a = mlp.gate_up_proj.lora_a_stacked[0]
        x = torch.sin(torch.arange(rows * a.shape[3], dtype=torch.float32)).view(rows, -1).to(a.dtype)
        expected = mlp(x).float()
        with wrapper.deferring():
            found = mlp(x).float()
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        worst = max(worst, error) if error == error else float("inf")
    if worst > (1e-3 if mlps and a.dtype == torch.float32 else 0.1):
        raise ConfigError(f"activation self-test failed: an MLP with fused adapters differs by {worst:.2e} relative")
    return worst


def _is_gated(module: Any) -> bool:
    activation, linear = getattr(module, "act_fn", None), getattr(module, "gate_up_proj", None)
    stacked = getattr(linear, "lora_b_stacked", None)
    return type(activation).__name__ == "SiluAndMul" and isinstance(stacked, tuple) and len(stacked) == 2
