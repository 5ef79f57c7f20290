"""The step loop: ask, evaluate, tell, journal, commit. One function, read from top to bottom.

Guarantees: a step is in the journal before any replica applies it; SIGTERM, SIGHUP and Ctrl-C end the run after the
current step and leave it resumable; a resumed run takes the same steps as if it had not stopped.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from zoray.methods import snapshots
from zoray.methods.estimators import Feedback
from zoray.methods.estimators.feedback import gains
from zoray.methods.spaces import Lora
from zoray.methods.spaces.signs import packed
from zoray.models.adapters import write_peft
from zoray.pool.on_ray.start import start_pool
from zoray.records import ConfigError, require
from zoray.records.process.stopping import stop_requested
from zoray.records.tiles import Grid, mean
from zoray.run import journal
from zoray.run.evaluation import evaluate
from zoray.run.reports.history import best, stalled
from zoray.run.reports.monitor import Monitor
from zoray.run.reports.summary import closing, failures, opening, result_of, summary_of
from zoray.scoring.metrics import Losses, check_rewards
from zoray.scoring.workload import order_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from zoray.pool.pool import Pool
    from zoray.records import Evaluation
    from zoray.run.experiment import Experiment
    from zoray.scoring.workload import Workload


def tune(
    experiment: Experiment,
    workload: Workload,
    config: dict[str, Any],
    start_pool: Callable[..., Pool] = start_pool,
    stopping: Callable[[], bool] | None = None,
    on_dev: Callable[[Pool, Evaluation, np.ndarray | None], None] = lambda pool, evaluation, rows: None,
) -> dict[str, Any]:
    """Run an experiment to its end, or until it is asked to stop; returns the summary.

    `workload` is the experiment's checked model and data; `config` the experiment as plain values, for plots and W&B.
    The run's folder must exist. `stopping`: asked after each step, in place of signals. `on_dev`: called with each
    evaluation on dev, between two steps; in a resumed run again with the one it begins at.

    Raises:
        ConfigError, JournalError, ReplicaLost, FloatingPointError: raised by the parts; journalled steps are kept.
        OSError: the disk refuses a file of the run. It can be resumed, and then ends with an undisturbed run's digest.
    """
    e, run, folder = experiment, experiment.run, experiment.run.path
    order = order_of(e.spec, workload)
    losses_of = Losses(workload, order).of
    require(len(workload.splits.dev) > 0, "examples in the dev split", 0, "Raise task.dev")
    tests = run.test and len(workload.splits.test) > 0
    header = journal.make_header(e, workload)
    earlier = journal.read_journal(folder / journal.FILE_NAME, header)
    done = earlier.steps if earlier else ()
    started = time.monotonic()

    with Monitor(folder, e.logging, folder.name, config, run.steps, len(done)) as monitor:
        trained = e.space.trained(workload.matrices)
        monitor.message(f"{folder}: {len(workload.splits.train)} training examples, {trained:,} numbers trained")
        known = [(noted.commit.step, noted.digest) for noted in done if noted.digest is not None]
        played, snapshot = [noted.commit for noted in done], journal.usable_snapshot(folder / snapshots.FILE_NAME, done)
        with (
            start_pool(e.spec, e.cluster, folder.name, monitor.message, played, known, snapshot) as pool,
            journal.open_journal(folder / journal.FILE_NAME, header, earlier, pool.info.dtype, e.space.folds) as log,
            stop_requested() if stopping is None else nullcontext(stopping) as stop,
        ):
            pool.stopping = stop
            if pool.info.weights != header["weights"]:
                raise ConfigError(
                    f"expected the replicas' model files to be those of this machine, {workload.folder} (hash "
                    f"{header['weights']}); they have {pool.info.weights}. Give all nodes the same files"
                )
            for line in opening(e, workload, pool, order, time.monotonic() - started):
                monitor.message(line)
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
                    monitor.message(failures(step, scores))
                failed += scores.failed

                losses, examples = losses_of(probes, grid, scores)
                estimate = e.estimator.tell(probes, losses, pool.info.noise / math.sqrt(examples))
                guide: tuple[Any, ...] = ()
                if scores.feedback is not None and isinstance(e.estimator, Feedback):
                    trust = e.estimator.judge(trust, probes, losses)
                    guide = (gains(trust, len(header["matrices"])), packed(scores.feedback, step))
                memory, commit = e.optimizer.update(memory, step, run.steps, estimate.weights, *guide)

                # Metrics first: a resumed run drops those of steps that are not journalled, and repeats those steps.
                monitor.step(result_of(step, e, grid, scores, estimate, pool, time.monotonic() - began))
                monitor.check()
                log.append(journal.StepRecord(commit, tuple(map(mean, losses)), digest, memory, trust))
                every = e.cluster.snapshot_every
                if digest is not None and every and step - last_snapshot >= every:
                    log.sync()  # a snapshot is useless if the journal loses its step
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
            facts = {"finished": finished, "steps": last, "selected": selected, "digest": digest}
            seconds = time.monotonic() - started
            summary = summary_of(header, monitor.history, pool, trust, **facts, seconds=seconds)
            monitor.finish(summary)  # the first file written at the end
            if isinstance(e.space, Lora):
                write_peft(folder / "adapter", arrays, e.space.rank, e.space.alpha, e.model.path, e.space.targets)
            for line in closing(e, folder, summary, monitor.history, failed):
                monitor.message(line)
            monitor.check()
    return summary


def measure(pool: Pool, workload: Workload, monitor: Monitor, split: str) -> tuple[Evaluation, np.ndarray | None]:
    """The current state's evaluation on a split, and each example's worth (see evaluation.evaluate).

    If the run has evaluated that state before (a resumed run may have), the earlier one is returned, and None.
    """
    known = {(evaluation.step, evaluation.split): evaluation for evaluation in monitor.history.evaluations}
    if (len(pool.commits), split) in known:
        return known[len(pool.commits), split], None
    found, rows = evaluate(pool, workload, split)
    monitor.evaluation(found)
    monitor.check()
    return found, rows
