"""The structure of vLLM's LoRA layers: which module holds a matrix, its slots, and its base weight.

vLLM fuses matrices (q, k, v; gate, up) into one module with a pair of stacked tensors for each. Two modules differ from
linear ones: an embedding stores A with a row per token, and the LM head's adapter sits in the logits processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zoray.engines.slots import Site
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Pair(NamedTuple):
    """All slots of one matrix, views into vLLM's tensors."""

    a: torch.Tensor  # (slots, 1, max rank, in)
    b: torch.Tensor  # (slots, 1, out, max rank)


def takes_tokens(module: Any) -> bool:
    """Whether a LoRA module takes token ids."""
    return hasattr(module, "lora_a_stacked_2d")


def gives_logits(module: Any) -> bool:
    """Whether a LoRA module computes logits."""
    return hasattr(module, "sharded_to_full_mapping")


def slots_of(module: Any) -> list[Pair]:
    """The slot tensors of a module's matrices."""
    if takes_tokens(module):
        return [Pair(module.lora_a_stacked.transpose(1, 2).unsqueeze(1), module.lora_b_stacked)]
    if gives_logits(module):
        return [Pair(module.lora_a_stacked, module.lora_b_stacked)]
    return [Pair(*pair) for pair in zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)]


def join_a(module: Any) -> torch.Tensor:
    """Make the A of a linear layer's matrices, still empty, views of one tensor, (slots, matrices * rank, in)."""
    stacked = module.lora_a_stacked
    slots, _, rank, width = stacked[0].shape
    a = stacked[0].new_zeros(slots, len(stacked) * rank, width)
    module.lora_a_stacked = tuple(part.unsqueeze(1) for part in a.split(rank, dim=1))
    return a


def join_b(module: Any) -> torch.Tensor:
    """The same for their B^T, (slots, matrices * rank, out), with zeros in columns of other matrices.

    So one product serves all of them. Call it before any graph is captured, since the slots move.
    """
    stacked = module.lora_b_stacked
    slots, _, _, rank = stacked[0].shape
    sizes = [b.shape[2] for b in stacked]
    b = stacked[0].new_zeros(slots, len(sizes) * rank, sum(sizes))
    blocks = [part.split(sizes, dim=2)[i] for i, part in enumerate(b.split(rank, dim=1))]  # (slots, rank, out)
    module.lora_b_stacked = tuple(block.transpose(1, 2).unsqueeze(1) for block in blocks)
    return b


def names_in(manager: Any, module_name: str) -> list[str]:
    """Canonical names of the matrices that vLLM has fused into a module, in its order."""
    prefix, _, leaf = module_name.rpartition(".")
    return [f"{prefix}.{child}".lstrip(".") for child in manager.packed_modules_mapping.get(leaf, [leaf])]


def find_slots(manager: Any, matrices: Mapping[str, tuple[int, int]]) -> dict[str, Site]:
    """The slots of each matrix of {canonical name: (out, in)} in this worker.

    Raises:
        ConfigError: a matrix has no slots, or slots of another shape.
    """
    sites: dict[str, Site] = {}
    for module_name, module in manager.modules.items():
        names, slots = names_in(manager, module_name), slots_of(module)
        if len(names) != len(slots):
            raise ConfigError(f"vLLM stacks {len(slots)} matrices in {module_name}, expected {names}")
        shapes = [
            matrices.get(name, (pair.b.shape[2], pair.a.shape[3])) for name, pair in zip(names, slots, strict=True)
        ]
        for name, pair, window in zip(names, slots, windows(module, shapes), strict=True):
            sites[name] = Site(*pair, *window)
    missing = [name for name in matrices if name not in sites]
    if missing:
        raise ConfigError(
            f"vLLM has no LoRA slot for {len(missing)} of this model's {len(matrices)} matrices, e.g. "
            f"{missing[0]}; choose space.targets among {sorted({name.rsplit('.', 1)[-1] for name in sites})}"
        )
    for name, (out_features, in_features) in matrices.items():
        site = sites[name]
        if site.a.shape[3] != len(site.columns) or site.b.shape[2] != len(site.rows):
            raise ConfigError(
                f"expected slots for {name} of {out_features} x {in_features} that hold rows {site.rows} and columns "
                f"{site.columns}; vLLM has {site.b.shape[2]} x {site.a.shape[3]}"
            )
    return {name: sites[name] for name in matrices}


def windows(module: Any, shapes: Sequence[tuple[int, int]]) -> list[tuple[range, range]]:
    """This worker's (rows of B, columns of A) of a module's matrices: a part of them under tensor parallelism.

    vLLM itself decides: it slices the indices of rows and columns as it slices an adapter that it loads.
    """
    if getattr(module, "tp_size", 1) == 1:
        return [(range(out), range(into)) for out, into in shapes]
    if takes_tokens(module) or gives_logits(module):
        raise ConfigError("expected engine.tensor_parallel=1 where an embedding or the LM head has an adapter")
    rows, columns = ([torch.arange(shape[side]) for shape in shapes] for side in (0, 1))
    some_b, some_a = [row[:, None] for row in rows], [column[None] for column in columns]
    if isinstance(module.lora_b_stacked, tuple) and len(shapes) > 1:
        some_b, some_a = module.slice_lora_b(some_b), module.slice_lora_a(some_a)
    else:
        some_b, some_a = [module.slice_lora_b(some_b[0])], [module.slice_lora_a(some_a[0])]
    return [(_range(b), _range(a)) for b, a in zip(some_b, some_a, strict=True)]


def _range(numbers: torch.Tensor) -> range:
    """Consecutive numbers as a range."""
    found = numbers.flatten().tolist()
    if found != list(range(found[0], found[0] + len(found))):
        raise ConfigError("vLLM splits a worker's rows of a matrix into several pieces; take engine.tensor_parallel=1")
    return range(found[0], found[0] + len(found))


def find_weights(manager: Any, matrices: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Canonical matrix name -> its rows of the fused base weight, (out, in), as a writable view.

    A weight that vLLM has packed or quantised has no such view; the space's error then says what to do.
    """
    weights: dict[str, torch.Tensor] = {}
    for module_name, module in manager.modules.items():
        if takes_tokens(module) or gives_logits(module):
            continue
        fused = getattr(module.base_layer, "weight", None)
        sizes = [pair.b.shape[2] for pair in slots_of(module)]
        if fused is None or fused.ndim != 2 or fused.shape[0] != sum(sizes):
            continue
        weights.update(zip(names_in(manager, module_name), fused.data.split(sizes), strict=True))
    return {name: weights[name] for name in matrices if name in weights}
