"""Residual feedback: exact in the last block, the same from vLLM as from the reference, rebuilt from signs alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engines import sequence
from tiny import tiny_gemma3

from zoray.engines.feedback.lens import Products
from zoray.engines.feedback.residual import FAMILIES, family_of, norm_behind, reader_of
from zoray.engines.hf import Hf
from zoray.engines.packing import Plan, SequenceTable
from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators.feedback import Feedback, quantised
from zoray.methods.spaces import Lora
from zoray.methods.spaces.signs import guide, packed
from zoray.models.folder import linear_matrices
from zoray.records import Commit, ConfigError, JournalError, Probe, TokenSequence

SPACE = Lora(rank=2, alpha=4, targets="residual", train="AB")
CENTRE = Probe(2, 0, 0.0)
MODELS = ("llama", "opt", "qwen2", "gemma3")


def commit(step: int, numbers: int, matrices: int, **options: Any) -> Commit:
    bits = np.random.default_rng(step).integers(0, 2, numbers).astype(np.uint8)
    gains = tuple(float(np.float32(0.01 * (k + 1))) for k in range(matrices))
    return Commit(step, (), gains=gains, signs=np.packbits(bits).tobytes(), **options)


def folder_of(name: str, tiny_models: dict[str, Path], tmp_path_factory: Any) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("gemma3")) if name == "gemma3" else tiny_models[name]


@pytest.fixture(scope="module", params=MODELS)
def engines(request: Any, tiny_models: dict[str, Path], tmp_path_factory: Any) -> tuple[Any, Any]:
    """(vLLM, reference) with the same state at journal index 2, in which neither A nor B is as it began."""
    folder = folder_of(request.param, tiny_models, tmp_path_factory)
    matrices = linear_matrices(folder)
    vllm = Vllm(slots=1, max_tokens=2048, kv_cache_gib=0.25).start(folder, "float32", matrices, SPACE, seed=3)
    reference = Hf().start(folder, "float32", matrices, SPACE, seed=3)
    numbers, count = SPACE.trained(matrices), len(SPACE.select(matrices))
    for engine in (vllm, reference):
        engine.apply([commit(0, numbers, count), commit(1, numbers, count, momentum=0.5, rate=-1.0)])
    assert vllm.digest() == reference.digest()
    return vllm, reference


@pytest.fixture(scope="module")
def plan() -> Plan:
    rng = np.random.default_rng(0)
    return Plan.of([(CENTRE, sequence(rng, int(length), i % 3)) for i, length in enumerate(rng.integers(5, 60, 12))])


def slopes(values: np.ndarray) -> np.ndarray:
    """Of no pattern, so that the softmax of every row counts."""
    return np.sin(1.0 + np.arange(len(values)))


def cosine(a: torch.Tensor, b: np.ndarray) -> float:
    other = torch.from_numpy(b)
    return float((a * other).sum() / (a.norm() * other.norm()))


def relative(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert list(found) == list(expected)
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in found)


def true_gradients(reference: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """By autograd through the whole model."""
    factors = {
        name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, a, b in reference.state.factors(CENTRE)
    }
    reference._active = factors
    loss, first = torch.zeros(()), plan.first_output
    weights = torch.from_numpy(slopes(np.zeros(first[-1])))
    for i, number in enumerate(plan.chosen.tolist()):
        one = plan.table[number]
        logps = reference.model(input_ids=torch.from_numpy(one.tokens)[None]).logits[0].log_softmax(-1)
        picked = logps[torch.from_numpy(one.rows), torch.from_numpy(one.targets)]
        loss = loss + (picked * weights[first[i] : first[i + 1]][torch.from_numpy(one.outputs)]).sum()
    flat = [tensor for pair in factors.values() for tensor in pair]
    found = iter(torch.autograd.grad(loss, flat))
    reference._active = {}
    return {f"{name}.lora_{part}": next(found).detach() for name in factors for part in "AB"}


def test_the_last_block_has_its_exact_gradient_and_vllm_agrees(engines, plan):
    vllm, reference = engines
    sums, feedback = reference.feedback(plan, slopes)
    found, own = vllm.feedback(plan, slopes)
    assert np.abs(found - sums).max() < 1e-4 and relative(own, feedback) < 1e-3
    assert list(feedback) == list(reference.state.layout.shapes)
    truth = true_gradients(reference, plan)
    last = list(reference.state.matrices)[-1]
    for part in ("lora_A", "lora_B"):
        exact = truth[f"{last}.{part}"].numpy()
        assert np.abs(feedback[f"{last}.{part}"] - exact).max() < 1e-4 * np.abs(exact).max()
    others = [cosine(truth[name], feedback[name]) for name in truth if name.endswith("lora_B") and last not in name]
    assert all(value < 0.999 for value in others)  # of the blocks before, it is an estimate


def test_the_maps_are_the_same_from_both_engines_and_the_last_block_has_none(engines, plan):
    vllm, reference = engines
    rng = np.random.default_rng(5)
    rows, zeros = np.arange(4, 60, dtype=np.int32), np.zeros(56, np.int32)
    some = [TokenSequence(rng.integers(5, 500, 60).astype(np.int32), rows, zeros, zeros, 1) for _ in range(30)]
    _, before = reference.feedback(plan, slopes)
    for engine in engines:
        engine.fit_lens(SequenceTable.of(some), 64)
    _, expected = reference.feedback(plan, slopes)
    _, found = vllm.feedback(plan, slopes)
    assert relative(found, expected) < 5e-3
    last = list(reference.state.matrices)[-1]
    assert all(np.array_equal(before[name], expected[name]) == (last in name) for name in before)
    for engine in engines:
        engine.fit_lens(SequenceTable.of(some), 0)
    assert relative(reference.feedback(plan, slopes)[1], before) == 0


def test_a_map_is_the_mean_jacobian_of_what_lies_between():
    """Of h + tanh(h W) for normally distributed h of any covariance, by Stein's lemma, within a few percent."""
    generator = torch.Generator().manual_seed(0)
    mixing, w = (
        torch.eye(12) + torch.randn(12, 12, generator=generator) / 8,
        torch.randn(12, 12, generator=generator) / 4,
    )
    h = torch.randn(200_000, 12, generator=generator) @ mixing + 0.3
    products = Products()
    for part in h.split(50_000):
        products.add(part, part + torch.tanh(part @ w) + 5.0)
    jacobian = torch.eye(12) + w * (1 - torch.tanh(h @ w) ** 2).mean(0)
    gradient = torch.randn(30, 12, generator=generator)
    expected = gradient @ jacobian.t()
    found = products.fit(12).back(gradient)
    assert (
        float((found - expected).norm() / expected.norm()) < 0.1 < float((gradient - expected).norm() / expected.norm())
    )
    few = products.fit(4).back(gradient)
    assert float((found - expected).norm()) < float((few - expected).norm()) < float((gradient - expected).norm())


def test_the_bare_model_gives_sums_and_no_feedback(engines, plan):
    vllm, reference = engines
    one = plan.table[int(plan.chosen[0])]
    both = Plan.of([(None, one), (CENTRE, one)])

    def only_bare(values: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(values)) < len(values) // 2, 1.0, 0.0)

    for engine in (vllm, reference):
        sums, feedback = engine.feedback(both, only_bare)
        assert sums[: len(sums) // 2] == pytest.approx(engine.score_base([one])[0], abs=1e-4)
        assert all(not values.any() for values in feedback.values())


def test_other_probes_are_refused(engines, plan):
    one = plan.table[0]
    for engine in engines:
        with pytest.raises(ConfigError, match="expected a plan of one probe of scale 0"):
            engine.feedback(Plan.of([(Probe(2, 0, 0.1), one)]), slopes)


def test_matrices_that_do_not_write_to_the_stream_and_other_families_are_refused(tiny_models, tmp_path):
    with pytest.raises(ConfigError, match="got q_proj, up_proj as well"):
        family_of(tiny_models["llama"], ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    from transformers import GPT2Config

    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is of gpt2"):
        family_of(tmp_path)


def test_norms_of_a_family():
    gemma, llama = FAMILIES["gemma3_text"], FAMILIES["llama"]
    assert norm_behind(gemma, "model.layers.3.mlp.down_proj") == "model.layers.3.post_feedforward_layernorm"
    assert norm_behind(llama, "model.layers.3.mlp.down_proj") is None
    assert reader_of(llama, "model.layers.3.self_attn.o_proj", 5) == "model.layers.3.post_attention_layernorm"
    assert reader_of(llama, "model.layers.3.mlp.down_proj", 5) == "model.layers.4.input_layernorm"
    assert reader_of(llama, "model.layers.4.mlp.down_proj", 5) == "model.norm"


def test_targets_that_write_to_the_stream_from_a_share_of_the_layers_on():
    names = [
        f"model.layers.{k}.{leaf}"
        for k in range(6)
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    matrices = {name: (4, 4) for name in names}
    assert list(Lora(targets="residual").select(matrices)) == [name for name in names if "q_proj" not in name]
    chosen = Lora(targets="residual:0.5").select(matrices)
    assert {name.split(".")[2] for name in chosen} == {"3", "4", "5"} and len(chosen) == 6
    for wrong in ("residual:1", "residual:x", "residual:-0.5"):
        with pytest.raises(ConfigError, match="SHARE"):
            Lora(targets=wrong).select(matrices)
    with pytest.raises(ConfigError, match="o_proj"):
        Lora(targets="residual").select({"model.layers.0.q_proj": (4, 4)})


def test_signs_are_a_bit_each_and_what_has_none_stays():
    matrices = {"model.layers.0.o_proj": (5, 3), "model.layers.1.o_proj": (2, 7)}
    state = Lora(rank=2, train="AB").open(matrices, 0)
    numbers = state.layout.numel
    feedback = np.array([(-1) ** k * (k % 3) for k in range(numbers)])
    signs = packed(feedback, 0)
    assert len(signs) == -(-numbers // 8)
    gains = (0.5, 2.0)
    flat = guide(state.layout, signs, gains)
    found, begin = np.zeros(numbers), 0
    for name, shape in state.layout.shapes.items():
        found[begin : begin + int(np.prod(shape))] = state.layout.view(flat, name).flatten()
        begin += int(np.prod(shape))
        assert set(np.unique(state.layout.view(flat, name).abs())) == {gains[int(name.split(".")[2])]}
    assert np.all(np.sign(found)[feedback != 0] == np.sign(feedback)[feedback != 0])
    other = guide(state.layout, packed(feedback, 1), gains).numpy()
    assert np.count_nonzero(flat.numpy()) == numbers  # nothing in the padding
    assert (flat.numpy() + other == 0).sum() - (state.layout.size - numbers) == np.sum(feedback == 0)  # in turn
    for wrong in ((signs[:-1], gains), (signs, gains[:1])):
        with pytest.raises(JournalError, match="gains"):
            guide(state.layout, *wrong)


def test_the_state_moves_by_the_mean_of_signs():
    matrices = {"model.layers.0.o_proj": (4, 8)}
    state = Lora(rank=2, train="AB").open(matrices, 0)
    x, m = state.flat.clone(), torch.zeros_like(state.flat)
    for step in range(3):
        one = commit(step, state.layout.numel, 1, momentum=0.75, rate=-0.25)
        state.apply(one)
        m = m * 0.75 + guide(state.layout, one.signs, one.gains)
        x = x + m * -0.25
    assert torch.equal(state.flat, x) and torch.equal(state.momentum, m)


def test_a_commit_travels_in_a_bit_a_number():
    one = commit(3, 80_000, 40)
    assert pickle.loads(pickle.dumps(one)) == one
    assert len(pickle.dumps(one)) < 80_000 / 8 + 1024
    with pytest.raises(ValueError, match="gains and signs, or neither"):
        Commit(0, (), gains=(1.0,))


def test_whole_numbers_do_not_know_scales():
    rng = np.random.default_rng(0)
    values = {
        "a": rng.normal(size=(30, 4)).astype(np.float32),
        "b": rng.normal(size=50).astype(np.float32),
        "c": np.zeros(3),
    }
    found = quantised(values, 127, 1.0)
    assert found.dtype == np.int8 and len(found) == 173 and np.abs(found).max() <= 127 and not found[-3:].any()
    louder = {name: 1e-20 * part if name == "a" else 1e6 * part for name, part in values.items()}
    assert np.array_equal(quantised(louder, 127, 1.0), found)
    assert np.abs(quantised(values, 127, 0.1)).max() <= 0.1 * 127
    assert set(np.abs(quantised({"a": np.array([0.01, 2.0, 99.0] + [2.0] * 50)}, 3, 1.0))) == {0, 3}
    assert not quantised({"a": np.array([np.nan, 1.0])}, 127, 1.0).any()


def test_the_estimator_asks_for_the_centre_once():
    estimator = Feedback()
    assert estimator.ask(4) == (Probe(4, 0, 0.0),) and estimator.directions == 0
    assert estimator.tell(estimator.ask(0), [(0.5,)]).loss == 0.5
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        estimator.tell(estimator.ask(0), [(float("nan"),)])
    with pytest.raises(ConfigError, match="of at least 0"):
        Feedback(lens=-1)
