"""Feedback as on CUDA: rows in static buffers, inside vLLM on the CPU, also where torch has compiled the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_lora import SLOTS, WIDTH, PaddingDispatcher, filled, given, kernel_meta, layer
from test_engines import sequence
from test_feedback import CENTRE, SPACE, commit, folder_of, relative, slopes
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper import punica_gpu
from vllm.platforms.cpu import CpuPlatform

from zoray.engines.feedback import kept
from zoray.engines.feedback.kept import Keeping, KeptRows, StaticRows, keep_stream, most_rows
from zoray.engines.hf import Hf
from zoray.engines.layers import lora_cuda as cuda_lora
from zoray.engines.layers.lora_cuda import CudaLora, DenseLayer, Mask
from zoray.engines.layers.vllm_layers import join_a, join_b
from zoray.engines.packing import Plan, SequenceTable
from zoray.engines.slots import FEEDBACK
from zoray.engines.vllm import feedback as vllm_feedback
from zoray.engines.vllm import worker as vllm_worker
from zoray.engines.vllm.engine import Vllm
from zoray.engines.vllm.graphs import Graphs
from zoray.methods.spaces import Lora
from zoray.models.folder import linear_matrices
from zoray.records import ConfigError, TokenSequence

CPU = torch.device("cpu")
NO_PASSES = {"fuse_norm_quant": False, "fuse_act_quant": False, "fuse_attn_quant": False}  # of vLLM's, for CUDA only


def as_on_cuda(monkeypatch: Any, backend: str | None = None) -> None:
    """vLLM on the CPU with the layers, the buffers and the padding of the CUDA path; compiled by a backend of torch's.

    Layers are prepared when vLLM has wrapped them, before its warm-up compiles the model, as on a card.
    """
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", kernel_meta(), raising=False)
    monkeypatch.setattr(LoRAModelManager, "_create_lora_modules", LoRAModelManager._create_lora_modules)
    cuda_lora.register.__wrapped__()

    def wrapper(scorer: Any) -> Any:
        scorer.runner.cudagraph_dispatcher = PaddingDispatcher()
        scorer.graphs = Graphs(scorer.runner, scorer.slots)
        return next(iter(scorer.manager.punica_wrapper_mapping.values()))

    monkeypatch.setattr(vllm_worker.PackedScorer, "_lora_wrapper", wrapper)
    monkeypatch.setattr(vllm_worker.PackedScorer, "_around_layers", lambda _: nullcontext())
    monkeypatch.setattr(vllm_worker.cpu_lora, "join", lambda _: None)
    monkeypatch.setattr(vllm_worker.cpu_gated, "fuse", lambda *_: [])
    if backend:
        arguments, check = Vllm.llm_arguments, CpuPlatform.check_and_update_config

        settings = {"backend": backend, "pass_config": NO_PASSES, "compile_sizes": []}

        def compiled(self: Vllm, *args: Any) -> dict[str, Any]:
            return {**arguments(self, *args), "enforce_eager": False, "compilation_config": dict(settings)}

        def as_it_was(config: Any) -> None:  # vLLM does not compile a model with adapters on a CPU
            mode, wanted = config.compilation_config.mode, config.compilation_config.backend
            check(config)
            config.compilation_config.mode, config.compilation_config.backend = mode, wanted

        # for CUDA's own operations
        monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda *_: None)
        monkeypatch.setattr(Vllm, "llm_arguments", compiled)
        monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(as_it_was))


def engine_of(folder: Any, space: Lora = SPACE, dtype: str = "float32", **options: Any) -> Any:
    settings: dict[str, Any] = {"slots": 2, "max_tokens": 1024, "kv_cache_gib": 0.25, "feedback": True, **options}
    return Vllm(**settings).start(folder, dtype, linear_matrices(folder), space, seed=3)


def scorer_of(engine: Any) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._zoray


def plan_of(seed: int, count: int = 9, longest: int = 60) -> Plan:
    rng = np.random.default_rng(seed)
    return Plan.of(
        [(CENTRE, sequence(rng, int(n), i % 3)) for i, n in enumerate(rng.integers(5, longest, count).tolist())]
    )


def moved(*engines: Any) -> None:
    """All at journal index 2, with neither A nor B as it began."""
    for engine in engines:
        shapes = linear_matrices(engine._folder)
        numbers, count = SPACE.trained(shapes), len(SPACE.select(shapes))
        engine.apply([commit(0, numbers, count), commit(1, numbers, count, momentum=0.5, rate=-1.0)])


@pytest.mark.parametrize(
    ("architecture", "backend"), [("llama", None), ("opt", "eager"), ("gemma3", None), ("gemma3", "eager")]
)
def test_feedback_from_static_buffers_is_the_reference_s(
    architecture, backend, tiny_models, tmp_path_factory, monkeypatch
):
    """Longer and shorter forwards in turn, each padded, and one with more rows than the buffers have."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("compiled")))
    as_on_cuda(monkeypatch, backend)
    folder = folder_of(architecture, tiny_models, tmp_path_factory)
    engine = engine_of(folder)
    rows = scorer_of(engine).feedback.rows
    assert isinstance(rows, StaticRows) and engine.at_once()[1] == rows.most <= 1024
    assert engine.self_test["kept_error"] < 1e-4 and engine.self_test["feedback_error"] < 1e-3
    reference = Hf().start(folder, "float32", linear_matrices(folder), SPACE, seed=3)
    moved(engine, reference)
    for seed, longest, count in ((0, 60, 9), (1, 12, 2), (2, 100, 12)):
        plan = plan_of(seed, count, longest)
        agree(engine, reference, plan)
        assert not rows.table.any() and rows.stream is None and not rows.inputs  # nothing stays asked for
    rows.most = 3  # the others are kept by Python, in a forward that is not compiled
    agree(engine, reference, plan)
    assert rows.at is None


@pytest.mark.slow
def test_buffers_are_filled_by_what_inductor_makes_of_the_model(tiny_models, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    folder = tiny_models["llama"]
    as_on_cuda(monkeypatch, "inductor")
    engine, reference = engine_of(folder), Hf().start(folder, "float32", linear_matrices(folder), SPACE, seed=3)
    moved(engine, reference)
    assert not scorer_of(engine).graphs.plain
    agree(engine, reference, plan_of(0))


def agree(engine: Any, reference: Any, plan: Plan) -> None:
    """Sums and feedback are those of the reference."""
    expected, gradient = reference.feedback(plan, slopes)
    found, own = engine.feedback(plan, slopes)
    assert np.abs(found - expected).max() < 1e-4 and relative(own, gradient) < 1e-3


def test_in_a_compiled_model_no_python_is_called(tiny_models, monkeypatch):
    """Without which the tests above would not say what they should."""
    as_on_cuda(monkeypatch, "eager")
    engine, called = engine_of(tiny_models["llama"]), list[str]()
    keep = StaticRows.keep

    def noted(self: StaticRows, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        called.append(name)
        keep(self, name, x, y)

    monkeypatch.setattr(StaticRows, "keep", noted)
    expected = engine.feedback(plan_of(0), slopes)[1]
    assert not called and not scorer_of(engine).graphs.plain
    with scorer_of(engine).graphs.plainly():
        assert relative(engine.feedback(plan_of(0), slopes)[1], expected) < 1e-4
    assert len(called) == 4


def test_only_matrices_with_an_adapter_pay(tiny_models, monkeypatch):
    """Slots are made for all layers of a name; what is trained may be some of them, and others have fused layers."""
    as_on_cuda(monkeypatch)
    names = ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj")
    engine = engine_of(tiny_models["llama"], Lora(rank=2, alpha=4, targets="residual:0.5", train="AB"))
    modules = scorer_of(engine).manager.modules
    keeping = {name for name, module in modules.items() if isinstance(module.punica_wrapper, Keeping)}
    assert keeping == set(names) < modules.keys()
    rows = scorer_of(engine).feedback.rows
    assert rows.input_buffers.keys() == set(names) and not rows.output_buffers
    assert [tuple(rows.input_buffers[name].shape) for name in names] == [(1024, 128), (1024, 64)]
    without = engine_of(tiny_models["llama"], feedback=False)
    assert not any(isinstance(m.punica_wrapper, Keeping) for m in scorer_of(without).manager.modules.values())


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("input", r"kept of the input of model.layers.\d.*_proj differs .*eager=true, or estimator=rloo"),
        ("stream", "kept of the stream differs"),
        ("head", "along the feedback of model.layers.1.mlp.down_proj the scores do not rise"),
    ],
)
def test_an_engine_whose_feedback_is_broken_is_refused(broken, says, cuda, tiny_models, monkeypatch):
    if cuda:
        as_on_cuda(monkeypatch)
    if broken == "head":
        monkeypatch.setattr(vllm_feedback.Head, "back", lambda self, hidden, *_: torch.ones_like(hidden))
    elif broken == "stream":
        monkeypatch.setattr(StaticRows if cuda else KeptRows, "keep_stream", lambda self, *_: set_stream(self))
    else:
        kind = StaticRows if cuda else KeptRows
        keep = kind.keep
        monkeypatch.setattr(kind, "keep", lambda self, name, x, y: keep(self, name, x.roll(1, 0), y))
    with pytest.raises(ConfigError, match=says):
        engine_of(tiny_models["llama"])


def set_stream(rows: Any) -> None:
    """As if nobody had kept it."""
    if isinstance(rows, StaticRows):
        rows.stream_buffer.zero_()
    elif rows.at is not None:
        rows.stream = torch.zeros(len(rows.at), 64)


def test_a_captured_model_that_was_not_started_for_it_has_no_feedback(tiny_models, monkeypatch):
    as_on_cuda(monkeypatch)
    engine = engine_of(tiny_models["llama"], feedback=False)
    scorer_of(engine).device = torch.device("meta")  # of a card, as far as this is asked
    with pytest.raises(ConfigError, match=r"was started for estimator=feedback.* Set engine.feedback=true"):
        engine.at_once()


def test_half_precision_is_proven_within_its_rounding(tiny_models, monkeypatch):
    as_on_cuda(monkeypatch)
    engine = engine_of(tiny_models["llama"], dtype="bfloat16")
    assert engine.self_test["kept_error"] < 0.02 and engine.self_test["feedback_error"] < 0.1
    found = engine.feedback(plan_of(0), slopes)[1]
    assert all(values.dtype == np.float32 for values in found.values())


def test_maps_are_fitted_to_streams_of_a_forward_without_graphs(tiny_models, monkeypatch):
    as_on_cuda(monkeypatch, "eager")
    folder = tiny_models["llama"]
    engine, reference = engine_of(folder), Hf().start(folder, "float32", linear_matrices(folder), SPACE, seed=3)
    rng, rows = np.random.default_rng(5), np.arange(4, 60, dtype=np.int32)
    some = [TokenSequence(rng.integers(5, 500, 60).astype(np.int32), rows, rows * 0, rows * 0, 1) for _ in range(30)]
    for one in (engine, reference):
        one.fit_lens(SequenceTable.of(some), 64)
    expected, found = (one.feedback(plan_of(0), slopes)[1] for one in (reference, engine))
    assert relative(found, expected) < 5e-3


def test_the_table_s_rest_is_a_row_that_every_forward_has():
    rows = StaticRows({"a": (4, 0), "b": (3, 5)}, 6, 4, torch.float32, CPU)
    x, y, stream = torch.randn(9, 4), torch.randn(9, 5), torch.randn(9, 6)
    rows.ask(torch.tensor([8, 2]))
    rows.keep("a", x, y)
    rows.keep("b", x[:, :3], y)
    rows.keep_stream(stream)
    assert torch.equal(rows.inputs["a"], x[[8, 2]]) and torch.equal(rows.outputs["b"], y[[8, 2]])
    assert rows.outputs.keys() == {"b"} and torch.equal(rows.stream, stream[[8, 2]])
    assert torch.equal(rows.input_buffers["a"][2:], x[[0, 0]])
    rows.clear()
    rows.keep("a", x[:1], y[:1])  # one token: a table with what was asked for before would read beyond it
    assert torch.equal(rows.input_buffers["a"], x[[0, 0, 0, 0]]) and not rows.fits(5) and rows.fits(4)
    rows.ask(torch.arange(5))
    rows.keep("a", x, y)
    rows.keep_stream(stream, stream)
    assert torch.equal(rows.inputs["a"], x[:5]) and torch.equal(rows.stream, 2 * stream[:5])


@pytest.mark.parametrize("behind", [True, False])
def test_a_layer_that_keeps_can_be_compiled_as_vllm_compiles(behind):
    """In one graph, without guards, traced at the largest number of tokens; the buffers are written each time."""
    torch._dynamo.reset()  # without guards, what another test has compiled of `forward` would be taken
    outs, most = (24,), 64
    module, mask = layer(outs), Mask(most, SLOTS, torch.float32, CPU)
    rows = StaticRows({"m": (WIDTH, 24 * behind)}, 24, most, torch.float32, CPU)
    dense, weight = DenseLayer(mask.values, join_a(module), join_b(module)), torch.randn(24, WIDTH)
    keeping, norm = Keeping(dense, rows, "m"), torch.nn.LayerNorm(24)
    keep_stream(norm, rows)
    filled(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight.t()
        keeping.add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, outs)
        normed = norm(y)
        return y.mul_(2.0) + normed  # what comes after may overwrite it

    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, options=options)
    for tokens, asked in ((most, [0]), (10, [9, 3]), (33, list(range(33))), (5, [])):
        x, _ = given(tokens, outs)
        mask.set(np.array([1] * (tokens - 1) + [-1]))
        if tokens == most:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            rows.ask(torch.tensor(asked, dtype=torch.long))
            found = compiled(x)
            assert rows.stream is not None
            kept_now = [part.clone() for part in (rows.inputs["m"], rows.stream, *rows.outputs.values())]
            expected = forward(x)
        assert torch.allclose(found, expected, atol=1e-4)
        assert torch.equal(kept_now[0], x[asked])
        for part in kept_now[1:]:
            y = x @ weight.t()
            dense.add_lora_linear(y, x, None, None, 1.0, outs)
            assert torch.allclose(part, y[asked], atol=1e-4) and len(kept_now) == 2 + behind
        rows.clear()


def test_punica_layers_keep_as_well():
    """Whatever the wrapper: it adds first, then what it made is kept."""
    rows = StaticRows({"m": (WIDTH, 24)}, 24, 4, torch.float32, CPU)

    class Adds(CudaLora):
        def __init__(self) -> None: ...

        def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
            y += 1

    x, y = given(9, (24,))
    before = y.clone()
    rows.ask(torch.tensor([7]))
    assert Keeping(Adds(), rows, "m").add_lora_linear(y, x, (), (), 1.0, (24,)) is None
    assert torch.equal(rows.outputs["m"], before[[7]] + 1) and torch.equal(rows.inputs["m"], x[[7]])


def test_memory_for_rows_is_bounded(monkeypatch):
    model, widths = torch.nn.Linear(1000, 1000, bias=False), {"a": (100, 0), "b": (50, 100)}
    of_row = (100 + 150) * 2 + 4 * 64
    assert most_rows(model, widths, 64, torch.bfloat16) == kept.ROW_BYTES // of_row
    monkeypatch.setattr(kept, "ROW_BYTES", 0)
    assert most_rows(model, widths, 64, torch.bfloat16) == int(0.04 * 4e6) // of_row


def test_the_estimator_s_engine_keeps_and_its_compiled_model_is_another_one():
    plain = Vllm(slots=2)
    guided = plain.for_probes(1, guided=True)
    assert guided == Vllm(slots=2, feedback=True) and plain.for_probes(1) is plain
    settings = [one._compiled_for(8, ("a", "b")) for one in (plain, guided)]
    assert settings[1].pop(FEEDBACK) == ["a", "b"] and settings[0] == settings[1]
    with pytest.raises(ConfigError, match="tensor_parallel=1 with estimator=feedback"):
        Vllm(tensor_parallel=2, feedback=True)
    with pytest.raises(ConfigError, match=r"engine.feedback to be true or false"):
        Vllm(feedback="yes")  # type: ignore[arg-type]
