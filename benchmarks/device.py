"""What a device can do, and how busy a step keeps it: measured, not read from a data sheet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Median seconds of a call that works on the device."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, return_mode="median")) / 1000
    from torch.utils.benchmark import Timer

    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.02).median


def rates(device: str, tiny: bool) -> dict[str, Any]:
    """Rates of a large matrix product in each dtype, in TFLOP/s, and of a large copy, in GB/s read and written."""
    size = 512 if tiny else 8192
    found = {}
    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[f"{name} TFLOP/s"] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device) / 1e12
    source = torch.zeros((1 << 22) if tiny else (1 << 28), device=device)
    there = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return {**found, "GB/s": copied / seconds_of(lambda: there.copy_(source), device) / 1e9}


def busy(step: Callable[[], object], device: str, steps: int = 3) -> dict[str, float]:
    """How much of some steps the device works, from a profile: a share, and the rest in milliseconds a step.

    On a CPU what works is torch's operators, and the rest is Python.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        whole = 1e6 * (time.perf_counter() - began)
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    spans = [event.time_range for event in profile.events() if event.device_type == wanted]
    worked = union([(span.start, span.end) for span in spans])
    return {"busy": min(1.0, worked / whole), "gaps ms": max(0.0, whole - worked) / steps / 1000}


def union(spans: list[tuple[float, float]]) -> float:
    """The length of what some spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
