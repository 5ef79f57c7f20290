"""`python -m zoray.launch`: tune a model. `--help` lists the settings; conf/config.yaml explains them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from zoray.records import ConfigError, disk
from zoray.records.overrides import setting
from zoray.records.paths import user_path
from zoray.run.config import build_experiment, run_main
from zoray.run.folder import (
    check_kept,
    check_run_files,
    create,
    has_measured,
    load_run_config,
    resume_command,
    with_absolute_paths,
)

MAY_CHANGE = ("cluster", "engine", "logging")  # in a resumed run: none of these affects the result


def main(config: Any) -> int:
    """Check all that can be checked, make the run's folder, and run."""
    from omegaconf import OmegaConf

    resume = config.run.resume
    if resume is not None:
        config = _resumed(config, user_path(resume))
    experiment = build_experiment(config)
    if resume is None:
        OmegaConf.update(config, "run.date", experiment.run.date, force_add=True)  # kept, where it was not given
    experiment.logging.check()
    path = experiment.run.path
    check_kept(path)
    if resume is None and path.exists():
        raise ConfigError(
            f"expected run folder {path} not to exist yet (runs are never overwritten); "
            f"resume it: {setting('run.resume', str(path))}, or choose another run.name"
        )

    from zoray.run.driver import tune
    from zoray.scoring.workload import load_workload
    from zoray.tasks.preview import preview

    experiment.cluster.check()
    workload = load_workload(experiment.spec)  # every mistake in model and data shows before a folder is made
    submits = experiment.cluster.submits
    shows_only = submits and experiment.cluster.dry_run  # the command and the script, and nothing else
    if resume is None and not shows_only:
        assert workload.encoder is not None
        print("\n".join(preview(experiment.task, workload.splits, workload.encoder)))
        config = with_absolute_paths(config)
        experiment = build_experiment(config)
        create(path, OmegaConf.to_yaml(config, resolve=True))
    try:
        if submits:
            from zoray.pool.slurm import submit

            submit(experiment.cluster, path, [] if resume is None else _changes())
            return 0
        summary = tune(experiment, workload, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except BaseException as error:
        kept = resume is not None or has_measured(path)
        if not kept:  # nothing is lost, and the next try may use this name
            shutil.rmtree(path, ignore_errors=True)
        if disk.refuses(error):
            again = f"go on: {resume_command(path)}" if kept else "start it again: nothing had been measured yet"
            error.add_note(f"Then {again}")
        raise
    return 0 if summary["finished"] else 3


def _resumed(config: Any, folder: Path) -> Any:
    """The stored config, with this command line's settings where a resumed run may change them."""
    from omegaconf import OmegaConf

    stored = load_run_config(folder)
    foreign = sorted(argument for argument in sys.argv[1:] if not _may_resume_with(argument))
    if foreign:
        raise ConfigError(
            f"a resumed run keeps its settings; got {', '.join(foreign)}. Only {', '.join(MAY_CHANGE)} may change"
        )
    given = [argument.split("=", 1)[0].lstrip("+") for argument in sys.argv[1:]]
    for key in sorted(given, key=lambda key: "." in key):  # whole components first, then settings of them
        if key.split(".")[0] in MAY_CHANGE:
            OmegaConf.update(stored, key, OmegaConf.select(config, key), merge=False)
    stored.run.resume = str(folder)
    check_run_files(stored, folder)
    return stored


def _changes() -> list[str]:
    """The arguments of this command line that a job needs to resume a run."""
    keys = {argument: argument.split("=", 1)[0].lstrip("+") for argument in sys.argv[1:]}
    return [a for a, key in keys.items() if key.split(".")[0] in MAY_CHANGE and key != "cluster.dry_run"]


def _may_resume_with(argument: str) -> bool:
    key = argument.split("=", 1)[0].lstrip("+")
    return argument.startswith("-") or key == "run.resume" or key.split(".")[0] in MAY_CHANGE


if __name__ == "__main__":
    sys.argv = [f"cluster.{argument}" if argument.startswith("dry_run=") else argument for argument in sys.argv]
    run_main("config", main)
