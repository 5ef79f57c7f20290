"""What other programs get: stacks and truncations are right; PEFT and transformers load what is written, or nothing."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from zoray.methods.spaces import Lora
from zoray.models import adapters
from zoray.models.adapters import Stack, relative_error, truncate, write_merged, write_peft
from zoray.models.folder import linear_matrices, load_matrices
from zoray.records import ConfigError

TOKENS = torch.tensor([[1, 5, 300, 17, 42, 511, 8]])
SHAPES = {"one": (6, 10), "two": (11, 4)}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B (out, r) and A (r, in) of each matrix."""
    return {
        name: (torch.from_numpy(normal(out, rank, seed=seed)), torch.from_numpy(normal(rank, into, seed=seed + 100)))
        for name, (out, into) in SHAPES.items()
    }


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits[0].float()


def changed_model(folder: Path, change: dict[str, torch.Tensor]):
    """The model in float32 with W + change; {} for the base itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, delta in change.items():
        module = model.get_submodule(name)  # a weight of its own, where two modules share one
        module.weight = torch.nn.Parameter(
            module.weight + (delta.t() if name.endswith("embed_tokens") else delta).float()
        )
    return model


def peft_model(folder: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(changed_model(folder, {}), adapter)


def tiny_adapter(folder: Path, space: Lora) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Random A and B for a tiny model, and what they add to its weights."""
    arrays, change = {}, {}
    for seed, (name, (out, into)) in enumerate(space.select(linear_matrices(folder, space.targets)).items()):
        a, b = normal(space.rank, into, seed=seed) / math.sqrt(into), normal(out, space.rank, seed=seed + 100) * 0.1
        arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"] = a, b
        change[name] = torch.from_numpy(space.scaling * b.astype(np.float64) @ a)
    return arrays, change


# stacks


def test_a_stack_is_the_sum_of_its_folds():
    stack, folds = Stack(), [factors(rank, seed) for seed, rank in enumerate((1, 3, 2))]
    for fold in folds:
        stack(fold)
    arrays = stack.arrays()
    assert (stack.rank, stack.fits) == (6, True)
    assert set(arrays) == {f"{name}.{part}" for name in SHAPES for part in ("lora_A", "lora_B")}
    for name, (out, into) in SHAPES.items():
        a, b = arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"]
        assert (a.shape, b.shape, a.dtype, b.dtype) == ((6, into), (out, 6), np.float32, np.float32)
        assert b.tobytes() == np.concatenate([fold[name][0].numpy() for fold in folds], axis=1).tobytes()
        assert a.tobytes() == np.concatenate([fold[name][1].numpy() for fold in folds], axis=0).tobytes()
        expected = sum((fold[name][0].double() @ fold[name][1].double()).numpy() for fold in folds)
        assert np.abs(b.astype(np.float64) @ a.astype(np.float64) - expected).max() < 1e-12
    assert (
        relative_error(arrays, {name: sum(f[name][0].double() @ f[name][1].double() for f in folds) for name in SHAPES})
        < 1e-15
    )


def test_a_stack_keeps_copies():
    """The factors are views of buffers that the state goes on to use."""
    stack, given = Stack(), factors(2, 0)
    stack(given)
    before = {name: array.copy() for name, array in stack.arrays().items()}
    for b, a in given.values():
        b.zero_(), a.zero_()
    assert all((array == before[name]).all() and array.any() for name, array in stack.arrays().items())


def test_a_stack_forgets_what_no_longer_fits():
    """512 is the largest rank that vLLM has slots for; beyond it nothing is held in memory."""
    stack = Stack()
    for seed in range(4):
        stack(factors(128, seed))
    assert (stack.rank, stack.fits) == (512, True) and stack.arrays()["one.lora_B"].shape == (6, 512)
    stack(factors(1, 5))
    assert (stack.rank, stack.fits, stack._parts) == (513, False, [])
    stack(factors(1, 6))
    assert (stack.rank, stack.fits, stack._parts) == (514, False, [])
    assert not Stack().rank and Stack().fits


# truncation


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 8)])
def test_truncation_is_the_best_approximation(shape, rank):
    """Eckart and Young: the first terms of the SVD, which NumPy computes in float64."""
    delta = normal(*shape)
    u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    arrays = truncate({"w": torch.from_numpy(delta)}, rank)
    b, a = arrays["w.lora_B"].astype(np.float64), arrays["w.lora_A"].astype(np.float64)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    assert arrays["w.lora_B"].dtype == arrays["w.lora_A"].dtype == np.float32
    assert np.abs(b @ a - (u[:, :rank] * s[:rank]) @ vh[:rank]).max() < 1e-5
    expected = math.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
    assert relative_error(arrays, {"w": torch.from_numpy(delta)}) == pytest.approx(expected, abs=1e-6)
    for product in (b.T @ b, a @ a.T):  # singular values are split evenly
        assert np.abs(product - np.diag(s[:rank])).max() < 1e-4


def test_truncation_of_a_low_rank_change_is_exact():
    change = {name: b @ a for name, (b, a) in factors(3, 0).items()}
    assert relative_error(truncate(change, 2), change) > 0.05
    assert relative_error(truncate(change, 3), change) < 1e-6
    assert relative_error(truncate(change, 4), change) < 1e-6


def test_truncation_beyond_the_full_rank_fills_up_with_zeros():
    """So that all matrices of an adapter have its one rank."""
    change = {name: torch.from_numpy(normal(*shape)) for name, shape in SHAPES.items()}
    arrays = truncate(change, 8)
    assert {name: array.shape for name, array in arrays.items()} == {
        "one.lora_B": (6, 8),
        "one.lora_A": (8, 10),
        "two.lora_B": (11, 8),
        "two.lora_A": (8, 4),
    }
    assert not arrays["two.lora_B"][:, 4:].any() and not arrays["two.lora_A"][4:].any()
    assert arrays["one.lora_A"][:6].any(axis=1).all()
    assert relative_error(arrays, change) < 1e-6


def test_truncation_of_no_change_is_zero():
    arrays = truncate({"w": torch.zeros(5, 4)}, 2)
    assert not (arrays["w.lora_B"] @ arrays["w.lora_A"]).any()
    assert all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_truncation_takes_any_dtype(dtype):
    delta = torch.from_numpy(normal(6, 5)).to(dtype)
    arrays = truncate({"w": delta}, 5)
    assert arrays["w.lora_A"].dtype == np.float32 and relative_error(arrays, {"w": delta}) < 1e-6


def test_large_matrices_take_a_randomised_svd(monkeypatch):
    """Close to the best one where singular values fall off; the same at every call, and no generator is disturbed."""
    monkeypatch.setattr(adapters, "EXACT_SVD", 32)
    u, _ = np.linalg.qr(normal(100, 100))
    v, _ = np.linalg.qr(normal(90, 90, seed=1))
    s = 2.0 ** -np.arange(90)
    delta = torch.from_numpy((u[:, :90] * s) @ v.T).float()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    arrays, again = truncate({"w": delta}, 4), truncate({"w": delta}, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(array.tobytes() == again[name].tobytes() for name, array in arrays.items())
    assert arrays["w.lora_B"].shape == (100, 4) and arrays["w.lora_A"].shape == (4, 90)
    best = math.sqrt((s[4:] ** 2).sum() / (s**2).sum())
    assert relative_error(arrays, {"w": delta}) == pytest.approx(best, rel=1e-3)
    assert truncate({"w": delta}, 90)["w.lora_B"].shape == (100, 90)  # more than the sketch can be wider by


def test_the_limit_of_the_exact_svd_is_on_the_smaller_side(monkeypatch):
    """A wide matrix with a small side is cheap: it keeps the exact one."""
    monkeypatch.setattr(adapters, "EXACT_SVD", 8)
    monkeypatch.setattr(torch, "svd_lowrank", None)
    assert truncate({"w": torch.from_numpy(normal(8, 100))}, 2)["w.lora_A"].shape == (2, 100)
    with pytest.raises(TypeError):
        truncate({"w": torch.from_numpy(normal(9, 100))}, 2)


# the relative error


def test_relative_error_is_of_all_matrices_together():
    change = {"one": torch.tensor([[3.0, 0.0]]), "two": torch.tensor([[0.0], [4.0]])}
    exact = {
        "one.lora_B": np.array([[1.0]], np.float32),
        "one.lora_A": np.array([[3.0, 0.0]], np.float32),
        "two.lora_B": np.array([[0.0], [2.0]], np.float32),
        "two.lora_A": np.array([[2.0]], np.float32),
    }
    assert relative_error(exact, change) == 0.0
    assert relative_error({name: 0 * array for name, array in exact.items()}, change) == 1.0
    assert relative_error(exact | {"one.lora_A": np.zeros((1, 2), np.float32)}, change) == 3 / 5
    assert relative_error(exact | {"two.lora_B": np.zeros((2, 1), np.float32)}, change) == 4 / 5
    assert relative_error(exact | {"one.lora_A": np.array([[3.0, 5.0]], np.float32)}, change) == 1.0


def test_relative_error_of_no_change_is_zero():
    zeros = {"w.lora_B": np.zeros((2, 1), np.float32), "w.lora_A": np.zeros((1, 3), np.float32)}
    assert relative_error(zeros, {"w": torch.zeros(2, 3)}) == 0.0


# PEFT folders


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", None),
        (("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        ("k_proj", ["k_proj"]),
        (("layers.1.*",), None),
        (("self_attn.q_proj",), None),
        (("*_proj",), None),
        (("q_proj", "lm_head", "embed_tokens"), ["embed_tokens", "lm_head", "q_proj"]),
    ],
)
def test_peft_scores_the_same(tiny_models, tmp_path, architecture, targets, modules):
    """Plain module names stay what they are; anything else becomes full names, so that PEFT takes no other module."""
    folder, space = tiny_models[architecture], Lora(rank=3, alpha=4.5, targets=targets)
    arrays, change = tiny_adapter(folder, space)
    write_peft(tmp_path / "out", arrays, space.rank, space.alpha, str(folder), space.targets)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    listed = modules or (sorted({n.rsplit(".", 1)[-1] for n in change}) if targets == "all-linear" else sorted(change))
    assert config["target_modules"] == listed
    model = peft_model(folder, tmp_path / "out")
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(change) and len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * len(change)
    found, expected = logits(model), logits(changed_model(folder, change))
    assert (found - expected).abs().max() < 1e-4
    assert (logits(changed_model(folder, {})) - expected).abs().max() > 0.1


def test_an_embedding_that_scales_its_output_scales_its_adapter(tmp_path):
    """Gemma multiplies by sqrt(hidden) inside the embedding; the adapter's part is multiplied as well."""
    from transformers import GemmaConfig, GemmaForCausalLM

    from zoray.engines.hf import Hf
    from zoray.records import Commit, Probe, TokenSequence

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GemmaConfig(vocab_size=512, num_key_value_heads=1, head_dim=16, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    GemmaForCausalLM(config).save_pretrained(tmp_path / "gemma")
    space = Lora(rank=2, alpha=4.0, targets=("embed_tokens",))
    matrices = linear_matrices(tmp_path / "gemma", space.targets)
    engine = Hf().start(tmp_path / "gemma", "float32", matrices, space, seed=0)
    engine.apply([Commit(0, (0.3,))])
    write_peft(tmp_path / "out", engine.adapter(), space.rank, space.alpha, "gemma", space.targets)
    expected = logits(peft_model(tmp_path / "gemma", tmp_path / "out")).log_softmax(-1)
    tokens, last = TOKENS[0].numpy(), TOKENS.shape[1] - 1
    picked = [7, 9, 300]
    sequence = TokenSequence(tokens, np.full(3, last), np.array(picked), np.arange(3), 3)
    found = engine.score([(Probe(1, 0, 0.0), sequence)])[0]
    assert found == pytest.approx(expected[last, picked].double().numpy(), abs=1e-4)
    assert np.abs(found - engine.score_base([sequence])[0]).max() > 0.05


def test_the_files_of_a_peft_folder(tiny_models, tmp_path):
    space = Lora(rank=3, alpha=4.5, targets=("q_proj",))
    arrays, change = tiny_adapter(tiny_models["llama"], space)
    write_peft(tmp_path / "deep" / "out", arrays, space.rank, space.alpha, "org/name", space.targets)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out"]
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/name",
        "r": 3,
        "lora_alpha": 4.5,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": ["q_proj"],
    }
    stored = load_file(out / "adapter_model.safetensors")
    assert set(stored) == {f"base_model.model.{name}.{part}.weight" for name in change for part in ("lora_A", "lora_B")}
    for name, array in arrays.items():
        assert stored[f"base_model.model.{name}.weight"].tobytes() == array.tobytes()


def test_arrays_that_are_not_contiguous_are_written_right(tmp_path):
    array = normal(10, 3).T
    write_peft(tmp_path / "out", {"q.lora_A": array, "q.lora_B": normal(4, 3)}, 3, 3, "base")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (stored["base_model.model.q.lora_A.weight"] == array).all()


# merged checkpoints


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_merged_checkpoint_scores_the_same(tiny_models, tmp_path, architecture):
    """And it is a whole model: the other weights, the config and the tokenizer come along."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_models[architecture]
    _, change = tiny_adapter(folder, Lora(rank=3, alpha=4.5, targets=("q_proj", "layers.1.*")))
    base = load_matrices(folder, list(change), "float32")
    weights = {name: (base[name].double() + change[name]).float() for name in change}
    write_merged(tmp_path / "out", folder, weights)
    model, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), changed_model(folder, change)
    assert model.dtype == torch.float32
    found = dict(model.named_parameters())
    for name, parameter in changed_model(folder, {}).named_parameters():
        written = weights.get(name.removesuffix(".weight"), parameter)
        assert torch.equal(found.pop(name), written)
    assert not found
    assert (logits(model) - logits(expected)).abs().max() < 1e-4
    assert (logits(model) - logits(changed_model(folder, {}))).abs().max() > 0.1
    texts = ["the film is a wonderful thing", " great"]
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out")]
    assert tokenizers[0](texts).input_ids == tokenizers[1](texts).input_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_merged_checkpoint_has_the_dtype_of_its_weights(tiny_models, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    names = list(linear_matrices(tiny_models["llama"]))
    weights = load_matrices(tiny_models["llama"], names, str(dtype).removeprefix("torch."))
    weights[names[0]] += 1
    write_merged(tmp_path / "out", tiny_models["llama"], weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(model.get_parameter(f"{name}.weight"), weights[name]) for name in names)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


# folders appear whole or not at all


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small(value: float = 1.0) -> dict[str, np.ndarray]:
    return {"q_proj.lora_A": np.full((2, 4), value, np.float32), "q_proj.lora_B": np.full((3, 2), value, np.float32)}


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    write_peft(out, small(), 2, 2, "first")
    (out / "left-over.txt").write_text("of the first one")
    write_peft(out, small(2.0), 2, 2, "second")
    assert sorted(listing(tmp_path)) == ["out/adapter_config.json", "out/adapter_model.safetensors"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "second"
    assert (load_file(out / "adapter_model.safetensors")["base_model.model.q_proj.lora_A.weight"] == 2).all()


def test_an_error_leaves_nothing_behind_and_the_earlier_export_as_it_was(tmp_path):
    """Text has no place in a tensor file: the error comes after the config has been written."""
    bad = small() | {"q_proj.lora_A": np.array(["no", "number"])}
    with pytest.raises(SafetensorError):
        write_peft(tmp_path / "new" / "out", bad, 2, 2, "base")
    assert listing(tmp_path) == {}
    write_peft(tmp_path / "out", small(), 2, 2, "first")
    before = listing(tmp_path)
    with pytest.raises(SafetensorError):
        write_peft(tmp_path / "out", bad, 2, 2, "second")
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_merged_checkpoint_appears_whole_or_not_at_all(tiny_models, tmp_path):
    """Without a tokenizer the export fails, after the weights have been written."""
    source, name = tmp_path / "source", next(iter(linear_matrices(tiny_models["llama"])))
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_models["llama"] / file, source)
    weights = load_matrices(source, [name], "float32")
    out = tmp_path / "exports" / "out"
    with pytest.raises((OSError, ValueError)):
        write_merged(out, source, weights)
    assert list(out.parent.iterdir()) == []
    write_merged(out, tiny_models["llama"], weights)
    before = listing(out.parent)
    with pytest.raises((OSError, ValueError)):
        write_merged(out, source, weights)
    with pytest.raises(RuntimeError):
        write_merged(out, tiny_models["llama"], {name: weights[name][:3]})
    assert listing(out.parent) == before and [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "half.safetensors").write_bytes(b"torn")
    write_peft(tmp_path / "out", small(), 2, 2, "base")
    assert sorted(listing(tmp_path)) == ["out/adapter_config.json", "out/adapter_model.safetensors"]


def test_a_place_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't write to .*file/out: Not a directory\. Choose another folder"):
        write_peft(tmp_path / "file" / "out", small(), 2, 2, "base")
