"""Folders of models that are incomplete: refused by what their files are, before anything loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from zoray.models.files import check_gguf
from zoray.models.folder import Model, load_tokenizer, weights_hash
from zoray.records import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 538090408\n"
BIN, SHARD = "pytorch_model.bin", "model-00002-of-00003.safetensors"


def index(*shards: str) -> str:
    return json.dumps({"weight_map": {f"w{k}": shard for k, shard in enumerate(shards)}})


# Files that take the place of a whole model's (None: gone), and what is said of it.
BROKEN = {
    "weights are a pointer": ({"model.safetensors": POINTER}, r"model.safetensors is a Git LFS pointer.*git lfs pull"),
    "so is a tokenizer": ({"tokenizer.json": POINTER}, "tokenizer.json is a Git LFS pointer"),
    "so is a config": ({"config.json": POINTER}, "config.json is a Git LFS pointer"),
    "so is a .bin": ({"model.safetensors": None, BIN: POINTER}, "pytorch_model.bin is a Git LFS pointer"),
    "a GGUF pointer": ({"model.safetensors": None, "m.gguf": POINTER}, "m.gguf is a Git LFS pointer"),
    "empty weights": ({"model.safetensors": ""}, "model.safetensors is empty"),
    "an empty tokenizer": ({"tokenizer.json": ""}, "tokenizer.json is empty"),
    "an empty config": ({"config.json": ""}, "config.json is empty"),
    "no config": ({"config.json": None}, "has no config.json"),
    "no tokenizer": ({"tokenizer.json": None, "tokenizer_config.json": None}, "has no tokenizer"),
    "no weights": ({"model.safetensors": None}, r"neither \*.safetensors nor \*.bin with weights"),
    "GGUF alone": ({"model.safetensors": None, "m.gguf": "GGUF"}, "it has m.gguf, which is another format"),
    "only a trainer's state": ({"model.safetensors": None, "training_args.bin": "x"}, "neither"),
    "a shard is missing": (
        {"model.safetensors": None, "model.safetensors.index.json": index("a.safetensors", SHARD), "a.safetensors": ""},
        "of the 2 weight files that model.safetensors.index.json names, model-00002-of-00003.safetensors is missing",
    ),
    "so are two of .bin": (
        {"model.safetensors": None, "pytorch_model.bin.index.json": index("a.bin", "b.bin", "c.bin"), "a.bin": "x"},
        "b.bin and 1 more are missing",
    ),
    "a damaged index": ({"model.safetensors": None, "model.safetensors.index.json": "{}"}, "index.json is damaged"),
    "an adapter": (
        {"model.safetensors": None, "adapter_config.json": "{}", "adapter_model.safetensors": "x"},
        "neither .* with weights. It is an adapter; give its base model",
    ),
    "an archive without its end": ({"model.safetensors": None, BIN: "PK\x03\x04rest"}, "end of the archive"),
}


@pytest.fixture
def folder(tiny_models, tmp_path) -> Path:
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_folder_is_refused_by_its_files(folder, case):
    files, said = BROKEN[case]
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
    if case == "a shard is missing":
        (folder / "a.safetensors").write_text("not looked at yet")
    with pytest.raises(ConfigError, match=said) as error:
        load_tokenizer(Model(str(folder)).resolve())
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [9, 1000, -1])
def test_weights_that_are_cut_short_or_too_long_are_refused(folder, kept):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ConfigError, match="is cut short"):
        Model(str(folder)).resolve()
    (folder / "model.safetensors").write_bytes(whole + b"x")
    with pytest.raises(ConfigError, match="is damaged: it has"):
        Model(str(folder)).resolve()
    (folder / "model.safetensors").write_bytes(whole)
    assert Model(str(folder)).resolve() == folder.resolve()


@pytest.mark.parametrize("files", [{"tokenizer.json": None}, {"tokenizer.json": "{}"}, {"tokenizer.json": "<html>"}])
def test_a_tokenizer_that_does_not_load_is_one_line(folder, files):
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers can load") as error:
        load_tokenizer(Model(str(folder)).resolve())
    assert "\n" not in str(error.value)


def test_what_is_no_safetensors_file_is_refused_before_a_replica_starts(folder):
    (folder / "model.safetensors").write_text("<html>not found</html>")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        weights_hash(Model(str(folder)).resolve())


def test_a_package_without_its_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(ConfigError, match="is a Git LFS pointer"):
        check_gguf(tmp_path / "m.gguf", "model.path=package:a/m.gguf")
    (tmp_path / "m.gguf").write_text("something else")
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        check_gguf(tmp_path / "m.gguf", "model.path=package:a/m.gguf")
