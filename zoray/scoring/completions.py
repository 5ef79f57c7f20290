"""Generates completions under each probe and rewards them.

The prompts of all probes go to the engine in one call, which batches them continuously, long and short together. A
completion is judged as soon as it is finished, in another process, while the engine generates the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.methods.directions import name_hash, philox_numpy
from zoray.scoring.objectives.base import Outcomes
from zoray.scoring.objectives.reward import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.engines.base import Engine
    from zoray.models.tokens import Encoder
    from zoray.records import Example, Probe, Sampling

_SAMPLE = name_hash("zoray.writer.sample")


class Writer:
    """Writes completions for an objective and judges them."""

    def __init__(self, objective: Any, engine: Engine, encoder: Encoder, seed: int) -> None:
        self.objective, self._engine, self._encoder, self._seed = objective, engine, encoder, seed
        self._stops = encoder.stop_ids(objective.sampling.stop)
        self._judge = objective.judge()
        self.texts: list[str] = []  # of the last call, in its order
        self.tokens: list[tuple[list[int], list[int]]] = []  # likewise: those of the prompt and of the completion

    def outcomes(
        self,
        examples: Sequence[Example],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        chosen: np.ndarray,
        step: int,
        sampling: Sampling | None = None,
        turns: np.ndarray | None = None,
    ) -> Outcomes:
        """Losses and scores of completions of the examples `chosen` (n,) under `probes[probe_of]`, probe_of (n,).

        `sampling` replaces the objective's own; `turns` (n,) tells several completions of one prompt apart.
        """
        sampling = sampling or self.objective.sampling
        assert sampling is not None
        asked = {int(i): examples[int(i)] for i in np.unique(chosen)}
        prompts = {i: self._encoder.tokens(example.prompt, sampling.max_tokens) for i, example in asked.items()}
        shown = {i: self._encoder.text(example.prompt) for i, example in asked.items()}
        told = {i: facts(example, shown[i]) for i, example in asked.items()}
        numbers = [int(i) for i in chosen]
        self.texts, self.tokens = [""] * len(numbers), [(prompts[i], []) for i in numbers]
        judged: list[Any] = [None] * len(numbers)
        lengths, ended = np.zeros(len(numbers)), np.zeros(len(numbers))
        for at, tokens in self._engine.generate(
            [prompts[i] for i in numbers], probes, probe_of, sampling, self._seeds(chosen, step, turns), self._stops
        ):
            self.tokens[at] = (prompts[numbers[at]], list(tokens))
            written = tokens[:-1] if tokens and tokens[-1] in self._stops else tokens
            text, cut = self._encoder.written(tokens, sampling.stop)
            lengths[at], ended[at] = len(written), len(written) < len(tokens) or cut
            self.texts[at] = text
            judged[at] = self._judge.submit(shown[numbers[at]], text, told[numbers[at]])
        results = [future.result() for future in judged]
        rewards = np.array([result.value for result in results])
        failures = [result.failure for result in results if result.failure]
        failed = np.array([bool(result.failure) for result in results], np.float64)
        outcomes = self.objective.worth(rewards, {"tokens": lengths, "ended": ended, "failed": failed})
        tokens = sum(len(prompts[i]) for i in numbers) + int(lengths.sum())
        failure = failures[0] if failures else ""
        return replace(outcomes, tokens=tokens, written=len(numbers), failed=len(failures), failure=failure)

    def _seeds(self, chosen: np.ndarray, step: int, turns: np.ndarray | None) -> list[int]:
        """A seed for each completion: all probes of a step draw the same numbers for an example and turn."""
        key = (self._seed, _SAMPLE & 0xFFFFFFFF)
        turn = 0 if turns is None else turns
        return philox_numpy((chosen, step, turn, _SAMPLE >> 32), key)[:, 0].astype(np.int64).tolist()
