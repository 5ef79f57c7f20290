"""A tuning job's request as a zoray experiment: what the server decides, and what the request may change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoray.methods.optimizers import LEAST_DECAY
from zoray.models.folder import max_length
from zoray.pool.settings import Cluster
from zoray.records import ConfigError
from zoray.records.tiles import MAX_TILE
from zoray.run.experiment import Experiment, Run
from zoray.run.reports.monitor import Logging
from zoray.scoring.objectives import Preference
from zoray.serving.learning.job_requests import MOST_RATE, MOST_STEPS, Hyperparameters
from zoray.serving.learning.pool import PATIENT

if TYPE_CHECKING:
    from zoray.serving.learning.job_requests import NewJob
    from zoray.serving.settings import Settings
    from zoray.serving.store import Store


def experiment_of(settings: Settings, store: Store, name: str, request: NewJob, date: str | None = None) -> Experiment:
    """The experiment of a job, whose run is in the job's folder; `date`: on which it was asked for.

    Raises:
        ConfigError: there is no such upload or task, or a setting does not suit it.
    """
    s, numbers = settings, request.hyperparameters
    task, objective = request.lessons(store.data_path)
    optimizer = s.optimizer
    if numbers is not None and numbers.learning_rate is not None:
        lr = numbers.learning_rate
        optimizer = replace(optimizer, lr=lr, anchor=optimizer.anchor * (lr * optimizer.anchor >= LEAST_DECAY))
    batch = (numbers and numbers.batch_size) or s.batch
    run = Run(
        name="run",
        folder=str(store.folder / "jobs" / name),
        steps=(numbers and numbers.steps) or s.steps,
        batch=batch,
        # a tile that gives feedback is a forward pass of its own
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
    # In the steps of requests a sequence is a request, of which vLLM wants to write a token.
    engine = replace(s.engine, max_length=s.engine.length_limit(max_length(s.model.resolve())) - 1)
    logging_ = Logging(progress=False, curve=False)
    return Experiment(s.model, task, objective, s.space, s.estimator, optimizer, engine, cluster, logging_, run)


def settled(settings: Settings, request: NewJob, experiment: Experiment, rows: int) -> dict[str, Any]:
    """A request as it is kept: what depends on the number of rows and on the server's settings is a number of its own.

    Raises:
        ConfigError: epochs come to more steps than a job may take, or a multiplier to too high a learning rate.
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
    """What a job is done with, for people: `request` as it is kept."""
    found, base = request.get("hyperparameters") or {}, settings.optimizer.lr
    steps, batch = found.get("steps") or settings.steps, found.get("batch_size") or settings.batch
    rate = found.get("learning_rate") or base
    seen = steps * batch / request["rows"] if request.get("rows") else None  # of jobs before there were rows
    return {
        "steps": steps,
        "batch_size": batch,
        "learning_rate": rate,
        "learning_rate_multiplier": float(f"{rate / base:.6g}"),
        "n_epochs": "auto" if seen is None else int(seen) if seen == int(seen) else round(seen, 2),
        **({"beta": found.get("beta") or Preference.beta} if request.get("learns_by") == "dpo" else {}),
    }
