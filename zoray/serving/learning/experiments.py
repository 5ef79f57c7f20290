"""A tuning job's request as a zoray experiment: its data, the server's settings and those that the request may change.

A job learns from an upload, or from a task that comes with zoray: named in the request, composed from the package's own
conf only. Guarantees: a name is looked up among existing files and is never part of a path; a request may change such a
task's sizes and nothing else, so no path, template or import name of a request reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from zoray.methods.optimizers import LEAST_DECAY
from zoray.models.folder import max_length
from zoray.pool.settings import Cluster
from zoray.records import ConfigError
from zoray.records.signatures import did_you_mean
from zoray.records.tiles import MAX_TILE
from zoray.run.config import build, conf_dir
from zoray.run.experiment import Experiment, Run
from zoray.run.reports.monitor import Logging
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Preference
from zoray.serving.learning.job_requests import MOST_RATE, MOST_STEPS, PREFIX, Else, Hyperparameters
from zoray.serving.learning.pool import PATIENT
from zoray.tasks.file.task import File, open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zoray.scoring.objectives.base import Objective
    from zoray.serving.learning.job_requests import NewJob, Use
    from zoray.serving.settings import Settings
    from zoray.serving.store import Store
    from zoray.tasks.base import Task
    from zoray.tasks.file.rows.text import Rows

SIZES = ("train", "dev", "test")


class Upload(File):
    """An uploaded file, of which nothing is cached elsewhere: what people delete is gone."""

    cached: ClassVar[bool] = False


@dataclass(frozen=True)
class Apart(Upload):
    """An upload with another one, whose rows are dev.

    Args:
        held_out: the other one's path.
    """

    held_out: str = ""

    def tables(self) -> dict[str, Rows]:
        """The upload's rows, and the held-out ones."""
        return {**super().tables(), "dev": open_rows(self.held_out)["train"]}


def lessons(request: NewJob, data_path: Callable[[str], Path]) -> tuple[Task, Objective]:
    """A job's task, and the likelihood that suits it; `data_path` gives the path of an upload's data.

    Raises:
        ConfigError: there is no such upload or task, or a setting does not suit it.
    """
    use, source = request.use, request.source
    if source.startswith(PREFIX):
        if other := use.model_dump(exclude_defaults=True).keys() - set(SIZES):
            raise ConfigError(
                f"expected use of a task to have {', '.join(SIZES)} only; got {', '.join(sorted(other))}. Upload "
                "your own data to say how they are read"
            )
        task, objective = preset(source.removeprefix(PREFIX), use.model_dump(include=set(SIZES)))
    else:
        held_out = None if request.validation_file is None else data_path(request.validation_file)
        task = file_of(use, data_path(source), held_out)
        objective = objective_of(task)
    return task, _as_asked(objective, request)


def file_of(use: Use, data: Path, held_out: Path | None = None) -> File:
    """The task for an upload's data; `held_out`: another upload's data, whose rows are dev.

    Raises:
        ConfigError: the settings contradict each other.
    """
    settings = {"path": str(data), **use.model_dump(exclude_none=True)}
    return Upload(**settings) if held_out is None else Apart(held_out=str(held_out), **settings)


def objective_of(task: File) -> Objective:
    """The likelihood that suits a file's kind of rows."""
    kinds = {"choice": ChoiceNLL, "completion": AnswerNLL, "chat": AnswerNLL, "preference": Preference}
    if (kind := task.kind_found) not in kinds:
        raise ConfigError("expected rows with a label, a completion, a chat or a preference; got prompts only")
    return kinds[kind]()


def _as_asked(objective: Objective, request: NewJob) -> Objective:
    """The objective with the request's beta; ConfigError if the rows need another method than the request's."""
    pairs, beta = isinstance(objective, Preference), request.hyperparameters and request.hyperparameters.beta
    if request.method is not None and (request.method.type == "dpo") != pairs:
        have, method = ("preferences", "dpo") if pairs else ("no preferences", "supervised")
        raise ConfigError(
            f"expected method {method}, since the rows have {have}; got {request.method.type}. Rows with columns "
            "prompt, chosen and rejected are learnt from by dpo, all others by supervised"
        )
    if beta is not None and not pairs:
        raise ConfigError("expected beta with preferences only (prompt, chosen, rejected); leave it out")
    return replace(objective, beta=beta) if beta is not None else objective  # type: ignore[type-var]


@cache
def task_names() -> tuple[str, ...]:
    """The tasks that need nothing from the user: no path, no parts, and no reward."""
    return tuple(
        path.stem
        for path in sorted((conf_dir() / "task").glob("*.yaml"))
        if "???" not in (settings := _settings(path.stem)).values() and _metric(settings) != "reward"
    )


def preset(name: str, sizes: Mapping[str, int | None]) -> tuple[Task, Objective]:
    """A task with the given sizes of its splits (None: the task's own), and the likelihood that suits it.

    Raises:
        ConfigError: there is no such task, or it can't have a size.
    """
    if name not in task_names():
        advice = did_you_mean(name, list(task_names()))
        raise ConfigError(f"expected task to be one of {', '.join(task_names())}; got {name[:40]!r}{advice}")
    settings = _settings(name)
    given = {key: size for key in SIZES if (size := sizes.get(key)) is not None}
    return build(settings | given, "task"), ChoiceNLL() if _metric(settings) == "accuracy" else AnswerNLL()


def _settings(name: str) -> dict[str, Any]:
    """The settings in conf/task; read each time, since components may keep the objects they are given."""
    return yaml.safe_load((conf_dir() / "task" / f"{name}.yaml").read_text(encoding="utf-8"))


def _metric(settings: Mapping[str, Any]) -> str | None:
    """The metric of the task's class."""
    module, _, name = settings["_target_"].rpartition(".")
    return getattr(import_module(module), name).metric


def experiment_of(settings: Settings, store: Store, name: str, request: NewJob, date: str | None = None) -> Experiment:
    """The experiment of a job, whose run is in the job's folder; `date`: the date of its request.

    Raises:
        ConfigError: there is no such upload or task, or a setting does not suit it.
    """
    s, numbers = settings, _chosen(settings, dict(request.hyperparameters or ()))
    task, objective = lessons(request, store.data_path)
    optimizer, lr, batch = s.optimizer, numbers["learning_rate"], numbers["batch_size"]
    if lr != optimizer.lr:
        optimizer = replace(optimizer, lr=lr, anchor=optimizer.anchor * (lr * optimizer.anchor >= LEAST_DECAY))
    run = Run(
        name="run",
        folder=str(store.folder / "jobs" / name),
        steps=numbers["steps"],
        batch=batch,
        # a tile that gives feedback needs its own forward pass
        tile_examples=min(-(-batch // s.replicas), MAX_TILE) if s.estimator.guided else Run.tile_examples,
        seed=s.seed,  # the engine has opened its adapters with it
        data_seed=s.seed if request.seed is None else request.seed,
        eval_every=s.eval_every,
        too_long="cut",
        date=date,
        test=request.use.test != 0,
    )
    patience = dict.fromkeys(("hang_timeout_s", "start_timeout_s", "wait_timeout_s"), PATIENT)
    cluster = Cluster(replicas=s.replicas, late_floor_s=60.0, **patience)
    # In steps shared with requests a sequence is a request, for which vLLM wants to write a token.
    engine = replace(s.engine, max_length=s.engine.length_limit(max_length(s.model.resolve())) - 1)
    logging_ = Logging(progress=False, curve=False)
    return Experiment(s.model, task, objective, s.space, s.estimator, optimizer, engine, cluster, logging_, run)


def _chosen(settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """A job's numbers: its own where given, else the server's."""
    fields = Hyperparameters.model_fields
    own = {name: one for name, field in fields.items() for one in field.metadata if isinstance(one, Else)}
    return {name: given.get(name) or attrgetter(setting)(settings) for name, setting in own.items()}


def settled(settings: Settings, request: NewJob, experiment: Experiment, rows: int) -> dict[str, Any]:
    """A request as it is kept: values that depend on the number of rows or the server's settings become fixed numbers.

    Raises:
        ConfigError: epochs amount to too many steps, or a multiplier to too high a learning rate.
    """
    numbers = request.hyperparameters or Hyperparameters()
    found = numbers.model_dump(exclude_none=True)
    if (epochs := found.pop("n_epochs", None)) is not None:
        found["steps"] = -(-epochs * rows // experiment.run.batch)
        if found["steps"] > MOST_STEPS:
            raise ConfigError(f"expected n_epochs of at most {MOST_STEPS:,} steps; got {found['steps']:,}")
    if (times := found.pop("learning_rate_multiplier", None)) is not None:
        found["learning_rate"] = times * settings.optimizer.lr
        if found["learning_rate"] >= MOST_RATE:
            raise ConfigError(f"expected a learning rate below {MOST_RATE}; got {found['learning_rate']:g}")
    kept = request.model_dump(exclude_none=True) | ({"hyperparameters": found} if found else {})
    return {**kept, "rows": rows, "learns_by": "dpo" if isinstance(experiment.objective, Preference) else "supervised"}


def numbers_of(settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    """A job's numbers, for people; `request` as it is kept."""
    numbers = _chosen(settings, found := request.get("hyperparameters") or {})
    rows = request.get("rows")  # old jobs have none
    seen = numbers["steps"] * numbers["batch_size"] / rows if rows else None
    return {
        **numbers,
        "learning_rate_multiplier": float(f"{numbers['learning_rate'] / settings.optimizer.lr:.6g}"),
        "n_epochs": "auto" if seen is None else int(seen) if seen == int(seen) else round(seen, 2),
        **({"beta": found.get("beta") or Preference.beta} if request.get("learns_by") == "dpo" else {}),
    }
