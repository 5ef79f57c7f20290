"""What a run will take: against what the engine and the states really hold, and what does not fit is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zoray.engines.layers.vllm_layers import slots_of
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.models.folder import linear_matrices, load_matrices, parameters
from zoray.run import plan
from zoray.run.config import build_experiment, compose
from zoray.scoring.replica import Replica
from zoray.scoring.workload import load_workload


@pytest.fixture(scope="module")
def settings(tiny_models, labelled_file) -> list[str]:
    words = "task.words=[' terrible',' great']"
    here = ["model=hf", f"model.path={tiny_models['llama']}", "task=file", f"task.path={labelled_file}", words]
    return [*here, "task.dev=10", "task.test=10", "engine.kv_cache_gib=0.25", "engine.slots=3"]


@pytest.mark.parametrize("space", [Lora(rank=4), Lora(rank=4, train="AB"), Lozo(rank=2), Lozo(rank=2, keep_base=True)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_a_state_keeps(space, momentum, tiny_models):
    """Against the tensors of a state after a step; these are padded to whole blocks of random numbers."""
    from zoray.records import Commit

    matrices = linear_matrices(tiny_models["llama"])
    state = space.open(matrices, 0, weights=load_matrices(tiny_models["llama"], list(matrices), "float32"))
    state.apply(Commit(0, (0.5,), momentum=momentum or None, rate=0.1 if momentum else 1.0))
    flats = [state.flat, state.momentum]
    flats.append(state._v if isinstance(space, Lozo) else state._a_flat if space.train == "B" else None)
    held = sum(flat.numel() for flat in flats if flat is not None)
    assert space.kept(matrices, momentum > 0) <= held <= 1.3 * space.kept(matrices, momentum > 0) + 4096
    drawn = state.direction(1, 0)
    assert space.drawn(matrices) <= drawn.numel() <= 1.3 * space.drawn(matrices) + 4096


def test_eggroll_keeps_nothing(tiny_models):
    space, matrices = LowRank(rank=2), linear_matrices(tiny_models["llama"])
    assert space.kept(matrices, False) == 0
    assert space.drawn(matrices) == 2 * sum(out + into for out, into in matrices.values())


@pytest.mark.parametrize("targets", ["all-linear", "[layers.1.self_attn.v_proj]"])
def test_sizes_and_tokens_are_those_of_the_run(targets, settings):
    """Slots as vLLM allocates them, weights as the file has them, tokens as a replica counts them."""
    e = build_experiment(compose("config", [*settings, f"space.targets={targets}"]))
    workload = load_workload(e.spec)
    found = plan.make(e, workload)
    replica = Replica(e.spec, workload)
    worker = replica.engine.llm.llm_engine.model_executor.driver_worker.worker
    modules = worker._zoray.manager.modules.values()
    slots = {t.data_ptr(): t.numel() * 4 for module in modules for pair in slots_of(module) for t in pair}
    assert found.memory["adapter slots"] == sum(slots.values())
    assert found.memory["weights"] == pytest.approx((workload.folder / "model.safetensors").stat().st_size, rel=0.05)
    grid = replica.grid(0, "train")
    scores, _ = replica.evaluate((), grid.tiles)
    assert plan.step_tokens(e, workload)[0] == scores.tokens
    assert (found.probes, found.sequences, found.forwards) == (16, 32, 6)  # 16 probes in 3 slots
    assert found.trained == e.space.trained(workload.matrices)


def test_parameters_of_tied_and_untied_models(tiny_models):
    from transformers import AutoModelForCausalLM

    for name in ("llama", "opt"):
        model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
        count, looked_up, hidden, vocabulary = parameters(tiny_models[name])
        assert vocabulary == model.config.vocab_size
        assert count == sum(p.numel() for p in model.parameters())
        assert hidden == model.config.hidden_size and looked_up >= model.get_input_embeddings().weight.numel()


def test_more_work_takes_longer_and_more_bytes(settings):
    one, many = (
        plan.make(e, load_workload(e.spec))
        for e in (build_experiment(compose("config", [*settings, f"estimator.population={n}"])) for n in (2, 64))
    )
    assert many.tokens[1] == 32 * one.tokens[1] and many.tokens[2] == 32 * one.tokens[2]
    assert many.to_replica > one.to_replica and many.from_replica > one.from_replica
    assert many.forwards == 22 and one.forwards == 1


def test_the_command_prints_a_plan_and_refuses_what_cannot_fit(settings):
    def call(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "zoray.plan", *settings, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = call("cluster.replicas=2")
    assert done.returncode == 0, done.stderr
    for word in ("numbers trained", "16 probes, 32 sequences", "KV cache", "bytes to a replica", "for 400 steps"):
        assert word in done.stdout
    refused = call("engine.kv_cache_gib=100000")
    assert refused.returncode == 2
    assert "the largest part is KV cache" in refused.stderr and "Lower engine.kv_cache_gib" in refused.stderr
    assert call("space.rank=0").returncode == 2
