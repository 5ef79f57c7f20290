"""Checks that the files of a model's folder are whole, before anything loads them.

Only names, sizes and headers are read, so a check takes milliseconds for a model of any size.
"""

from __future__ import annotations

import json
import re
import zipfile
from typing import TYPE_CHECKING

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"  # stands in for a large file without Git LFS
SMALL = 1 << 12  # bytes; pointers have some 130
INDEXES = {
    "model.safetensors.index.json": "model.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model.bin",
}  # they name the shards, unless the single file is there
TOKENIZERS = re.compile(r".*(token|vocab|tekken|\.model$|\.spm$|\.tiktoken$)")  # names of their files
OTHERS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_model")  # stems of files other than weights
LONGEST = 100 << 20  # bytes of a header: safetensors' own limit
AGAIN = "Copy or download it again"
FIX = "Give a Hugging Face folder (config.json, *.safetensors, tokenizer files) or a Hub id (org/name)"


def check_files(folder: Path, name: str) -> None:
    """Raise ConfigError unless the folder has config.json and whole weights.

    Args:
        folder: the model's.
        name: its name in messages, such as model.path=...
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    _check_pointers(files, name)
    _check_kind({path.name for path in files}, name)
    weights = [path for path in files if path.suffix == ".safetensors" and not path.stem.startswith(OTHERS)]
    weights = weights or [path for path in files if path.suffix == ".bin" and not path.stem.startswith(OTHERS)]
    for path in files:
        if path.suffix == ".json" or path in weights:
            _require(path.stat().st_size > 0, name, path, "is empty")
    _check_shards(folder, name)
    for path in weights:
        (_check_safetensors if path.suffix == ".safetensors" else _check_archive)(path, name)


def check_gguf(path: Path, name: str) -> None:
    """Raise ConfigError unless a file begins as a GGUF file does."""
    _check_pointers([path], name)
    with path.open("rb") as file:
        _require(file.read(4) == b"GGUF", name, path, "is not a GGUF file, which begins with the letters GGUF")


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer."""
    return path.stat().st_size < SMALL and path.read_bytes().startswith(POINTER)


def _check_pointers(files: Iterable[Path], name: str) -> None:
    for path in files:
        if is_pointer(path):
            raise ConfigError(
                f"{name}: {path.name} is a Git LFS pointer, which only stands for the file. Run `git lfs "
                "install` and `git lfs pull` in that clone, or download the model again"
            )


def _check_kind(names: set[str], name: str) -> None:
    """Raise ConfigError unless config and weights are there, by their names."""
    adapter = "It is an adapter; give its base model. " if "adapter_config.json" in names else ""
    if "config.json" not in names:
        raise ConfigError(f"{name} has no config.json. {adapter}{FIX}")
    if not _weights(names) and not names & set(INDEXES):
        other = sorted(file for file in names if file.endswith((".gguf", ".pth", ".pt", ".msgpack", ".h5", ".onnx")))
        found = f"; it has {', '.join(other[:3])}, which is another format" if other else ""
        raise ConfigError(f"{name} has neither *.safetensors nor *.bin with weights{found}. {adapter}{FIX}")


def check_tokenizer(folder: Path) -> None:
    """Raise ConfigError if no file of the folder has a tokenizer's name."""
    if not any(TOKENIZERS.match(path.name) for path in folder.iterdir()):
        raise ConfigError(
            f"{folder} has no tokenizer (such as tokenizer.json and tokenizer_config.json). Copy its files from the "
            "model that this one was made from"
        )


def check_weights(folder: Path) -> None:
    """Raise ConfigError for a weight file that safetensors can't read; `check_files` leaves this to the reader."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        _require(length <= LONGEST, f"{folder}", path, "is not a safetensors file")


def _weights(names: Iterable[str]) -> list[str]:
    return [file for file in names if file.endswith((".safetensors", ".bin")) and not file.startswith(OTHERS)]


def _check_shards(folder: Path, name: str) -> None:
    for index, single in INDEXES.items():
        path = folder / index
        others = any(folder.glob("*.safetensors")) if single.endswith(".bin") else False
        if not path.is_file() or (folder / single).is_file() or others:
            continue
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{name}: {index} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
        missing = [shard for shard in shards if not (folder / str(shard)).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(
                f"{name} is incomplete: of the {len(shards)} weight files that {index} names, {missing[0]}{more} "
                f"{'are' if more else 'is'} missing. Copy or download the model again"
            )


def _check_safetensors(path: Path, name: str) -> None:
    """Check the format: a length, that many bytes of JSON with the end of each tensor, and the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST:
            return  # see check_weights
        _require(size >= 8 + length, name, path, f"is cut short: it has {size:,} bytes")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            ends = None
    _require(ends is not None, name, path, "is not a safetensors file, or is damaged at its beginning")
    wanted = 8 + length + max(ends or [0])
    _require(size >= wanted, name, path, f"is cut short: it has {size:,} of {wanted:,} bytes")
    _require(size == wanted, name, path, f"is damaged: it has {size:,} bytes, and its tensors end at {wanted:,}")


def _check_archive(path: Path, name: str) -> None:
    """Check a file of torch's: a zip archive, whose table of contents comes last; before 1.6 another format."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    _require(not zipped or zipfile.is_zipfile(path), name, path, "is cut short: the end of the archive is missing")


def _require(condition: bool, name: str, path: Path, wrong: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: {path.name} {wrong}. {AGAIN}")
