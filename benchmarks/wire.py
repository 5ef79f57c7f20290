"""How many bytes does a step take between the driver and a replica? Of the messages as they enter the socket.

    python -m benchmarks.wire

The pool's own messages to a replica and its answers, for steps of 2 to 512 probes, all to one replica: a line through
them is so many bytes a probe plus a constant. Where an estimator centres by prompt (EGGROLL) each example's loss is
asked for, and the answer grows with the batch.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.null import start
from benchmarks.options import parse
from zoray.estimators import Evolution, OneSided, TwoPoint
from zoray.optimizers import to_float32
from zoray.records import Commit
from zoray.tiles import Grid

FRAME = 4  # bytes before each message that say how long it is
BATCH, COUNTS = 16, (1, 4, 16, 64, 256)
ESTIMATORS = {
    "two_point": lambda n: TwoPoint(pairs=n),
    "one_sided": lambda n: OneSided(probes=max(2, 2 * n - 1)),
    "evolution": lambda n: Evolution(population=2 * n),
    "evolution_by_prompt": lambda n: Evolution(population=2 * n, centring="prompt"),
}


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
    return result


def step_bytes(estimator: Any) -> tuple[int, int, int]:
    """(probes, bytes to the replica, bytes back) of a step that carries the commit of the one before."""
    spec = SimpleNamespace(estimator=estimator, batch=BATCH, tile_examples=4)
    with start(1, {})(spec) as pool:
        pool.members.ready[0].connection = scale = Scale(pool.members.ready[0].connection)  # type: ignore[assignment]
        values = np.random.default_rng(0).normal(size=estimator.directions).tolist()
        pool.commit(Commit(1000, tuple(map(to_float32, values))))
        pool.evaluate(Grid.of(spec, 1001), digest=True)
    return len(estimator.ask(0)), scale.sent, scale.received


if __name__ == "__main__":
    main(sys.argv[1:])
