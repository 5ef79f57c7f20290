"""A LoRA adapter in PEFT's format: its configuration and its tensors, read without PEFT.

Guarantees: the adapter is the same as PEFT would load, B @ A times a scale on the matrices that the tensors name. A
configuration key that could mean more is refused by name, including keys of later versions of PEFT.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from zoray.models.files import is_pointer
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of tensor names in a file
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
USED = {  # what `Adapter` reads
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
WITHOUT_EFFECT = {  # on the outputs of a finished adapter
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),  # without megatron_config and use_qalora
    "fan_in_fan_out",  # PEFT corrects it for the kind of layer
    "merge_weights",  # of PEFT 0.2
}
KEEPING = ("gaussian", "eva", "orthogonal", "mica")  # values of init_lora_weights that leave the base weights alone
REMEDY = (
    "Merge it into its base with PEFT, model.merge_and_unload().save_pretrained(FOLDER), and take that: "
    "model.path=FOLDER"
)
CONVERT = (
    "Save it as PEFT converts it to plain LoRA, save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), "
    "or merge it: model.merge_and_unload().save_pretrained(FOLDER) and model.path=FOLDER"
)

READ_ERRORS = (  # for a file that is incomplete or not of the named format
    *(SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError),
    *(ValueError, KeyError, IndexError, AttributeError, TypeError),
)


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter by its configuration.

    Args:
        folder: the adapter's folder.
        config: the keys of `adapter_config.json`; PEFT's defaults hold for missing keys.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The rank of matrices that rank_pattern does not name."""
        return self.config.get("r", 8)

    @property
    def alpha(self) -> float:
        """The alpha of matrices that alpha_pattern does not name."""
        return float(self.config.get("lora_alpha", 8))

    @property
    def uniform(self) -> bool:
        """Whether all matrices have one rank and one alpha."""
        return not self.config.get("rank_pattern") and not self.config.get("alpha_pattern")

    def rank_of(self, matrix: str) -> int:
        """The rank of a matrix's adapter."""
        return int(_by_pattern(self.config.get("rank_pattern"), matrix, self.rank))

    def scaling_of(self, matrix: str) -> float:
        """The factor of B @ A for a matrix."""
        rank, alpha = self.rank_of(matrix), float(_by_pattern(self.config.get("alpha_pattern"), matrix, self.alpha))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def targets(self, matrix: str) -> bool:
        """Whether PEFT gives a matrix an adapter (as check_target_module_exists does); false if nothing says so."""
        wanted, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if wanted in (None, "all-linear") or (excluded and _named(excluded, matrix)):
            return False
        if isinstance(wanted, str) or matrix in wanted:
            return _named(wanted, matrix)
        layers, pattern = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        if not _named(wanted, matrix) or layers is None or layers == []:
            return _named(wanted, matrix)
        shapes = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([pattern] if isinstance(pattern, str) else pattern or [])]
        found = next(filter(None, (re.match(shape, matrix) for shape in shapes or [r".*?\.[^.]*\.(\d+)\."])), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(wanted: str | list[str], matrix: str) -> bool:
    """Whether a regular expression or a list of last parts names a matrix."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, matrix) is not None
    return any(f".{matrix}".endswith(f".{name}") for name in wanted)


def _by_pattern(pattern: Mapping[str, Any] | None, matrix: str, default: Any) -> Any:
    """The value of the first key that matches a matrix's last parts as a regular expression."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", matrix))
    return next(found, default)


def read_config(folder: Path) -> Adapter:
    """The adapter of a folder, without its tensors.

    Raises:
        ConfigError: there is no adapter, or its configuration asks for more than B @ A on frozen base weights.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else f"it is no JSON: {error}"
        raise ConfigError(
            f"expected a PEFT adapter's folder ({CONFIG}); got {folder}, and of {CONFIG}: {why}. Name the folder that "
            "save_pretrained or a run has written"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ConfigError(f"expected a plain LoRA adapter from PEFT; {path} has peft_type={json.dumps(kind)}. {REMEDY}")
    _check_keys(path, config)
    adapter = Adapter(folder, config)
    _check_values(path, adapter)
    return adapter


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in KEEPING:
        raise ConfigError(
            f"expected an adapter of the unchanged base model; {path} has init_lora_weights={json.dumps(init)}, with "
            f"which PEFT changes the base weights before it trains. {CONVERT}"
        )
    more = {key for key, value in config.items() if value and key not in USED | WITHOUT_EFFECT}
    if config.get("bias", "none") not in ("none", None):
        more.add("bias")
    if more:
        raise ConfigError(f"expected a plain LoRA adapter without biases; {path} has {sorted(more)}. {REMEDY}")


def _check_values(path: Path, adapter: Adapter) -> None:
    """Raise ConfigError unless the values in use have the right types, and patterns are regular expressions."""
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    whole = [adapter.config.get("r", 8), *(ranks.values() if isinstance(ranks, dict) else [None])]
    numbers = [adapter.config.get("lora_alpha", 8), *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in whole):
        raise ConfigError(f"expected r and rank_pattern in {path} to be whole numbers of at least 1; got {whole}")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers):
        raise ConfigError(f"expected lora_alpha and alpha_pattern in {path} to be positive numbers; got {numbers}")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if not (value is None or isinstance(value, str) or _listed(value, str)):
            raise ConfigError(f"expected {key} in {path} to be text or a list of texts; got {value!r}")
    layers = config.get("layers_to_transform")
    if not (layers is None or isinstance(layers, int) or _listed(layers, int)):
        raise ConfigError(f"expected layers_to_transform in {path} to be whole numbers; got {layers!r}")
    pattern = config.get("layers_pattern") or []
    names = [
        config.get("target_modules"),
        config.get("exclude_modules"),
        *([pattern] if isinstance(pattern, str) else pattern),
    ]
    for expression in (*ranks, *alphas, *(name for name in names if isinstance(name, str))):
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"expected regular expressions in {path}; got {expression!r}: {error}") from None


def _listed(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def matrices_of(names: Iterable[str]) -> list[str]:
    """The matrices whose factors have these names, each once."""
    return list(dict.fromkeys(match[1] for name in names if (match := FACTOR.fullmatch(name))))


def tensor_names(folder: Path) -> list[str]:
    """The names in an adapter's file; reads no tensors from `.safetensors`."""
    from safetensors import safe_open

    path = _tensor_file(folder)
    if path.name != TENSORS:
        return list(read_tensors(folder))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except READ_ERRORS as error:
        raise _damaged(path, error) from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an adapter's file by their names there.

    Raises:
        ConfigError: the file is missing or incomplete, or has NaN or infinity.
    """
    import torch
    from safetensors.torch import load_file

    path = _tensor_file(folder)
    try:
        tensors = load_file(path) if path.name == TENSORS else torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConfigError(f"expected tensors by name in {path}; got {type(tensors).__name__} of other things")
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise ConfigError(f"expected finite numbers in {path}; {some(bad)} have NaN or infinity")
    return tensors


def _tensor_file(folder: Path) -> Path:
    """The file of an adapter's tensors: `.safetensors` if there are both, as in PEFT."""
    path = next((file for name in (TENSORS, PICKLED) if (file := folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"expected {TENSORS} or {PICKLED} in the adapter's folder {folder}; it has neither")
    if is_pointer(path):
        raise ConfigError(
            f"expected an adapter's weights in {path}; got a Git LFS pointer, which only stands for them. "
            f"Fetch them: git -C {shlex.quote(str(folder))} lfs pull"
        )
    return path


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(f"can't read the adapter's weights {path}, which may be incomplete: {reason}. Copy it again")


def some(names: Sequence[str]) -> str:
    """The first three names, and the number of others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
