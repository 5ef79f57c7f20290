"""Tasks that zoray brings along as what a job learns from: named in a request, composed of the package's own conf only.

Guarantees: a name is looked up among the files that are there and is never part of a path; a request may change a
task's sizes and nothing else, so that no path, template or name to import of a request's reaches a task.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import yaml

from zoray.records import ConfigError
from zoray.records.signatures import did_you_mean
from zoray.run.config import build, conf_dir
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zoray.scoring.objectives.base import Objective
    from zoray.tasks.base import Task

PREFIX = "task:"  # before a task's name, where a request has room for a file's id only
SIZES = ("train", "dev", "test")


@cache
def names() -> tuple[str, ...]:
    """The tasks that need nothing of the user's: no path, no parts, and no reward."""
    return tuple(
        path.stem
        for path in sorted((conf_dir() / "task").glob("*.yaml"))
        if "???" not in (settings := _settings(path.stem)).values() and _metric(settings) != "reward"
    )


def preset(name: str, sizes: Mapping[str, int | None]) -> tuple[Task, Objective]:
    """A task, with sizes of its splits that differ from its own where they are given, and the likelihood that suits it.

    Raises:
        ConfigError: there is no such task, or a size that it can't have.
    """
    if name not in names():
        advice = did_you_mean(name, list(names()))
        raise ConfigError(f"expected task to be one of {', '.join(names())}; got {name[:40]!r}{advice}")
    settings = _settings(name)
    given = {key: size for key in SIZES if (size := sizes.get(key)) is not None}
    return build(settings | given, "task"), ChoiceNLL() if _metric(settings) == "accuracy" else AnswerNLL()


def _settings(name: str) -> dict[str, Any]:
    """What conf/task says; each time anew, since components may keep what they are given."""
    return yaml.safe_load((conf_dir() / "task" / f"{name}.yaml").read_text(encoding="utf-8"))


def _metric(settings: Mapping[str, Any]) -> str | None:
    """What the task's class is measured by."""
    module, _, name = settings["_target_"].rpartition(".")
    return getattr(import_module(module), name).metric
