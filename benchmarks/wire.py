"""How many bytes does a step take between the driver and a replica? Of the messages as they enter the socket.

    python -m benchmarks.wire

The pool's own messages to a replica and its answers, for steps of 2 to 512 probes, all to one replica: a line through
them is so many bytes a probe plus a constant. Where an estimator centres by prompt (EGGROLL) each example's loss is
asked for, and the answer grows with the batch.

`feedback` is by the size of the adapter, of rank 8 on the writers of the upper half of some models, by their shapes
only: a commit has a bit for each number, an answer a byte. `journal` is the step's line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.null import start
from benchmarks.options import parse
from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.estimators.feedback import Feedback
from zoray.methods.optimizers import to_float32
from zoray.methods.spaces import Lora
from zoray.methods.spaces.signs import packed
from zoray.records import Commit, Scores
from zoray.records.tiles import Grid
from zoray.run.journal import FILE_NAME, Journal, StepRecord

FRAME = 4  # bytes before each message that say how long it is
BATCH, COUNTS = 16, (1, 4, 16, 64, 256)
ESTIMATORS = {
    "two_point": lambda n: TwoPoint(pairs=n),
    "one_sided": lambda n: OneSided(probes=max(2, 2 * n - 1)),
    "evolution": lambda n: Evolution(population=2 * n),
    "evolution_by_prompt": lambda n: Evolution(population=2 * n, centring="prompt"),
}
MODELS = {"smollm2-135m": (30, 576, 1536), "llama-3-8b": (32, 4096, 14336), "opt-13b": (40, 5120, 20480)}
GUIDED = Lora(rank=8, alpha=16.0, targets="residual:0.5", train="AB")


class Scale:
    """Stands before a member's connection and notes the bytes of each message and its answer, with their frames."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.close = connection, connection.close
        self.sent = self.received = 0

    def send_bytes(self, message: bytes) -> None:
        """Pass a message on."""
        self.sent = FRAME + len(message)
        self.connection.send_bytes(message)

    def recv_bytes(self) -> bytes:
        """Pass an answer on."""
        message = self.connection.recv_bytes()
        self.received = FRAME + len(message)
        return message


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    parse(arguments, {})
    print(json.dumps(measure()))


def measure() -> dict[str, Any]:
    """Bytes of a step for each estimator and number of probes, and the line through them."""
    result: dict[str, Any] = {"benchmark": "wire", "batch": BATCH}
    for name, make in ESTIMATORS.items():
        points = [step_bytes(make(count)) for count in COUNTS]
        probes, there, back = np.array(points, float).T
        slope, constant = np.polyfit(probes, there + back, 1)
        result[name] = {
            "bytes": [{"probes": p, "to_replica": t, "from_replica": b} for p, t, b in points],
            "bytes_per_probe": round(float(slope), 2),
            "constant": round(float(constant)),
        }
    return result | {"feedback": {name: feedback_bytes(writers(*shape)) for name, shape in MODELS.items()}}


def step_bytes(estimator: Any) -> tuple[int, int, int]:
    """(probes, bytes to the replica, bytes back) of a step that carries the commit of the one before."""
    values = np.random.default_rng(0).normal(size=estimator.directions).tolist()
    _, there, back = exchange(estimator, Commit(1000, tuple(map(to_float32, values))))
    return len(estimator.ask(0)), there, back


def exchange(estimator: Any, commit: Commit, numbers: int = 0) -> tuple[Scores, int, int]:
    """A step of a replica whose adapter has `numbers`, with the commit before: its answer, bytes to it and back."""
    spec = SimpleNamespace(estimator=estimator, batch=BATCH, tile_examples=4)
    with start(1, {}, numbers=numbers)(spec) as pool:
        pool.members.ready[0].connection = scale = Scale(pool.members.ready[0].connection)  # type: ignore[assignment]
        pool.commit(commit)
        scores, _ = pool.evaluate(Grid.of(spec, commit.step + 1), digest=True)
    return scores, scale.sent, scale.received


def writers(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """The matrices of a model that write to its residual stream."""
    names = {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    return {f"model.layers.{k}.{name}": shape for k in range(layers) for name, shape in names.items()}


def feedback_bytes(matrices: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The bytes of a feedback step: to a replica, from it, and in the journal."""
    numbers, chosen = GUIDED.trained(matrices), GUIDED.select(matrices)
    gains = tuple(to_float32(gain) for gain in np.random.default_rng(0).uniform(0.05, 0.1, len(chosen)))
    signs = packed(np.random.default_rng(0).integers(-1, 2, numbers), 1000)
    commit = Commit(1000, (), momentum=to_float32(0.9), rate=to_float32(-0.002), gains=gains, signs=signs)
    scores, there, back = exchange(Feedback(), commit, numbers)
    assert scores.feedback is not None and len(scores.feedback) == numbers
    with tempfile.TemporaryDirectory() as folder, Journal.create(Path(folder) / FILE_NAME, {}) as journal:
        journal.next_step, header = commit.step, journal.path.stat().st_size
        journal.append(StepRecord(commit, (0.5,), "0" * 16))
        line = journal.path.stat().st_size - header
    return {"numbers": numbers, "matrices": len(chosen), "to_replica": there, "from_replica": back, "journal": line}


if __name__ == "__main__":
    main(sys.argv[1:])
