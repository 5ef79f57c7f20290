"""Any function of a completion that the model writes, as the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.records import ConfigError, Example, Sampling, TokenSequence, is_finite, require
from zoray.scoring.objectives.base import Objective, Outcomes, Sums
from zoray.scoring.rewards.judging.functions import BUILT_IN, absolute, load_function, split_path
from zoray.scoring.rewards.judging.judge import Judge

if TYPE_CHECKING:
    from zoray.models.tokens import Encoder

PROOF = 8  # last tokens of a prompt, by which replicas are compared


@dataclass(frozen=True)
class Reward(Objective):
    """Minimises minus the reward of what the model writes after each prompt.

    All probes of a step see the same prompts and, where completions are sampled, the same random numbers, so that only
    the perturbation makes rewards differ. A completion without a reward (the function raises, hangs, or returns no
    finite number) counts as `failed`; it is reported, and above a share of them the run stops.

    Args:
        function: a reward of zoray's own by its name, or `package.module:name` or `path/file.py:name` of a function
            (prompt, completion, example) -> float.
        arguments: its keyword arguments.
        max_tokens: longest completion; this and the next three default to the task's own (null).
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens with this much probability together.
        stop: texts that end a completion.
        failed: the reward of a completion that got none.
        max_failed: share of a step's completions without a reward above which the run stops.
        timeout_s: seconds for one call.
        workers: processes of each replica that call it.
        name: what the metric is called.
    """

    columns: ClassVar[tuple[str, ...]] = ("tokens", "ended", "failed")
    smooth: ClassVar[bool] = False

    function: str
    arguments: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    failed: float = 0.0
    max_failed: float = 0.5
    timeout_s: float = 10.0
    workers: int = 2
    name: str = "reward"

    def __post_init__(self) -> None:
        require(is_finite(self.failed), "objective.failed to be a number", self.failed)
        object.__setattr__(self, "function", absolute(self.function))  # a replica may have another working directory
        ok = is_finite(self.max_failed) and 0 <= self.max_failed <= 1
        require(ok, "objective.max_failed to be a share in [0, 1]", self.max_failed)
        require(is_finite(self.timeout_s) and self.timeout_s > 0, "objective.timeout_s to be positive", self.timeout_s)
        require(isinstance(self.workers, int) and self.workers >= 1, "objective.workers of at least 1", self.workers)
        object.__setattr__(self, "arguments", dict(self.arguments or {}))
        object.__setattr__(self, "stop", None if self.stop is None else tuple(self.stop))
        self._sampling(Sampling())  # to refuse what is wrong with it

    @property
    def metric(self) -> str | None:
        return self.name

    @property
    def sampling(self) -> Sampling:
        """How completions are written."""
        return self._sampling(Sampling())

    def _sampling(self, default: Sampling) -> Sampling:
        given = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "stop")}
        return replace(default, **{name: value for name, value in given.items() if value is not None})

    def bind(self, task: Any, example: Example) -> Objective:
        """With the task's sampling where none is set; raises ConfigError unless the function loads."""
        load_function(self.function, self.arguments)
        if split_path(self.function)[0] == BUILT_IN:  # these take any completion, and say what an example lacks
            with self.judge() as judge:
                failure = judge.submit("", "", facts(example, "")).result().failure
            if failure:
                raise ConfigError(f"objective.function={self.function}: {failure.strip().splitlines()[-1]}")
        sampling = self._sampling(task.sampling)
        return replace(
            self,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
        )

    def judge(self) -> Judge:
        """The judge that calls the function."""
        return Judge(self.function, self.arguments, self.timeout_s, self.workers)

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        """The end of the prompt: not the objective, but what replicas are compared by."""
        tokens = encoder.tokens(example.prompt, self.sampling.max_tokens)
        if len(tokens) < 2:
            tokens = [*tokens, *tokens, 0][:2]
        return (encoder.sequence(tokens, range(max(1, len(tokens) - PROOF), len(tokens))),)

    def reduce(self, batch: Sums) -> Outcomes:
        raise NotImplementedError("a reward is of completions, see Writer")

    def worth(self, rewards: np.ndarray, columns: Mapping[str, np.ndarray]) -> Outcomes:
        """Losses and scores of completions (n,) from their rewards (n,), nan for one that could not be had."""
        scores = np.where(np.isnan(rewards), self.failed, rewards)
        return Outcomes(-scores, scores, columns)


def facts(example: Example, prompt: str) -> dict[str, Any]:
    """What a reward function is told about an example."""
    return {"answers": list(example.answers), **example.data, "prompt": prompt}


def text_metric(name: str, task: Any, example: Example) -> Objective:
    """The objective for a metric of zoray.scoring.rewards on a task of answers.

    Raises:
        ConfigError: there is no such metric.
    """
    try:
        return Reward(name, name=name).bind(task, example)
    except ConfigError as error:
        raise ConfigError(f"expected a metric among f1, exact_match, numeric, ...; got {name!r}: {error}") from None
