"""`python -m zoray.evaluate run=DIR [step=K] [split=dev]`: rebuild the state of any step and score it, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from zoray import journal
from zoray.cli import build, build_experiment, load_run_config, run_main
from zoray.records import ConfigError, JournalError, Probe


def main(config: Any) -> None:
    """Print loss, accuracy and digest."""
    if config.run is None:
        raise ConfigError("expected the folder of a run: python -m zoray.evaluate run=runs/<name> [step=K] [split=dev]")
    if config.split not in ("train", "dev", "test"):
        raise ConfigError(f"expected split to be train, dev or test; got {config.split!r}")
    folder = Path(str(config.run))
    contents = journal.read(folder / journal.FILE_NAME)
    experiment = build_experiment(load_run_config(folder))
    if config.engine is not None:
        experiment = replace(experiment, engine=build(config.engine, "engine"))
    last = len(contents.steps) if config.step is None else config.step
    if not isinstance(last, int) or not 0 <= last <= len(contents.steps):
        raise ConfigError(f"expected step in 0..{len(contents.steps)}, the steps in this journal; got {last!r}")

    from zoray.replica import Replica

    replica = Replica(experiment.spec)
    if replica.info.weights != contents.header["weights"]:
        raise JournalError(
            f"the journal was made with base weights {contents.header['weights']}; {experiment.model.path} has "
            f"{replica.info.weights}"
        )
    replica.apply([noted.commit for noted in contents.steps[:last]])
    outcomes = replica.outcomes(config.split, Probe(last, 0, 0.0))
    if not outcomes:
        raise ConfigError(f"the {config.split} split is empty")
    loss, accuracy = (sum(column) / len(outcomes) for column in zip(*outcomes, strict=True))
    digest = replica.engine.digest()
    scores = f"{config.split} accuracy {accuracy:.4f}, loss {loss:.6f} ({len(outcomes)} examples)"
    print(f"step {last}: {scores}, digest {digest}")


if __name__ == "__main__":
    run_main("evaluate", main)
