"""A run's measurements from metrics.jsonl: steps, evaluations, the best one, a before/after table."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError, Evaluation, JournalError, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class History:
    """A run's steps and evaluations in order; a later record of the same step (and split) replaces the earlier one."""

    def __init__(self) -> None:
        self._steps: dict[int, StepResult] = {}
        self._evaluations: dict[tuple[int, str], Evaluation] = {}

    @property
    def steps(self) -> list[StepResult]:
        return [self._steps[key] for key in sorted(self._steps)]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [self._evaluations[key] for key in sorted(self._evaluations)]

    def step(self, result: StepResult) -> None:
        self._steps[result.step] = result

    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluations[evaluation.step, evaluation.split] = evaluation

    def rewind(self, step: int) -> None:
        """Forget all measurements after `step`: a resumed run goes on from there."""
        self._steps = {key: value for key, value in self._steps.items() if key <= step}
        self._evaluations = {key: value for key, value in self._evaluations.items() if key[0] <= step}

    def read(self, folder: Path) -> None:
        """Read a metrics.jsonl. A torn last line is ignored; an earlier damaged line is an error that names it."""
        path = folder / "metrics.jsonl"
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                kind = record["kind"]
                if kind == "step":
                    self.step(_record(StepResult, record))
                elif kind == "evaluation":
                    self.evaluation(_record(Evaluation, record))
                elif kind == "resume":
                    self.rewind(record["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(f"{path}, line {number} is damaged: {type(error).__name__}: {error}") from error


def read_metrics(folder: Path) -> tuple[list[StepResult], list[Evaluation]]:
    """The steps and evaluations of a run folder, without those that a resume took back; later lines win."""
    history = History()
    history.read(folder)
    return history.steps, history.evaluations


def _record(kind: type, line: dict) -> Any:
    """A record from its line; null is a number that was not finite, and keys of another version are left out."""
    line = {"score": line.get("accuracy"), **line}  # the score's name when it was always the accuracy
    names = [f.name for f in dataclasses.fields(kind) if f.name in line]
    absent = {name: math.nan for name in names if line[name] is None and name != "metric"}
    return kind(**{name: line[name] for name in names} | absent)


def summarise(evaluations: Iterable[Evaluation], selected: int | None = None) -> dict[str, dict]:
    """Results before step 1, at the selected step (None: the last one), and best on dev.

    A block has step, the metric by its name, loss and count on dev; `initial` and `final` hold the same for the test
    split as "test". A block is empty if it was not measured.
    """
    summary: dict[str, dict] = {"initial": {}, "final": {}, "best": {}}
    ordered = sorted(evaluations, key=lambda e: e.step)
    for e in ordered:  # in order, so the last one stays in `final`
        block = "initial" if e.step == 0 else "final" if selected in (None, e.step) else None
        numbers = _block(e)
        for name in (block, "final" if e.step == selected == 0 else None):
            if name:
                summary[name].update(numbers if e.split == "dev" else {e.split: numbers})
    top = best(ordered)
    if top is not None:
        summary["best"] = _block(top)
    return summary


def _block(e: Evaluation) -> dict[str, Any]:
    metric = {} if e.metric is None else {e.metric: e.score}
    return {"step": e.step, **metric, "loss": e.loss, "count": e.count, **e.others}


def best(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The evaluation on dev with the highest score; ties go to the lowest loss, then the fewest steps."""
    dev = sorted((e for e in evaluations if e.split == "dev"), key=lambda e: e.step)
    return max(dev, key=_rank, default=None)


def stalled(evaluations: Iterable[Evaluation], patience: int) -> bool:
    """Whether the last `patience` evaluations on dev (0: never) brought no new best one."""
    dev = sorted({e.step: e for e in evaluations if e.split == "dev"}.values(), key=lambda e: e.step)
    top = best(dev)
    return bool(patience) and top is not None and sum(e.step > top.step for e in dev) >= patience


def table(evaluations: Iterable[Evaluation], selected: int | None = None) -> str:
    """Metric and loss before and after as plain text; a dash where nothing was measured."""
    evaluations = list(evaluations)
    summary, metric = summarise(evaluations, selected), next((e.metric for e in evaluations if e.metric), None)
    lines = [
        f"         {metric or 'metric':<35}loss",
        "         before     after    change     before     after",
    ]
    for split in ("dev", "test"):
        before, after = summary["initial"], summary["final"]
        if split == "test":
            before, after = before.get("test", {}), after.get("test", {})
        if "step" in before or "step" in after:
            old, new = before.get(metric), after.get(metric)
            change = None if old is None or new is None else new - old
            cells = [_cell(old, ".3f"), _cell(new, ".3f"), _cell(change, "+.3f")]
            cells += [_cell(before.get("loss"), ".4f", 11), _cell(after.get("loss"), ".4f")]
            lines.append(f"{split:<5}" + "".join(cells))
    top = summary["best"]
    name = f"{metric} {top[metric]:.3f}" if metric and metric in top else f"loss {top.get('loss', math.nan):.4f}"
    lines.append(f"best dev {name} at step {top['step']}" if top else "no evaluation on dev")
    return "\n".join(lines if len(lines) > 3 else lines[-1:])


def _rank(e: Evaluation) -> tuple[float, float]:
    """Higher is better: the score first, then a low loss; a number that is not finite loses to every other."""
    return e.score if math.isfinite(e.score) else -math.inf, -e.loss if math.isfinite(e.loss) else -math.inf


def _cell(value: float | None, layout: str, width: int = 10) -> str:
    return f"{'-' if value is None else format(value, layout):>{width}}"


def resolve_step(step: object, folder: Path, steps: int) -> int:
    """The step that a command line asks for: a number, null for the last, "best" for the best one evaluated on dev.

    Raises:
        ConfigError: the journal has fewer steps, or "best" is asked for and there is no evaluation on dev.
    """
    if step is None:
        return steps
    if step == "best":
        known = read_metrics(folder)[1] if (folder / "metrics.jsonl").exists() else []
        top = best(e for e in known if e.step <= steps)
        if top is None:
            raise ConfigError(f"expected an evaluation on dev in {folder}/metrics.jsonl for step=best; give a number")
        return top.step
    if not isinstance(step, int) or isinstance(step, bool):
        raise ConfigError(f"expected step to be a whole number or best; got {step!r}")
    if not 0 <= step <= steps:
        raise ConfigError(f"expected step in 0..{steps}, the steps in this journal; got {step}")
    return step
