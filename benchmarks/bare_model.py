"""A bare model of transformers: what it says at the answers, and backpropagation through low-rank adapters on it.

The adapters are forward hooks, so the model's own code runs as it is; blocks below the first adapter take no part in
the backward pass. Nothing is kept between steps: each forward pass goes through the whole model.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from zoray.records import TokenSequence

WRITERS = ("o_proj", "out_proj", "down_proj", "fc2", "attention.dense", "self_attn.dense", "dense_4h_to_h")
READ = 32  # sequences of a forward pass without gradients


class Split(NamedTuple):
    """Prompts as tokens, and the labels."""

    sequences: list[list[int]]
    labels: torch.Tensor  # (n,)


class Reading(NamedTuple):
    """What the untuned model says at the last prompt token of each row of a split."""

    logits: torch.Tensor  # (n, options)
    states: torch.Tensor  # (n, layers, hidden)
    labels: torch.Tensor  # (n,)


def load(folder: Path, dtype: str = "auto") -> Any:
    """The model in float32 unless told otherwise, frozen."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if dtype == "auto" else dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def blocks(model: Any) -> int:
    """How many blocks it has."""
    return model.config.get_text_config().num_hidden_layers


def padded(sequences: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with padding on the right, and the mask of what is none."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()


def answer_logits(
    model: Any, sequences: Sequence[Sequence[int]], words: torch.Tensor, layers: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The words' logits behind each sequence, (n, words), and the hidden states there, (n, layers, hidden)."""
    ids, mask = padded(sequences, model.device)
    rows, last = torch.arange(len(ids), device=ids.device), mask.sum(1) - 1
    kept, place = last.unique(return_inverse=True)  # the LM head is large; it reads positions that some row ends at
    asked = {"logits_to_keep": kept, "use_cache": False, "output_hidden_states": len(layers) > 0}
    output = model(input_ids=ids, attention_mask=mask, **asked)
    logits = output.logits[rows, place][:, words.to(ids.device)].float()
    states = [output.hidden_states[layer][rows, last].float() for layer in layers]
    return logits, torch.stack(states, 1) if states else logits.new_zeros(len(ids), 0, 0)


@torch.no_grad()
def read(model: Any, split: Split, words: torch.Tensor, layers: Sequence[int] = ()) -> Reading:
    """Logits and hidden states of all rows; those of like length go together."""
    order = sorted(range(len(split.sequences)), key=lambda i: len(split.sequences[i]))
    found = [
        answer_logits(model, [split.sequences[i] for i in order[first : first + READ]], words, layers)
        for first in range(0, len(order), READ)
    ]
    back = torch.tensor(order).argsort()
    logits, states = (torch.cat(parts).cpu()[back] for parts in zip(*found, strict=True))
    return Reading(logits, states, split.labels)


def token_loss(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of all tokens but the first of each sequence, and how many they are."""
    ids, mask = padded(sequences, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    there = mask[:, 1:].bool()
    return cross_entropy(logits[:, :-1][there].float(), ids[:, 1:][there], reduction="sum"), int(there.sum())


def answer_loss(model: Any, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """The mean cross-entropy of the targets of each sequence, (n,)."""
    ids, mask = padded([sequence.tokens.tolist() for sequence in sequences], model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    asked = ((logits[i, torch.from_numpy(s.rows).long()], s.targets) for i, s in enumerate(sequences))
    return torch.stack([cross_entropy(own.float(), torch.from_numpy(t).long().to(ids.device)) for own, t in asked])


class MeanSign(torch.optim.Optimizer):
    """m <- beta m + (1 - beta) sign(g), x <- x - lr m."""

    def __init__(self, parameters: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """The next step; there is no closure."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad.sign(), 1 - group["beta"])
                parameter.sub_(mean, alpha=group["lr"])


def linear_layers(model: Any, everywhere: bool, first: int) -> list[torch.nn.Linear]:
    """The layers of blocks that get adapters: all of them, or from block `first` on those that write to the stream."""
    layers = []
    for name, module in model.named_modules():
        block = re.search(r"\.(\d+)\.", name)  # the head and the embedding have none
        if isinstance(module, torch.nn.Linear) and block:
            writes = any(name.endswith(f".{suffix}") for suffix in WRITERS)
            if everywhere or (writes and int(block[1]) >= first):
                layers.append(module)
    if not layers:
        raise ConfigError(
            f"expected linear layers whose names end in one of {', '.join(WRITERS)} from block {first} "
            f"of {blocks(model)} on; {model.config.model_type} has none. Set first=..., or take rules=adamw-all"
        )
    return layers


@contextmanager
def adapted(
    layers: Sequence[torch.nn.Linear], seed: int, rank: int = 8, alpha: float = 16.0
) -> Iterator[list[torch.Tensor]]:
    """The layers with alpha / rank B A beside each; gives all A and B. A is normal of variance 1 / (3 in), B is 0."""
    generator, parameters, handles = torch.Generator().manual_seed(seed), [], []
    for layer in layers:
        drawn = torch.randn(rank, layer.in_features, generator=generator) / (3 * layer.in_features) ** 0.5
        a = drawn.to(layer.weight.device).requires_grad_()
        b = torch.zeros(layer.out_features, rank, device=layer.weight.device, requires_grad=True)

        def add(module: Any, inputs: Any, output: Any, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return output + (alpha / rank * (inputs[0].to(a.dtype) @ a.T) @ b.T).to(output.dtype)

        handles.append(layer.register_forward_hook(add))
        parameters += [a, b]
    try:
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


def descend(
    parameters: list[torch.Tensor], optimizer: str, lr: float, steps: int, loss_of: Callable[[int], torch.Tensor]
) -> Iterator[int]:
    """So many steps, the learning rate falling linearly to 0; yields how many have been taken, after each."""
    rule: Any = MeanSign if optimizer == "MeanSign" else getattr(torch.optim, optimizer)
    taken = rule(parameters, lr=lr)
    falling = torch.optim.lr_scheduler.LambdaLR(taken, lambda step: 1 - step / max(1, steps))
    for step in range(steps):
        taken.zero_grad()
        loss_of(step).backward()
        taken.step()
        falling.step()
        yield step + 1
