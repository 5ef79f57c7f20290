"""RMSNorm on the CPU by kernels in vLLM's CPU wheel, in place of the plain torch operations that vLLM dispatches to.

Six passes over the hidden states become one, twice a layer. Each norm is first compared with vLLM's own, and stays
unchanged if they differ, or if the wheel has no such kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

VECTOR = 16  # numbers that a kernel takes at a time; a row's length is a multiple


class CpuNorm:
    """Replaces the operations of one of vLLM's norms.

    Args:
        weight: (hidden,).
        epsilon: added to the mean square.
        before: the norm's own operations, for inputs that the kernels do not take.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float, before: Callable[..., Any]) -> None:
        self.weight, self.epsilon, self.before = weight, epsilon, before
        self.plain, self.fused = torch.ops._C.rms_norm.default, torch.ops._C.fused_add_rms_norm.default

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm of x; or the norm of x + residual and that sum, in place."""
        if not self._takes(x):
            return self.before(x) if residual is None else self.before(x, residual)
        if residual is None:
            result = torch.empty_like(x)
            self.plain(result, x, self.weight, self.epsilon)
            return result
        if not self._takes(residual):
            return self.before(x, residual)
        self.fused(x, residual, self.weight, self.epsilon)
        return x, residual

    def _takes(self, x: torch.Tensor) -> bool:
        return x.dtype == self.weight.dtype and x.is_contiguous()


@torch.inference_mode()
def take(model: Any) -> int:
    """Let the norms of a vLLM model use the compiled kernels; returns how many do."""
    if not hasattr(torch.ops._C, "rms_norm") or not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return 0
    taken = 0
    for module in model.modules():
        if type(module).__name__ != "RMSNorm" or not getattr(module, "has_weight", False):
            continue
        if module.variance_size_override is not None or module.weight.shape[0] % VECTOR:
            continue
        norm = CpuNorm(module.weight.data, module.variance_epsilon, module._forward_method)
        if _same(norm):
            module._forward_method = norm
            taken += 1
    return taken


def _same(norm: CpuNorm) -> bool:
    """Whether a norm computes what vLLM's own operations do."""
    ramp = torch.arange(6 * len(norm.weight), dtype=torch.float32).view(2, 3, -1)
    x, residual = torch.sin(ramp).to(norm.weight.dtype)
    alone, together = norm(x), norm(x.clone(), residual.clone())
    close, tolerance = torch.allclose, 1e-4 if x.dtype == torch.float32 else 0.05
    own = norm.before(x.clone(), residual.clone())
    pairs = ((alone, norm.before(x)), *zip(together, own, strict=True))
    return all(close(found, expected, rtol=tolerance, atol=tolerance) for found, expected in pairs)
