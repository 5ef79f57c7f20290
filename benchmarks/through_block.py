"""Would feedback reach queries, keys, values, gates and up-projections, by one step back through their own block?

    python -m benchmarks.through_block [examples=16] [seed=0] [model=hf model.path=FOLDER]

These matrices do not write to the residual stream. The gradient at the stream's end is taken as that at their block's
output, for each answer's last row, and goes back through the block's own attention or MLP, once: autograd of a module
alone, on the inputs it had (a norm behind it, as Gemma has, is not gone through). Prints, for the upper half of the
layers, the mean cosine of such a gradient of each kind of weight with the true one, beside that of the matrices that
write to the stream; and the same of the exact gradient at the block's output in that row, which tells what is lost on
the way down from what is lost because other rows are not asked for. Then one JSON object. Other keys are settings of
conf/.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from benchmarks.bare_model import answer_logits, blocks, load
from benchmarks.baselines import encode, some
from benchmarks.options import parse
from zoray.models.folder import load_tokenizer, max_length
from zoray.models.tokens import Encoder
from zoray.run.config import build, compose, guarded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEFAULTS = {"examples": "16", "seed": "0", "bos": "false"}


def main(arguments: list[str]) -> None:
    """Measure, print a table and one JSON object."""
    own = [argument for argument in arguments if argument.partition("=")[0] in DEFAULTS]
    options = parse(own, DEFAULTS)
    kinds = measure(options, [argument for argument in arguments if argument not in own])
    print("| weight | from the stream's end | exact at its block's output |\n|---|---|---|")
    for kind, (guess, exact) in kinds.items():
        print(f"| {kind} | {guess:.2f} | {exact:.2f} |")
    print(json.dumps({"benchmark": "through_block", **options, "cosines": kinds}))


def measure(options: dict[str, str], where: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """Mean cosines by kind of weight, over the upper half of the layers, of the gradient summed over the examples."""
    config = compose("config", where)
    source, task = build(config.model, "model"), build(config.task, "task")
    folder = source.resolve()
    encoder = Encoder(load_tokenizer(folder), max_length(folder), cut=True)
    data, words = encode({"dev": task.load().dev}, encoder, options["bos"] == "true")
    model = load(folder, source.dtype)
    layers = model.get_submodule("model.layers")
    upper = range(blocks(model) // 2, blocks(model))
    modules = {f"{i}.{part}": getattr(layers[i], part) for i in upper for part in ("self_attn", "mlp")}
    weights = {
        f"{name}.{leaf.removesuffix('.weight')}": weight
        for name, module in modules.items()
        for leaf, weight in module.named_parameters()
        if weight.dim() == 2
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    true, guess, exact = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(3))
    for number in some(len(data["dev"].sequences), int(options["examples"]), int(options["seed"])).tolist():
        with calls(modules, layers[-1]) as kept:
            logits = answer_logits(model, [data["dev"].sequences[number]], words)[0]
            loss = cross_entropy(logits, data["dev"].labels[number : number + 1])
            outputs = {name: call["output"] for name, call in kept.items()}
            found = torch.autograd.grad(loss, [*weights.values(), *outputs.values()])
        at_output = dict(zip(outputs, found[len(weights) :], strict=True))
        for name, part in zip(weights, found, strict=False):
            true[name] += part
        end = at_output.pop("end")[:, -1]
        for total, given in ((guess, lambda name, end=end: end), (exact, lambda name, g=at_output: g[name][:, -1])):
            for name, module in modules.items():
                through(module, kept[name], given(name), name, total)
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, gradient in true.items():
        pair = (cosine_similarity(part[name].flatten(), gradient.flatten(), 0).item() for part in (guess, exact))
        by_kind[name.rpartition(".")[2]].append(tuple(pair))  # type: ignore[arg-type]
    return {kind: tuple(torch.tensor(pairs).mean(0).tolist()) for kind, pairs in by_kind.items()}  # type: ignore[misc]


def through(
    module: Any, call: dict[str, Any], gradient: torch.Tensor, name: str, total: dict[str, torch.Tensor]
) -> None:
    """Add the gradients of a module's weights, from that (1, H) at the last row of its output."""
    leaves = {leaf: weight for leaf, weight in module.named_parameters() if weight.dim() == 2}
    output = module(*call["args"], **call["kwargs"])
    output = output[0] if isinstance(output, tuple) else output
    parts = torch.autograd.grad(output[:, -1], list(leaves.values()), gradient)
    for leaf, part in zip(leaves, parts, strict=True):
        total[f"{name}.{leaf.removesuffix('.weight')}"] += part


@contextmanager
def calls(modules: dict[str, Any], last: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """What modules are called with and give, detached inputs; `end`: the stream behind the last block."""
    kept: dict[str, dict[str, Any]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            plain = {key: value.detach() if torch.is_tensor(value) else value for key, value in kwargs.items()}
            output = output[0] if isinstance(output, tuple) else output
            kept[name] = {"args": [arg.detach() for arg in args], "kwargs": plain, "output": output}

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    handles.append(last.register_forward_hook(hook("end"), with_kwargs=True))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
