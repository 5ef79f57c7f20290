"""A server's engine as a replica of a job's pool: it scores tiles for the driver, and measures versions."""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.engines.packing import Plan
from zoray.pool.on_ray.actor import ReplicaActor
from zoray.records import ConfigError, Probe, TokenSequence
from zoray.records.tiles import mean
from zoray.scoring.metrics import metrics, worth
from zoray.scoring.replica import Replica
from zoray.scoring.scorer import Scorer
from zoray.serving.gate import Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zoray.engines.shared.engine import SharedEngine
    from zoray.records import Sampling
    from zoray.scoring.replica import ReplicaInfo
    from zoray.scoring.workload import ReplicaSpec

log = logging.getLogger(__name__)
NEUTRAL = Path(__file__).with_name("neutral.txt")  # on no job's subject: tests how much English a version forgets


class TuningMember(ReplicaActor):
    """An engine as a replica of a job's pool: the driver's calls run in a thread, in turns with requests.

    Args:
        engine: of this process.
        text: the neutral text.
        client: vLLM's client, which knows whether its core has died.
    """

    def __init__(self, engine: SharedEngine, text: list[TokenSequence], client: Any) -> None:
        super().__init__()
        self._engine, self._text, self._client = engine, text, client
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the member is connected to a driver."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, name: str, address: tuple[str, int], key: bytes) -> None:
        """Connect to a driver, and answer its calls until it is gone."""
        self._thread = threading.Thread(target=self._serve, args=(name, address, key), name="zoray-tuning", daemon=True)
        self._thread.start()

    def call(self, message: bytes) -> bytes:
        """As ReplicaActor.call; if vLLM's core has died, this process ends, and Serve starts another.

        The driver would take the error for the job's own and end the job; it waits when a connection breaks.
        """
        answer = super().call(message)
        if self._client.errored:
            log.error("vLLM's core has died, so this engine ends")
            os._exit(1)
        return answer

    def load(self, spec: ReplicaSpec, cores: tuple[int, int] | None) -> ReplicaInfo:
        """Load the job's data; the model is loaded already."""
        self._engine.reset()
        if self.replica is None or self.replica.spec != spec:
            self.replica = Replica(spec, engine=self._engine)
        return self.replica.info

    def measure(self, slot: int, dev: bool, stopping: Callable[[], bool]) -> Measured:
        """Measure a slot's version (-1: the base model) on the neutral text, and with `dev` on the job's dev rows.

        Raises:
            Closed: `stopping` was true between two slices.
        """
        replica = self.replica if dev else None
        if dev and replica is None:
            raise RuntimeError("this replica has no job's data yet")
        pinned = Pinned(self._engine, slot, stopping)
        sums = pinned.score_plan(Plan.of([(Probe(0, 0, 0.0), part) for part in self._text]))
        spread = _perplexity([sums], self._text)
        if replica is None:
            return Measured(math.nan, math.nan, spread)
        workload = replica.workload
        count = len(workload.splits.dev)
        scorer = Scorer(replica.spec, workload, pinned)  # type: ignore[arg-type]
        found = scorer.outcomes("dev", (Probe(0, 0, 0.0),), np.zeros(count, np.int64), np.arange(count), measured=True)
        score, metric, _ = metrics(workload, "dev", found.losses, {"score": found.scores, **found.columns})
        rows = worth(score, found.losses, {"score": found.scores})
        return Measured(score, mean(found.losses.tolist()), spread, metric, tuple(rows.tolist()))

    def _serve(self, name: str, address: tuple[str, int], key: bytes) -> None:
        with suppress(ConfigError):  # the driver has gone before this was connected
            self.serve(name, address, key)


class Pinned:
    """An engine that scores every probe with one version's slot; the bare model stays as it is."""

    def __init__(self, engine: SharedEngine, slot: int, stopping: Callable[[], bool]) -> None:
        self._engine, self._slot, self._stopping = engine, slot, stopping

    def score_plan(self, plan: Plan) -> np.ndarray:
        """As Engine.score_plan."""
        slots = np.where(plan.probe_of < 0, -1, self._slot)
        return self._engine.score_slots(plan.table, plan.chosen, slots, self._stopping)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """As Engine.generate."""
        slots = np.where(probe_of < 0, -1, self._slot)
        return self._engine.generate_slots(prompts, slots, sampling, seeds, stops)


def neutral_text(tokenizer: object, longest: int = 256) -> list[TokenSequence]:
    """The paragraphs of NEUTRAL; every token but the first of each is scored, into one output."""
    found = []
    for paragraph in NEUTRAL.read_text(encoding="utf-8").strip().split("\n\n"):
        tokens = np.array(tokenizer(paragraph)["input_ids"][:longest], np.int64)  # type: ignore[operator]
        rows = np.arange(len(tokens) - 1)
        found.append(TokenSequence(tokens, rows, tokens[1:], np.zeros(len(rows), np.int64), 1))
    return found


def _perplexity(sums: list[np.ndarray], parts: list[TokenSequence]) -> float:
    """exp of the mean negative log-probability of a token, from the sums of each sequence."""
    tokens = sum(len(part.rows) for part in parts)
    return float(np.exp(-sum(float(s.sum()) for s in sums) / tokens))
