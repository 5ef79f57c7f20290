"""A run's steps on one replica in this process: what the driver does, without Ray, journal and monitoring."""

from __future__ import annotations

import math
from typing import Any


class Stepper:
    """Takes the next of `steps` steps at each call, from where the replica's state is.

    The last step's commit goes with the next one's tiles.
    """

    def __init__(self, e: Any, replica: Any, steps: int = 1_000_000) -> None:
        self.e, self.replica, self.steps = e, replica, steps
        self.matrices = len(e.space.select(replica.workload.matrices))
        self.step, self.memory, self.commits = replica.engine.step(), e.optimizer.init(), []
        self.trust: tuple[float, ...] = ()
        self.tokens = 0  # forward tokens so far

    def direct(self) -> None:
        """Scored by the packed forward."""
        from zoray.methods.estimators.feedback import gains
        from zoray.methods.spaces.signs import packed
        from zoray.records.tiles import losses_of

        e, guide = self.e, ()
        probes, grid = e.estimator.ask(self.step), self.replica.grid(self.step, "train")
        scores, _ = self.replica.evaluate(self.commits[-1:], grid.tiles, per_example=grid.per_example)
        losses, examples = losses_of(probes, grid.tiles, scores, grid.per_example)
        estimate = e.estimator.tell(probes, losses, self.replica.info.noise / math.sqrt(examples))
        if scores.feedback is not None:
            self.trust = e.estimator.judge(self.trust, probes, losses)
            guide = (gains(self.trust, self.matrices), packed(scores.feedback, self.step))
        self.memory, commit = e.optimizer.update(self.memory, self.step, self.steps, estimate.weights, *guide)
        self.commits.append(commit)
        self.step += 1
        self.tokens += scores.tokens

    def request(self) -> None:
        """Scored by vLLM's request path."""
        self.replica.engine.scoring = "request"
        try:
            self.direct()
        finally:
            self.replica.engine.scoring = "direct"
