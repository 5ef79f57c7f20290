"""A run's state as files for other programs: a PEFT adapter folder, or a merged Hugging Face checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.methods.snapshots import pack
from zoray.methods.spaces import Lora
from zoray.methods.spaces.base import MAX_RANK, is_embedding
from zoray.models.folder import load_parameters
from zoray.models.peft_files import PREFIX, matrices_of, read_config, read_tensors, some, tensor_names
from zoray.records import ConfigError, disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from zoray.methods.spaces.fold import Factors

EXACT_SVD = 2048  # largest shorter side of a matrix for the full SVD


def write_peft(
    folder: Path,
    adapter: Mapping[str, np.ndarray],
    rank: int,
    alpha: float,
    base_model: str,
    targets: str | Sequence[str] = "all-linear",
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, replacing an earlier export as a whole.

    Args:
        folder: the adapter's folder.
        adapter: {`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)}, not scaled: PEFT applies alpha / rank.
        rank: LoRA rank.
        alpha: LoRA scale numerator.
        base_model: the base named in `adapter_config.json`.
        targets: the space's targets; anything but plain module names is written as full names.
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
    """PEFT's name for `<matrix>.lora_A` in a file."""
    matrix, _, part = name.rpartition(".")
    if is_embedding(matrix):
        return f"{PREFIX}{matrix}.{part.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{name}.weight"


def peft_space(folder: Path) -> Any:
    """The space (spaces.Lora) of a folder's PEFT adapter; its matrices are those of the tensors.

    If matrices have different ranks or scales, the space has the largest rank and a scale of 1, and B takes the scales.

    Raises:
        ConfigError: there is no LoRA adapter, or it has parts that zoray does not support.
    """
    adapter = read_config(folder)
    matrices = matrices_of(tensor_names(folder))
    if not matrices:
        raise ConfigError(f"expected the factors of a LoRA adapter in {folder}; its file of tensors has none")
    rank = max(map(adapter.rank_of, matrices))
    alpha = adapter.alpha if adapter.uniform else float(rank)
    if adapter.uniform and adapter.config.get("use_rslora"):
        alpha *= rank**0.5
    if rank > MAX_RANK:
        raise ConfigError(f"expected an adapter of rank {MAX_RANK} at most, vLLM's largest; {folder} is of rank {rank}")
    return Lora(rank, alpha, tuple(matrices), "AB")


def read_peft(folder: Path, space: Any, matrices: Mapping[str, tuple[int, int]], base: Path | None = None) -> bytes:
    """A PEFT adapter as a snapshot of its space's state, for Engine.restore; arguments and errors of `read_factors`."""
    tensors, state = read_factors(folder, space, matrices, base), space.open(matrices, 0)
    for name, a, b in state.tensors(state.flat):
        a.copy_(tensors[f"{name}.lora_A"])
        b.copy_(tensors[f"{name}.lora_B"])
    data = pack(state, 1 << 62)
    assert data is not None
    return data


def read_factors(
    folder: Path, space: Any, matrices: Mapping[str, tuple[int, int]], base: Path | None = None
) -> dict[str, torch.Tensor]:
    """{`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)} of a PEFT adapter, for the scale of `space`.

    Args:
        folder: the adapter's folder.
        space: the result of `peft_space`, or a space of the same rank and alpha.
        matrices: {canonical name: (out, in)} of the model.
        base: the model's folder, for comparison if the file also has base weights.

    Raises:
        ConfigError: the adapter belongs to another model, is incomplete, or has changed base weights.
    """
    adapter, tensors = read_config(folder), read_tensors(folder)
    made = matrices_of(tensors)
    if foreign := [name for name in made if name not in matrices]:
        raise ConfigError(
            f"{folder} has adapters for {some(foreign)}, but the model has no such linear layers. Take its own model"
        )
    found = {}
    for name in (one for one in matrices if one in made):
        b_scale = adapter.scaling_of(name) / space.scaling
        rank = space.rank if adapter.uniform else adapter.rank_of(name)
        for part, shape in (("lora_A", (rank, matrices[name][1])), ("lora_B", (matrices[name][0], rank))):
            tensor = tensors.pop(_peft_key(f"{name}.{part}"), None)
            if tensor is None or tensor.shape != shape:
                got = "none" if tensor is None else tuple(tensor.shape)
                raise ConfigError(
                    f"expected {name}.{part} of shape {shape} in {folder}; got {got}. Take the adapter's own model"
                )
            found[f"{name}.{part}"] = _widened(tensor, part, space.rank, b_scale)
    if lacking := [name for name in matrices if adapter.targets(name) and name not in made]:
        raise ConfigError(
            f"expected factors for every module of target_modules in {folder}; it has none for {some(lacking)}. Copy "
            "it again, or take its own model"
        )
    _check_rest(folder, tensors, base)
    return found


def _widened(tensor: torch.Tensor, part: str, rank: int, b_scale: float) -> torch.Tensor:
    """A factor in float32, padded with zeros to `rank`; B is multiplied by `b_scale`."""
    import torch

    tensor = tensor.float() * (b_scale if part == "lora_B" and abs(b_scale - 1) > 1e-12 else 1.0)
    short = rank - tensor.shape[part == "lora_B"]
    return torch.nn.functional.pad(tensor, (0, short) if part == "lora_B" else (0, 0, 0, short)) if short else tensor


def _check_rest(folder: Path, tensors: Mapping[str, torch.Tensor], base: Path | None) -> None:
    """Raise ConfigError unless every other tensor is an unchanged base weight (PEFT copies embeddings)."""
    import torch

    names = {key: key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in tensors}
    own = load_parameters(base, list(names.values())) if base is not None and names else {}
    if odd := [key for key, name in names.items() if name not in own]:
        raise ConfigError(f"expected only a LoRA adapter's factors in {folder}; it also has {some(odd)}")
    for key, name in names.items():
        mine, theirs = own[name].float(), tensors[key].float()
        if not torch.equal(mine, theirs):
            far = f"by up to {(mine - theirs).abs().max():.3g}" if mine.shape == theirs.shape else "in shape"
            raise ConfigError(
                f"expected the base model's own {name} in {folder}; it differs {far}, as after enlarging the "
                "vocabulary, or in another dtype. Merge the adapter into its base with PEFT and take that as the "
                "model, or save it with save_embedding_layers=False if it was not trained"
            )


class Stack:
    """The folds of a run as one adapter, [B_1 B_2 ...] [A_1; A_2; ...], while its rank is at most vLLM's largest."""

    def __init__(self) -> None:
        self.rank = 0
        self._parts: list[Factors] = []

    def __call__(self, factors: Factors | int) -> None:
        """Take the factors of a fold, or a rank that can't fit; a stack beyond the largest rank drops all factors."""
        self.rank += factors if isinstance(factors, int) else next(iter(factors.values()))[0].shape[1]
        if self.fits and not isinstance(factors, int):
            self._parts.append({name: (b.clone(), a.clone()) for name, (b, a) in factors.items()})
        else:
            self._parts.clear()

    @property
    def fits(self) -> bool:
        """Whether the exact stack's rank is still within vLLM's largest."""
        return self.rank <= MAX_RANK

    def arrays(self) -> dict[str, np.ndarray]:
        """{`<matrix>.lora_A`, `<matrix>.lora_B`} for a scale of 1."""
        import torch

        arrays = {}
        for name in self._parts[0]:
            arrays[f"{name}.lora_B"] = torch.cat([part[name][0] for part in self._parts], dim=1).cpu().numpy()
            arrays[f"{name}.lora_A"] = torch.cat([part[name][1] for part in self._parts]).cpu().numpy()
        return arrays


def truncate(change: Mapping[str, torch.Tensor], rank: int) -> dict[str, np.ndarray]:
    """The best adapter of `rank` for a change of weights {name: (out, in)}, by SVD; singular values split evenly."""
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
    """A fresh folder to write to; it replaces `folder` if all goes well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"can't write to {folder}: {error.strerror}. Choose another folder") from None
    try:
        with disk.naming(folder):
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
