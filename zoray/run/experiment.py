"""An experiment: the components of a run, each with its own frozen config, and the numbers of the loop itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoray.engines.base import EngineConfig
    from zoray.methods.estimators import Estimator
    from zoray.methods.optimizers import Sgd
    from zoray.methods.spaces import Space
    from zoray.models.folder import Model
    from zoray.pool.settings import Cluster
    from zoray.run.reports.monitor import Logging
    from zoray.scoring.objectives import Objective
    from zoray.tasks.base import Task

from zoray.methods.estimators import Feedback
from zoray.models.tokens import checked_date
from zoray.records import ConfigError, require
from zoray.records.paths import user_path
from zoray.records.tiles import MAX_TILE
from zoray.scoring.workload import ReplicaSpec


@dataclass(frozen=True)
class Run:
    """The loop.

    Args:
        name: the run's folder below `folder`.
        folder: where runs are kept.
        resume: folder of a run to resume; its config is taken from there.
        steps: optimizer steps.
        batch: examples per step.
        stratify: take labels in turn, so that batches of a multiple of the number of labels are balanced.
        seed: of directions and of A.
        data_seed: of the order of examples.
        tile_examples: examples per tile, the unit handed to a replica. It affects the result, so it does not depend on
            the number of replicas; a step has one tile for each direction and each slice of the batch.
        eval_every: steps between evaluations on dev; 0 for only before and after.
        digest_every: steps between comparisons of the replicas' states.
        patience: end the run after this many evaluations on dev in a row without a new best; 0 for never.
        select: which state is the result, "best" on dev or "last".
        too_long: "refuse" sequences over the model's or the engine's limit, or "cut" their beginning, as MeZO does;
            null refuses, but cuts those of a file so large that it is streamed.
        test: evaluate on test, if the task has such rows, before the first step and at the selected one.
        date: YYYY-MM-DD, the date for chat templates that ask for today's; null for the day on which the run begins,
            in UTC. Resumed runs, evaluations and all replicas use the run's date.
    """

    name: str = "run"
    folder: str = "runs"
    resume: str | None = None
    steps: int = 400
    batch: int = 2
    stratify: bool = True
    seed: int = 0
    data_seed: int = 0
    tile_examples: int = 4
    eval_every: int = 100
    digest_every: int = 10
    patience: int = 0
    select: str = "best"
    too_long: str | None = None
    test: bool = True
    date: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "date", checked_date(self.date, "run.date"))
        ok = re.fullmatch(r"[A-Za-z0-9][\w.+-]*", str(self.name)) is not None
        require(ok, "run.name of letters, digits and . _ - +, beginning with a letter or digit", self.name)
        for field in ("steps", "batch", "tile_examples", "digest_every"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 1, f"run.{field} to be a whole number of at least 1", value)
        require(
            self.tile_examples <= MAX_TILE, f"run.tile_examples of at most {MAX_TILE}, see tiles.py", self.tile_examples
        )
        for field in ("eval_every", "patience"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 0, f"run.{field} to be a whole number of 0 or more", value)
        require(
            not self.patience or self.eval_every > 0,
            "run.patience to be 0 where run.eval_every=0, since it counts evaluations between steps",
            self.patience,
        )
        require(isinstance(self.stratify, bool), "run.stratify to be true or false", self.stratify)
        require(self.select in ("best", "last"), "run.select to be best or last", self.select)
        require(self.too_long in ("refuse", "cut", None), "run.too_long to be refuse, cut or null", self.too_long)
        for field in ("seed", "data_seed"):
            value = getattr(self, field)
            require(isinstance(value, int) and 0 <= value < 2**32, f"run.{field} to be in 0..2**32-1", value)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return user_path(self.resume) if self.resume else user_path(self.folder) / self.name


@dataclass(frozen=True)
class Experiment:
    """All components of a run; what `conf/config.yaml` composes."""

    model: Model
    task: Task
    objective: Objective
    space: Space
    estimator: Estimator
    optimizer: Sgd
    engine: EngineConfig
    cluster: Cluster
    logging: Logging
    run: Run

    def __post_init__(self) -> None:
        """Refuse components that do not work together."""
        self.engine.check(self.space)
        space, batch, pairs = type(self.space).__name__.lower(), self.run.batch, self.estimator.directions
        if not self.estimator.shared and batch % pairs:
            raise ConfigError(
                f"expected run.batch to be a multiple of the estimator's {pairs} directions, which share it out "
                f"(estimator.shared=false); got {batch}. Take {max(1, batch // pairs) * pairs}"
            )
        if self.optimizer.momentum and not self.space.takes_momentum:
            raise ConfigError(
                f"expected optimizer.momentum=0 with space={space}, whose momentum would be as large as the model; got "
                f"{self.optimizer.momentum}. Take space=lozo or space=lora"
            )
        if isinstance(self.estimator, Feedback):
            self._check_feedback(self.estimator)
        if self.space.folds and self.optimizer.anchor and not self.space.keep_base:
            raise ConfigError(
                f"expected space.keep_base=true with optimizer.anchor={self.optimizer.anchor} and space={space}: steps "
                "are folded into the base weights, so the decay towards them needs a copy"
            )

    def _check_feedback(self, estimator: Feedback) -> None:
        if not self.space.takes_signs:
            raise ConfigError(
                "expected space=lora with estimator=feedback, whose signs move the numbers of an adapter; got space="
                f"{type(self.space).__name__.lower()}"
            )
        require(
            not estimator.pairs or self.optimizer.momentum > 0,
            "optimizer.momentum above 0 with estimator.pairs, whose probes go along it (optimizer=feedback has it)",
            self.optimizer.momentum,
        )
        ranks = self.engine.tensor_parallel
        require(ranks == 1, "engine.tensor_parallel=1 with estimator=feedback", ranks, "Take more replicas instead")

    @cached_property
    def spec(self) -> ReplicaSpec:
        """The part that a replica needs."""
        return ReplicaSpec(
            self.model,
            self.task,
            self.objective,
            self.space,
            self.estimator,
            self.engine.for_probes(len(self.estimator.ask(0)), self.estimator.guided),
            self.run.seed,
            self.run.data_seed,
            self.run.batch,
            self.run.stratify,
            self.run.tile_examples,
            self.run.too_long,
            self.run.date,
        )
