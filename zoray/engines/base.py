"""What every engine is.

An engine holds a frozen model and one adapter state. It writes probes into adapter slots, runs sequences under them,
and returns sums of log-probabilities. It knows nothing of losses, tasks, steps or other replicas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from zoray.engines.packing import Plan, SequenceTable, split_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from zoray.methods.spaces.base import Space
    from zoray.records import Commit, Probe, Sampling, TokenSequence


class EngineConfig(Protocol):
    """The settings of an engine."""

    @property
    def slots(self) -> int | None:
        """How many adapter slots there are; 0 for an engine without, None for as many as a step has probes."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a forward; None for as many as a sequence has."""
        ...

    @property
    def kv_cache_gib(self) -> float:
        """Memory of its KV cache, 0 without one."""
        ...

    @property
    def tensor_parallel(self) -> int:
        """Over how many devices the model is shared out."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether each tile is scored alone, so that its bits do not depend on others."""
        ...

    def for_probes(self, probes: int, guided: bool = False) -> EngineConfig:
        """With all that a step of so many probes takes, `guided` by feedback or not."""
        ...

    def check(self, space: Space) -> None:
        """Raise ConfigError if this engine can't have such a space."""
        ...

    def length_limit(self, model_limit: int) -> int:
        """The longest sequence that this engine will score."""
        ...

    def start(
        self, folder: Path | str, dtype: str, matrices: Mapping[str, tuple[int, int]], space: Space, seed: int
    ) -> Engine:
        """Load the model and open the adapter state. {canonical name: (out, in)} are the model's linear layers.

        Raises:
            ConfigError: the engine can't run this model with these settings.
        """
        ...


class Engine(Protocol):
    """A model with adapter slots, and the adapter state that fills them."""

    self_test: dict[str, float]
    dtype: str  # of the base weights as loaded, "float32" for example

    def apply(self, commits: Sequence[Commit]) -> None:
        """Advance the adapter state; commits come in step order."""
        ...

    def score_plan(self, plan: Plan) -> np.ndarray:
        """Sums of log-probabilities of all outputs of a plan, in its order, float64; any number of tokens."""
        ...

    def feedback(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `score_plan`, and the residual feedback (methods.Feedback) of the trained numbers at the plan's probe.

        Returns the sums, and {`<matrix>.<part>`: array} of every trained tensor, float32, in the order of the state's
        layout.

        Args:
            plan: sequences under one probe of scale 0, or of the bare model, which give sums only.
            gradient: all sums of the plan -> d loss / d sum of each, (outputs,).

        Raises:
            ConfigError: the plan has other probes, or does not fit one forward pass.
        """
        ...

    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """Fit the maps (lens.py) that `feedback` goes through from here on, to the bare model on all of a table's rows.

        rank 0 takes none: the stream is taken to carry the gradient down as it is.
        """
        ...

    def at_once(self) -> tuple[int, int, int]:
        """Of one forward pass for `feedback`: most tokens, most asked rows; and tokens of a KV block."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Write a completion after each prompt (n,) under its probe (n,), in one continuous batch.

        Yields (number of the prompt, tokens of its completion) as they are finished, in any order. A completion ends
        with the first token of `stops`, which it includes, or at the longest length. Equal seeds draw equal numbers.
        """
        ...

    def settle(self) -> None:
        """Compute now what `apply` may leave until the state is looked at."""
        ...

    def reset(self) -> None:
        """Back to journal index 0, base weights included."""
        ...

    def step(self) -> int:
        """The journal index of the state: how many steps it has applied."""
        ...

    def digest(self) -> str:
        """Digest of the trained tensors."""
        ...

    def snapshot(self, limit: int) -> bytes | None:
        """The state as snapshots.pack makes it; None if it takes more than `limit` bytes."""
        ...

    def restore(self, data: bytes, step: int) -> None:
        """Take the state, before `step`, that a snapshot holds."""
        ...

    def adapter(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32, not scaled."""
        ...


class Pairs:
    """For engines: scoring of (probe, sequence) pairs, through a plan made of them."""

    if TYPE_CHECKING:

        def score_plan(self, plan: Plan) -> np.ndarray: ...

    def score(self, work: Sequence[tuple[Probe | None, TokenSequence]]) -> list[np.ndarray]:
        """For each (probe, sequence) its sums of log-probabilities, (n_outputs,) float64; None is the bare model."""
        plan = Plan.of(work)
        return split_outputs(self.score_plan(plan), plan.table.n_outputs)

    def score_base(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """The same for the bare model."""
        return self.score([(None, sequence) for sequence in sequences])
