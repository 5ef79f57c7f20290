"""`python -m zoray.evaluate`: score any state on any task, without Ray.

run=DIR [step=K|best] [split=dev] [task=NAME]     a step of a run, on its own task or on another
task=NAME model=NAME [adapter=DIR]                a bare model, with a PEFT adapter or without
shots=K                                           the same with K solved examples before each prompt (ICL)
predictions=FILE.jsonl                            what the model made of each example
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, from_record
from zoray.models.adapters import peft_space, read_peft
from zoray.models.folder import linear_matrices
from zoray.records import ConfigError, JournalError, Probe, disk
from zoray.records.paths import user_path
from zoray.records.process import streams
from zoray.records.tiles import mean
from zoray.run import journal
from zoray.run.config import build, build_experiment, check_run_files, load_run_config, run_main
from zoray.run.reports.history import resolve_step
from zoray.scoring.metrics import metrics
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL
from zoray.scoring.objectives.base import Objective, Unbound
from zoray.scoring.workload import ReplicaSpec, load_workload
from zoray.tasks.few_shot import FewShot
from zoray.tasks.mixture import Mixture

if TYPE_CHECKING:
    from zoray.records import Example
    from zoray.scoring.objectives.base import Outcomes
    from zoray.scoring.replica import Replica


def main(config: Any) -> int:
    """Print metric, loss and digest; fails where nobody can read them."""
    if config.run is None and (config.task is None or config.model is None):
        raise ConfigError(
            "expected a run, or a model and a task: python -m zoray.evaluate run=runs/NAME (and step=K or step=best, "
            "split=dev, task=NAME), or model=smollm2-135m task=NAME (and adapter=DIR)"
        )
    if config.run is not None and (config.adapter is not None or config.model is not None):
        raise ConfigError("expected either run=..., which has its model and adapter, or model=... and adapter=...")
    if config.split not in ("train", "dev", "test"):
        raise ConfigError(f"expected split to be train, dev or test; got {config.split!r}")
    if config.predictions is not None and user_path(config.predictions).exists():
        raise ConfigError(f"expected {config.predictions} not to exist yet; it does. Choose another file")
    if config.predictions is not None:
        disk.check_place(user_path(config.predictions), "predictions")

    from zoray.scoring.replica import Replica

    spec, contents, last = _of_run(config) if config.run is not None else _of_model(config)
    adapter = None if config.adapter is None else _read_adapter(user_path(config.adapter), spec)
    workload = load_workload(spec)
    if not len(workload.splits[config.split]):
        raise ConfigError(f"the {config.split} split is empty")
    replica = Replica(spec, workload)
    if contents is not None:
        _replay(replica, contents, last)
    elif adapter is not None:
        replica.engine.restore(adapter, 0)
    outcomes = replica.outcomes(config.split, Probe(last, 0, 0.0))
    columns = {"score": outcomes.scores, **outcomes.columns}
    score, metric, others = metrics(workload, config.split, outcomes.losses, columns)
    shown = f"{metric} {score:.4f}, " if metric else ""
    at = "" if contents is None else f"step {last}: "
    loss, count = mean(outcomes.losses.tolist()), len(outcomes.losses)
    print(f"{at}{config.split} {shown}loss {loss:.6f} ({count} examples), digest {replica.engine.digest()}")
    if others:
        print("also " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    if outcomes.failed:
        print(f"{outcomes.failed} of {outcomes.written} rewards could not be had; the first: {outcomes.failure}")
    if config.predictions is not None:  # last: a disk that is full takes no number away
        _write(user_path(config.predictions), replica, config.split, outcomes)
    return int(streams.lost())


def _of_run(config: Any) -> tuple[ReplicaSpec, journal.Contents, int]:
    folder = user_path(config.run)
    contents = journal.read(folder / journal.FILE_NAME)
    stored = load_run_config(folder)
    check_run_files(stored, folder, ["model", *(part for part in ("task", "objective") if config[part] is None)])
    experiment = build_experiment(stored)
    if experiment.estimator.guided:  # a state is scored without
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


def _of_model(config: Any) -> tuple[ReplicaSpec, None, int]:
    """The spec of a model as it is, which an adapter without numbers leaves as it is to the bit."""
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


def _read_adapter(folder: Path, spec: ReplicaSpec) -> bytes:
    """A state of the model, before it loads."""
    base = spec.model.resolve()
    return read_peft(folder, spec.space, linear_matrices(base, spec.space.targets), base)


def _task(config: Any, own: Any) -> Any:
    task = own if config.task is None else build(config.task, "task")
    if config.shots and isinstance(task, Mixture):
        raise ConfigError("expected a single task for shots=...; got a mixture. Take its parts one by one")
    return FewShot(task, config.shots, config.shots_seed) if config.shots else task


@dataclass(frozen=True)
class Suited(Unbound):
    """The objective that a task is evaluated by where none is named: by its answers, or its options, or else `own`."""

    own: Any = None

    def bind(self, task: Any, example: Example) -> Objective:
        """The likelihood of answers or of options."""
        objective = AnswerNLL() if example.answers else ChoiceNLL() if len(example.options) >= 2 else self.own
        if objective is None:
            raise ConfigError("expected an objective for a task with neither options nor answers: objective=reward ...")
        return objective.bind(task, example)


def _replay(replica: Replica, contents: journal.Contents, last: int) -> None:
    """Bring a replica to a step of a run, and compare all digests on the way."""
    header = contents.header
    if replica.info.weights != header["weights"]:
        raise JournalError(
            f"the journal was made with base weights {header['weights']}; {replica.spec.model.path} has "
            f"{replica.info.weights}"
        )
    if replica.spec.space.folds and replica.info.dtype != header["dtype"]:
        raise JournalError(
            f"the run folded into base weights of {header['dtype']}; this engine holds {replica.info.dtype}. "
            "Take the run's own engine and kind of device"
        )
    for noted in contents.steps[:last]:
        if noted.digest is not None and noted.digest != replica.engine.digest():
            raise JournalError(f"the state before step {noted.commit.step} differs from the run's, {noted.digest}")
        replica.apply([noted.commit])


def _write(path: Path, replica: Replica, split: str, outcomes: Outcomes) -> None:
    """A line for each example: what it was asked, what is right, what the model said, and what that is worth."""
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
    """A prompt as JSON: of a chat pairs of role and content, with what else a message has as a third."""
    return prompt if isinstance(prompt, str) else [[m.role, m.content, *filter(None, [m.more])] for m in prompt]


if __name__ == "__main__":
    run_main("evaluate", main)
