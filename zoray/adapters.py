"""What a run's state becomes for other programs: a PEFT adapter folder, or a merged Hugging Face checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.records import ConfigError
from zoray.snapshots import pack
from zoray.spaces import Lora
from zoray.spaces.base import MAX_RANK, is_embedding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from zoray.spaces.fold import Factors

FOREIGN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")  # of PEFT's LoRA
EXACT_SVD = 2048  # smaller side of a matrix up to which the full SVD is taken


def write_peft(
    folder: Path,
    adapter: Mapping[str, np.ndarray],
    rank: int,
    alpha: float,
    base_model: str,
    targets: str | Sequence[str] = "all-linear",
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; an earlier export there is replaced as a whole.

    Args:
        folder: the adapter's folder.
        adapter: {`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)}, not scaled: PEFT applies alpha / rank.
        rank: LoRA rank.
        alpha: LoRA scale numerator.
        base_model: what `adapter_config.json` names as the base.
        targets: the space's targets; anything but plain module names is written out as full names.
    """
    from safetensors.numpy import save_file

    matrices = sorted({name.rpartition(".")[0] for name in adapter})
    listed = [targets] if isinstance(targets, str) else list(targets)
    plain = all(target.replace("_", "").replace("-", "").isalnum() for target in listed)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in matrices}) if plain else matrices,
    }
    with _replacing(folder) as partial:
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {_peft_key(name): np.ascontiguousarray(value) for name, value in adapter.items()}
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_key(name: str) -> str:
    """`<matrix>.lora_A` as PEFT names it in a file."""
    matrix, _, part = name.rpartition(".")
    if is_embedding(matrix):
        return f"base_model.model.{matrix}.{part.replace('lora_', 'lora_embedding_')}"
    return f"base_model.model.{name}.weight"


def peft_space(folder: Path) -> Any:
    """The space (spaces.Lora) that a PEFT adapter of a folder is a state of.

    Raises:
        ConfigError: there is no LoRA adapter, or one with parts that zoray does not have.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a PEFT adapter's folder (adapter_config.json); got {folder}: {error}") from None
    found = [name for name in FOREIGN if config.get(name)] or config.get("peft_type")
    if found != "LORA" or config.get("bias", "none") != "none":
        raise ConfigError(f"expected a plain LoRA adapter without biases; {path} has {found}")
    targets = config["target_modules"]
    return Lora(config["r"], float(config["lora_alpha"]), targets if isinstance(targets, str) else tuple(targets), "AB")


def read_peft(folder: Path, space: Any, matrices: Mapping[str, tuple[int, int]]) -> bytes:
    """A PEFT adapter as a snapshot of its space's state, for Engine.restore; {canonical name: (out, in)} of the model.

    Raises:
        ConfigError: it is of another model.
    """
    tensors, state = read_factors(folder, space, matrices), space.open(matrices, 0)
    for name, a, b in state.tensors(state.flat):
        a.copy_(tensors[f"{name}.lora_A"])
        b.copy_(tensors[f"{name}.lora_B"])
    data = pack(state, 1 << 62)
    assert data is not None
    return data


def read_factors(folder: Path, space: Any, matrices: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} of a PEFT adapter.

    Raises:
        ConfigError: it is of another model.
    """
    import torch
    from safetensors.torch import load_file

    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, (rows, columns) in space.select(matrices).items():
        for part, shape in (("lora_A", (space.rank, columns)), ("lora_B", (rows, space.rank))):
            tensor = tensors.pop(_peft_key(f"{name}.{part}"), torch.zeros(0))
            if tensor.shape != shape:
                raise ConfigError(
                    f"expected {name}.{part} of shape {shape} in {folder}; got {tuple(tensor.shape)}. Take the "
                    "adapter's own model"
                )
            found[f"{name}.{part}"] = tensor
    if tensors:
        raise ConfigError(f"{folder} has adapters for {sorted(tensors)[:3]}, which the model lacks. Take its own model")
    return found


class Stack:
    """The folds of a run as one adapter: [B_1 B_2 ...] [A_1; A_2; ...], while its rank is at most vLLM's largest."""

    def __init__(self) -> None:
        self.rank = 0
        self._parts: list[Factors] = []

    def __call__(self, factors: Factors | int) -> None:
        """Take the factors of a fold, or a rank that can't fit; a stack that has grown too high forgets them."""
        self.rank += factors if isinstance(factors, int) else next(iter(factors.values()))[0].shape[1]
        if self.fits and not isinstance(factors, int):
            self._parts.append({name: (b.clone(), a.clone()) for name, (b, a) in factors.items()})
        else:
            self._parts.clear()

    @property
    def fits(self) -> bool:
        """Whether the exact stack is still within the largest rank."""
        return self.rank <= MAX_RANK

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`, `<matrix>.lora_B`}, for a scale of 1."""
        import torch

        arrays = {}
        for name in self._parts[0]:
            arrays[f"{name}.lora_B"] = torch.cat([part[name][0] for part in self._parts], dim=1).cpu().numpy()
            arrays[f"{name}.lora_A"] = torch.cat([part[name][1] for part in self._parts]).cpu().numpy()
        return arrays


def truncate(change: Mapping[str, torch.Tensor], rank: int) -> dict[str, np.ndarray]:
    """The best adapter of a rank for a change of weights {name: (out, in)}, by SVD; singular values split evenly."""
    import torch

    arrays = {}
    for name, delta in change.items():
        if min(delta.shape) <= EXACT_SVD:
            u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(delta.float(), q=min(rank + 16, min(delta.shape)), niter=6)
            vh = v.t()
        root, width = s[:rank].sqrt(), min(rank, len(s))
        b, a = torch.zeros(delta.shape[0], rank), torch.zeros(rank, delta.shape[1])
        b[:, :width], a[:width] = (u[:, :rank] * root).cpu(), (root[:, None] * vh[:rank]).cpu()
        arrays[f"{name}.lora_B"], arrays[f"{name}.lora_A"] = b.numpy(), a.numpy()
    return arrays


def relative_error(adapter: Mapping[str, np.ndarray], change: Mapping[str, torch.Tensor]) -> float:
    """||B A - change|| / ||change|| over all matrices (Frobenius)."""
    missed = total = 0.0
    for name, delta in change.items():
        exact = delta.double().cpu().numpy()
        made = adapter[f"{name}.lora_B"].astype(np.float64) @ adapter[f"{name}.lora_A"].astype(np.float64)
        missed, total = missed + float(((made - exact) ** 2).sum()), total + float((exact**2).sum())
    return float(np.sqrt(missed / total)) if total else 0.0


def write_merged(folder: Path, source: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a Hugging Face checkpoint: the model in `source` with some weights {canonical name: (out, in)} replaced.

    The checkpoint has the dtype of these weights. An earlier export in `folder` is replaced as a whole.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = next(iter(weights.values())).dtype
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, weight in weights.items():
        model.get_parameter(f"{name}.weight").data.copy_(weight.t() if is_embedding(name) else weight)
    with _replacing(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to write to, that takes the place of `folder` when all went well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"can't write to {folder}: {error.strerror}. Choose another folder") from None
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
