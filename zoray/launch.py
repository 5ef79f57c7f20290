"""`python -m zoray.launch`: tune a model. `--help` lists the settings; conf/config.yaml explains them."""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from zoray.cli import build_experiment, load_run_config, run_main
from zoray.records import ConfigError

KEEP_ON_RESUME = ("cluster", "engine", "logging")  # what a resumed run may change: none of it enters the result


def main(config: Any) -> int:
    """Check everything that can be checked, make the run's folder, and run."""
    from omegaconf import OmegaConf

    resume = config.run.resume
    if resume is not None:
        config = _resumed(config, Path(resume))
    experiment = build_experiment(config)
    experiment.logging.check()
    path = experiment.run.path
    if resume is None and path.exists():
        raise ConfigError(
            f"expected run folder {path} not to exist yet (runs are never overwritten); "
            f"go on with it: run.resume={path}, or choose another run.name"
        )

    from zoray.data import load_workload
    from zoray.driver import tune

    load_workload(experiment.spec)  # every mistake in model and data shows before a folder is made
    if resume is None:
        _create(path, OmegaConf.to_yaml(config, resolve=True))
    summary = tune(experiment, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    return 0 if summary["finished"] else 3


def _resumed(config: Any, folder: Path) -> Any:
    """The stored config, with the settings of this command line that may differ from session to session."""
    from omegaconf import OmegaConf, open_dict

    stored = load_run_config(folder)
    given = {argument.split("=", 1)[0].split(".")[0] for argument in sys.argv[1:] if not argument.startswith("-")}
    foreign = sorted(argument for argument in sys.argv[1:] if not _may_resume_with(argument))
    if foreign:
        raise ConfigError(
            f"a resumed run keeps its settings; got {', '.join(foreign)}. Only {', '.join(KEEP_ON_RESUME)} may change"
        )
    for name in KEEP_ON_RESUME:
        if name in given:
            stored[name] = config[name]
    with open_dict(stored):
        stored.run.resume = str(folder)
    return OmegaConf.create(OmegaConf.to_container(stored))


def _may_resume_with(argument: str) -> bool:
    key = argument.split("=", 1)[0]
    return argument.startswith("-") or key == "run.resume" or key.split(".")[0] in KEEP_ON_RESUME


def _create(path: Path, config: str) -> None:
    """Make the run's folder with its config, whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
    partial.mkdir(parents=True)
    (partial / "config.yaml").write_text(config)
    try:
        partial.rename(path)
    except OSError:
        shutil.rmtree(partial)
        raise ConfigError(f"expected run folder {path} not to exist yet; another run has just made it") from None


if __name__ == "__main__":
    run_main("config", main)
