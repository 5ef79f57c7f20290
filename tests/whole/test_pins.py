"""What must never change by moving code: examples, sampled tokens, steps of every preset, messages, run folders.

A journal names examples by their place, and directions by (seed, step, index, matrix): with another order or another
salt a run of before could not go on. Losses are drawn here, as exact fractions, so that nothing depends on a processor.
"""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loop import drive

from zoray.methods.directions import direction_numpy, philox_numpy
from zoray.methods.optimizers import to_float32
from zoray.records import Commit, Scores
from zoray.records.tiles import gives_feedback, summed
from zoray.run.config import build_experiment, compose, conf_dir
from zoray.scoring.completions import Writer
from zoray.tasks.batches import Order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.records import Tile

HIDDEN, INNER, LAYERS, STEPS = 6, 10, 4, 3
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
MATRICES = {f"model.layers.{k}.{name}": shape for k in range(LAYERS) for name, shape in SHAPES.items()}


def weights() -> dict[str, Any]:
    """Base weights, the same at every call."""
    import torch

    return {
        name: torch.from_numpy(direction_numpy(3, 0, 0, name, 0, out * into, "rademacher")).view(out, into) / 8
        for name, (out, into) in MATRICES.items()
    }


class Drawn:
    """A replica whose losses and feedback are drawn, from what they are of."""

    def __init__(self, experiment: Any) -> None:
        self.state = experiment.space.open(experiment.space.select(MATRICES), 11, weights=weights())
        self.numbers = experiment.space.trained(MATRICES)

    def evaluate(
        self, commits: Sequence[Commit], tiles: Sequence[Tile], digest: bool, per_example: bool = False, levels: int = 0
    ) -> tuple[Scores, str]:
        """As Replica.evaluate."""
        for commit in commits[self.state.step :]:
            self.state.apply(commit)
        losses = [
            int(philox_numpy((example, probe.step, probe.index, int(probe.scale > 0)), (5, 7))[0]) % 2048 / 1024
            for tile in tiles
            for probe in tile.probes
            for example in range(tile.start, tile.stop)
        ]
        found, feedback = np.array(losses), None
        if levels and any(map(gives_feedback, tiles)):
            words = philox_numpy((np.arange(self.numbers), self.state.step, 0, 0), (5, 8))[:, 0]
            feedback = (words % 255).astype(np.int32) - 127
        found = found if per_example else summed(tiles, found)
        return Scores(found, 0.0, 0, feedback=feedback), self.state.digest()


PRESETS = {
    "concise": "9d5b2a9fcbad3c1c",
    "eggroll": "de9cac8a569f25c8",
    "eggroll_qwen3_4b": "49d0859ae7ca78e1",
    "es_qwen2.5_3b": "4ed3a9ef5192ccf1",
    "feedback": "8507a34f1db34523",
    "fzoo_opt13b_sst2": "33600d1e9bd4d5b8",
    "json_object": "9d5b2a9fcbad3c1c",
    "lozo_m_opt13b_sst2": "e888bea8c31743c1",
    "lozo_opt13b_sst2": "a65728f9239724af",
    "mezo_like_opt1.3b_sst2": "8d39ba9d9e527888",
    "mezo_lora_opt13b_sst2": "aeee2b7ee584d5d4",
    "mezo_opt13b_sst2": "8d39ba9d9e527888",
    "movie_reviews": "8507a34f1db34523",
}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml")))
def test_the_first_steps_of_every_preset(preset):
    e = build_experiment(compose("config", [f"experiment={preset}"]))
    records = drive([Drawn(e)], e.estimator, e.optimizer, STEPS, 4, 4, matrices=len(e.space.select(MATRICES)))
    said = [(list(record.commit.coefficients), record.digest) for record in records]
    assert hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] == PRESETS[preset]


def test_the_first_batches():
    labels = np.arange(1000) % 3
    uniform, balanced = [20, 353, 30, 621, 338, 972, 202, 700], [60, 526, 743, 90, 535, 629, 606, 157]
    for stratify, first in ((False, uniform), (True, balanced)):
        order = Order(SimpleNamespace(data_seed=0, batch=8, stratify=stratify), labels)
        assert order.step(0).tolist() == first


def test_the_first_sampling_seeds():
    objective: Any = SimpleNamespace(sampling=SimpleNamespace(stop=()), judge=lambda: None)
    encoder: Any = SimpleNamespace(stop_ids=lambda stop: frozenset())
    writer = Writer(objective, SimpleNamespace(), encoder, 0)  # type: ignore[arg-type]
    assert writer._seeds(np.arange(3), 0, None) == [1938152394, 1731387948, 1642265497]
    assert writer._seeds(np.arange(3), 7, np.arange(3)) == [2710306697, 2641993660, 723182925]


def on_the_wire(value: object) -> int:
    """Bytes of a message without the names of what unpickles it, which moves change."""
    import pickle
    import pickletools

    packed = pickle.dumps(value, protocol=5)
    names = [text for code, text, _ in pickletools.genops(packed) if code.name == "SHORT_BINUNICODE"]
    return len(packed) - sum(len(str(name)) for name in names if str(name).startswith(("zoray", "_")))


def test_the_bytes_of_a_step():
    """What the driver sends and what comes back: 4 bytes a coefficient, a bit a number; 8 a loss, 1 a number."""
    weights, gains = tuple(to_float32(k / 3) for k in range(1000)), (0.5,) * 60
    assert on_the_wire(Commit(7, weights)) == 4 * 1000 + 61
    assert on_the_wire(Commit(7, (), momentum=0.9, gains=gains, signs=bytes(1000))) == 4 * 60 + 1000 + 75
    assert on_the_wire(Scores(np.arange(1000), 0.5, 9)) == 8 * 1000 + 47
    fed = Scores(np.arange(1), 0.5, 9, feedback=np.zeros(8000, np.int8))
    assert on_the_wire(fed) == 8 + 8000 + 64
