"""For tests: the main of a run in this process, and a pool of one replica there, for driver.tune without Ray."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zoray import launch
from zoray.run.config import compose
from zoray.scoring.replica import Replica

if TYPE_CHECKING:
    import pytest

    from zoray.records import Commit, Scores
    from zoray.records.tiles import Grid


def launched(monkeypatch: pytest.MonkeyPatch, *settings: str) -> int:
    """The exit status of `python -m zoray.launch` with these settings, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["zoray.launch", *settings])
    return launch.main(compose("config", list(settings)))


class LocalPool:
    """What the driver asks of a pool, see zoray.pool.pool.Pool."""

    size, rebuilt = 1, 0

    def __init__(self, spec: Any, cluster: Any, name: str, say: Any, played: Any, known: Any, snapshot: Any) -> None:
        self.spec, self.replica, self.commits = spec, Replica(spec), list(played)
        self.info, self.lost, self.scored = self.replica.info, [], {}

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *error: object) -> None: ...

    def evaluate(self, grid: Grid, digest: bool = False) -> tuple[Scores, str | None]:
        return self.replica.evaluate(self.commits, grid.tiles, digest, grid.per_example)

    def commit(self, commit: Commit) -> None:
        self.commits.append(commit)

    def rewind(self, step: int) -> None:
        del self.commits[step:]
        self.replica.reset()

    def digest(self) -> str:
        self.replica.apply(self.commits)
        return self.replica.engine.digest()

    def adapter(self) -> tuple[Any, str]:
        self.replica.apply(self.commits)
        return self.replica.adapter(), self.replica.engine.digest()
