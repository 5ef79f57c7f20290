"""The vLLM engine against the exact reference, on a tiny Llama and a tiny OPT, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoray.engines.hf import Hf
from zoray.engines.vllm import Vllm
from zoray.export import write_peft
from zoray.models import linear_matrices
from zoray.records import Commit, ConfigError, Probe, TokenSequence
from zoray.spaces import Lora

SLOTS, MAX_TOKENS = 3, 256
TOLERANCE = 1e-4  # of a log-probability, float32
COMMITS = (Commit(0, (0.03, -0.02)), Commit(1, (0.05, 0.0), decay=0.9))


def sequence(rng: np.random.Generator, length: int, answer: int) -> TokenSequence:
    """Random tokens: two single-token options (answer 0), or one answer of several tokens."""
    tokens = rng.integers(5, 500, length).astype(np.int32)
    if answer == 0:
        rows, outputs = np.full(2, length - 1, np.int32), np.arange(2, dtype=np.int32)
        return TokenSequence(tokens, rows, np.array([7, 9], np.int32), outputs, 2)
    rows = np.arange(length - answer, length, dtype=np.int32)
    targets = rng.integers(5, 500, answer).astype(np.int32)
    return TokenSequence(tokens, rows, targets, np.zeros(answer, np.int32), 1)


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [sequence(rng, int(length), i % 3) for i, length in enumerate(rng.integers(5, 60, 12))]


@pytest.fixture(scope="module", params=[("llama", "B"), ("llama", "AB"), ("opt", "B")], ids="-".join)
def engines(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> tuple[Any, Any]:
    """(vLLM engine, reference engine) with the same adapter state at journal index 2."""
    architecture, train = request.param
    folder = tiny_models[architecture]
    space, matrices = Lora(rank=2, alpha=4, train=train), linear_matrices(folder)
    vllm = Vllm(slots=SLOTS, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    assert vllm.digest() == reference.digest()
    for engine in (vllm, reference):
        engine.apply(COMMITS)
    return vllm, reference


def worst(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_self_test_has_measured_every_layer(engines):
    vllm, _ = engines
    assert 0 < vllm.self_test["adapter_error"] < 1e-4


def test_base_plus_and_minus_equal_the_reference(engines, sequences):
    vllm, reference = engines
    assert worst(vllm.score_base(sequences), reference.score_base(sequences)) < TOLERANCE
    for scale in (0.0, 0.05, -0.05):
        work = [(Probe(2, 0, scale), s) for s in sequences]
        assert worst(vllm.score(work), reference.score(work)) < TOLERANCE


def test_perturbations_are_far_larger_than_the_difference_of_engines(engines, sequences):
    vllm, _ = engines
    plus, minus = ([(Probe(2, 0, scale), s) for s in sequences] for scale in (0.05, -0.05))
    assert worst(vllm.score(plus), vllm.score(minus)) > 100 * TOLERANCE


def test_more_probes_than_slots_and_more_tokens_than_a_forward(engines, sequences):
    vllm, reference = engines
    probes = [Probe(2, k, scale) for k in range(3) for scale in (0.05, -0.05)]
    work = [(probe, s) for s in sequences for probe in probes]  # probes interleaved: order must not matter
    assert len(probes) > SLOTS and sum(len(s.tokens) for _, s in work) > 4 * MAX_TOKENS
    together = vllm.score(work)
    assert worst(together, reference.score(work)) < TOLERANCE
    alone = [vllm.score([item])[0] for item in work[:20]]
    assert worst(together[:20], alone) < TOLERANCE


def test_the_same_call_gives_the_same_bits(engines, sequences):
    vllm, _ = engines
    work = [(Probe(2, 0, 0.05), s) for s in sequences]
    assert all(np.array_equal(a, b) for a, b in zip(vllm.score(work), vllm.score(work), strict=True))


def test_states_agree_to_the_bit_and_know_their_step(engines):
    vllm, reference = engines
    assert vllm.digest() == reference.digest() and vllm.step() == reference.step() == 2
    a, b = vllm.adapter(), reference.adapter()
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_exported_adapter_loads_in_vllm_with_the_same_slots(engines, tmp_path):
    """vLLM's own loader, reading the PEFT folder, must fill a slot exactly as the engine does (alpha / rank once)."""
    from vllm.lora.request import LoRARequest

    vllm, _ = engines
    worker = vllm.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    scorer = worker._zoray
    write_peft(tmp_path / "adapter", vllm.adapter(), scorer.space, "base")
    assert vllm.llm.llm_engine.add_lora(LoRARequest("exported", 1, str(tmp_path / "adapter")))
    manager = scorer.manager
    manager.activate_adapter(1)
    slot = manager.lora_index_to_id.index(1)
    loaded = {name: (a[slot].clone(), b[slot].clone()) for name, (a, b) in scorer.sites.items()}
    scorer.write_slot(slot, Probe(2, 0, 0.0))
    rank = scorer.space.rank
    for name, (a, b) in scorer.sites.items():
        assert torch.equal(loaded[name][0][0, :rank], a[slot, 0, :rank]), name
        assert torch.equal(loaded[name][1][0, :, :rank], b[slot, 0, :, :rank]), name
        assert loaded[name][1].any()


def test_request_path_mapping_of_the_cpu_kernel(engines):
    """Tokens of several requests, in the scheduler's order: each must get its own adapter, -1 none."""
    from vllm.lora.layers import LoRAMapping

    vllm, _ = engines
    scorer = vllm.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._zoray
    probes = [Probe(2, slot, 0.5) for slot in range(SLOTS)]
    for slot, probe in enumerate(probes):
        scorer.write_slot(slot, probe)
    ids = [11, 11, 0, 12, 12, 11, 13]  # vLLM adapter ids; 0 is the base model
    scorer.wrapper.update_metadata(LoRAMapping(tuple(ids), (11, 12, 11, 13), True), [11, 12, 13], SLOTS + 1, 512)
    name, module = next(iter(scorer.manager.modules.items()))
    x = torch.randn(len(ids), module.lora_a_stacked[0].shape[3], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        scorer._map_tokens(((-1, 0, len(ids)),))
        bare = module(x)
        bare = bare[0] if isinstance(bare, tuple) else bare
    assert torch.equal(y[2], bare[2])
    for token, adapter in enumerate(ids):
        if adapter:
            state = scorer.state.perturbed(probes[adapter - 11])
            tensors = {n: (a, b) for n, a, b in scorer.state.tensors(state)}
            expected = scorer._expected(name, module, tensors, x[token : token + 1])[0]
            assert torch.allclose(y[token] - bare[token], expected, atol=1e-4)


def test_a_sequence_over_the_budget_is_refused(engines):
    vllm, _ = engines
    tokens = np.full(MAX_TOKENS + 1, 7, np.int32)
    last = np.array([MAX_TOKENS], np.int32)
    with pytest.raises(ConfigError, match="over the engine's budget"):
        vllm.score([(Probe(2, 0, 0.0), TokenSequence(tokens, last, last, np.zeros(1, np.int32), 1))])


def test_a_dead_adapter_fails_the_self_test(tiny_models, monkeypatch):
    """A LoRA kernel that does nothing, as when vLLM ignores an adapter, must not get past the start."""
    from zoray.engines.cpu_lora import SegmentedLora

    monkeypatch.setattr(SegmentedLora, "add_lora_linear", lambda self, *a, **k: None)
    folder = tiny_models["llama"]
    with pytest.raises(ConfigError, match="self-test failed"):
        Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(
            folder, "float32", linear_matrices(folder), Lora(rank=2, alpha=4), seed=0
        )


def test_targets_choose_the_matrices(tiny_models, sequences):
    """Training q and v only: vLLM still fuses them with k, whose part must stay as it is."""
    folder = tiny_models["llama"]
    space, matrices = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")), linear_matrices(folder)
    vllm = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=0)
    reference = Hf().start(folder, "float32", matrices, space, seed=0)
    assert {name.rpartition(".")[0].rsplit(".", 1)[-1] for name in vllm.adapter()} == {"q_proj", "v_proj"}
    work = [(Probe(0, 0, 0.1), s) for s in sequences]
    assert worst(vllm.score(work), reference.score(work)) < TOLERANCE
