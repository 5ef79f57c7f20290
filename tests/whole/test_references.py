"""Each method's first 20 steps against a reference written from its paper: full weight matrices, float64, plain loops.

The reference shares nothing with zoray but the random numbers of an address (NumPy) and the examples of a step: it
perturbs explicit weights, runs the model on one text at a time, and applies the paper's formula. The engine is the
reference engine in float64, so what is left are the float32 roundings of zoray's adapter state and coefficients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from loop import drive
from orders import batch_indices, stratified_indices

from zoray.engines.hf import Hf
from zoray.methods.directions import direction_numpy
from zoray.methods.estimators import Evolution, OneSided, TwoPoint
from zoray.methods.optimizers import GlobalAdaptive, Sgd, Sign
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.models.folder import Model
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec
from zoray.tasks.file.task import File

SEED, DATA_SEED, BATCH, STEPS = 3, 5, 2, 20
EMBEDDING = "model.embed_tokens"
TOLERANCE = 1e-6  # of a step's largest coefficient, or of a typical one where that is smaller: a step whose losses
# nearly cancel keeps the float32 rounding of the perturbed adapter, which is relative to the gradient


class Reference:
    """A float64 model with explicit weights, and the loss of a step's batch under any weights."""

    def __init__(self, folder: str, task: File, vocabulary: bool = False, stratify: bool = False) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train, self.stratify = task.load().train, stratify
        linear = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        if not vocabulary:
            del linear["lm_head"]
        self.weights = {name: module.weight.data for name, module in linear.items()}
        if vocabulary:
            self.weights[EMBEDDING] = self.model.get_input_embeddings().weight.data.t()  # (hidden, vocabulary)
        self.base = {name: weight.numpy().copy() for name, weight in self.weights.items()}

    def batch(self, step: int) -> np.ndarray:
        """Which training examples a step sees."""
        if self.stratify:
            return stratified_indices(DATA_SEED, step, BATCH, [example.label for example in self.train])
        return batch_indices(DATA_SEED, step, BATCH, len(self.train))

    @torch.no_grad()
    def losses(self, step: int, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Cross-entropy over the options of each of the step's examples, (batch,)."""
        for name, value in weights.items():
            self.weights[name].copy_(torch.from_numpy(value))
        losses = []
        for index in self.batch(step):
            example = self.train[index]
            prompt = self.tokenizer(example.prompt)["input_ids"]
            full = [self.tokenizer(example.prompt + option)["input_ids"] for option in example.options]
            assert all(tokens[:-1] == prompt for tokens in full), "options of one token"
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            scores = [float(logits[tokens[-1]]) for tokens in full]
            losses.append(np.logaddexp.reduce(scores) - scores[example.label])
        return np.array(losses)

    def loss(self, step: int, weights: dict[str, np.ndarray]) -> float:
        """The batch's mean loss."""
        return float(self.losses(step, weights).mean())


def noise(step: int, probe: int, name: str, shape: tuple[int, int], distribution: str) -> np.ndarray:
    """The random matrix of an address, float64."""
    flat = direction_numpy(SEED, step, probe, name, 0, shape[0] * shape[1], distribution)
    return flat.reshape(shape).astype(np.float64)


def plus(weights: dict[str, np.ndarray], z: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    return {name: weights[name] + scale * z[name] for name in weights}


# the spaces, as explicit matrices


class LoraMatrices:
    """B (and A) as matrices; the model's weights are W + alpha / r B A."""

    def __init__(self, space: Lora, reference: Reference) -> None:
        self.space, self.base = space, reference.base
        initial = 2**32 - 1  # the address of initial values
        self.x = {}
        for name, weight in self.base.items():
            shape = (space.rank, weight.shape[1])
            width = weight.shape[0] if name == EMBEDDING else weight.shape[1]
            a = noise(initial, 0, f"{name}.lora_A", shape, "gaussian") / math.sqrt(3 * width)
            self.x[f"{name}.lora_A"] = a.astype(np.float32).astype(np.float64)
            self.x[f"{name}.lora_B"] = np.zeros((weight.shape[0], space.rank))
        self.start = dict(self.x)

    def z(self, step: int, k: int) -> dict[str, np.ndarray]:
        return {
            name: noise(step, k, name, value.shape, self.space.distribution)
            * (self.space.train == "AB" or name.endswith("B"))
            for name, value in self.x.items()
        }

    def weights(self, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        s = self.space.alpha / self.space.rank
        return {n: w + s * x[f"{n}.lora_B"] @ x[f"{n}.lora_A"] for n, w in self.base.items()}


class LozoMatrices:
    """Full weights; z = U V^T with V of the interval (LoZO, Algorithm 1). Also U alone, for the momentum."""

    def __init__(self, space: Lozo, reference: Reference) -> None:
        self.space = space
        self.start, self.x = reference.base, dict(reference.base)

    def v(self, step: int) -> dict[str, np.ndarray]:
        first = step - step % self.space.interval
        kind, r = self.space.distribution, self.space.rank
        return {n: noise(first, 0, f"{n}.lozo_V", (r, w.shape[1]), kind).T for n, w in self.x.items()}

    def u(self, step: int, k: int) -> dict[str, np.ndarray]:
        kind, r = self.space.distribution, self.space.rank
        return {n: noise(step, k, f"{n}.lozo_U", (w.shape[0], r), kind) for n, w in self.x.items()}

    def z(self, step: int, k: int) -> dict[str, np.ndarray]:
        u, v = self.u(step, k), self.v(step)
        return {name: u[name] @ v[name].T for name in u}

    def weights(self, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return x


class LowRankMatrices(LozoMatrices):
    """Full weights; z = U V^T / sqrt(r), both fresh for every probe (EGGROLL)."""

    def z(self, step: int, k: int) -> dict[str, np.ndarray]:
        kind, r = self.space.distribution, self.space.rank
        drawn = {}
        for name, w in self.x.items():
            u = noise(step, k, f"{name}.lowrank_U", (w.shape[0], r), kind)
            v = noise(step, k, f"{name}.lowrank_V", (r, w.shape[1]), kind)
            drawn[name] = u @ v / math.sqrt(r)
        return drawn


MATRICES = {Lora: LoraMatrices, Lozo: LozoMatrices, LowRank: LowRankMatrices}


# the methods, as their papers write them: each gives the step's coefficients and moves x


def mezo(reference: Reference, m: Any, step: int, lr: float, pairs: int = 1, eps: float = 1e-2) -> list[float]:
    """MeZO, Algorithm 1 (with n pairs: Algorithm 2); LoZO, Algorithm 1, when z = U V^T."""
    coefficients = []
    for k in range(pairs):
        z = m.z(step, k)
        up, down = (reference.loss(step, m.weights(plus(m.x, z, sign * eps))) for sign in (1, -1))
        coefficients.append(-lr * (up - down) / (2 * eps) / pairs)
    for k, c in enumerate(coefficients):
        m.x = plus(m.x, m.z(step, k), c)
    return coefficients


def mezo_apart(reference: Reference, m: Any, step: int, lr: float, eps: float = 1e-2) -> list[float]:
    """A pair for each example of the batch, scored on that example alone; the mean of their estimates."""
    coefficients = []
    for k in range(BATCH):
        up, down = (reference.losses(step, m.weights(plus(m.x, m.z(step, k), s * eps)))[k] for s in (1, -1))
        coefficients.append(-lr * (up - down) / (2 * eps) / BATCH)
    for k, c in enumerate(coefficients):
        m.x = plus(m.x, m.z(step, k), c)
    return coefficients


def clipped_mezo(reference: Reference, m: Any, step: int, lr: float, eps: float = 1e-2) -> list[float]:
    """Two pairs; |g| clipped to 1; five steps of warm-up, then a straight line to zero at step 20."""
    lr *= (step + 1) / 5 if step < 5 else (STEPS - step) / (STEPS - 5)
    g = []
    for k in range(2):
        up, down = (reference.loss(step, m.weights(plus(m.x, m.z(step, k), s * eps))) for s in (1, -1))
        g.append((up - down) / (2 * eps) / 2)
    norm = math.sqrt(g[0] ** 2 + g[1] ** 2)
    coefficients = [-lr * gk / max(1.0, norm) for gk in g]
    for k, c in enumerate(coefficients):
        m.x = plus(m.x, m.z(step, k), c)
    return coefficients


def fzoo(reference: Reference, m: Any, step: int, lr: float, probes: int = 5, eps: float = 1e-2) -> list[float]:
    """FZOO, arXiv 2506.09034: x <- x - eta / sigma g, g = 1 / (eps N) sum_k (l_k - l_0) u_k; our lr is eta / eps."""
    l0 = reference.loss(step, m.weights(m.x))
    ls = np.array([reference.loss(step, m.weights(plus(m.x, m.z(step, k), eps))) for k in range(probes)])
    sigma = math.sqrt(((ls - ls.mean()) ** 2).sum() / (probes - 1))
    eta = lr * eps
    coefficients = [-eta / sigma * (li - l0) / (eps * probes) for li in ls]
    for k, c in enumerate(coefficients):
        m.x = plus(m.x, m.z(step, k), c)
    return coefficients


def evolution(
    reference: Reference, m: Any, step: int, lr: float, kind: str, members: int = 6, sigma: float = 1e-2
) -> list[float]:
    """ES at scale (z-scored losses), the same with ranks or a plain baseline, or EGGROLL (mirrored, by prompt)."""
    mirrored = kind == "eggroll"
    signed = [(k, s) for k in range(members // 2) for s in (1, -1)] if mirrored else [(k, 1) for k in range(members)]
    table = np.array([reference.losses(step, m.weights(plus(m.x, m.z(step, k), s * sigma))) for k, s in signed])
    if kind == "eggroll":
        centred = table - table.mean(axis=0)
        fitness = (centred / math.sqrt((centred**2).mean())).mean(axis=1)
    elif kind == "rank":
        batch = table.mean(axis=1)
        fitness = np.array([sum(other < own for other in batch) for own in batch]) / (members - 1) - 0.5
    else:
        fitness = table.mean(axis=1)
        fitness = fitness - fitness.mean()
        fitness = fitness / (math.sqrt((fitness**2).mean()) if kind == "zscore" else sigma * (members - 1) / members)
    coefficients = [0.0] * (max(k for k, _ in signed) + 1)
    for (k, s), f in zip(signed, fitness, strict=True):
        coefficients[k] -= lr * s * f / members
    for k, c in enumerate(coefficients):
        m.x = plus(m.x, m.z(step, k), c)
    return coefficients


class LozoM:
    """LoZO-M, Algorithm 2: N <- beta N + (1 - beta) c U, x <- x - lr N V^T; N <- N V_old^T V_new / n at a redraw."""

    def __init__(self, beta: float) -> None:
        self.beta, self.n, self.v = beta, None, None

    def __call__(self, reference: Reference, m: LozoMatrices, step: int, lr: float, eps: float = 1e-2) -> list[float]:
        z, u, v = m.z(step, 0), m.u(step, 0), m.v(step)
        up, down = (reference.loss(step, plus(m.x, z, sign * eps)) for sign in (1, -1))
        c = (up - down) / (2 * eps)
        if self.n is None:
            self.n = {name: np.zeros_like(value) for name, value in u.items()}
        elif step % m.space.interval == 0:
            self.n = {name: n @ self.v[name].T @ v[name] / len(v[name]) for name, n in self.n.items()}
        self.n = {name: self.beta * n + (1 - self.beta) * c * u[name] for name, n in self.n.items()}
        self.v = v
        m.x = {name: x - lr * self.n[name] @ v[name].T for name, x in m.x.items()}
        return [(1 - self.beta) * c]


class Meazo:
    """MEAZO, arXiv 2605.03869: one running mean of squared projected gradients scales the step."""

    def __init__(self, beta: float) -> None:
        self.beta, self.v, self.t = beta, 0.0, 0

    def __call__(self, reference: Reference, m: Any, step: int, lr: float, eps: float = 1e-2) -> list[float]:
        z = m.z(step, 0)
        up, down = (reference.loss(step, m.weights(plus(m.x, z, sign * eps))) for sign in (1, -1))
        g = (up - down) / (2 * eps)
        self.v, self.t = self.beta * self.v + (1 - self.beta) * g * g, self.t + 1
        c = -lr * g / (math.sqrt(self.v / (1 - self.beta**self.t)) + 1e-8)
        m.x = plus(m.x, z, c)
        return [c]


class DecayedMezo:
    """MeZO with decoupled decays: x <- (1 - lr wd) x, then x <- x0 + (1 - lr a)(x - x0)."""

    def __init__(self, weight_decay: float, anchor: float) -> None:
        self.weight_decay, self.anchor = weight_decay, anchor

    def __call__(self, reference: Reference, m: Any, step: int, lr: float, eps: float = 1e-2) -> list[float]:
        z = m.z(step, 0)
        up, down = (reference.loss(step, m.weights(plus(m.x, z, sign * eps))) for sign in (1, -1))
        c = -lr * (up - down) / (2 * eps)
        shrunk = {name: (1 - lr * self.weight_decay) * x for name, x in m.x.items()}
        for name, start in m.start.items():
            shrunk[name] = start + (1 - lr * self.anchor) * (shrunk[name] - start)
        m.x = plus(shrunk, z, c)
        return [c]


class DecayedLozo:
    """LoZO with the same decays; those of the base weights are first seen when V is redrawn, those of U V^T at once."""

    def __init__(self, weight_decay: float, anchor: float) -> None:
        self.weight_decay, self.anchor = weight_decay, anchor
        self.seen: dict[str, np.ndarray] = {}  # the base weights that the losses see
        self.exact: dict[str, np.ndarray] = {}  # the same, decayed at every step
        self.low: dict[str, np.ndarray] = {}  # U V^T since the last redraw

    def __call__(self, reference: Reference, m: LozoMatrices, step: int, lr: float, eps: float = 1e-2) -> list[float]:
        if step % m.space.interval == 0:
            self.exact = plus(self.exact, self.low, 1.0) if self.exact else dict(m.start)
            self.seen, self.low = self.exact, {name: np.zeros_like(x) for name, x in m.start.items()}
        z, at = m.z(step, 0), plus(self.seen, self.low, 1.0)
        up, down = (reference.loss(step, plus(at, z, sign * eps)) for sign in (1, -1))
        c = -lr * (up - down) / (2 * eps)
        keep, pull = 1 - lr * self.weight_decay, 1 - lr * self.anchor
        self.exact = {n: start + pull * (keep * self.exact[n] - start) for n, start in m.start.items()}
        self.low = {name: pull * keep * low + c * z[name] for name, low in self.low.items()}
        return [c]


def sign_mezo(reference: Reference, m: Any, step: int, lr: float, eps: float = 1e-2) -> list[float]:
    """ZO-signSGD: x <- x - lr sign(g z)."""
    z = m.z(step, 0)
    up, down = (reference.loss(step, m.weights(plus(m.x, z, s * eps))) for s in (1, -1))
    m.x = {name: x - lr * np.sign((up - down) * z[name]) for name, x in m.x.items()}
    return [-lr * float(np.sign(up - down))]


LORA_B, LORA_AB = Lora(rank=2, alpha=4.0), Lora(rank=3, alpha=6.0, train="AB", distribution="gaussian")
LOZO, LOZO_RADEMACHER = Lozo(rank=2, interval=6), Lozo(rank=1, interval=5, distribution="rademacher")
LOZO_BASE, LOWRANK_BASE = Lozo(rank=2, interval=6, keep_base=True), LowRank(rank=8, keep_base=True)
VOCABULARY = Lora(rank=2, alpha=4.0, targets=("all-linear", "lm_head", "embed_tokens"))
EGGROLL, LOWRANK = LowRank(rank=1), LowRank(rank=8, distribution="rademacher")
PAIR, CONSTANT = TwoPoint(eps=1e-2), {"schedule": "constant"}
CASES = {
    "mezo-lora-B": (LORA_B, PAIR, Sgd(0.01, **CONSTANT), mezo),
    "mezo-lora-AB": (LORA_AB, PAIR, Sgd(0.003, **CONSTANT), mezo),
    "mezo-pairs": (LORA_B, TwoPoint(3, eps=1e-2), Sgd(0.01, **CONSTANT), lambda *a: mezo(*a, pairs=3)),
    "mezo-pairs-apart": (LORA_B, TwoPoint(BATCH, eps=1e-2, shared=False), Sgd(0.003, **CONSTANT), mezo_apart),
    "mezo-vocabulary": (VOCABULARY, TwoPoint(eps=0.05), Sgd(1e-3, **CONSTANT), lambda *a: mezo(*a, eps=0.05)),
    "mezo-stratified": (LORA_B, PAIR, Sgd(0.003, **CONSTANT), mezo),
    "clip-and-warm-up": (LORA_B, TwoPoint(2, eps=1e-2), Sgd(0.01, "linear", warmup=5, clip=1.0), clipped_mezo),
    "lozo": (LOZO, PAIR, Sgd(1e-4, **CONSTANT), mezo),
    "lozo-rademacher": (LOZO_RADEMACHER, PAIR, Sgd(1e-4, **CONSTANT), mezo),
    "lozo-m": (LOZO, PAIR, Sgd(3e-4, momentum=0.8, **CONSTANT), LozoM(0.8)),
    "mezo-like-lowrank": (LOWRANK, PAIR, Sgd(1e-4, **CONSTANT), mezo),
    "fzoo": (LORA_B, OneSided(5, eps=1e-2), Sgd(0.01, **CONSTANT), fzoo),
    "fzoo-lozo": (LOZO, OneSided(5, eps=1e-2), Sgd(1e-3, **CONSTANT), fzoo),
    "es-zscore": (
        *(LOWRANK, Evolution(6, 1e-2, antithetic=False), Sgd(1e-3, **CONSTANT)),
        lambda *a: evolution(*a, kind="zscore"),
    ),
    "es-rank": (
        *(LORA_B, Evolution(6, 1e-2, antithetic=False, shaping="centred_rank"), Sgd(0.01, **CONSTANT)),
        lambda *a: evolution(*a, kind="rank"),
    ),
    "es-plain": (
        *(LORA_B, Evolution(6, 1e-2, antithetic=False, shaping="none"), Sgd(0.01, **CONSTANT)),
        lambda *a: evolution(*a, kind="plain"),
    ),
    "eggroll": (
        *(EGGROLL, Evolution(6, 1e-2, centring="prompt"), Sgd(1e-3, **CONSTANT)),
        lambda *a: evolution(*a, kind="eggroll"),
    ),
    "meazo": (LORA_B, PAIR, Sgd(0.005, link=GlobalAdaptive(0.9), **CONSTANT), Meazo(0.9)),
    "sign": (LORA_B, PAIR, Sgd(0.002, link=Sign(), **CONSTANT), sign_mezo),
    "decay": (LORA_AB, PAIR, Sgd(0.003, weight_decay=2.0, anchor=3.0, **CONSTANT), DecayedMezo(2.0, 3.0)),
    "decay-lozo": (LOZO_BASE, PAIR, Sgd(1e-4, weight_decay=20.0, anchor=30.0, **CONSTANT), DecayedLozo(20.0, 30.0)),
    "decay-lowrank": (LOWRANK_BASE, PAIR, Sgd(1e-4, weight_decay=20.0, anchor=30.0, **CONSTANT), DecayedMezo(20, 30)),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_the_paper(case, tiny_models, labelled_file):
    space, estimator, optimizer, method = CASES[case]
    task = File(str(labelled_file), {0: " terrible", 1: " great"}, train=60, dev=20, test=20)
    vocabulary, stratify = space is VOCABULARY, case == "mezo-stratified"
    model = Model(str(tiny_models["llama" if vocabulary else "opt"]), dtype="float64")
    replica = Replica(ReplicaSpec(model, task, ChoiceNLL(), space, TwoPoint(), Hf(), SEED, DATA_SEED, BATCH, stratify))
    records = drive([replica], estimator, optimizer, STEPS, BATCH, BATCH)

    reference = Reference(model.path, task, vocabulary, stratify)
    matrices = MATRICES[type(space)](space, reference)
    found = np.array([noted.commit.coefficients for noted in records])
    expected = np.array([method(reference, matrices, step, optimizer.lr) for step in range(STEPS)])
    typical = np.sqrt((expected**2).mean())
    errors = np.abs(found - expected).max(axis=1) / np.maximum(np.abs(expected).max(axis=1), typical)
    assert errors.max() < TOLERANCE, f"{case}: {errors.max():.2e} at step {errors.argmax()}"
