"""A run's own report in words and numbers: when it begins, for a step, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoray.methods.estimators.feedback import trusted
from zoray.records import StepResult
from zoray.records.overrides import setting
from zoray.records.tiles import Grid, scored
from zoray.run.reports.history import summarise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zoray.methods.estimators import Estimate
    from zoray.pool.pool import Pool
    from zoray.records import Scores
    from zoray.run.experiment import Experiment
    from zoray.run.reports.history import History
    from zoray.scoring.workload import Workload
    from zoray.tasks.batches import Order


def opening(e: Experiment, workload: Workload, pool: Pool, order: Order, seconds: float) -> Iterator[str]:
    """Lines before the first step: how many replicas are ready after `seconds`, and warnings."""
    check = ", ".join(f"{name} {value:.1e}" for name, value in pool.info.self_test) or "exact reference"
    yield (
        f"{pool.size} replica(s) ready after {seconds:.0f} s; adapters live: {check}; score noise {pool.info.noise:.1e}"
    )
    tile_count = len(Grid.of(e.spec, 0, pooled=workload.pooled))
    if pool.size > tile_count:
        yield f"warning: a step has {tile_count} tiles for {pool.size} replicas; lower run.tile_examples"
    if e.run.stratify and e.run.batch % order.labels:
        yield (
            f"warning: batches of {e.run.batch} can't hold {order.labels} labels equally often; make run.batch a "
            "multiple of them, or set run.stratify=false"
        )
    if workload.encoder is not None and workload.encoder.shortened:
        yield f"{workload.encoder.shortened} sequences were too long; their beginning was cut"


def result_of(
    step: int, e: Experiment, grid: Grid, scores: Scores, found: Estimate, pool: Pool, s: float
) -> StepResult:
    """A step that took `s` seconds, as a record for metrics.jsonl."""
    return StepResult(
        step=step + 1,
        loss=found.loss,
        score=scores.score / scored(grid.tiles),
        lr=e.optimizer.lr_at(step, e.run.steps),
        tokens=scores.tokens,
        seconds=s,
        dropped=found.dropped,
        ties=found.ties,
        buried=found.buried,
        replicas=pool.size,
        failed=scores.failed,
    )


def failures(step: int, scores: Scores) -> str:
    """A warning that some of a step's completions have no reward."""
    return (
        f"warning: step {step + 1}: {scores.failed} of {scores.written} completions have no reward "
        f"and count as objective.failed; the first: {scores.failure.strip().splitlines()[-1]}"
    )


def summary_of(
    header: dict[str, Any],
    history: History,
    pool: Pool,
    trust: tuple[float, ...],
    *,
    finished: bool,
    steps: int,
    selected: int,
    seconds: float,
    digest: str,
) -> dict[str, Any]:
    """summary.json of a run with `steps` journalled, whose state is the one after `selected` steps."""
    taken = history.steps
    in_steps, tokens = sum(s.seconds for s in taken), sum(s.tokens for s in taken)
    return {
        "finished": finished,
        "steps": steps,
        "selected": selected,
        "wall_seconds": seconds,
        "seconds_per_step": in_steps / len(taken) if taken else 0.0,
        "tokens_per_second": tokens / in_steps if taken else 0.0,
        "forward_tokens": tokens,
        **summarise(history.evaluations, selected),
        "silent_directions": {name: sum(getattr(s, name) for s in taken) for name in ("dropped", "ties", "buried")},
        "score_noise": pool.info.noise,
        **({"trust": trusted(trust)} if trust else {}),
        "failed_rewards": sum(s.failed for s in taken),
        "digest": digest,
        "replicas": pool.size,
        "lost_replicas": len(pool.lost),
        "rebuilt_replicas": pool.rebuilt,
        "scored": pool.scored,
        **{name: header[name] for name in ("model", "task", "space", "estimator", "optimizer")},
    }


def closing(e: Experiment, folder: Path, summary: dict[str, Any], history: History, failed: int) -> Iterator[str]:
    """Lines after the table of results: warnings, and how to use the run. `failed`: rewards, this time."""
    directions = e.estimator.directions * len(history.steps)
    silent = summary["silent_directions"]["ties"] + summary["silent_directions"]["buried"]
    if directions and silent > directions / 2:
        yield (
            f"warning: {silent} of {directions} directions said nothing (equal losses, or a difference below "
            "the score noise): raise the perturbation (estimator.eps or sigma), or the batch"
        )
    if "trust" in summary:
        shares = " ".join(f"{share:.2f}" for share in summary["trust"])
        yield f"trust in feedback, from the lowest layers that move to the highest: {shares}"
    if failed:
        yield f"warning: {failed} completions had no reward, see `failed` in metrics.jsonl"
    if not summary["finished"]:
        again = setting("run.resume", str(folder))
        yield f"stopped after step {summary['steps']} of {e.run.steps}; go on with {again}"
    elif e.space.folds:
        shown = setting("run", str(folder))
        yield f"the tuned model: python -m zoray.export {shown} step={summary['selected']} out=DIR"
