"""A run's folder: created whole or not at all, read from anywhere, with a check that the files it names exist.

Configs of 0.1 hold that version's module names; they are read as today's.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from os.path import abspath
from pathlib import Path
from typing import Any

from zoray.records import ConfigError
from zoray.records.overrides import setting
from zoray.records.paths import absolute_paths, missing_paths

ROOM_OF = {  # modules of 0.1 that its runs' configs name, except those that are now rooms
    **dict.fromkeys(("spaces", "estimators", "feedback", "optimizers"), "methods"),
    **dict.fromkeys(("cluster", "slurm"), "pool"),
    **dict.fromkeys(("experiment", "monitoring"), "run"),
    "objectives": "scoring",
}


def resume_command(path: Path) -> str:
    """The command that resumes a run, ready to paste into a shell."""
    return f"python -m zoray.launch {setting('run.resume', str(path))}"


def with_absolute_paths(config: Any) -> Any:
    """The config that a run keeps, so that it can be resumed and evaluated from any working directory.

    A Ray job has a copy of its working directory on each node, deleted when it ends: there paths stay as they are.
    """
    from omegaconf import OmegaConf

    if "working_dir_files" in Path.cwd().parts:
        return config
    return OmegaConf.create(absolute_paths(OmegaConf.to_container(config, resolve=True), Path.cwd()))


def check_kept(path: Path) -> None:
    """Raise ConfigError if a run's folder would be in a Ray job's working directory, which Ray deletes."""
    if "working_dir_files" in path.absolute().parts:
        raise ConfigError(
            f"expected run.folder outside the job's working directory, which Ray deletes after the job; got {path}. "
            "Use a folder on the head node, or one that all nodes share: run.folder=/data/runs"
        )


def has_measured(path: Path) -> bool:
    """Whether a run has reached its first evaluation or step."""
    metrics, steps = path / "metrics.jsonl", path / "journal.jsonl"  # the journal's first line is only its header
    return (metrics.exists() and metrics.stat().st_size > 0) or (steps.exists() and steps.read_bytes().count(b"\n") > 1)


def create(path: Path, config: str) -> None:
    """Create the run's folder with its config, whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
    try:
        partial.mkdir(parents=True)
        (partial / "config.yaml").write_text(config, encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            f"can't make the run folder {path}: {error.strerror}. Choose another run.folder or run.name"
        ) from None


def load_run_config(folder: Path) -> Any:
    """The config that a run was started with, with absolute paths; ConfigError if the folder is not a run's."""
    import yaml
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"expected the folder of a run (with config.yaml and journal.jsonl); got {str(folder)!r}")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError) as error:  # OmegaConf raises OSError for neither a mapping nor a list
        raise ConfigError(f"{path} is not readable: {' '.join(str(error).split())}") from None
    settings = _in_rooms(settings)
    if (start := _started_in(folder, settings)) is not None:
        settings = absolute_paths(settings, start)
    return OmegaConf.create(absolute_paths(settings, Path.cwd()))


def _in_rooms(settings: Any) -> Any:
    """The settings of a run, with every `_target_` of 0.1 replaced by today's name."""
    if isinstance(settings, list):
        return [_in_rooms(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    moved = {key: _in_rooms(value) for key, value in settings.items()}
    if found := re.fullmatch(r"zoray\.(\w+)\.(?:\w+\.)*(\w+)", str(moved.get("_target_"))):
        moved["_target_"] = f"zoray.{ROOM_OF.get(found[1], found[1])}.{found[2]}"
    return moved


def _started_in(folder: Path, settings: Any) -> Path | None:
    """The working directory that a run was started from, known from its folder if run.folder is relative."""
    run = settings.get("run") if isinstance(settings, Mapping) else None
    below = Path(str(run.get("folder")), str(run.get("name"))) if isinstance(run, Mapping) else Path()
    here = Path(abspath(folder))
    if not below.parts or below.is_absolute() or here.parts[-len(below.parts) :] != below.parts:
        return None
    return here.parents[len(below.parts) - 1]


def check_run_files(config: Any, folder: Path, parts: Sequence[str] = ("model", "task", "objective")) -> None:
    """Raise ConfigError unless the files and folders that these parts of a run's config name exist."""
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(config)
    if missing := list(missing_paths({part: settings.get(part) for part in parts})):
        (key, value), more = missing[0], f" (and {len(missing) - 1} more of its settings)" if len(missing) > 1 else ""
        raise ConfigError(
            f"expected {key}={value} of the run {folder} to be there; it is not{more}. If it was moved, set {key} in "
            f"{folder / 'config.yaml'} to the place where it is now"
        )


def base_of_run(folder: Path, header: Mapping[str, Any]) -> Path:
    """The folder of the model that a run's journal pins, at the place that its config names now.

    Raises:
        ConfigError: the folder is not there.
        JournalError: the model has other weights.
    """
    from zoray.models.folder import pinned_folder

    if not (folder / "config.yaml").is_file():  # the journal alone
        return pinned_folder(header)
    stored = load_run_config(folder)
    check_run_files(stored, folder, ["model"])
    return pinned_folder({**header, "model": stored.model.path})
