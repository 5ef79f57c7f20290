"""A run's outputs: progress, metrics.jsonl, summary.json, curve.png, Weights & Biases.

Guarantees: every step and evaluation is a line of metrics.jsonl, flushed at once. A configured sink works at start or
raises a ConfigError. After that no failure of a sink reaches the run: one warning is logged and the sink is switched
off. So nothing may be rebuilt from here; the journal is the run's source of truth. But if a disk refuses the run's own
files, the run should not go on as if they were written: `check` raises that error, between two steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from zoray.records import ConfigError, Evaluation, StepResult, disk, require
from zoray.run.reports.history import History, table
from zoray.run.reports.plots import draw_curve, label

log = logging.getLogger(__name__)
OWN = ("metrics.jsonl", "summary.json", "curve.png")  # files a run writes beside its journal and adapter
LOGIN_REMEDY = "Set WANDB_API_KEY, or logging.wandb.mode=offline"


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Weights & Biases: `offline` keeps the files in the run folder, `online` needs WANDB_API_KEY or `wandb login`."""

    mode: str = "disabled"
    project: str = "zoray"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        modes = ("disabled", "offline", "online")
        require(self.mode in modes, f"logging.wandb.mode to be one of {', '.join(modes)}", self.mode)
        require(isinstance(self.project, str) and self.project != "", "a name as logging.wandb.project", self.project)
        require(not isinstance(self.tags, str), "logging.wandb.tags to be a list", self.tags, f"Write [{self.tags}].")
        object.__setattr__(self, "tags", tuple(str(tag) for tag in self.tags))


@dataclasses.dataclass(frozen=True)
class Logging:
    """Which sinks a run has besides metrics.jsonl and summary.json."""

    progress: bool = True
    curve: bool = True
    wandb: Wandb | dict = dataclasses.field(default_factory=Wandb)

    def __post_init__(self) -> None:
        for name in ("progress", "curve"):
            require(isinstance(getattr(self, name), bool), f"logging.{name} to be true or false", getattr(self, name))
        if isinstance(self.wandb, Mapping):
            known = [f.name for f in dataclasses.fields(Wandb)]
            for key in self.wandb:
                require(key in known, f"a key of logging.wandb, one of {', '.join(known)}", key)
            object.__setattr__(self, "wandb", Wandb(**self.wandb))
        require(isinstance(self.wandb, Wandb), "logging.wandb to be a Wandb or its parameters", self.wandb)

    def check(self) -> None:
        """Raise ConfigError if a sink can't work on this machine. Writes nothing, so it needs no folder yet."""
        if self.curve:
            _require_installed("matplotlib", "logging.curve", "logging.curve=false")
        if isinstance(self.wandb, Wandb) and self.wandb.mode != "disabled":
            _require_installed("wandb", "logging.wandb", "logging.wandb.mode=disabled")
            if self.wandb.mode == "online":
                import wandb

                try:
                    login = wandb.login(prompt=False)  # a prompt would hang a batch job
                except Exception as error:  # a malformed key; must reach the user
                    raise ConfigError(f"W&B login failed: {error}. {LOGIN_REMEDY}") from error
                require(login, "a login for logging.wandb.mode=online", "no API key", LOGIN_REMEDY)


class Monitor:
    """All sinks of one run, behind four verbs. Build it before any GPU is taken: it checks the sinks.

    A run that ends without `finish` still gets its curve, and W&B marks it as failed, so it can be resumed.
    """

    def __init__(
        self, folder: Path, logging: Logging, name: str, config: dict, steps: int, start_step: int = 0
    ) -> None:
        logging.check()
        folder.mkdir(parents=True, exist_ok=True)
        self.history = History()
        self.refused: OSError | None = None  # why a file of the run could not be written
        self.sinks: dict[str, Sink] = {
            "console": Console(logging.progress, steps, start_step),
            "metrics.jsonl": MetricsFile(folder, start_step),
            "summary.json": SummaryFile(folder),
        }
        # Damaged metrics of an earlier session cost the curve its beginning; they must not stop a resume.
        self._guard("earlier metrics", lambda: self.history.read(folder))
        if logging.curve:
            self.sinks["curve.png"] = Curve(folder, name, config, self.history)
        if isinstance(logging.wandb, Wandb) and logging.wandb.mode != "disabled":
            run = self.sinks["wandb"] = WandbRun(folder, logging.wandb, name, config)
            self.message(f"W&B: {run.where}")

    def step(self, result: StepResult) -> None:
        self.history.step(result)
        self._each("step", result)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.history.evaluation(evaluation)
        self._each("evaluation", evaluation)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        self._each("message", text)

    def finish(self, summary: dict) -> None:
        """The run reached its end: write summary.json and curve.png, print what changed."""
        self._each("finish", summary)
        self.message(table(self.history.evaluations, summary.get("selected")))

    def check(self) -> None:
        """Raise the OSError with which a file of the run was refused, if any."""
        if self.refused is not None:
            raise self.refused

    def close(self) -> None:
        self._each("close")
        self.sinks.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, verb: str, *arguments: object) -> None:
        for name, sink in list(self.sinks.items()):
            self._guard(name, lambda sink=sink: getattr(sink, verb)(*arguments))

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """The one place that swallows errors: a lost metric must not cost the run."""
        try:
            action()
        except Exception as error:
            self.sinks.pop(name, None)
            if name in OWN and disk.refuses(error):
                self.refused = self.refused or error  # type: ignore[assignment]
            log.warning("monitoring goes on without %s: %s: %s", name, type(error).__name__, error)


class Sink:
    """A place that metrics go to. Any method may raise; the monitor then drops the sink."""

    def step(self, result: StepResult) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self, summary: dict) -> None: ...

    def close(self) -> None: ...


class Console(Sink):
    """Messages on stdout; progress on stderr: a bar on a terminal, else lines a tenth of the run and 30 s apart."""

    def __init__(self, progress: bool, steps: int, start_step: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.progress, self.steps, self.start, self.done = progress, steps, start_step, start_step
        self.clock = time.monotonic
        self.loss, self.weight, self.dev, self.metric = 0.0, 0.0, math.nan, None
        self.seconds, self.began, self.printed = math.nan, 0.0, (start_step, -math.inf)  # printed: (step, time)
        self.bar: tqdm | None = None

    def step(self, result: StepResult) -> None:
        now = self.clock()
        if self.done == self.start:
            self.began = now - result.seconds  # loading the model is not a step
        self.done += 1
        if math.isfinite(result.loss):  # mean over about the last 20 steps, unbiased from the first one on
            self.loss, self.weight = 0.95 * self.loss + 0.05 * result.loss, 0.95 * self.weight + 0.05
        self.seconds = result.seconds if math.isnan(self.seconds) else 0.9 * self.seconds + 0.1 * result.seconds
        if not self.progress:
            return
        left = (now - self.began) / (self.done - self.start) * (self.steps - self.done)
        status = f"{self._numbers()}, lr {result.lr:.2g}, {self.seconds:.3g} s/step, {_duration(left)} left"
        if self.stream.isatty():
            if self.bar is None:
                layout = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt}{postfix}"
                places = {"total": self.steps, "initial": self.start, "file": self.stream}
                self.bar = tqdm(**places, bar_format=layout, dynamic_ncols=True)
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update()
            return
        step, then = self.printed
        if self.done == self.steps or then < 0 or (self.done - step >= self.steps / 10 and now - then >= 30):
            self.printed = (self.done, now)
            print(f"step {self.done}/{self.steps}: {status}", file=self.stream, flush=True)

    def evaluation(self, evaluation: Evaluation) -> None:
        if evaluation.split == "dev":
            self.dev, self.metric = evaluation.score, evaluation.metric
        if self.progress:
            e = evaluation
            score = f"{e.metric} {e.score:.3f}, " if e.metric else ""
            others = "".join(f", {name} {value:.3g}" for name, value in e.others.items())
            self.message(f"step {e.step}: {e.split} {score}loss {e.loss:.4f}{others} ({e.count} examples)")

    def message(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def finish(self, summary: dict) -> None:
        self.close()  # what follows is printed below the finished bar

    def close(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
            self.bar = None

    def _numbers(self) -> str:
        loss = f"loss {self.loss / self.weight:.4f}" if self.weight else "loss nan"
        return loss if math.isnan(self.dev) else f"{loss}, dev {self.metric} {self.dev:.3f}"


class MetricsFile(Sink):
    """metrics.jsonl: append-only lines, each flushed; a torn last line of an earlier session is cut off."""

    def __init__(self, folder: Path, start_step: int) -> None:
        path = self.path = folder / "metrics.jsonl"
        resumed = path.exists()
        self.file = path.open("ab", buffering=0)  # the system gets a line at once, whole or with an error
        if resumed:
            data = path.read_bytes()
            self.file.truncate(data.rfind(b"\n") + 1)
        if resumed or start_step:
            self._append({"kind": "resume", "step": start_step})

    def step(self, result: StepResult) -> None:
        self._append({"kind": "step", **dataclasses.asdict(result)})

    def evaluation(self, evaluation: Evaluation) -> None:
        self._append({"kind": "evaluation", **dataclasses.asdict(evaluation)})

    def close(self) -> None:
        self.file.close()

    def _append(self, record: dict) -> None:
        line = _json({**record, "time": round(time.time(), 3)}) + "\n"
        disk.append(self.file, line.encode(), self.path)


class SummaryFile(Sink):
    """summary.json, replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "summary.json"

    def finish(self, summary: dict) -> None:
        disk.replace(self.path, (_json(summary, indent=2) + "\n").encode())


class Curve(Sink):
    """curve.png, drawn once: when the run finishes, or stops early after at least one step or evaluation."""

    def __init__(self, folder: Path, name: str, config: dict, history: History) -> None:
        self.path, self.name, self.history, self.pending = folder / "curve.png", name, history, False
        labels = [label(config.get(key)) for key in ("model", "task", "space", "estimator")]
        self.subtitle = " · ".join(filter(None, labels))

    def step(self, result: StepResult) -> None:
        self.pending = True

    def evaluation(self, evaluation: Evaluation) -> None:
        self.pending = True

    def finish(self, summary: dict) -> None:
        self.pending = False
        draw_curve(self.path, self.history.steps, self.history.evaluations, self.name, self.subtitle)

    def close(self) -> None:
        if self.pending:
            self.finish({})


class WandbRun(Sink):
    """A W&B run with the step as x axis. It never prompts, and waits for a server for a bounded time only."""

    def __init__(self, folder: Path, config: Wandb, name: str, run_config: dict) -> None:
        import wandb

        # An absent server costs a minute; a bar redrawn every step would fill W&B's console log.
        limits: dict[str, Any] = {"init_timeout": 60, "finish_timeout": 60, "console": "off", "silent": True}
        options: dict[str, Any] = {**dataclasses.asdict(config), "dir": str(folder), "name": name, "config": run_config}
        # `auto` resumes the unfinished run of this folder; W&B has that online only.
        options["resume"] = "auto" if config.mode == "online" else None
        try:
            self.run = wandb.init(**options, settings=wandb.Settings(**limits))
        except Exception as error:  # not swallowed: it becomes the user's error, before the run costs anything
            raise ConfigError(f"W&B did not start: {type(error).__name__}: {error}. {LOGIN_REMEDY}") from error
        self.run.define_metric("*", step_metric="step")
        self.where = self.run.url or f"offline in {self.run.dir}; upload it with `wandb sync`"
        self.finished = False

    def step(self, result: StepResult) -> None:
        numbers = {"train/loss": result.loss, "train/score": result.score, "optim/lr": result.lr}
        numbers |= {f"probes/{name}": getattr(result, name) for name in ("ties", "buried", "dropped", "failed")}
        numbers |= {"time/step_seconds": result.seconds, "time/tokens": result.tokens, "replicas": result.replicas}
        self.run.log({"step": result.step, **numbers})

    def evaluation(self, evaluation: Evaluation) -> None:
        e = evaluation
        numbers = {"loss": e.loss, "seconds": e.seconds, **e.others} | ({e.metric: e.score} if e.metric else {})
        self.run.log({"step": e.step, **{f"{e.split}/{key}": value for key, value in numbers.items()}})

    def finish(self, summary: dict) -> None:
        self.run.summary.update({"summary": _plain(summary)})
        self.finished = True

    def close(self) -> None:
        self.run.finish(exit_code=0 if self.finished else 1)


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """Values allowed in strict JSON: NaN and infinities become null, NumPy scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"


def _require_installed(package: str, key: str, instead: str) -> None:
    found = importlib.util.find_spec(package) is not None
    require(found, f"the package {package} for {key}", "it is not installed", f"Install it, or set {instead}")
