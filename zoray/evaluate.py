"""`python -m zoray.evaluate`: score any state on any task, without Ray.

run=DIR [step=K|best] [split=dev] [task=NAME]     a step of a run, on its own task or on another
task=NAME model=NAME [adapter=DIR]                a bare model, with a PEFT adapter or without
shots=K                                           the same with K solved examples before each prompt (ICL)
predictions=FILE.jsonl                            writes the model's answer to each example
"""

from __future__ import annotations

from typing import Any

from zoray.records import ConfigError, Probe, disk
from zoray.records.paths import user_path
from zoray.records.process import streams
from zoray.records.tiles import mean
from zoray.run.config import run_main
from zoray.run.evaluation import catch_up, of_model, of_run, read_adapter, write_predictions
from zoray.scoring.metrics import metrics
from zoray.scoring.workload import load_workload


def main(config: Any) -> int:
    """Print metric, loss and digest; fails if the output can't be written."""
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

    spec, contents, last = of_run(config) if config.run is not None else of_model(config)
    adapter = None if config.adapter is None else read_adapter(user_path(config.adapter), spec)
    workload = load_workload(spec)
    if not len(workload.splits[config.split]):
        raise ConfigError(f"the {config.split} split is empty")
    replica = Replica(spec, workload)
    if contents is not None:
        catch_up(replica, contents, last)
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
        print(f"{outcomes.failed} of {outcomes.written} completions got no reward; the first: {outcomes.failure}")
    if config.predictions is not None:  # last, so that a full disk costs no number
        write_predictions(user_path(config.predictions), replica, config.split, outcomes)
    return int(streams.lost())


if __name__ == "__main__":
    run_main("evaluate", main)
