"""What must hold on a device: bits that NumPy makes, scores of the reference, states that a journal gives back.

Each check returns what it measured, and raises AssertionError where something does not hold. On CUDA
tests/engines/test_gpu.py runs the same ones, on the CPU a small form of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.noise import weighted
from benchmarks.shapes import vocabulary, with_weights
from benchmarks.stepper import Stepper
from zoray.engines.hf import Hf
from zoray.engines.packing import Plan
from zoray.methods.directions import Layout, direction_numpy, direction_torch
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.models.folder import linear_matrices, load_matrices
from zoray.records import Commit, Probe, TokenSequence
from zoray.run import journal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from zoray.methods.spaces import State

MATRICES = {"layers.0.q_proj": (96, 67), "layers.0.k_proj": (33, 67), "layers.1.up_proj": (1000, 64)}
DISTRIBUTIONS = ("rademacher", "gaussian")
TOLERANCES = {"float32": 2e-3, "float16": 0.03, "bfloat16": 0.2}  # of a score, in standard deviations of the scores
FOLDING = {
    "lozo": Lozo(rank=2, interval=3, keep_base=True),
    "lozo-stochastic": Lozo(rank=2, interval=3, keep_base=True, fold_rounding="stochastic", distribution="rademacher"),
    "lowrank": LowRank(rank=3, keep_base=True),
    "lowrank-stochastic": LowRank(rank=3, keep_base=True, fold_rounding="stochastic", distribution="rademacher"),
}
SPACES = {
    "lora": ("space=lora", "space.train=AB"),
    "lozo": ("space=lozo", "space.interval=7", "estimator.eps=5e-4", "optimizer.lr=1e-5"),
    "lowrank": ("space=lowrank", "space.rank=4", "estimator.eps=5e-4", "optimizer.lr=1e-5"),
}


@dataclass(frozen=True)
class Place:
    """Where the checks run: "cpu" or "cuda", with tiny models or larger ones, which are made in a folder."""

    device: str
    tiny: bool
    folder: Path

    @property
    def models(self) -> tuple[str, ...]:
        """Shapes that are compared with the reference."""
        return ("opt-tiny", "llama-tiny") if self.tiny else ("opt-125m", "llama-125m")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What weights are loaded as; a CPU has no products in float16 worth the name."""
        return ("float32", "bfloat16") if self.device == "cpu" else tuple(TOLERANCES)


def directions(place: Place) -> dict[str, Any]:
    """Directions have the bits that NumPy makes; whole ones, and parts of a matrix alone."""
    shapes, compared = {name: (out, 3) for name, (out, _) in MATRICES.items()}, 0
    for distribution in DISTRIBUTIONS:
        for seed, step, probe in ((7, 5, 2), (2**32 - 1, 2**31 + 5, 2**32 - 1)):
            layout = Layout(shapes, place.device)
            flat = layout.direction(seed, step, probe, distribution)
            for name, (rows, columns) in shapes.items():
                whole = direction_numpy(seed, step, probe, name, 0, rows * columns, distribution)
                expected = torch.from_numpy(whole).view(rows, columns)
                assert torch.equal(layout.view(flat, name).cpu(), expected), f"{distribution} {name}: other bits"
                address = (seed, step, probe, name, (rows, columns), distribution, slice(5, 30))
                part = direction_torch(*address, device=place.device)
                assert torch.equal(part.cpu(), expected[5:30]), f"{distribution} {name}[5:30]: other bits"
                compared += rows * columns
    return {"elements compared": compared}


def states(place: Place) -> dict[str, Any]:
    """After a hundred commits every space has, on the device, the digest that it has on the CPU."""
    compared = 0
    for distribution in DISTRIBUTIONS:
        for train in ("B", "AB"):
            space = Lora(rank=3, alpha=5, train=train, distribution=distribution)
            pair = [space.open(MATRICES, 11, device) for device in ("cpu", place.device)]
            for step in range(100):
                for state in pair:
                    state.apply(Commit(step, (0.0123, -0.0456), decay=0.999))
                if step % 20 == 19:
                    agree(pair, f"lora {train}, {distribution}, step {step}")
            probe = Probe(100, 0, 0.01)
            assert torch.equal(pair[0].perturbed(probe), pair[1].perturbed(probe).cpu()), f"lora {train}: other probes"
            compared += 1
    for name in FOLDING:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            folded(place, name, dtype)
            compared += 1
    return {"states compared": compared}


def folded(place: Place, name: str, dtype: torch.dtype) -> None:
    """The same of base weights in a dtype; with momentum (where the space has it), decay and anchor."""
    space, random = FOLDING[name], torch.Generator().manual_seed(0)
    base = {matrix: (torch.randn(shape, generator=random) * 0.05).to(dtype) for matrix, shape in MATRICES.items()}
    devices = ("cpu", place.device)
    copies = [{matrix: weight.clone().to(device) for matrix, weight in base.items()} for device in devices]
    pair = [space.open(MATRICES, 11, device, weights) for device, weights in zip(devices, copies, strict=True)]
    momentum = {"momentum": 0.9, "rate": -0.01} if isinstance(space, Lozo) else {}
    for step in range(31):  # ends within an interval
        for state in pair:
            state.apply(Commit(step, (0.0123, 0.0, -0.0456), decay=0.999, anchor=0.99, **momentum))
        if step % 10 == 0:
            agree(pair, f"{name} in {dtype}, step {step}")
    for matrix in MATRICES:
        assert torch.equal(copies[0][matrix], copies[1][matrix].cpu()), f"{name} in {dtype}: other weights"
        assert not torch.equal(copies[0][matrix], base[matrix]), f"{name} in {dtype}: nothing was folded"
    for (_, *here), (_, *there) in zip(*(state.factors(Probe(31, 1, 0.01)) for state in pair), strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True)), f"{name}: other probes"


def agree(pair: Sequence[State], where: str) -> None:
    """Two states have one digest."""
    digests = [state.digest() for state in pair]
    assert digests[0] == digests[1], f"{where}: {digests[0]} on the CPU, {digests[1]} on the device"


def engine(place: Place, model: str, dtype: str) -> dict[str, Any]:
    """Slots hold what the state says; base, plus and minus score as the reference does; graphs as no graphs."""
    from zoray.engines.vllm.engine import Vllm

    folder, space = with_weights(model, place.folder / model), Lora(rank=2, alpha=4, train="AB")
    matrices = linear_matrices(folder)
    vllm = Vllm(slots=4, max_tokens=512, kv_cache_gib=0.25).start(folder, dtype, matrices, space, seed=3)
    reference = Hf(device=place.device).start(folder, "float32", matrices, space, seed=3)
    for one in (vllm, reference):
        one.apply([Commit(0, (0.03, -0.02))])
    assert vllm.digest() == reference.digest(), "the engines' states differ"
    groups = {"base": None, "centre": Probe(1, 0, 0.0), "plus": Probe(1, 0, 0.1), "minus": Probe(1, 0, -0.1)}
    work = [(probe, sequence) for probe in groups.values() for sequence in sequences(model)]
    found, expected = (np.concatenate(one.score(work)) for one in (vllm, reference))
    scale, result = float(expected.std()), dict[str, Any](vllm.self_test)
    for number, name in enumerate(groups):
        part = slice(number * len(found) // len(groups), (number + 1) * len(found) // len(groups))
        result[f"{name} error"] = float(np.abs(found[part] - expected[part]).max()) / scale
    scorer = vllm.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._zoray
    check_slots(scorer, [probe for probe in groups.values() if probe is not None])
    if not scorer.graphs.plain:
        scorer.graphs.plain = True
        eager = np.concatenate(vllm.score(work))
        result["graph error"] = float(np.abs(found - eager).max()) / scale
    for name, error in result.items():
        assert error <= TOLERANCES[dtype] or not name.endswith(" error"), (
            f"{name} {error:.2e}, over {TOLERANCES[dtype]}"
        )
    return {**result, "tolerance": TOLERANCES[dtype]}


def feedback(place: Place, model: str, dtype: str) -> dict[str, Any]:
    """Residual feedback of a captured forward is the reference's, in forwards of several lengths in turn."""
    from zoray.engines.vllm.engine import Vllm

    folder, space = with_weights(model, place.folder / model), Lora(rank=2, alpha=4, targets="residual:0.5", train="AB")
    matrices = linear_matrices(folder)
    config = Vllm(slots=1, max_tokens=1024, kv_cache_gib=0.25, feedback=True)
    vllm = config.start(folder, dtype, matrices, space, seed=3)
    reference = Hf(device=place.device).start(folder, "float32", matrices, space, seed=3)
    numbers, gains = space.trained(matrices), (0.01,) * len(space.select(matrices))
    signs = np.packbits(np.random.default_rng(0).integers(0, 2, numbers).astype(np.uint8)).tobytes()
    for one in (vllm, reference):
        one.apply([Commit(0, (), gains=gains, signs=signs)])
    assert vllm.digest() == reference.digest(), "the engines' states differ"
    errors: dict[str, float] = {}
    for count in (8, 2, 12):
        plan = Plan.of([(Probe(1, 0, 0.0), one) for one in sequences(model, count)])
        found, expected = (one.feedback(plan, _slopes)[1] for one in (vllm, reference))
        for name, tensor in expected.items():
            error = float(np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor))
            errors[name] = max(errors.get(name, 0.0), error)
    where = max(errors, key=errors.__getitem__)
    result = {**vllm.self_test, "error": errors[where], "where": where, "tolerance": TOLERANCES[dtype]}
    assert errors[where] <= TOLERANCES[dtype], f"{where}: {errors[where]:.2e}, over {TOLERANCES[dtype]}"
    return result


def _slopes(values: np.ndarray) -> np.ndarray:
    """Of no pattern, so that the softmax of every row counts."""
    return np.sin(1.0 + np.arange(len(values)))


def sequences(model: str, count: int = 8) -> list[TokenSequence]:
    """Random sequences of several lengths, with two targets at each of two positions."""
    random, found = np.random.default_rng(0), []
    for length in random.integers(6, 60, count):
        tokens = random.integers(5, vocabulary(model), length).astype(np.int32)
        rows, targets = np.repeat([length - 3, length - 1], 2), random.integers(5, vocabulary(model), 4)
        found.append(TokenSequence(tokens, rows.astype(np.int32), targets.astype(np.int32), np.arange(4), 4))
    return found


@torch.inference_mode()
def check_slots(scorer: Any, probes: list[Probe]) -> None:
    """Slots have the state's factors, rounded once to the slots' dtype, and nothing above the space's rank."""
    scorer.write_all(probes)
    rank = scorer.space.rank
    for slot, probe in enumerate(probes):
        for name, a, b in scorer.state.factors(probe):
            site = scorer.contents.sites[name]
            assert torch.equal(site.a[slot, 0, :rank], a.to(site.a.dtype)), f"A of {name} in slot {slot}"
            assert torch.equal(site.b[slot, 0, :, :rank], (b * scorer.space.scaling).to(site.b.dtype)), f"B of {name}"
            assert not site.a[slot, 0, rank:].any() and not site.b[slot, 0, :, rank:].any(), f"{name}: rank"


def runs(place: Place, space: str) -> dict[str, Any]:
    """The same steps twice have the same digest, and a journal of them gives it as well, on the device and on a CPU."""
    from zoray.run.journal import make_header
    from zoray.scoring.replica import Replica

    model, count = place.models[-1], 10 if place.tiny else 100
    settings = ["run.batch=8", "estimator=two_point", "estimator.pairs=2", "engine.kv_cache_gib=0.5"]
    settings += ["engine.max_tokens=2048", *SPACES[space]]
    e, workload = weighted(model, "float32" if place.device == "cpu" else "bfloat16", place.folder, settings)
    replica, ends = Replica(e.spec, workload), []
    for number in range(2):
        stepper, digests = Stepper(e, replica, count), [replica.engine.digest()]
        path = place.folder / f"{space}-{number}.jsonl"
        path.unlink(missing_ok=True)
        header = {**make_header(e, workload), "dtype": replica.info.dtype}
        with journal.Journal.create(path, header) as log:
            for _ in range(count):
                stepper.direct()
                log.append(journal.StepRecord(stepper.commits[-1], (), digests[-1], stepper.memory))
                replica.apply(stepper.commits[-1:])
                digests.append(replica.engine.digest())
        ends.append(digests)
        replica.engine.reset()
    assert len(set(ends[0])) == count + 1, "a step changed nothing"
    differs = [step for step, (a, b) in enumerate(zip(*ends, strict=True)) if a != b]
    assert not differs, f"the same steps twice differ from step {differs[:1]} on"
    result: dict[str, Any] = {"steps": count, "digest": ends[0][-1]}
    for device in sorted({"cpu", place.device} if not e.space.folds else {place.device}):
        contents, weights = journal.read(path), None
        if e.space.folds:
            loaded = load_matrices(workload.folder, workload.matrices, replica.info.dtype)
            weights = {name: weight.to(device) for name, weight in loaded.items()}
        found = journal.replay(contents, device=device, weights=weights).digest()
        assert found == ends[0][-1], f"replayed on {device}: {found}, the run had {ends[0][-1]}"
        result[f"replayed on {device}"] = "equal"
    return result


def all_checks(place: Place) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every check by name."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "directions": partial(directions, place),
        "states": partial(states, place),
    }
    for model in place.models:
        for dtype in place.dtypes:
            checks[f"engine-{model}-{dtype}"] = partial(engine, place, model, dtype)
            checks[f"feedback-{model}-{dtype}"] = partial(feedback, place, model, dtype)
    return checks | {f"run-{space}": partial(runs, place, space) for space in SPACES}
