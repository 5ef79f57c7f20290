"""For tests: a pool of one replica in this process, for driver.tune without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoray.scoring.replica import Replica

if TYPE_CHECKING:
    from zoray.records import Commit, Scores
    from zoray.records.tiles import Grid


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
