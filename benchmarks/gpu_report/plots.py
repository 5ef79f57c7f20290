"""Pictures of a report: seconds of a step by batch size, and signal over noise by eps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COLOURS = {"zoray": "#3b6ea8", "bare": "#999999", "request": "#3f8f5b", "lozo": "#d1662f", "mezo": "#a8433b"}


def draw(out: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write speed.png and signal.png for what has been measured."""
    rows = {
        part: {
            name.partition(":")[2]: result["measured"]["rows"]
            for name, result in results.items()
            if name.startswith(f"{part}:") and "rows" in result.get("measured", {})
        }
        for part in ("speed", "signal")
    }
    if rows["speed"]:
        speed(out / "speed.png", rows["speed"])
    if rows["signal"]:
        signal(out / "signal.png", rows["signal"])


def speed(path: Path, cases: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """A panel for each case: milliseconds of every contender over the batch size."""
    from matplotlib.figure import Figure

    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.8 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    labels: dict[str, Any] = {}
    for panel, (name, rows) in zip(panels, cases.items(), strict=False):
        for contender, colour in COLOURS.items():
            if f"{contender} ms" in rows[0]:
                x, y = zip(*((row["batch"], row[f"{contender} ms"]) for row in rows), strict=True)
                labels[contender] = panel.plot(x, y, marker="o", markersize=3.5, color=colour)[0]
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        panel.minorticks_off()
        low, high = (round(bound) for bound in np.log2(panel.get_ylim()))
        ticks = [2.0**power for power in range(low, high + 1, max(1, (high - low) // 5))]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_title(name, fontsize=10)
        _plain(panel)
    for panel in list(figure.axes)[len(cases) :]:
        panel.set_visible(False)
    figure.supxlabel("examples a step", fontsize=9)
    figure.supylabel("milliseconds a step", fontsize=9)
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def signal(path: Path, cases: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Signal over noise by eps, a line for each model and dtype."""
    from matplotlib.figure import Figure

    from benchmarks.noise import SOUND

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    for name, rows in cases.items():
        points = zip(*((row["eps"], row["over noise"]) for row in rows), strict=True)
        panel.plot(*points, marker="o", markersize=3.5, label=name)
    panel.axhline(SOUND, color="#333333", linewidth=0.8, linestyle="--")
    panel.text(1e-4, SOUND * 1.15, f"{SOUND:g} times the noise", fontsize=8, color="#333333")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("eps")
    panel.set_ylabel("|L+ - L-| over the noise of a loss")
    _plain(panel)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _plain(panel: Any) -> None:
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
