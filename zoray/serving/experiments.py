"""A tuning job's request as a zoray experiment: what the server decides, and what the request may change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from zoray.cluster import Cluster
from zoray.experiment import Experiment, Run
from zoray.models import max_length
from zoray.monitoring import Logging
from zoray.optimizers import LEAST_DECAY
from zoray.serving.pool import PATIENT
from zoray.tiles import MAX_TILE

if TYPE_CHECKING:
    from zoray.serving.requests import NewJob
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
