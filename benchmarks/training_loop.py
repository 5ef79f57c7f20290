"""The baseline: LoZO and MeZO as the official training loops take a step, on transformers.

Read from the published trainers (MeZO's and LoZO's `trainer.zo_step`) and written anew. What makes them slow is kept:
every option of every example is a sequence of its own, padded to the longest; each forward gives logits for the whole
vocabulary at all positions; the weights are perturbed in place, tensor by tensor, with numbers drawn anew from the
step's seed: three passes (plus, minus twice, back) and a fourth for the update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class TrainingLoop:
    """A model under in-place perturbation.

    Args:
        model: a causal language model of transformers, in eval mode.
        method: "lozo" (U V^T, V redrawn every `interval` steps) or "mezo" (Gaussian, full size).
        lr, eps: step size and perturbation.
        rank, interval: of lozo.
    """

    def __init__(
        self, model: Any, method: str = "lozo", lr: float = 1e-7, eps: float = 1e-3, rank: int = 2, interval: int = 50
    ) -> None:
        self.model, self.method, self.lr, self.eps = model, method, lr, eps
        self.rank, self.interval, self.steps = rank, interval, 0
        self.trained = [(name, parameter) for name, parameter in model.named_parameters()]
        self._v: dict[str, torch.Tensor] = {}

    def _directions(self, seed: int, redraw: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(seed)
        for name, parameter in self.trained:
            data = parameter.data
            if self.method == "mezo" or data.ndim < 2:
                yield data, torch.normal(0.0, 1.0, data.shape, device=data.device, dtype=data.dtype)
                continue
            if redraw:
                self._v[name] = torch.randn(data.shape[1], self.rank, device=data.device, dtype=data.dtype)
            u = torch.randn(data.shape[0], self.rank, device=data.device, dtype=data.dtype)
            yield data, u @ self._v[name].t()

    def _move(self, seed: int, scale: float, redraw: bool) -> None:
        for data, z in self._directions(seed, redraw):
            data.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, batch: Sequence[tuple[Sequence[Sequence[int]], Sequence[int], int]], pad: int = 0) -> float:
        """One step on a batch of (option sequences, where each option begins, label); returns the mean loss at plus."""
        seed = int(np.random.default_rng(self.steps).integers(1_000_000_000))
        redraw = self.steps % self.interval == 0
        self._move(seed, self.eps, redraw)
        plus = self.loss(batch, pad)
        self._move(seed, -2 * self.eps, redraw)
        minus = self.loss(batch, pad)
        self._move(seed, self.eps, redraw)
        self._move(seed, -self.lr * (plus - minus) / (2 * self.eps), False)
        self.steps += 1
        return plus

    @torch.no_grad()
    def loss(self, batch: Sequence[tuple[Sequence[Sequence[int]], Sequence[int], int]], pad: int = 0) -> float:
        """Mean cross-entropy over the options, from mean log-probabilities of their tokens."""
        return float(torch.tensor([loss for loss, _ in self.outcomes(batch, pad)]).mean())

    @torch.no_grad()
    def outcomes(
        self, batch: Sequence[tuple[Sequence[Sequence[int]], Sequence[int], int]], pad: int = 0
    ) -> list[tuple[float, bool]]:
        """(loss, whether the right option is the likeliest) of each example."""
        sequences = [tokens for options, _, _ in batch for tokens in options]
        longest, device = max(map(len, sequences)), self.model.device
        ids = torch.full((len(sequences), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(sequences):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0]
        outcomes, at = [], 0
        for options, begins, label in batch:
            scores = torch.stack(
                [
                    logps[at + k, begin - 1 : len(tokens) - 1].mean()
                    for k, (tokens, begin) in enumerate(zip(options, begins, strict=True))
                ]
            )
            loss = float(torch.logsumexp(scores, 0) - scores[label])
            outcomes.append((loss, int(scores.argmax()) == label))
            at += len(options)
        return outcomes


def option_batch(sequences: Sequence[Any], label: int) -> tuple[list[list[int]], list[int], int]:
    """An example's token sequences (records.TokenSequence) as whole option sequences with where each option begins."""
    options, begins = [], []
    for sequence in sequences:
        tokens = sequence.tokens.tolist()
        for output in range(sequence.n_outputs):
            own = sequence.outputs == output
            first = int(sequence.rows[own].min()) + 1
            options.append(tokens[:first] + sequence.targets[own].tolist())
            begins.append(first)
    return options, begins, label
