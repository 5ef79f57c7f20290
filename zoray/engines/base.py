"""The protocol of engines.

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
        """The number of adapter slots; 0 for an engine without slots, None for one per probe of a step."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of one forward; None for as many as a sequence has."""
        ...

    @property
    def kv_cache_gib(self) -> float:
        """Memory for the KV cache, 0 without one."""
        ...

    @property
    def tensor_parallel(self) -> int:
        """The number of devices that share the model."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether each tile is scored alone, so that its bits do not depend on other tiles."""
        ...

    def for_probes(self, probes: int, guided: bool = False) -> EngineConfig:
        """The settings for a step of this many probes, `guided` by feedback or not."""
        ...

    def check(self, space: Space) -> None:
        """Raise ConfigError if this engine can't have this space."""
        ...

    def length_limit(self, model_limit: int) -> int:
        """The longest sequence that this engine will score."""
        ...

    def start(
        self, folder: Path | str, dtype: str, matrices: Mapping[str, tuple[int, int]], space: Space, seed: int
    ) -> Engine:
        """Load the model and open the adapter state. `matrices`: the linear layers, {canonical name: (out, in)}.

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
        """Like `score_plan`, with the residual feedback (methods.Feedback) of the trained numbers at the plan's probe.

        Returns the sums, and {`<matrix>.<part>`: array} of every trained tensor, float32, in the order of the state's
        layout.

        Args:
            plan: sequences under one probe of scale 0; those of the bare model give sums only.
            gradient: all sums of the plan -> d loss / d sum of each, (outputs,).

        Raises:
            ConfigError: the plan has other probes, or does not fit one forward pass.
        """
        ...

    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """Fit the maps (lens.py) that `feedback` uses from here on, to the bare model on all rows of a table.

        With rank 0 there are no maps: the stream is assumed to carry the gradient down unchanged.
        """
        ...

    def at_once(self) -> tuple[int, int, int]:
        """Limits of one forward pass for `feedback`: tokens and scored rows; and the tokens of a KV block."""
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

        Yields (index of the prompt, tokens of its completion) as completions finish, in any order. A completion ends
        with the first token of `stops`, which it includes, or at the longest length. Equal seeds draw equal numbers.
        """
        ...

    def settle(self) -> None:
        """Compute now the updates that `apply` may put off until the state is read."""
        ...

    def reset(self) -> None:
        """Back to journal index 0, base weights included."""
        ...

    def step(self) -> int:
        """The journal index of the state: the number of steps it has applied."""
        ...

    def digest(self) -> str:
        """Digest of the trained tensors."""
        ...

    def snapshot(self, limit: int) -> bytes | None:
        """The state, packed by snapshots.pack; None if it takes more than `limit` bytes."""
        ...

    def restore(self, data: bytes, step: int) -> None:
        """Take the state before `step` from a snapshot."""
        ...

    def adapter(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} float32, not scaled."""
        ...


class Pairs:
    """Mixin for engines: scores (probe, sequence) pairs by making a plan of them."""

    if TYPE_CHECKING:

        def score_plan(self, plan: Plan) -> np.ndarray: ...

    def score(self, work: Sequence[tuple[Probe | None, TokenSequence]]) -> list[np.ndarray]:
        """Sums of log-probabilities for each (probe, sequence), (n_outputs,) float64; None is the bare model."""
        plan = Plan.of(work)
        return split_outputs(self.score_plan(plan), plan.table.n_outputs)

    def score_base(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """The same for the bare model."""
        return self.score([(None, sequence) for sequence in sequences])
