"""Adapters that others made: scored as the installed PEFT scores them, or refused by the name of what is not known.

The settings of PEFT are those of its own dataclasses: one that a later PEFT brings along fails here, and not at users'.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tiny import tiny_gemma3
from transformers import AutoModelForCausalLM

from zoray.engines.hf import Hf
from zoray.engines.packing import Plan
from zoray.engines.vllm.engine import Vllm
from zoray.models.adapters import peft_space, read_peft
from zoray.models.folder import linear_matrices
from zoray.records import ConfigError, Probe, TokenSequence

TOKENS = np.array([1, 5, 300, 17, 42, 511, 8], np.int32)
ROWS = np.arange(6, dtype=np.int64)
ATTENTION = ["q_proj", "v_proj"]

# For each field of LoraConfig values that are not its default; True: PEFT makes the adapter and what it scores is
# scored. A text: the adapter is refused by this name. PEFT needs more than a tiny model for some of these, so that the
# value is written into the configuration of a plain adapter.
VALUES: dict[str, list[tuple[Any, bool | str]]] = {
    "task_type": [("CAUSAL_LM", True)],
    "peft_type": [(name, "peft_type") for name in PEFT_TYPE_TO_CONFIG_MAPPING if name != "LORA"],
    "auto_mapping": [({"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, True)],
    "peft_version": [("0.3.0", True), (None, True)],
    "base_model_name_or_path": [("somebody/elses-name", True)],
    "revision": [("main", True)],
    "inference_mode": [(True, True)],
    "r": [(1, True), (12, True)],
    "target_modules": [
        ("all-linear", True),
        (["self_attn.q_proj", "down_proj"], True),
        (["model.layers.1.mlp.up_proj"], True),
        (r".*\.1\.self_attn\.(q|k)_proj", True),
        (["lm_head"], True),
        (["lm_head", "q_proj"], True),
        (["embed_tokens"], True),
        (["embed_tokens", "lm_head", "o_proj"], True),
    ],
    "exclude_modules": [(["layers.0.self_attn.q_proj"], True), (r".*\.1\..*", True)],
    "lora_alpha": [(1, True), (5, True)],
    "lora_dropout": [(0.5, True)],
    "fan_in_fan_out": [(True, True)],
    "bias": [("all", "bias"), ("lora_only", "bias")],
    "use_rslora": [(True, True)],
    "modules_to_save": [(["lm_head"], "modules_to_save")],
    "init_lora_weights": [
        *((value, True) for value in (True, False, "gaussian", "orthogonal", "mica", "eva")),
        *((value, "init_lora_weights") for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
        ("a_later_one", "init_lora_weights"),
    ],
    "layers_to_transform": [([1], True), (0, True)],
    "layers_pattern": [("layers", True)],
    "rank_pattern": [({"q_proj": 2, r"model.layers.1.self_attn.v_proj": 7}, True)],
    "alpha_pattern": [({r"layers\.0\..*v_proj": 3}, True)],
    "megatron_config": [({"tensor_model_parallel_size": 2}, "megatron_config")],
    "megatron_core": [("my.core", True)],
    "trainable_token_indices": [
        ([3, 4], "trainable_token_indices"),
        ({"embed_tokens": [3]}, "trainable_token_indices"),
    ],
    "loftq_config": [({"loftq_bits": 4}, True)],
    "eva_config": [({"rho": 2.0}, True)],
    "corda_config": [({"corda_method": "kpm"}, True)],
    "lora_ga_config": [({"direction": "ArBr"}, True)],
    "use_dora": [(True, "use_dora")],
    "velora_config": [({"scale": 1.0}, "velora_config")],
    "alora_invocation_tokens": [([5, 6], "alora_invocation_tokens")],
    "use_qalora": [(True, "use_qalora")],
    "qalora_group_size": [(8, True)],
    "monteclora_config": [({"n": 1}, "monteclora_config")],
    "layer_replication": [([[0, 2], [1, 2]], "layer_replication")],
    "runtime_config": [({"ephemeral_gpu_offload": True}, True)],
    "lora_bias": [(True, "lora_bias")],
    "target_parameters": [(["mlp.experts.gate_up_proj"], "target_parameters")],
    "use_bdlora": [({"nblocks": 2}, "use_bdlora")],
    "arrow_config": [({"top_k": 1}, "arrow_config")],
    "kasa_config": [({"beta": 0.1}, "kasa_config")],
    "ensure_weight_tying": [(True, "ensure_weight_tying")],
}
MADE_BY_PEFT = {  # the others are written into a plain adapter's configuration
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("init_lora_weights", "trainable_token_indices", "use_dora", "layer_replication", "inference_mode"),
}
NEEDS_DATA = ("eva", "corda", "loftq", "lora_ga", "a_later_one")  # values of init_lora_weights


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def made(folder: Path, out: Path, safe: bool = True, **settings: Any) -> Path:
    """An adapter that PEFT made, with numbers as if it had been trained."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **settings}
    model = get_peft_model(base(folder), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(out, safe_serialization=safe)
    return out


def changed(folder: Path, out: Path, **keys: Any) -> Path:
    """A plain adapter of PEFT's with other values in its configuration."""
    path = made(folder, out) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return out


def ours(folder: Path, adapter: Path, how: Any = None) -> torch.Tensor:
    """Log-probabilities of the tokens, by zoray."""
    space = peft_space(adapter)
    matrices = linear_matrices(folder, space.targets)
    data = read_peft(adapter, space, matrices, folder)
    engine = (how or Hf()).start(folder, "float32", matrices, space, 0)
    engine.restore(data, 0)
    sequence = TokenSequence(TOKENS, ROWS, TOKENS[1:].astype(np.int64), ROWS, len(ROWS))
    return torch.from_numpy(engine.score_plan(Plan.of([(Probe(0, 0, 0.0), sequence)])))


def logps(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)
    return found.gather(-1, torch.from_numpy(TOKENS[1:].astype(np.int64))[:, None])[:, 0].double()


def theirs(folder: Path, adapter: Path) -> torch.Tensor:
    """The same by PEFT."""
    return logps(PeftModel.from_pretrained(base(folder), adapter).eval())


def agree(folder: Path, adapter: Path) -> None:
    found, right = ours(folder, adapter), theirs(folder, adapter)
    assert (found - right).abs().max() < 1e-5
    assert (right - logps(base(folder))).abs().max() > 1e-4, "an adapter that changes nothing"


def test_the_values_are_those_of_the_installed_peft():
    """A setting that is not here is one that nobody has looked at."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(VALUES)


CASES = [(key, value, what) for key, values in VALUES.items() for value, what in values]


@pytest.mark.parametrize(("key", "value", "what"), CASES, ids=lambda value: str(value)[:30])
def test_every_setting_of_peft(tiny_models, tmp_path, key, value, what):
    folder = tiny_models["llama"]
    if key in MADE_BY_PEFT and value not in NEEDS_DATA:
        more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
        adapter = made(folder, tmp_path / "a", **{key: value, **more})
    else:
        adapter = changed(folder, tmp_path / "a", **{key: value})
    if what is True:
        agree(folder, adapter)
        return
    with pytest.raises(ConfigError, match=rf"{adapter}/adapter_config.json has .*\b{what}\b"):
        peft_space(adapter)


@pytest.fixture(scope="module")
def folders(tiny_models, tmp_path_factory):
    return {**tiny_models, "gemma3": tiny_gemma3(tmp_path_factory.mktemp("models") / "gemma3")}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]], ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_models_tied_and_untied_and_both_files(folders, tmp_path, kind, targets, safe):
    agree(folders[kind], made(folders[kind], tmp_path / "a", safe, target_modules=targets))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1], "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_rslora": True},
    ],
    ids=["patterns", "vocabulary"],
)
def test_vllm_scores_the_same(tiny_models, tmp_path, settings):
    """Slots hold what is asked for, with ranks of their own and on some of the layers."""
    adapter = made(tiny_models["llama"], tmp_path / "a", **settings)
    found = ours(tiny_models["llama"], adapter, Vllm(slots=1, max_tokens=256, kv_cache_gib=0.1))
    assert (found - theirs(tiny_models["llama"], adapter)).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converts_to_plain_lora_is_scored(tiny_models, tmp_path, init):
    """PEFT moves the base's part into the adapter, which then is of the base as it is."""
    folder = tiny_models["llama"]
    torch.manual_seed(0)
    model = get_peft_model(base(folder), LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    agree(folder, tmp_path / "a")
    assert (ours(folder, tmp_path / "a") - logps(model.eval())).abs().max() < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_another_base_says_what_to_do(tiny_models, tmp_path, init):
    adapter = made(tiny_models["llama"], tmp_path / "a", init_lora_weights=init)
    with pytest.raises(ConfigError, match=rf'init_lora_weights="{init}", with which PEFT changes the base.*merge_and'):
        peft_space(adapter)


@pytest.mark.parametrize(
    "keys",
    [
        {"a_later_key": None, "another": False, "a_third": {}, "a_fourth": "", "a_fifth": []},
        {"merge_weights": False, "enable_lora": None, "fan_in_fan_out": False},  # of PEFT 0.2
        {  # as unsloth names what it trains
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|v_proj)))"
        },
    ],
    ids=["empty", "old", "unsloth"],
)
def test_keys_of_other_programs_that_mean_nothing(tiny_models, tmp_path, keys):
    agree(tiny_models["llama"], changed(tiny_models["llama"], tmp_path / "a", **keys))


def test_an_old_configuration_lacks_most_keys(tiny_models, tmp_path):
    adapter = made(tiny_models["llama"], tmp_path / "a")
    keys = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    (adapter / "adapter_config.json").write_text(json.dumps(keys))
    agree(tiny_models["llama"], adapter)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"a_later_key": 3, "use_dora": True}, "without biases; .* has \\['a_later_key', 'use_dora'\\]. Merge it"),
        ({"peft_type": None}, "has peft_type=null"),
        ({"enable_lora": [True, False]}, "enable_lora"),
        ({"r": "4"}, "expected r and rank_pattern in .* whole numbers of at least 1; got"),
        ({"r": 0}, "expected r and rank_pattern"),
        ({"rank_pattern": [3]}, "expected r and rank_pattern"),
        ({"lora_alpha": None}, "expected lora_alpha and alpha_pattern in .* positive numbers; got"),
        ({"target_modules": 3}, "expected target_modules in .* text or a list of texts; got 3"),
        ({"target_modules": "("}, "expected regular expressions in .*; got '\\('"),
        ({"alpha_pattern": {"q_proj": 3, "[": 4}}, "expected regular expressions in"),
        ({"layers_to_transform": "1"}, "expected layers_to_transform in .* whole numbers; got '1'"),
        ({"layers_pattern": 3}, "expected layers_pattern in"),
        ({"r": 8}, r"expected model.layers.0.self_attn.q_proj.lora_A of shape \(8, 64\) in .*; got \(4, 64\)"),
        ({"rank_pattern": {"v_proj": 5}}, r"v_proj.lora_A of shape \(5, 64\)"),
        ({"r": 600}, "of rank 512 at most"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"it has none for model.layers.0.self_attn.o_proj"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(tiny_models, tmp_path, keys, says):
    with pytest.raises(ConfigError, match=says):
        ours(tiny_models["llama"], changed(tiny_models["llama"], tmp_path / "a", **keys))


def rewritten(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: list[tuple[str, Any, str]] = [
    ("nan", lambda t: t[f"{Q}.lora_B.weight"][0].fill_(float("nan")), r"numbers in .*; .*q_proj.lora_B.* have NaN"),
    ("infinite", lambda t: t[f"{Q}.lora_A.weight"][0].fill_(float("inf")), "have NaN or infinity"),
    ("lacking", lambda t: t.pop(f"{Q}.lora_B.weight"), r"q_proj.lora_B of shape \(64, 4\) in .*; got none"),
    (
        "half",
        lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
        "none for model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj. Copy it again",
    ),
    ("empty", lambda t: t.clear(), "expected the factors of a LoRA adapter in"),
    (
        "deeper",
        lambda t: t.update({name.replace("layers.1", "layers.2"): value.clone() for name, value in list(t.items())}),
        "has adapters for model.layers.2.self_attn.q_proj, model.layers.2.self_attn.v_proj, but the model has no such",
    ),
    (
        "magnitude",
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}),
        "has .*q_proj.lora_magnitude_vector",
    ),
    ("named", lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(4, 64)}), "also has .*default.weight"),
]


@pytest.mark.parametrize(("change", "says"), [pytest.param(*rest, id=name) for name, *rest in DAMAGE])
def test_tensors_that_do_not_fit(tiny_models, tmp_path, change, says):
    adapter = made(tiny_models["llama"], tmp_path / "a")
    rewritten(adapter, change)
    with pytest.raises(ConfigError, match=says):
        ours(tiny_models["llama"], adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda data: data[: len(data) // 2], "can't read the adapter's weights .*may be incomplete"),
        (lambda data: data[:5], "can't read the adapter's weights"),
        (lambda data: b"", "can't read the adapter's weights"),
        (lambda data: b"<html>not found</html>", "can't read the adapter's weights"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n",
            "got a Git LFS pointer, which only stands for them. Fetch them: git -C .* lfs pull",
        ),
    ],
    ids=["half", "five bytes", "empty", "html", "lfs"],
)
def test_files_that_are_not_whole(tiny_models, tmp_path, name, content, says):
    path = made(tiny_models["llama"], tmp_path / "a", name.endswith("safetensors")) / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ConfigError, match=says):
        ours(tiny_models["llama"], path.parent)


def test_no_weights_and_no_adapter(tiny_models, tmp_path):
    adapter = made(tiny_models["llama"], tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors or adapter_model.bin in .*; it has neither"):
        peft_space(adapter)
    for text in ("[]", "3", '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}', "\ud83d{", ""):
        (adapter / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(ConfigError, match=r"a PEFT adapter's folder|has peft_type=null"):
            peft_space(adapter)


def test_what_else_a_pickle_may_hold(tiny_models, tmp_path):
    """No code runs, and only tensors by name are taken."""
    path = made(tiny_models["llama"], tmp_path / "a", False) / "adapter_model.bin"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ConfigError, match="expected tensors by name"):
        peft_space(path.parent)
    torch.save(LoraConfig(), path)
    with pytest.raises(ConfigError, match="can't read the adapter's weights"):
        peft_space(path.parent)


def test_a_base_weight_of_its_own_is_refused(tiny_models, tmp_path):
    """PEFT puts embeddings into the file where they are targets; others than the model's would count."""
    folder = tiny_models["llama"]
    adapter = made(folder, tmp_path / "a", target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(adapter / "adapter_model.safetensors")
    rewritten(adapter, lambda t: t[key][3].add_(0.25))
    with pytest.raises(ConfigError, match=r"own model.embed_tokens.weight in .*; it differs by up to 0.25"):
        ours(folder, adapter)
    rewritten(adapter, lambda t: t.update({key: torch.zeros(520, 64)}))
    with pytest.raises(ConfigError, match=r"it differs in shape"):
        ours(folder, adapter)


def test_evaluate_refuses_before_the_model_loads(tiny_models, tmp_path, monkeypatch):
    """The command line's way to the same."""
    from zoray import evaluate
    from zoray.run.config import compose
    from zoray.scoring import replica

    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"the film is,{i % 2}\n" for i in range(30)))
    monkeypatch.setattr(replica.Replica, "__init__", lambda *_: pytest.fail("a model loads"))
    settings = ["engine=hf", "model=hf", f"model.path={tiny_models['llama']}", "task=file", f"task.path={rows}"]
    settings += ["task.dev=8", "task.test=0", f"adapter={tmp_path / 'a'}"]
    for keys, says in (({"use_dora": True}, "use_dora"), ({"r": 3}, r"of shape \(3, 64\)")):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        changed(tiny_models["llama"], tmp_path / "a", **keys)
        with pytest.raises(ConfigError, match=says):
            evaluate.main(compose("evaluate", settings))
