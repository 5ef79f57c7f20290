"""What vLLM's LoRA layers look like: which module holds a matrix, its slots, and its base weight.

vLLM fuses matrices (q, k, v; gate, up) into one module with a pair of stacked tensors for each. Two modules differ from
the linear ones: an embedding stores A with a row per token, and the LM head's adapter sits in the logits processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    Slots = list[tuple[torch.Tensor, torch.Tensor]]


def takes_tokens(module: Any) -> bool:
    """Whether a LoRA module takes token ids."""
    return hasattr(module, "lora_a_stacked_2d")


def gives_logits(module: Any) -> bool:
    """Whether a LoRA module computes logits."""
    return hasattr(module, "sharded_to_full_mapping")


def slots_of(module: Any) -> Slots:
    """The slot tensors of a module's matrices, as views: A (slots, 1, max rank, in) and B (slots, 1, out, max rank)."""
    if takes_tokens(module):
        return [(module.lora_a_stacked.transpose(1, 2).unsqueeze(1), module.lora_b_stacked)]
    if gives_logits(module):
        return [(module.lora_a_stacked, module.lora_b_stacked)]
    return list(zip(module.lora_a_stacked, module.lora_b_stacked, strict=True))


def names_in(manager: Any, module_name: str) -> list[str]:
    """Canonical names of the matrices that vLLM has fused into a module, in its order."""
    prefix, _, leaf = module_name.rpartition(".")
    return [f"{prefix}.{child}".lstrip(".") for child in manager.packed_modules_mapping.get(leaf, [leaf])]


def find_slots(manager: Any, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Canonical matrix name -> its slot tensors, as `slots_of` has them.

    Raises:
        ConfigError: a matrix of {canonical name: (out, in)} has no slots, or slots of another shape.
    """
    sites: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module_name, module in manager.modules.items():
        names, slots = names_in(manager, module_name), slots_of(module)
        if len(names) != len(slots):
            raise ConfigError(f"vLLM stacks {len(slots)} matrices in {module_name}, expected {names}")
        sites.update(zip(names, slots, strict=True))
    missing = [name for name in matrices if name not in sites]
    if missing:
        raise ConfigError(
            f"vLLM has no LoRA slot for {len(missing)} of this model's {len(matrices)} matrices, e.g. "
            f"{missing[0]}; choose space.targets among {sorted({name.rsplit('.', 1)[-1] for name in sites})}"
        )
    for name, (out_features, in_features) in matrices.items():
        a, b = sites[name]
        if a.shape[3] != in_features or b.shape[2] != out_features:
            raise ConfigError(
                f"expected a slot for {name} of {out_features} x {in_features}; vLLM has {b.shape[2]} x "
                f"{a.shape[3]} (tensor parallel shards are not supported yet)"
            )
    return sites


def find_weights(manager: Any, matrices: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Canonical matrix name -> its rows of the fused base weight, (out, in), as a view that can be written.

    A weight that vLLM has packed or quantised has no such view; the space then says what to do.
    """
    weights: dict[str, torch.Tensor] = {}
    for module_name, module in manager.modules.items():
        if takes_tokens(module) or gives_logits(module):
            continue
        fused = getattr(module.base_layer, "weight", None)
        sizes = [b.shape[2] for _, b in slots_of(module)]
        if fused is None or fused.ndim != 2 or fused.shape[0] != sum(sizes):
            continue
        weights.update(zip(names_in(manager, module_name), fused.data.split(sizes), strict=True))
    return {name: weights[name] for name in matrices if name in weights}
