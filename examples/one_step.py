"""A step of a run, spelled out: ask, evaluate, tell, commit. One process, no Ray, no vLLM, no settings files.

    python examples/one_step.py                                # SmolLM2-135M on the CPU, under a minute
    python examples/one_step.py model=FOLDER steps=3 journal=FILE

`zoray/run/driver.py` runs the same loop over a pool of replicas, with evaluations and plots around it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from zoray.engines.hf import Hf
from zoray.methods.estimators import TwoPoint
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora
from zoray.models.folder import SMOLLM2_135M, Model
from zoray.records import Probe
from zoray.records.signatures import record
from zoray.records.tiles import Grid, losses_of, mean
from zoray.run import journal
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

DEFAULTS = {"model": "smollm2-135m", "steps": "8", "journal": ""}
MAILS = Path(__file__).with_name("mail.csv")
SEED, BATCH = 0, 4


def main(model: str, steps: int, path: Path) -> None:
    """Take some steps, one printed line each, and replay them."""
    # The model, the data and the method. Each part is a frozen dataclass, and has a file in conf/.
    spec = ReplicaSpec(
        model=Model(model),
        task=File(str(MAILS), template="{text} This is", train=BATCH, dev=1, test=0),
        objective=ChoiceNLL(),  # the cross-entropy over the label words, " private" and " urgent"
        space=Lora(rank=2, alpha=4.0, train="B"),  # W + (alpha / rank) B A; only B moves, and it starts at zero
        estimator=TwoPoint(pairs=1, eps=0.01),  # the loss on both sides of the state, along a random direction
        engine=Hf(),  # transformers, one sequence at a time: slow and exact
        seed=SEED,
        data_seed=SEED,
        batch=BATCH,
    )
    estimator, optimizer, space = spec.estimator, Sgd(lr=0.01, schedule="constant"), spec.space
    replica = Replica(spec)  # loads model and data; a run has many replicas, one process each
    matrices = space.select(replica.workload.matrices)
    print(f"{space.trained(matrices):,} numbers move, in {len(matrices)} matrices")
    unperturbed, everything = (Probe(0, 0, 0.0),), np.arange(BATCH)
    print(f"loss of {BATCH} mails before: {replica.losses(unperturbed, everything).mean():.4f}")

    # The journal's header has all that a replay needs besides the steps.
    shapes = {name: list(shape) for name, shape in matrices.items()}
    header = {"space": record(space), "matrices": shapes, "run": {"seed": SEED}}
    log, memory = journal.Journal.create(path, header), optimizer.init()

    for step in range(steps):
        # ask: which probes to score. A probe is an address and a scale; its direction is never stored or sent.
        probes = estimator.ask(step)

        # evaluate: the loss of the step's examples under each probe. A pool hands the tiles out to its replicas.
        grid = Grid.of(spec, step)
        scores, digest = replica.evaluate((), grid.tiles, digest=True)
        losses, _ = losses_of(probes, grid.tiles, scores)

        # tell: what the losses say about the gradient, one weight per direction; the optimizer makes it a coefficient.
        estimate = estimator.tell(probes, losses)
        memory, commit = optimizer.update(memory, step, steps, estimate.weights)

        # commit: first into the journal, then into the state. So every step that took effect can be repeated.
        # (A pool sends the commit along with the next step's tiles.)
        log.append(journal.StepRecord(commit, tuple(map(mean, losses)), digest, memory))
        replica.apply([commit])

        plus, minus = map(mean, losses)
        print(f"step {step}: loss {plus:.6f} at +eps, {minus:.6f} at -eps; slope {estimate.weights[0]:+.4f}", end="")
        print(f"; moved by {commit.coefficients[0]:+.6f} of the direction")

    log.close()
    print(f"loss of the same mails after: {replica.losses(unperturbed, everything).mean():.4f}")
    print(f"journal: {path.stat().st_size:,} bytes, {path}")
    print("digest of the state: ", replica.engine.digest())
    print("digest of its replay:", journal.replay(journal.read(path)).digest())


if __name__ == "__main__":
    given = DEFAULTS | dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if given.keys() != DEFAULTS.keys():
        sys.exit(f"expected {', '.join(f'{key}=...' for key in DEFAULTS)}; got {' '.join(sys.argv[1:])}")
    name = SMOLLM2_135M if given["model"] == "smollm2-135m" else given["model"]
    main(name, int(given["steps"]), Path(given["journal"] or Path(tempfile.mkdtemp(), journal.FILE_NAME)))
