"""How good is each method at equal forward tokens? Accuracy on movie_reviews, three seeds, one table.

    python -m benchmarks.methods                     all runs that are missing, then the table
    python -m benchmarks.methods sequences=12800 only=eggroll lr=0.5
    python -m benchmarks.methods only=fzoo,rloo seeds=0 lr=0.5,1,2 test=false

Every method scores the same number of sequences of the same prompts. A run is one process with one replica on the cores
it is given, the driver's loop without Ray. Its result is kept as a file in `out`, so an interrupted call goes on where
it was. `lr` multiplies each method's own learning rate, for a search; `test=false` leaves the test split out.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.options import parse
from benchmarks.stepper import Stepper
from zoray.records.paths import user_path

# The methods as settings over the defaults of conf/; steps follow from the budget. Learning rates are the best of those
# tried on seed 0 at 1,600 sequences; runs eight times as long want about half of it.
METHODS: dict[str, list[str]] = {
    "mezo-lora-B": ["estimator=two_point", "run.batch=16", "optimizer.lr=0.12"],
    "mezo-lora-AB": ["estimator=two_point", "space.train=AB", "run.batch=16", "optimizer.lr=0.01"],
    "mezo-pairs": ["estimator=two_point", "estimator.pairs=8", "run.batch=2", "optimizer.lr=0.18"],
    "lozo": [  # the published interval of 50 would be all of a short run
        *("estimator=two_point", "space=lozo", "space.interval=10", "estimator.eps=5e-4", "run.batch=16"),
        "optimizer.lr=1e-4",
    ],
    "lozo-m": [
        *("estimator=two_point", "space=lozo", "space.interval=10", "estimator.eps=5e-4", "run.batch=16"),
        *("optimizer=momentum", "optimizer.lr=1e-4"),
    ],
    "lowrank-128": [
        *("estimator=two_point", "space=lowrank", "space.rank=128", "space.distribution=rademacher"),
        *("estimator.eps=7e-4", "run.batch=16", "optimizer.lr=1.8e-4"),
    ],
    "fzoo": ["estimator=one_sided", "estimator.probes=15", "run.batch=2", "optimizer.lr=0.24"],
    "es-zscore": ["estimator=evolution", "estimator.population=16", "run.batch=2", "optimizer.lr=0.18"],
    "es-rank": [
        *("estimator=evolution", "estimator.population=16", "estimator.shaping=centred_rank"),
        *("run.batch=2", "optimizer.lr=0.6"),
    ],
    "eggroll": [
        *("estimator=evolution", "estimator.centring=prompt", "estimator.sigma=7e-4", "run.batch=2"),
        *("estimator.population=16", "space=lowrank", "optimizer.lr=0.012"),
    ],
    "rloo": ["estimator=rloo", "run.batch=2", "optimizer.lr=0.18"],
    "rloo-lowrank": [
        *("estimator=rloo", "estimator.sigma=7e-4", "space=lowrank", "run.batch=2", "optimizer.lr=4e-4"),
    ],
    "sign": ["estimator=two_point", "run.batch=16", "optimizer=sign", "optimizer.lr=0.06"],
    "meazo": ["estimator=two_point", "run.batch=16", "optimizer=adaptive", "optimizer.lr=0.06"],
}
COMMON = ("engine.slots=32", "run.stratify=true")


def settings(method: str, where: tuple[str, ...] = COMMON) -> list[str]:
    """All settings of a method; a kept result that was made with others is made anew."""
    return [*METHODS[method], *where]


def main(arguments: list[str]) -> None:
    """Run what is missing and print the table; with `run=` one run, in this process."""
    defaults = {"sequences": "1600", "seeds": "0,1,2", "only": ",".join(METHODS), "lr": "1", "out": "runs/methods"}
    options = parse(arguments, {**defaults, "run": "", "test": "true"})
    budget, out = int(options["sequences"]), user_path(options["out"])
    if options["run"]:
        method, seed, factor = options["run"].split(",")
        print(json.dumps(run(method, int(seed), float(factor), budget, options["test"] == "true")))
        return
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in map(int, options["seeds"].split(",")):
        for method in options["only"].split(","):
            for factor in map(float, options["lr"].split(",")):
                path = (
                    out / f"{method}-{budget}-seed{seed}-lr{factor:g}{'' if options['test'] == 'true' else '-dev'}.json"
                )
                if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("settings") != settings(
                    method
                ):
                    command = [sys.executable, "-m", "benchmarks.methods", f"sequences={budget}"]
                    command += [f"run={method},{seed},{factor}", f"test={options['test']}"]
                    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
                    path.with_suffix(".partial").write_text(
                        done.stdout.strip().splitlines()[-1] + "\n", encoding="utf-8"
                    )
                    os.replace(path.with_suffix(".partial"), path)
                results.append(json.loads(path.read_text(encoding="utf-8")))
                print(path.read_text(encoding="utf-8").strip(), file=sys.stderr, flush=True)
    print(table(results))
    print(json.dumps({"benchmark": "methods", "sequences": budget, "runs": results}))


def run(
    method: str,
    seed: int,
    factor: float,
    budget: int,
    test: bool,
    where: tuple[str, ...] = COMMON,
) -> dict[str, Any]:
    """One run: tune within the budget of scored sequences, then measure the last state.

    `where`: settings that are the same for all methods, such as the engine's.
    """
    from zoray.records import Probe
    from zoray.records.tiles import mean, scored
    from zoray.run.config import build_experiment, compose
    from zoray.scoring.replica import Replica

    overrides = [*settings(method, where), f"run.seed={seed}", f"run.data_seed={seed}", "run.tile_examples=16"]
    lr = compose("config", overrides).optimizer.lr * factor
    e = build_experiment(compose("config", [*overrides, f"optimizer.lr={lr!r}"]))
    replica = Replica(e.spec)
    each = scored(replica.grid(0, "train").tiles)
    steps = budget // each
    stepper = Stepper(e, replica, steps)
    began = time.monotonic()
    for _ in range(steps):
        stepper.direct()
    seconds = time.monotonic() - began
    replica.apply(stepper.commits[-1:])
    result: dict[str, Any] = {"method": method, "seed": seed, "lr": lr, "factor": factor, "steps": steps}
    result |= {
        "settings": settings(method, where),
        "sequences": steps * each,
        "tokens": stepper.tokens,
        "seconds": round(seconds, 1),
        "digest": replica.engine.digest(),
    }
    for split in ("dev", "test") if test else ("dev",):
        found = replica.outcomes(split, Probe(steps, 0, 0.0))
        loss, accuracy = mean(found.losses.tolist()), mean(found.scores.tolist())
        result |= {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per method and learning rate, mean and standard deviation over the seeds."""
    rows = ["| method | lr | seeds | steps | tokens | dev accuracy | test accuracy | dev loss |", "|" + "---|" * 8]
    for key in sorted({(r["method"], r["lr"]) for r in results}):
        runs = [r for r in results if (r["method"], r["lr"]) == key]
        tokens = sum(r["tokens"] for r in runs) / len(runs)
        cells = [key[0], f"{key[1]:.3g}", str(len(runs)), str(runs[0]["steps"]), f"{tokens:,.0f}"]
        for name in ("dev_accuracy", "test_accuracy", "dev_loss"):
            values = [r[name] for r in runs if name in r]
            cells.append(_spread(values))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
