"""Evaluations: of a run's state through its pool, and of any state on any task through one replica, without Ray."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, from_record
from zoray.models.adapters import peft_space, read_peft
from zoray.models.folder import linear_matrices
from zoray.records import ConfigError, Evaluation, JournalError, disk
from zoray.records.paths import user_path
from zoray.records.tiles import Grid, mean
from zoray.run import journal
from zoray.run.config import build, build_experiment
from zoray.run.folder import check_run_files, load_run_config
from zoray.run.reports.history import resolve_step
from zoray.scoring.metrics import check_rewards, metrics, worth
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL
from zoray.scoring.objectives.base import Objective, Unbound
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.few_shot import FewShot
from zoray.tasks.mixture import Mixture

if TYPE_CHECKING:
    from zoray.pool.pool import Pool
    from zoray.records import Example
    from zoray.scoring.objectives.base import Outcomes
    from zoray.scoring.replica import Replica
    from zoray.scoring.workload import Workload


def evaluate(pool: Pool, workload: Workload, split: str) -> tuple[Evaluation, np.ndarray]:
    """Loss and metrics of the current state on a whole split, scored by all replicas; and each example's `worth`."""
    began, step, count = time.monotonic(), len(pool.commits), len(workload.splits[split])
    scores, digest = pool.evaluate(Grid.of(pool.spec, step, split, count), digest=True)
    check_rewards(scores, workload, f"evaluation on {split} before step {step + 1}")
    seconds, loss = time.monotonic() - began, mean(scores.losses.tolist())
    score, metric, others = metrics(workload, split, scores.losses, scores.columns or {})
    found = Evaluation(step, split, loss, score, count, scores.tokens, seconds, digest or "", metric, others)
    return found, worth(score, scores.losses, scores.columns or {})


def of_run(config: Any) -> tuple[ReplicaSpec, journal.Contents, int]:
    """The spec of a replica that scores a run, the run's journal, and the step asked for."""
    folder = user_path(config.run)
    contents = journal.read(folder / journal.FILE_NAME)
    stored = load_run_config(folder)
    check_run_files(stored, folder, ["model", *(part for part in ("task", "objective") if config[part] is None)])
    experiment = build_experiment(stored)
    if experiment.estimator.guided:  # scoring needs no feedback
        experiment = replace(experiment, estimator=TwoPoint())
    if config.engine is not None:
        experiment = replace(experiment, engine=build(config.engine, "engine"))
    pinned = (from_record(contents.header["space"]), contents.header["run"]["seed"])
    if pinned != (experiment.space, experiment.run.seed):
        raise JournalError(
            f"the journal was made with {pinned[0]} and run.seed={pinned[1]}; {folder / 'config.yaml'} says "
            f"{experiment.space} and {experiment.run.seed}. Undo the change of that file"
        )
    task, objective = _task(config, experiment.task), experiment.objective
    if config.objective is not None:
        objective = build(config.objective, "objective")
    elif config.task is not None:
        objective = Suited(objective)
    spec = replace(experiment.spec, task=task, objective=objective)
    return spec, contents, resolve_step(config.step, folder, len(contents.steps))


def of_model(config: Any) -> tuple[ReplicaSpec, None, int]:
    """The spec of an untuned model: a zero adapter leaves it unchanged to the bit."""
    from zoray.engines.vllm.engine import Vllm

    space: Any = Lora(rank=1, alpha=1.0)
    task = _task(config, None)
    if config.adapter is not None:
        space = peft_space(user_path(config.adapter))
    objective = Suited() if config.objective is None else build(config.objective, "objective")
    engine = Vllm() if config.engine is None else build(config.engine, "engine")
    engine.check(space)
    estimator = TwoPoint()
    model = build(config.model, "model")
    spec = ReplicaSpec(model, task, objective, space, estimator, engine.for_probes(2), 0, 0, batch=1)
    return spec, None, 0


def read_adapter(folder: Path, spec: ReplicaSpec) -> bytes:
    """A PEFT adapter as a state of the spec's model, read before the model loads."""
    base = spec.model.resolve()
    return read_peft(folder, spec.space, linear_matrices(base, spec.space.targets), base)


def _task(config: Any, own: Any) -> Any:
    task = own if config.task is None else build(config.task, "task")
    if config.shots and isinstance(task, Mixture):
        raise ConfigError("expected a single task for shots=...; got a mixture. Take its parts one by one")
    return FewShot(task, config.shots, config.shots_seed) if config.shots else task


@dataclass(frozen=True)
class Suited(Unbound):
    """The objective for evaluating a task if none is named: by its answers, or its options, or else `own`."""

    own: Any = None

    def bind(self, task: Any, example: Example) -> Objective:
        """The likelihood of answers or of options."""
        objective = AnswerNLL() if example.answers else ChoiceNLL() if len(example.options) >= 2 else self.own
        if objective is None:
            raise ConfigError("expected an objective for a task with neither options nor answers: objective=reward ...")
        return objective.bind(task, example)


def catch_up(replica: Replica, contents: journal.Contents, last: int) -> None:
    """Bring a replica to a step of a run, comparing all digests on the way."""
    header = contents.header
    if replica.info.weights != header["weights"]:
        raise JournalError(
            f"the journal was made with base weights {header['weights']}; {replica.spec.model.path} has "
            f"{replica.info.weights}"
        )
    if replica.spec.space.folds and replica.info.dtype != header["dtype"]:
        raise JournalError(
            f"the run folded into base weights of {header['dtype']}; this engine holds {replica.info.dtype}. "
            "Use the run's own engine and kind of device"
        )
    for noted in contents.steps[:last]:
        if noted.digest is not None and noted.digest != replica.engine.digest():
            raise JournalError(f"the state before step {noted.commit.step} differs from the run's, {noted.digest}")
        replica.apply([noted.commit])


def write_predictions(path: Path, replica: Replica, split: str, outcomes: Outcomes) -> None:
    """Write one line per example: its prompt, the right answer, the model's output, its score and loss."""
    workload, places = replica.workload, {}
    for part in workload.parts:
        if part.evaluator.sampling is not None:
            places[id(part.evaluator)] = iter(replica.scorer.writer(part.evaluator).texts)
    lines = []
    for i, example in enumerate(workload.splits[split]):
        evaluator = workload.parts[example.part].evaluator
        line: dict[str, Any] = {"example": i, "prompt": _asked(example.prompt)}
        line |= {"options": example.options, "label": example.label} if example.options else {}
        line |= {"answers": example.answers} if example.answers else {}
        if id(evaluator) in places:
            line["completion"] = next(places[id(evaluator)])
        line |= {"score": outcomes.scores[i], "loss": outcomes.losses[i]}
        line |= {name: values[i] for name, values in outcomes.columns.items()}
        if "predicted" in outcomes.columns and np.isfinite(line["predicted"]):
            line["predicted"] = example.options[int(line["predicted"])]
        numbers = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in line.items()}
        lines.append(json.dumps(numbers, ensure_ascii=False, default=float) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.replace(path, "".join(lines).encode())


def _asked(prompt: Any) -> Any:
    """A prompt as JSON; a chat is pairs of role and content, with a message's other fields as a third item."""
    return prompt if isinstance(prompt, str) else [[m.role, m.content, *filter(None, [m.more])] for m in prompt]
