"""Who learns more in the same time, and from the same tokens: zoray or the training loop? LoZO on both, one seed.

    python -m benchmarks.learn [steps=200] [every=50] [batch=16] [lr=1e-4] [out=runs/learn]

Both take the same steps, with the same learning rate, perturbation, rank and interval, on the same examples, and are
scored on dev every few steps; that time does not count. zoray moves the matrices of all layers, the official loop every
parameter. `out` gets curve.png and learn.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.options import parse
from benchmarks.stepper import Stepper
from benchmarks.training_loop import TrainingLoop, option_batch
from zoray.records.paths import user_path

DEFAULTS = {"steps": "200", "every": "50", "batch": "16", "lr": "1e-4", "eps": "5e-4", "rank": "2", "interval": "50"}
DEFAULTS |= {"dev": "200", "seed": "0", "out": "runs/learn"}


def main(arguments: list[str]) -> None:
    """Run both, draw them, print one JSON object."""
    options = parse(arguments, DEFAULTS)
    result = measure(options)
    out = user_path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "learn.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, out / "curve.png")
    print(json.dumps(result))


def measure(options: dict[str, str], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Points (step, seconds, forward tokens, dev accuracy, dev loss) of both. `where`: further settings, for tests."""
    from zoray.run.config import build_experiment, compose
    from zoray.scoring.workload import load_workload

    settings = ["estimator=two_point", "space=lozo", f"space.rank={options['rank']}", f"estimator.eps={options['eps']}"]
    settings += [f"space.interval={options['interval']}", "optimizer.schedule=constant", f"task.dev={options['dev']}"]
    settings += [
        f"optimizer.lr={options['lr']}",
        f"run.batch={options['batch']}",
        f"run.tile_examples={options['batch']}",
    ]
    settings += [f"run.seed={options['seed']}", f"run.data_seed={options['seed']}", *where]
    e = build_experiment(compose("config", settings))
    workload = load_workload(e.spec)
    steps, every = int(options["steps"]), int(options["every"])
    runs = {"zoray": Tuned(e, workload, steps), "loop": Looped(e, workload)}
    points: dict[str, list[dict[str, float]]] = {name: [run.point()] for name, run in runs.items()}
    for number in range(1, steps + 1):
        seen = number % every == 0 or number == steps
        for name, run in runs.items():  # step by step in turn, so that what else the machine does meets both
            began = time.perf_counter()
            run.step(seen)
            run.seconds += time.perf_counter() - began
            if seen:
                points[name].append(run.point())
    return {"benchmark": "learn", **options, **points}


class Tuned:
    """A replica's steps, without Ray."""

    def __init__(self, e: Any, workload: Any, steps: int) -> None:
        from zoray.scoring.replica import Replica

        self.replica, self.seconds = Replica(e.spec, workload), 0.0
        self.stepper = Stepper(e, self.replica, steps)

    def step(self, seen: bool) -> None:
        """The next one; its commit is applied at once if the state will be `seen`."""
        self.stepper.direct()
        if seen:
            self.replica.apply(self.stepper.commits[-1:])

    def point(self) -> dict[str, float]:
        """Where it is, with loss and accuracy on dev."""
        from zoray.records import Probe
        from zoray.records.tiles import mean

        found = self.replica.outcomes("dev", Probe(self.stepper.step, 0, 0.0))
        accuracy, loss = mean(found.scores.tolist()), mean(found.losses.tolist())
        return _point(self.stepper.step, self.seconds, self.stepper.tokens, accuracy, loss)


class Looped:
    """The training loop's steps on the same examples."""

    def __init__(self, e: Any, workload: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from zoray.scoring.workload import order_of

        model = AutoModelForCausalLM.from_pretrained(workload.folder, dtype=torch.float32).eval()
        settings = {"lr": e.optimizer.lr, "eps": e.estimator.eps, "rank": e.space.rank, "interval": e.space.interval}
        self.loop = TrainingLoop(model, "lozo", **settings)
        self.order, self.workload, self.seconds, self.tokens = order_of(e.spec, workload), workload, 0.0, 0

    def step(self, seen: bool) -> None:
        """The next one."""
        train, chosen = self.workload.splits.train, self.order.step(self.loop.steps)
        batch = [option_batch(self.workload.encoded["train"][i], train[i].label) for i in chosen]
        self.tokens += 2 * sum(len(sequence) for sequences, _, _ in batch for sequence in sequences)
        self.loop.step(batch)

    def point(self) -> dict[str, float]:
        """Where it is, with loss and accuracy on dev."""
        dev = [self.workload.example("dev", i) for i in range(len(self.workload.splits.dev))]
        batches = [[option_batch(sequences, example.label)] for example, sequences in dev]
        losses, correct = zip(*(self.loop.outcomes(batch)[0] for batch in batches), strict=True)
        loss = sum(losses) / len(losses)
        return _point(self.loop.steps, self.seconds, self.tokens, sum(correct) / len(correct), loss)


def draw(result: dict[str, Any], path: Path) -> None:
    """Dev loss over seconds and over forward tokens, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    scales = (("seconds", 1, "seconds of steps"), ("tokens", 1000, "thousands of forward tokens"))
    for axis, (key, unit, label) in zip(axes, scales, strict=True):
        for name, colour in (("zoray", "tab:blue"), ("loop", "tab:orange")):
            x, y = zip(*((p[key] / unit, p["dev_loss"]) for p in result[name]), strict=True)
            axis.plot(x, y, marker="o", color=colour, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("dev loss")
    axes[0].legend(labels=["zoray", "training loop"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _point(step: int, seconds: float, tokens: int, accuracy: float, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "seconds": seconds,
        "tokens": tokens,
        "dev_accuracy": accuracy,
        "dev_loss": round(loss, 5),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
