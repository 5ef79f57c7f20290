"""A run as a picture: curve.png, two panels over the steps.

No steps, one step, non-finite losses or no evaluations still give a readable picture, not an error. Non-finite losses
are gaps in the line and counted in the legend, never zeros. Uses no display and no pyplot state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoray.records import Evaluation, StepResult, disk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, DPI = (8.0, 6.4), 150  # inches and dots per inch: 1200 x 960 pixels
TRAIN, DEV, TEST, INK, GRID = "#3b6ea8", "#d1662f", "#3f8f5b", "#333333", "#dddddd"


def draw_curve(
    path: Path, steps: Sequence[StepResult], evaluations: Sequence[Evaluation], title: str, subtitle: str = ""
) -> None:
    """Write the curve as a PNG; `path` is replaced as a whole or left as it was."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.095, right=0.975, top=0.885, bottom=0.085, hspace=0.09)
    figure.text(0.095, 0.958, _short(title, 70), fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(0.095, 0.918, _short(subtitle, 110), fontsize=9, color="#666666", va="center")

    _losses(top, steps, evaluations)
    _scores(bottom, evaluations)
    last = max([0, *(s.step for s in steps), *(e.step for e in evaluations)])
    bottom.set_xlim(-0.02 * max(last, 1), 1.04 * max(last, 1))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("step", color=INK)
    for axes in (top, bottom):
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    disk.replace(path, drawn.getvalue())


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last `window`; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def label(part: object) -> str:
    """A short name of a part of the config: its name, else the last piece of its path or class."""
    if isinstance(part, Mapping):
        name = part.get("name") or part.get("path")
        return str(name).rstrip("/").split("/")[-1] if name else str(part.get("_target_", "")).split(".")[-1]
    return str(part or "")


def _losses(axes: Axes, steps: Sequence[StepResult], evaluations: Sequence[Evaluation]) -> None:
    """Training loss as a faint line, its moving average, and the dev loss as points."""
    axes.set_ylabel("loss", color=INK)
    x, raw = np.array([s.step for s in steps]), np.array([s.loss for s in steps], dtype=np.float64)
    raw = np.where(np.isfinite(raw), raw, np.nan)
    finite = int(np.isfinite(raw).sum())
    dev = [e for e in evaluations if e.split == "dev" and math.isfinite(e.loss)]
    seen = [e.loss for e in dev]
    if finite:
        window = max(1, min(50, len(raw) // 10))
        smooth = moving_average(raw, window)
        lone = "." if finite < 3 else ""  # a line through one point is invisible
        axes.plot(x, raw, color=TRAIN, alpha=0.28, linewidth=0.9, marker=lone, markersize=8, label="train, each step")
        if window > 1:
            axes.plot(x, smooth, color=TRAIN, linewidth=1.9, label=f"train, mean of {window} steps")
        low, high = np.nanpercentile(raw, [25, 75])
        reach = 3 * (high - low) + 1e-3 * abs(high)  # one wild step must not flatten the rest
        seen += [v for v in [*raw, *smooth] if low - reach <= v <= high + reach]
    if finite < len(raw):
        axes.plot([], [], " ", label=f"{len(raw) - finite} of {len(raw)} steps without a finite loss")
    if dev:
        axes.plot([e.step for e in dev], [e.loss for e in dev], "o", color=DEV, markersize=6, label="dev")
    if not seen:
        _say(axes, "no finite loss" if len(raw) else "no steps")
    else:
        low, high = min(seen), max(seen)
        pad = 0.08 * (high - low) or 0.05 * max(abs(high), 1e-3)
        axes.set_ylim(low - pad, high + 2 * pad)
    if axes.get_legend_handles_labels()[1]:
        trend = [v for v in (raw if finite else [e.loss for e in dev]) if math.isfinite(v)]
        side = "upper left" if trend and trend[-1] > trend[0] else "upper right"  # far from the line's high end
        axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.8, loc=side, ncols=2)


def _scores(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    """The dev metric with its start and best labelled, and the test metric as diamonds."""
    metric = next((e.metric for e in evaluations if e.metric), None)
    axes.set_ylabel(metric or "score", color=INK)
    shown = [e for e in evaluations if math.isfinite(e.score)]
    dev = sorted((e for e in shown if e.split == "dev"), key=lambda e: e.step)
    test = sorted((e for e in shown if e.split == "test"), key=lambda e: e.step)
    if not dev and not test:
        _say(axes, "no metric but the loss" if evaluations else "no evaluations")
        return
    values = [e.score for e in dev + test]
    pad = max(0.28 * (max(values) - min(values)), 0.02)
    low, high = min(values) - pad, max(values) + pad
    axes.set_ylim(low, high)
    if dev:
        axes.plot([e.step for e in dev], [e.score for e in dev], "o-", color=DEV, linewidth=1.6, label="dev")
        start, best = dev[0], max(dev, key=lambda e: (e.score, -e.step))
        rising = len(dev) == 1 or dev[1].score >= start.score
        _name(axes, start, f"{'start' if start.step == 0 else 'first'} {start.score:.3f}", DEV, below=rising)
        if best is not start:
            last = max(1, dev[-1].step)
            under = any(abs(e.step - best.step) < 0.3 * last and e.score >= best.score for e in test[-1:])  # its name's
            _name(axes, best, f"best {best.score:.3f} at step {best.step}", DEV, below=under)
    if test:
        axes.plot([e.step for e in test], [e.score for e in test], "D", color=TEST, markersize=7, label="test")
        below = bool(dev) and dev[-1].score >= test[-1].score  # away from the dev line
        _name(axes, test[-1], f"test {test[-1].score:.3f}", TEST, below=below)
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.8, loc="lower right", ncols=2)


def _name(axes: Axes, evaluation: Evaluation, text: str, color: str, below: bool) -> None:
    """Write `text` beside a point, on the side where the panel has room."""
    left, right = 0, max(line.get_xdata()[-1] for line in axes.lines)  # type: ignore[index]
    share = (evaluation.step - left) / max(right, 1)
    align = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        text,
        (evaluation.step, evaluation.score),
        xytext=(0, -9 if below else 9),
        textcoords="offset points",
        ha=align,
        va="top" if below else "bottom",
        fontsize=9,
        color=color,
    )


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#999999", fontsize=11)
    axes.set_yticks([])


def _short(text: str, length: int) -> str:
    """One line, not wider than the picture, and with no mathtext."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1] + "…"
