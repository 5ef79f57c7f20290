"""vLLM against the exact reference, in every space, on a tiny Llama and a tiny OPT, in float32 on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zoray.engines.hf import Hf, HfEngine
from zoray.engines.vllm.engine import Vllm
from zoray.engines.vllm.worker import PackedScorer
from zoray.methods.spaces import Lora, LowRank, Lozo, Space
from zoray.models.adapters import write_peft
from zoray.models.folder import linear_matrices, load_matrices
from zoray.records import Commit, ConfigError, Probe, TokenSequence

SLOTS, MAX_TOKENS = 3, 256
TOLERANCE = 1e-4  # of a log-probability, float32
COMMITS = (Commit(0, (0.03, -0.02)), Commit(1, (0.05, 0.0), decay=0.9))
FOLDED = (  # for an interval of 2: two folds, and one step that waits for the next
    *(Commit(0, (0.01, -0.005)), Commit(1, (0.008, 0.0), decay=0.95)),
    *(Commit(2, (-0.012, 0.004)), Commit(3, (0.0, 0.006)), Commit(4, (0.005, 0.009))),
)
WITH_MOMENTUM = tuple(
    Commit(step, (0.1 + 0.02 * step, -0.05), momentum=0.75, rate=-0.05, decay=0.99 if step == 2 else 1.0)
    for step in range(5)
)


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


EVERYTHING = ("all-linear", "lm_head", "embed_tokens")
ENGINES = {  # the tiny OPT has one weight for its embedding and its LM head
    "llama-B": ("llama", "B", "all-linear"),
    "llama-AB-everything": ("llama", "AB", EVERYTHING),
    "opt-B-everything": ("opt", "B", EVERYTHING),
}


@pytest.fixture(scope="module", params=ENGINES)
def engines(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> tuple[Any, Any]:
    """(vLLM engine, reference engine) with the same adapter state at journal index 2."""
    architecture, train, targets = ENGINES[request.param]
    folder = tiny_models[architecture]
    space, matrices = Lora(rank=2, alpha=4, train=train, targets=targets), linear_matrices(folder, targets)
    vllm = Vllm(slots=SLOTS, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    assert vllm.digest() == reference.digest()
    for engine in (vllm, reference):
        engine.apply(COMMITS)
    return vllm, reference


def worst(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_self_test_has_measured_every_layer(engines):
    vllm, reference = engines
    assert 0 < vllm.self_test["adapter_error"] < 1e-4
    llama = "Llama" in vllm.llm.model_config.architectures[0]  # whose MLP is gated
    assert ("activation_error" in vllm.self_test) == llama and vllm.self_test.get("activation_error", 0) < 1e-4
    assert "fold_error" not in vllm.self_test  # lora writes no base weight
    assert reference.self_test == {}  # it is the reference
    assert vllm.dtype == reference.dtype == "float32"


def test_base_plus_and_minus_equal_the_reference(engines, sequences):
    vllm, reference = engines
    assert worst(vllm.score_base(sequences), reference.score_base(sequences)) < TOLERANCE
    for scale in (0.0, 0.05, -0.05):
        work = [(Probe(2, 0, scale), s) for s in sequences]
        assert worst(vllm.score(work), reference.score(work)) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2"])
def test_an_engine_without_adapters_scores_the_bare_model_alone(architecture, tiny_models, sequences):
    folder = tiny_models[architecture]
    bare = Vllm(max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start_bare(folder, "float32")
    assert bare.dtype == "float32" and bare.llm.llm_engine.vllm_config.lora_config is None
    reference = Hf().start(folder, "float32", linear_matrices(folder), Lora(), seed=0)
    assert worst(bare.score_base(sequences), reference.score_base(sequences)) < TOLERANCE
    with pytest.raises(ConfigError, match="expected a plan of the bare model; got one with 1 probes"):
        bare.score([(Probe(0, 0, 0.0), sequences[0])])


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


def test_what_options_and_examples_begin_with_is_computed_once(engines, monkeypatch):
    """Two options of two and four tokens behind prompts of 40 and 70 tokens, which have 35 in common."""
    vllm, reference = engines
    rng, work = np.random.default_rng(4), []
    template = rng.integers(5, 500, 35)
    for length in (40, 70):
        prompt = np.concatenate([template, rng.integers(5, 500, length - 35)])
        for answer in (2, 4):
            tokens = np.concatenate([prompt, rng.integers(5, 500, answer)]).astype(np.int32)
            rows = np.arange(length - 1, length + answer - 1, dtype=np.int32)
            option = TokenSequence(tokens[:-1], rows, tokens[rows + 1], np.zeros(answer, np.int32), 1)
            work.append((Probe(2, 0, 0.05), option))
    forwards, forward = [], PackedScorer._forward
    monkeypatch.setattr(PackedScorer, "_forward", lambda self, pack: forwards.append(pack) or forward(self, pack))
    scorer = vllm.llm.llm_engine.model_executor.driver_worker.worker._zoray
    together = vllm.score(work)
    (packed,) = forwards
    assert scorer.block_size == 32
    whole, shared = sum(len(s.tokens) for _, s in work), 3 * 32 + 32  # the template's block; the long ones' second
    assert len(packed.tokens) == whole - shared and packed.context.tolist() == [0, 32, 32, 64]
    assert worst(together, reference.score(work)) < TOLERANCE
    monkeypatch.setattr(scorer, "share", False)
    assert worst(together, vllm.score(work)) < TOLERANCE
    assert len(forwards[-1].tokens) == whole
    monkeypatch.setattr(scorer, "share", True)
    both = [(Probe(2, 0, scale), one) for scale in (0.05, -0.05) for _, one in work]
    assert worst(vllm.score(both), reference.score(both)) < TOLERANCE  # plus and minus share nothing


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2"])
def test_the_request_path_gives_the_same_numbers(architecture, tiny_models):
    """Options of one token and of several, the bare model, more probes than slots; and back to the packed path."""
    folder, space = tiny_models[architecture], Lora(rank=2, alpha=4, train="AB")
    matrices, rng = linear_matrices(folder), np.random.default_rng(1)
    vllm = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    for engine in (vllm, reference):
        engine.apply(COMMITS)
    sequences = [sequence(rng, length, answer) for answer in range(4) for length in (7, 30)]
    for one in sequences:
        if len(one.rows) > 1 and one.n_outputs == 1:  # an answer of several tokens is the text's continuation
            one.targets[:-1] = one.tokens[one.rows[:-1] + 1]
    probes = [None, *(Probe(2, k, scale) for k in range(2) for scale in (0.0, 0.05, -0.05))]
    work = [(probe, one) for one in sequences for probe in probes]
    expected, direct = reference.score(work), vllm.score(work)
    assert worst(direct, expected) < TOLERANCE
    vllm.scoring = "request"
    assert worst(vllm.score(work), expected) < TOLERANCE
    vllm.scoring = "direct"
    assert worst(vllm.score(work), direct) == 0.0
    with_other_targets = sequence(rng, 9, 3)
    vllm.scoring = "request"
    with pytest.raises(ConfigError, match="can't score targets that are not the text's own continuation"):
        vllm.score([(None, with_other_targets)])


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
    write_peft(tmp_path / "adapter", vllm.adapter(), scorer.space.rank, scorer.space.alpha, "base")
    request = LoRARequest("exported", 1, str(tmp_path / "adapter"))
    if "model.decoder.embed_tokens" in scorer.contents.sites:  # vLLM's loader takes no embedding or head for an OPT
        with pytest.raises(ValueError, match="expected target modules"):
            vllm.llm.llm_engine.add_lora(request)
        return
    assert vllm.llm.llm_engine.add_lora(request)
    manager = scorer.manager
    manager.activate_adapter(1)
    slot = manager.lora_index_to_id.index(1)
    loaded = {name: (a[slot].clone(), b[slot].clone()) for name, (a, b, *_) in scorer.contents.sites.items()}
    scorer.contents.write(scorer.state, [Probe(2, 0, 0.0)], slot)
    rank = scorer.space.rank
    for name, (a, b, *_) in scorer.contents.sites.items():
        assert torch.equal(loaded[name][0][0, :rank], a[slot, 0, :rank]), name
        assert torch.equal(loaded[name][1][0, :, :rank], b[slot, 0, :, :rank]), name
        assert loaded[name][1].any()


class Packed(torch.nn.Module):
    """A linear layer without `weight`, as quantised ones are."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.qweight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.t()


def test_the_reference_engine_adapts_layers_that_have_no_weight(tiny_models, sequences):
    folder, space = tiny_models["llama"], Lora(rank=2)
    plain = Hf().start(folder, "float32", linear_matrices(folder), space, seed=3)
    packed = Hf().start(folder, "float32", linear_matrices(folder), space, seed=3).model
    for name in linear_matrices(folder):
        parent, _, leaf = name.rpartition(".")
        setattr(packed.get_submodule(parent), leaf, Packed(packed.get_submodule(name)))
    other = HfEngine(packed, space, linear_matrices(folder), 3)
    work = [(Probe(0, 0, 0.1), one) for one in sequences[:3]]
    assert worst(plain.score(work), other.score(work)) < 1e-5
    assert worst(other.score(work), other.score_base(sequences[:3])) > 1e-2


def test_request_path_mapping_of_the_cpu_kernel(engines):
    """Tokens of several requests, in the scheduler's order: each must get its own adapter, -1 none."""
    from vllm.lora.layers import LoRAMapping

    from zoray.engines.layers.vllm_layers import gives_logits, slots_of, takes_tokens
    from zoray.engines.vllm import selftest

    vllm, _ = engines
    scorer = vllm.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._zoray
    probes = [Probe(2, slot, 0.5) for slot in range(SLOTS)]
    scorer.write_all(probes)
    ids = [11, 11, 0, 12, 12, 11, 13]  # vLLM adapter ids; 0 is the base model
    kinds = {(takes_tokens(m), gives_logits(m)): (name, m) for name, m in scorer.manager.modules.items()}
    assert len(kinds) == (3 if scorer.space.targets == EVERYTHING else 1)
    for name, module in kinds.values():
        rows = [11, 12, 11, 13] if gives_logits(module) else ids
        width = slots_of(module)[0][0].shape[3]
        x = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(0))
        if takes_tokens(module):
            x = torch.tensor([4, 4, 4, 4, 300, 300, 300])
        with torch.inference_mode():
            scorer.wrapper.update_metadata(LoRAMapping(tuple(ids), (11, 12, 11, 13), True), [11, 12, 13], 4, 512)
            y = selftest._output(scorer, name, x)
            scorer.map_slots(((-1, 0, len(ids)),), [-1] * len(rows))
            bare = selftest._output(scorer, name, x)
        inputs = selftest._as_rows(x, module)
        for row, adapter in enumerate(rows):
            if not adapter:
                assert torch.equal(y[row], bare[row])
                continue
            state = scorer.state.perturbed(probes[adapter - 11])
            tensors = {n: (a, b) for n, a, b in scorer.state.tensors(state)}
            expected = selftest._expected(scorer, name, tensors, inputs[row : row + 1])[0]
            assert expected.any() and torch.allclose(y[row] - bare[row], expected, atol=1e-4)


def test_a_sequence_over_the_budget_is_refused(engines):
    vllm, _ = engines
    tokens = np.full(MAX_TOKENS + 1, 7, np.int32)
    last = np.array([MAX_TOKENS], np.int32)
    with pytest.raises(ConfigError, match="over the engine's budget"):
        vllm.score([(Probe(2, 0, 0.0), TokenSequence(tokens, last, last, np.zeros(1, np.int32), 1))])


@pytest.mark.parametrize(
    ("kernel", "targets"),
    [("add_lora_linear", "all-linear"), ("add_lora_embedding", "embed_tokens"), ("add_lora_logits", "lm_head")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dead_adapter_fails_the_self_test(tiny_models, monkeypatch, kernel, targets, dtype):
    """A LoRA kernel that does nothing, as when vLLM ignores an adapter, must not get past the start."""
    from zoray.engines.layers.lora_cpu import SegmentedLora

    monkeypatch.setattr(SegmentedLora, kernel, lambda self, *a, **k: None)
    folder = tiny_models["llama"]
    with pytest.raises(ConfigError, match="self-test failed"):
        Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(
            folder, dtype, linear_matrices(folder, targets), Lora(rank=2, alpha=4, targets=targets), seed=0
        )


@pytest.mark.parametrize("space", [Lora(rank=2, alpha=4), Lozo(rank=2)], ids=lambda s: type(s).__name__)
def test_outputs_far_larger_than_an_adapters_do_not_fail_the_self_test_in_16_bits(space, tiny_models, tmp_path):
    """As those of some layers of trained models: their rounding alone is a tenth of what an adapter adds."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_models["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 200
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(
        folder, "bfloat16", linear_matrices(folder), space, seed=0
    )
    assert engine.self_test["adapter_error"] < 0.1 and engine.self_test.get("fold_error", 0.0) < 0.1


def test_every_slot_must_fit_the_check_at_the_start():
    with pytest.raises(ConfigError, match=r"max_tokens of at least 3 x engine\.slots, .*; got 64 and 32"):
        Vllm(slots=32, max_tokens=64)


def test_targets_choose_the_matrices(tiny_models, sequences):
    """Training q and v only: vLLM still fuses them with k, whose part must stay as it is."""
    folder = tiny_models["llama"]
    space, matrices = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")), linear_matrices(folder)
    vllm = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=0)
    reference = Hf().start(folder, "float32", matrices, space, seed=0)
    assert {name.rpartition(".")[0].rsplit(".", 1)[-1] for name in vllm.adapter()} == {"q_proj", "v_proj"}
    work = [(Probe(0, 0, 0.1), s) for s in sequences]
    assert worst(vllm.score(work), reference.score(work)) < TOLERANCE


def test_targets_may_be_patterns_and_choose_what_is_folded(tiny_models, sequences):
    """All of layer 0, and of layer 1 two parts of fused modules; each step is folded at once."""
    folder, matrices = tiny_models["llama"], linear_matrices(tiny_models["llama"])
    space = Lozo(rank=2, interval=1, targets=("layers.0.*", "layers.1.*.[qv]_proj", "layers.1.mlp.up_proj"))
    vllm = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=0)
    reference = Hf().start(folder, "float32", matrices, space, seed=0)
    in_layer_1 = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    expected = {n for n in matrices if ".layers.0." in n} | {f"model.layers.1.{part}" for part in in_layer_1}
    assert {name.rpartition(".")[0] for name in vllm.adapter()} == expected and len(expected) == 10
    bare = reference.score_base(sequences)
    for engine in (vllm, reference):
        engine.apply(FOLDED)
    assert vllm.digest() == reference.digest()
    for scale in (0.0, 0.02, -0.02):
        work = [(Probe(5, 0, scale), s) for s in sequences]
        assert worst(vllm.score(work), reference.score(work)) < TOLERANCE
    assert worst(vllm.score_base(sequences), reference.score_base(sequences)) < TOLERANCE
    assert worst(vllm.score_base(sequences), bare) > 100 * TOLERANCE
    untouched = [n for n in matrices if n not in expected]
    original, folded = load_matrices(folder, matrices, "float32"), reference.model
    assert len(untouched) == 4
    for name in matrices:
        assert torch.equal(folded.get_submodule(name).weight, original[name]) == (name in untouched), name


# reset, and the spaces that fold


def test_reset_takes_an_adapter_back_to_its_start(engines, sequences):
    vllm, _ = engines
    before = vllm.digest()
    scores = vllm.score([(Probe(2, 0, 0.05), s) for s in sequences])
    for engine in engines:
        engine.reset()
        assert engine.step() == 0 and engine.digest() != before
        assert not any(value.any() for name, value in engine.adapter().items() if name.endswith("lora_B"))
        centre = engine.score([(Probe(0, 0, 0.0), s) for s in sequences])
        assert worst(centre, engine.score_base(sequences)) == 0.0  # a zero adapter changes no bit
        engine.apply(COMMITS)
        assert engine.digest() == before
    assert worst(scores, vllm.score([(Probe(2, 0, 0.05), s) for s in sequences])) == 0.0  # no slot is stale


@dataclass(frozen=True)
class Folding:
    """Two engines of a folding space at journal index 0, and what they were then."""

    space: Space
    vllm: Any
    reference: Any
    digest: str
    bare: list[np.ndarray]

    def advance(self, commits: tuple[Commit, ...]) -> None:
        """The state after the commits, from the start."""
        for engine in (self.vllm, self.reference):
            engine.reset()
            engine.apply(commits)
            assert engine.step() == len(commits)


FOLDING = {"lozo": Lozo(rank=2, interval=2), "lowrank": LowRank(rank=3)}


@pytest.fixture(scope="module", params=[(a, s) for a in ("llama", "opt") for s in FOLDING], ids="-".join)
def folding(request: pytest.FixtureRequest, tiny_models: dict[str, Path], sequences: list[TokenSequence]) -> Folding:
    architecture, name = request.param
    folder, space = tiny_models[architecture], FOLDING[name]
    matrices = linear_matrices(folder)
    vllm = Vllm(slots=SLOTS, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "float32", matrices, space, seed=3)
    reference = Hf().start(folder, "float32", matrices, space, seed=3)
    assert vllm.digest() == reference.digest() and vllm.step() == reference.step() == 0
    return Folding(space, vllm, reference, vllm.digest(), reference.score_base(sequences))


def at(index: int, scale: float, sequences: list[TokenSequence]) -> list[tuple[Probe, TokenSequence]]:
    return [(Probe(5, index, scale), s) for s in sequences]


def test_the_start_of_a_folding_space_is_the_bare_model(folding, sequences):
    """Also after the self-test, which wrote into the base weights and put them back."""
    folding.advance(())
    assert worst(folding.vllm.score_base(sequences), folding.bare) < TOLERANCE
    for engine in (folding.vllm, folding.reference):
        centre = engine.score([(Probe(0, 0, 0.0), s) for s in sequences])
        assert worst(centre, engine.score_base(sequences)) == 0.0


def test_base_weights_are_proved_to_be_live(folding):
    gated = {"activation_error"} & set(folding.vllm.self_test)  # a Llama's MLP
    assert set(folding.vllm.self_test) == {"adapter_error", "fold_error"} | gated and folding.reference.self_test == {}
    assert all(0 < error < 1e-4 for error in folding.vllm.self_test.values())
    assert folding.vllm.dtype == folding.reference.dtype == "float32"


def test_folded_states_agree_to_the_bit_and_their_scores_up_to_float32(folding, sequences):
    folding.advance(FOLDED)
    vllm, reference = folding.vllm, folding.reference
    assert vllm.digest() == reference.digest() != folding.digest
    for index in range(2):
        for scale in (0.0, 0.02, -0.02):
            work = at(index, scale, sequences)
            assert worst(vllm.score(work), reference.score(work)) < TOLERANCE
    folded = vllm.score_base(sequences)  # the base alone: without what waits for the next fold
    assert worst(folded, reference.score_base(sequences)) < TOLERANCE
    waits = isinstance(folding.space, Lozo)
    assert (worst(folded, vllm.score(at(0, 0.0, sequences))) > 10 * TOLERANCE) == waits
    plus, minus = (vllm.score(at(0, scale, sequences)) for scale in (0.02, -0.02))
    for others in (folding.bare, plus, minus):  # differences that a tolerance could hide are far larger
        assert worst(vllm.score(at(0, 0.0, sequences)), others) > 100 * TOLERANCE


def test_more_probes_than_slots_in_a_folding_space(folding, sequences):
    """Slots are reused within a call, and V is written again where it must be."""
    folding.advance(FOLDED)
    probes = [Probe(5, k, scale) for k in range(3) for scale in (0.02, -0.02)]
    work = [(probe, s) for s in sequences for probe in probes]
    assert len(probes) > SLOTS
    assert worst(folding.vllm.score(work), folding.reference.score(work)) < TOLERANCE


def test_reset_puts_the_base_weights_back(folding, sequences):
    vllm, reference = folding.vllm, folding.reference
    folding.advance(FOLDED)
    after, scores = vllm.digest(), vllm.score(at(0, 0.02, sequences))
    for engine in (vllm, reference):
        engine.reset()
        assert engine.step() == 0 and engine.digest() == folding.digest
        start = [(Probe(0, 0, 0.0), s) for s in sequences]
        assert worst(engine.score(start), folding.bare) < (TOLERANCE if engine is vllm else 1e-300)
        assert worst(engine.score_base(sequences), folding.bare) < (TOLERANCE if engine is vllm else 1e-300)
    folding.advance(FOLDED)
    assert vllm.digest() == reference.digest() == after
    assert worst(vllm.score(at(0, 0.02, sequences)), scores) == 0.0  # no slot is stale


def test_one_commit_at_a_time_is_the_same_as_all_at_once(folding, sequences):
    """With scoring in between, as in a run, so that slots and cached directions are in use."""
    folding.advance(FOLDED)
    expected = folding.vllm.digest()
    folding.vllm.reset()
    for commit in FOLDED:
        probes = [Probe(commit.step, k, scale) for k in range(2) for scale in (0.02, -0.02)]
        folding.vllm.score([(probe, sequences[0]) for probe in probes])
        folding.vllm.apply([commit])
    assert folding.vllm.digest() == expected
    assert (
        worst(folding.vllm.score(at(1, 0.02, sequences)), folding.reference.score(at(1, 0.02, sequences))) < TOLERANCE
    )


def test_momentum_in_a_folding_space(folding, sequences):
    """LoZO-M carries the buffer over to the next V; lowrank has none, whose buffer would be as large as the model."""
    if isinstance(folding.space, LowRank):
        folding.reference.reset()
        with pytest.raises(ConfigError, match="lowrank has no momentum"):
            folding.reference.apply(WITH_MOMENTUM)
        return
    folding.advance(WITH_MOMENTUM)
    vllm, reference = folding.vllm, folding.reference
    assert vllm.digest() == reference.digest()
    for scale in (0.0, 0.02, -0.02):
        work = at(0, scale, sequences)
        assert worst(vllm.score(work), reference.score(work)) < TOLERANCE
    assert worst(vllm.score(at(0, 0.0, sequences)), folding.bare) > 100 * TOLERANCE
    after = vllm.digest()
    folding.advance(tuple(Commit(c.step, c.coefficients, c.decay) for c in WITH_MOMENTUM))
    assert vllm.digest() == reference.digest() != after
    folding.advance(WITH_MOMENTUM)  # reset has cleared the buffer
    assert vllm.digest() == reference.digest() == after


def test_16_bit_weights_are_folded_to_the_same_bits(tiny_models, sequences):
    """Rounded once a fold, stochastically: in vLLM's fused tensors, in the reference, and after a reset."""
    folder, matrices = tiny_models["llama"], linear_matrices(tiny_models["llama"])
    space = Lozo(rank=2, interval=2, fold_rounding="stochastic", keep_base=True)
    vllm = Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(folder, "bfloat16", matrices, space, seed=3)
    reference = Hf().start(folder, "bfloat16", matrices, space, seed=3)
    assert vllm.dtype == reference.dtype == "bfloat16" and 0 < vllm.self_test["fold_error"] < 0.1
    initial = vllm.digest()
    for commits in (FOLDED, tuple(Commit(c.step, c.coefficients, anchor=0.9) for c in FOLDED)):
        for engine in (vllm, reference):
            engine.apply(commits)
        assert vllm.digest() == reference.digest() != initial
        for engine in (vllm, reference):
            engine.reset()
        assert vllm.digest() == reference.digest() == initial


@contextmanager
def computing_with_a_copy() -> Iterator[None]:
    """A backend that leaves the weights where they are, and computes with a copy of its own."""
    from vllm.model_executor.layers import utils

    def copy(layer: Any, remove_weight: bool) -> None:
        kept = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, kept, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", copy)
        yield


@pytest.mark.parametrize(
    ("loading", "says"),
    [(nullcontext, "has no plain weight .* Take space=lora"), (computing_with_a_copy, "folding self-test failed: .*")],
    ids=["packed", "copied"],
)
def test_base_weights_that_are_not_what_vllm_computes_with_fail_at_the_start(loading, says, tiny_models, monkeypatch):
    """As vLLM's CPU backend has them by default, and as another might: a fold would change nothing."""
    monkeypatch.setattr("zoray.engines.vllm.engine.plain_cpu_weights", loading)
    folder = tiny_models["llama"]
    with pytest.raises(ConfigError, match=says):
        Vllm(slots=2, max_tokens=MAX_TOKENS, kv_cache_gib=0.25).start(
            folder, "float32", linear_matrices(folder), Lozo(), seed=0
        )


@pytest.mark.parametrize("name", FOLDING)
def test_the_reference_in_float64_is_close_and_vllm_has_none(name, tiny_models, sequences):
    folder, matrices = tiny_models["llama"], linear_matrices(tiny_models["llama"])
    narrow, wide = (Hf().start(folder, dtype, matrices, FOLDING[name], seed=3) for dtype in ("float32", "float64"))
    assert (narrow.dtype, wide.dtype) == ("float32", "float64")
    for engine in (narrow, wide):
        engine.apply(FOLDED)
    difference = worst(narrow.score(at(0, 0.02, sequences)), wide.score(at(0, 0.02, sequences)))
    assert 0 < difference < TOLERANCE
    with pytest.raises(ConfigError, match=r"vLLM has no float64. Take engine=hf"):
        Vllm().start(folder, "float64", matrices, FOLDING[name], seed=3)
