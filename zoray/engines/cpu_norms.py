"""RMSNorm on the CPU by the kernels that vLLM's CPU wheel brings, which its dispatch leaves to plain torch operations.

Six passes over the hidden states become one, twice a layer. Registered through vLLM's own table of implementations; a
version without that table keeps what it has. (No `from __future__ import annotations`: torch reads these signatures.)
"""

from typing import Any

import torch

NAME = "zoray_cpu"
VECTOR = 16  # numbers that the kernels take at a time; a row is a multiple of it


def register() -> None:
    """Add the compiled kernels to vLLM's table, before an engine of this process orders it; once is enough."""
    ops = _ops()
    if ops and NAME not in ops[0].impls:
        norm, add_norm = ops
        norm.register_impl(NAME, supports_args=_plain)(_rms_norm)
        add_norm.register_impl(NAME, supports_args=_plain_with_residual, inplace=True)(_fused_add_rms_norm)


def prefer() -> bool:
    """Let the compiled kernels come first for this process; whether there are any."""
    ops = _ops()
    for op in ops:
        op.set_default([NAME, "native"])
    return bool(ops)


def _ops() -> tuple[Any, ...]:
    """vLLM's two entries for RMSNorm; none where the version has no table, or the wheel no kernels."""
    try:
        from vllm import ir
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return ()
        current_platform.import_kernels()
        ops = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
    except (ImportError, AttributeError):
        return ()
    return ops if all(hasattr(torch.ops._C, op.name) for op in ops) else ()


def _plain(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
    fits = x.shape[-1] % VECTOR == 0 and x.is_contiguous()
    return fits and variance_size is None and weight is not None and weight.dtype == x.dtype


def _plain_with_residual(
    x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
) -> bool:
    same = x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return same and _plain(x, weight, epsilon, variance_size)


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    result = torch.empty_like(x)
    torch.ops._C.rms_norm(result, x, weight, epsilon)
    return result


def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
