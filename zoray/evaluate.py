"""`python -m zoray.evaluate run=DIR [step=K|best] [split=dev] [task=NAME]`: score any step, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from zoray import journal
from zoray.cli import build, build_experiment, load_run_config, run_main
from zoray.history import resolve_step
from zoray.records import ConfigError, JournalError, Probe
from zoray.spaces import from_record


def main(config: Any) -> None:
    """Print loss, accuracy and digest."""
    if config.run is None:
        raise ConfigError(
            "expected the folder of a run: python -m zoray.evaluate run=runs/<name> [step=K|best] [split=dev]"
        )
    if config.split not in ("train", "dev", "test"):
        raise ConfigError(f"expected split to be train, dev or test; got {config.split!r}")
    folder = Path(str(config.run))
    contents = journal.read(folder / journal.FILE_NAME)
    experiment = build_experiment(load_run_config(folder))
    if config.engine is not None:
        experiment = replace(experiment, engine=build(config.engine, "engine"))
    if config.task is not None:
        experiment = replace(experiment, task=build(config.task, "task"))
    pinned = (from_record(contents.header["space"]), contents.header["run"]["seed"])
    if pinned != (experiment.space, experiment.run.seed):
        raise JournalError(
            f"the journal was made with {pinned[0]} and run.seed={pinned[1]}; {folder / 'config.yaml'} says "
            f"{experiment.space} and {experiment.run.seed}. Undo the change of that file"
        )
    last = resolve_step(config.step, folder, len(contents.steps))

    from zoray.replica import Replica

    replica = Replica(experiment.spec)
    if replica.info.weights != contents.header["weights"]:
        raise JournalError(
            f"the journal was made with base weights {contents.header['weights']}; {experiment.model.path} has "
            f"{replica.info.weights}"
        )
    if experiment.space.folds and replica.info.dtype != contents.header["dtype"]:
        raise JournalError(
            f"the run folded into base weights of {contents.header['dtype']}; this engine holds {replica.info.dtype}. "
            "Take the run's own engine and kind of device"
        )
    for noted in contents.steps[:last]:
        if noted.digest is not None and noted.digest != replica.engine.digest():
            raise JournalError(f"the state before step {noted.commit.step} differs from the run's, {noted.digest}")
        replica.apply([noted.commit])
    outcomes = replica.outcomes(config.split, Probe(last, 0, 0.0))
    if not outcomes:
        raise ConfigError(f"the {config.split} split is empty")
    loss, accuracy = (sum(column) / len(outcomes) for column in zip(*outcomes, strict=True))
    digest = replica.engine.digest()
    scores = f"{config.split} accuracy {accuracy:.4f}, loss {loss:.6f} ({len(outcomes)} examples)"
    print(f"step {last}: {scores}, digest {digest}")


if __name__ == "__main__":
    run_main("evaluate", main)
