"""The export command: any step of a run, and it scores as the replayed state does; or one clear line."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from journalled import STEPS, Made, commit, make, measured
from safetensors.numpy import load_file

from zoray.export import main
from zoray.methods.optimizers import to_float32
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.models.folder import linear_matrices, weights_hash
from zoray.records import Commit, ConfigError, JournalError
from zoray.replay import main as replay_main
from zoray.run import journal
from zoray.run.config import compose, run_main

TOKENS = torch.tensor([[1, 5, 300, 17, 42, 511, 8]])
SPACES = {
    "lora-B": Lora(rank=2, alpha=3.0),
    "lora-AB": Lora(rank=3, alpha=3.0, targets=("q_proj", "layers.1.mlp.*"), train="AB", distribution="gaussian"),
    "lozo": Lozo(rank=2, interval=2),
    "lozo-folded": Lozo(rank=1, interval=5, targets=("layers.0.*",), distribution="rademacher"),
    "lowrank": LowRank(rank=1, distribution="gaussian"),
}


@pytest.fixture(scope="session")
def runs(tiny_models, tmp_path_factory) -> dict[str, Made]:
    """A run of each space; read only."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make(root / name, tiny_models["llama"], space) for name, space in SPACES.items()}


@pytest.fixture(scope="session")
def defaults():
    return compose("export", [])


@pytest.fixture
def export(defaults, tmp_path, monkeypatch, capsys):
    """What the command does once its line is read: settings -> what it prints. Reading the line takes much longer."""
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)

    def call(**settings: object) -> str:
        capsys.readouterr()
        main(OmegaConf.merge(defaults, {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}))
        return capsys.readouterr().out

    return call


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A command without a process of its own: arguments -> (exit code, stdout, the error line)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, name: str = "export") -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"zoray.{name}", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            run_main(name, {"export": main, "replay": replay_main}[name])
        out, said = capsys.readouterr()
        return done.value.code, out, said[said.find("error: ") :] if "error: " in said else ""

    return call


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits[0].float()


def effective_model(folder: Path, weights: dict[str, np.ndarray]):
    """The model in float32 with some weights replaced; {} for the base itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in weights.items():
        value = torch.from_numpy(weight.T if name.endswith("embed_tokens") else weight)
        model.get_submodule(name).weight = torch.nn.Parameter(value.float())  # of its own, where two modules share one
    return model


def peft_model(folder: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(effective_model(folder, {}), adapter)


def merged_model(out: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out)


def adapter_error(made: Made, step: int, out: Path) -> float:
    """||B A - change|| / ||change|| of a written adapter, from its files."""
    stored, config = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    missed = total = 0.0
    for name, final in made.effective[step].items():
        change = final - made.effective[0][name]
        b, a = (stored[f"base_model.model.{name}.{part}.weight"].astype(np.float64) for part in ("lora_B", "lora_A"))
        assert b.shape[1] == a.shape[0] == config["r"]
        missed += ((config["lora_alpha"] / config["r"] * b @ a - change) ** 2).sum()
        total += (change**2).sum()
    return math.sqrt(missed / total)


# what is written scores as the state does


@pytest.mark.parametrize(
    ("space", "step"),
    [("lora-B", 0), ("lora-B", 3), ("lora-AB", 5), ("lozo", 0), ("lozo", 3), ("lozo-folded", 5), ("lowrank", 3)],
)
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_scores_as_the_replayed_state(export, runs, tiny_models, tmp_path, form, space, step):
    """At 3, lozo is in the middle of an interval."""
    made, model = runs[space], tiny_models["llama"]
    said = export(run=made.folder, out="out", step=step, format=form)
    assert re.fullmatch(rf"step {step} of {STEPS}, digest {made.digests[step]}, .*: out\n", said)
    found = logits(peft_model(model, tmp_path / "out") if form == "peft" else merged_model(tmp_path / "out"))
    expected, base = logits(effective_model(model, made.effective[step])), logits(effective_model(model, {}))
    assert (found - expected).abs().max() < 1e-4
    assert step == 0 or (expected - base).abs().max() > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("space", "step"), [("lora-AB", "3"), ("lozo", "null"), ("lowrank", "4")])
def test_the_command_names_the_digest_that_replay_prints(command, runs, space, step):
    made, number = runs[space], STEPS if step == "null" else int(step)
    start = f"step {number} of {STEPS}, digest {made.digests[number]}, "
    for name, arguments in (("replay", []), ("export", ["out=out"])):
        code, said, error = command(f"run={made.folder}", f"step={step}", *arguments, name=name)
        assert (code, error) == (0, "") and said.startswith(start)


def test_a_lora_run_is_written_exactly(export, runs, tmp_path):
    for name in ("lora-B", "lora-AB"):
        made, space = runs[name], SPACES[name]
        said = export(run=made.folder, out=name, step=3)
        assert said == f"step 3 of {STEPS}, digest {made.digests[3]}, exact adapter of rank {space.rank}: {name}\n"
        state = journal.replay(journal.read(made.folder / journal.FILE_NAME), 3)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(stored) == len(state.arrays())
        for key, array in state.arrays().items():
            assert stored[f"base_model.model.{key}.weight"].tobytes() == array.tobytes()
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (space.rank, space.alpha)
        plain = sorted({matrix.rsplit(".", 1)[-1] for matrix in state.matrices})
        assert config["target_modules"] == (plain if name == "lora-B" else sorted(state.matrices))


@pytest.mark.parametrize("space", ["lora-AB", "lozo", "lowrank"])
def test_a_merged_checkpoint_holds_the_effective_weights(export, runs, tiny_models, tmp_path, space):
    made = runs[space]
    said = export(run=made.folder, out="out", step=None, format="merged")
    assert f"digest {made.digests[-1]}, merged, " in said and "float32: out" in said
    model = merged_model(tmp_path / "out")
    assert model.dtype == torch.float32
    base = effective_model(tiny_models["llama"], {})
    for name, parameter in base.named_parameters():
        found = model.get_parameter(name).data.double().numpy()
        expected = made.effective[-1].get(name.removesuffix(".weight"), parameter.data.double().numpy())
        assert np.abs(found - expected).max() < 1e-6
    moved = {f"{name}.weight" for name in made.effective[-1]}
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter) == (name not in moved)


def test_a_folded_weight_is_merged_to_the_bit(export, runs, tmp_path):
    """Where nothing waits, the merged weights are those whose digest the run has."""
    for name in ("lozo-folded", "lowrank"):
        made = runs[name]
        export(run=made.folder, out=name, step=None, format="merged")
        model = merged_model(tmp_path / name)
        for matrix, weight in made.effective[-1].items():
            assert (model.get_parameter(f"{matrix}.weight").data.double().numpy() == weight).all()


# stacks and truncations


@pytest.mark.parametrize(
    ("space", "step", "rank"),
    [("lozo", 1, 2), ("lozo", 5, 6), ("lozo-folded", 4, 1), ("lowrank", 5, 10)],
)
def test_folds_are_stacked_while_they_fit(export, runs, tmp_path, space, step, rank):
    """lozo: a rank for every interval that has begun; lowrank: for every direction that had something to say."""
    made = runs[space]
    said = export(run=made.folder, out="out", step=step)
    says = rf"digest {made.digests[step]}, stack of all folds, rank {rank}, relative error (\S+): out\n"
    printed = float(re.search(says, said).group(1))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank
    assert printed < 1e-6 and adapter_error(made, step, tmp_path / "out") < 1e-6


def test_rank_does_not_cut_a_stack_that_fits(export, runs):
    said = export(run=runs["lowrank"].folder, out="out", step=5, rank=1)
    assert "stack of all folds, rank 10, " in said


@pytest.mark.parametrize(
    ("space", "change"),
    [
        (Lozo(rank=1, interval=2), {"decay": to_float32(0.99)}),
        (LowRank(keep_base=True), {"anchor": to_float32(0.99)}),
    ],
    ids=["lozo-decay", "lowrank-anchor"],
)
def test_a_run_with_decay_is_cut_by_svd(export, tiny_models, tmp_path, space, change):
    """A stack knows nothing of decay. At the step before the first decay it is still exact."""
    space = replace(space, targets=("layers.0.self_attn.*",))

    def commits(step):
        return replace(commit(step), **change) if step >= 2 else commit(step)

    made = make(tmp_path / "run", tiny_models["llama"], space, commits)
    said = export(run="run", out="before", step=2)
    assert "stack of all folds" in said
    for rank in (4, 32):
        said = export(run="run", out=f"rank{rank}", step=None, rank=rank)
        says = rf"digest {made.digests[-1]}, SVD of the change to rank {rank}, relative error (\S+): rank{rank}\n"
        printed, out = float(re.search(says, said).group(1)), tmp_path / f"rank{rank}"
        assert printed == pytest.approx(adapter_error(made, STEPS, out), rel=0.02, abs=1e-6)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, rank)


def test_decay_takes_the_base_along_and_svd_of_full_rank_keeps_it(export, tiny_models, tmp_path):
    """All matrices of these targets have a smaller side of at most 64."""
    space = Lozo(rank=1, interval=2, targets=("layers.0.self_attn.*",))
    commits = [replace(commit(step), decay=0.75) for step in range(STEPS)]
    made = make(tmp_path / "run", tiny_models["llama"], space, commits.__getitem__)
    said = export(run="run", out="out", step=None)
    assert ", SVD of the change to rank 64, " in said
    assert adapter_error(made, STEPS, tmp_path / "out") < 1e-5
    expected = logits(effective_model(tiny_models["llama"], made.effective[-1]))
    assert (logits(peft_model(tiny_models["llama"], tmp_path / "out")) - expected).abs().max() < 1e-3
    assert (logits(effective_model(tiny_models["llama"], {})) - expected).abs().max() > 0.5


def test_more_folds_than_a_slot_holds_are_cut_by_svd(export, tiny_models, tmp_path):
    """Rank 128: four steps of one direction make 512, the fifth one more."""
    space = LowRank(rank=128, targets=("layers.0.self_attn.*",), distribution="rademacher")
    made = make(tmp_path / "run", tiny_models["llama"], space, lambda step: Commit(step, (0.01 * (step + 1),)))
    said = export(run="run", out="four", step=4, rank=8)
    assert ", stack of all folds, rank 512, " in said and adapter_error(made, 4, tmp_path / "four") < 1e-6
    errors = []
    for rank in (8, 64):
        said = export(run="run", out=f"five{rank}", step=5, rank=rank)
        says = rf", SVD of the change to rank {rank}, relative error (\S+): five{rank}\n"
        errors.append(adapter_error(made, 5, tmp_path / f"five{rank}"))
        assert float(re.search(says, said).group(1)) == pytest.approx(errors[-1], rel=0.02, abs=1e-6)
        best = missed(made, 5, rank)
        assert errors[-1] == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert errors[0] > 0.05 and errors[1] < 1e-5


def missed(made: Made, step: int, rank: int) -> float:
    """The least relative error of a rank: the singular values that it leaves out."""
    left = total = 0.0
    for name, final in made.effective[step].items():
        s = np.linalg.svd(final - made.effective[0][name], compute_uv=False)
        left, total = left + (s[rank:] ** 2).sum(), total + (s**2).sum()
    return math.sqrt(left / total)


@pytest.mark.parametrize("space", [Lozo(rank=2, interval=2), LowRank()])
def test_the_base_weights_of_16_bits_are_rounded_to(export, tiny_models, tmp_path, space):
    """A stack does not know what rounding took away: the printed error does. Merged, the checkpoint is the state."""
    space = replace(space, targets=("q_proj", "up_proj"))
    made = make(tmp_path / "run", tiny_models["llama"], space, dtype="bfloat16", steps=4)
    said = export(run="run", out="adapter", step=4)
    printed = float(re.search(r", stack of all folds, rank \d+, relative error (\S+): adapter\n", said).group(1))
    assert printed == pytest.approx(adapter_error(made, 4, tmp_path / "adapter"), rel=0.02) and printed > 1e-3
    said = export(run="run", out="merged", step=4, format="merged")
    assert said.endswith(f"digest {made.digests[4]}, merged, bfloat16: merged\n")
    model = merged_model(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    for name, weight in made.effective[4].items():
        assert (model.get_parameter(f"{name}.weight").data.double().numpy() == weight).all()


@pytest.fixture(scope="module")
def narrow(tiny_models, tmp_path_factory):
    """The tiny Llama with weights of 16 bits."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("narrow") / "llama"
    shutil.copytree(tiny_models["llama"], folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


SMALL = [Commit(step, (to_float32(-4e-4), to_float32(2e-4), 0.0)) for step in range(STEPS)]  # as real steps are


@pytest.mark.parametrize("space", [Lora(rank=2, alpha=3.0), Lozo(rank=2, interval=50)], ids=["lora", "lozo"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_what_rounding_takes_from_a_merged_change_is_said(export, narrow, tmp_path, space, dtype):
    """The printed share is that of the files; where it is much, the advice is printed, and holds."""
    space = replace(space, targets=("q_proj", "up_proj"))
    made = make(tmp_path / "run", narrow, space, commits=lambda step: SMALL[step], dtype="bfloat16")
    said = export(run="run", out="merged", step=None, format="merged", dtype=dtype)
    model = merged_model(tmp_path / "merged")
    kept = "bfloat16" if dtype == "auto" else dtype
    assert str(model.dtype) == f"torch.{kept}" and said.endswith(f"merged, {kept}: merged\n")
    missed = total = 0.0
    for name, final in made.effective[-1].items():
        written = model.get_parameter(f"{name}.weight").data.double().numpy()
        missed += ((written - final) ** 2).sum()
        total += ((final - made.effective[0][name]) ** 2).sum()
    lost = math.sqrt(missed / total)
    assert lost > 0.15 if kept == "bfloat16" else lost < (1e-4 if kept == "float32" else 0.5)
    if kept == "float32":
        assert "rounding" not in said
        return
    found = re.match(r"(warning: )?rounding to (\w+) lost (\S+) % of the change", said)
    assert float(found[3]) / 100 == pytest.approx(lost, rel=0.1) and found[2] == kept
    assert bool(found[1]) == ("dtype=float32 keeps it" in said) == (lost > 0.05)


def test_a_run_in_float64_is_merged_to_the_bit(export, tiny_models, tmp_path):
    made = make(tmp_path / "run", tiny_models["llama"], LowRank(targets=("q_proj",)), dtype="float64")
    said = export(run="run", out="out", step=None, format="merged")
    assert f"digest {made.digests[-1]}, merged, float64: out" in said
    model = merged_model(tmp_path / "out")
    for name, weight in made.effective[-1].items():
        assert (model.get_parameter(f"{name}.weight").data.double().numpy() == weight).all()


def test_a_lowrank_run_that_never_moved_is_exported(export, tiny_models, tmp_path):
    """All directions of all its steps were silent."""
    space = LowRank(targets=("q_proj",))
    make(tmp_path / "run", tiny_models["llama"], space, lambda step: Commit(step, (0.0, 0.0)))
    export(run="run", out="out", step=None)
    found, base = logits(peft_model(tiny_models["llama"], tmp_path / "out")), effective_model(tiny_models["llama"], {})
    assert torch.equal(found, logits(base))


def test_a_stack_of_512_fits_when_nothing_waits(export, tiny_models, tmp_path):
    """Four folds of rank 128, and the fifth interval has not taken a step."""
    space = Lozo(rank=128, interval=1, targets=("layers.0.self_attn.q_proj",))
    make(tmp_path / "run", tiny_models["llama"], space, lambda step: Commit(step, (0.01,)), steps=4)
    said = export(run="run", out="out", step=None)
    assert ", stack of all folds, rank 512, " in said


# the best step


def test_the_best_step_on_dev_is_the_default(command, runs, tmp_path):
    made = runs["lozo"]
    run = Path(shutil.copytree(made.folder, tmp_path / "run"))
    measured(run, (0, "dev", 0.5), (2, "dev", 0.75), (4, "dev", 0.7), (4, "test", 0.9), (STEPS + 2, "dev", 1.0))
    for arguments in ([], ["step=best"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, said, error = command("run=run", "out=out", *arguments)
        assert (code, error) == (0, "") and said.startswith(f"step 2 of {STEPS}, digest {made.digests[2]}, ")


# mistakes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"run": None},
            "expected python -m zoray.export run=runs/NAME out=DIR (and step=K or step=best, format=peft or",
        ),
        (
            {"out": None},
            "expected python -m zoray.export run=runs/NAME out=DIR (and step=K or step=best, format=peft or",
        ),
        ({"format": "gguf"}, "expected format to be one of peft, merged; got 'gguf'"),
        ({"dtype": "int8"}, "expected dtype to be one of auto, float32, float16, bfloat16; got 'int8'"),
        ({"format": None}, "expected format to be one of peft, merged; got None"),
        ({"rank": 0}, "expected rank to be a whole number from 1 to 512; got 0"),
        ({"rank": 513}, "expected rank to be a whole number from 1 to 512; got 513"),
        ({"rank": "all"}, "expected rank to be a whole number from 1 to 512; got 'all'"),
        ({"rank": None}, "expected rank to be a whole number from 1 to 512; got None"),
        ({"out": "run"}, "expected run not to exist yet; it does. Choose another folder with out=DIR"),
        ({"out": "file"}, "expected file not to exist yet; it does. Choose another folder with out=DIR"),
        (
            {"run": "gone"},
            "expected a journal at gone/journal.jsonl; there is none. Give the folder of a run: run=runs",
        ),
        ({}, "expected an evaluation on dev in run/metrics.jsonl for step=best; give a number"),
        ({"step": "best"}, "expected an evaluation on dev in run/metrics.jsonl for step=best; give a number"),
        ({"step": 6}, "expected step in 0..5, the steps in this journal; got 6"),
        ({"step": -1}, "expected step in 0..5, the steps in this journal; got -1"),
        ({"step": "first"}, "expected step to be a whole number or best; got 'first'"),
        ({"step": True}, "expected step to be a whole number or best; got True"),
        ({"step": 1, "out": "file/out"}, "file is a file. Choose another place"),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(export, runs, tmp_path, settings, says):
    shutil.copytree(runs["lora-B"].folder, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(says)):
        export(**({"run": "run", "out": "out"} | settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_mistake_in_the_command_is_one_clear_line(command, runs, tmp_path):
    run = Path(shutil.copytree(runs["lora-B"].folder, tmp_path / "run"))
    usage = (
        "expected python -m zoray.export run=runs/NAME out=DIR (and step=K or step=best, format=peft or format=merged)"
    )
    assert command("out=out") == (2, "", f"error: {usage}\n")
    assert command("run=run") == (2, "", f"error: {usage}\n")
    measured(run, (2, "test", 0.9))  # which chooses nothing
    says = "expected an evaluation on dev in run/metrics.jsonl for step=best; give a number"
    assert command("run=run", "out=out") == (2, "", f"error: {says}\n")
    says = "expected rank to be a whole number from 1 to 512; got 8.0"
    assert command("run=run", "out=out", "rank=8.0") == (2, "", f"error: {says}\n")


def test_a_damaged_journal_is_a_failure_that_names_the_line(command, runs, tmp_path):
    path = Path(shutil.copytree(runs["lora-B"].folder, tmp_path / "run")) / journal.FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"step":3', b'"step":4', 1))
    code, out, said = command("run=run", "out=out", "step=1")
    assert (code, out) == (1, "") and said.startswith("error: JournalError: run/journal.jsonl, line 5: damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("space", "form"), [("lora-B", "merged"), ("lozo", "peft"), ("lozo", "merged"), ("lowrank", "peft")]
)
def test_other_weights_are_refused(export, tiny_models, tmp_path, space, form):
    """A model that was replaced at its place after the run: its adapter would be another thing."""
    model = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    made = make(tmp_path / "run", model, replace(SPACES[space], targets=("q_proj",)))
    before = weights_hash(model)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    says = f"the journal was made with base weights {before}; {model} has {weights_hash(model)}. Give the weights that"
    with pytest.raises(JournalError, match=re.escape(says)):
        export(run=made.folder, out="out", step=None, format=form)
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_a_lora_run_needs_no_model(export, tiny_models, tmp_path):
    model = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    made = make(tmp_path / "run", model, SPACES["lora-B"])
    shutil.rmtree(model)
    assert made.digests[-1] in export(run="run", out="out", step=None)
    with pytest.raises(ConfigError, match="is read as a local folder"):
        export(run="run", out="merged", step=None, format="merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_head_and_embedding_are_exported(export, tiny_models, tmp_path, architecture):
    """The tiny OPT has one weight for both, which two adapters can't be merged into."""
    model, space = tiny_models[architecture], Lora(rank=2, train="AB", targets=("v_proj", "lm_head", "embed_tokens"))
    made = make(tmp_path / "run", model, space)
    assert made.digests[-1] in export(run="run", out="peft", step=None)
    expected, base = logits(effective_model(model, made.effective[-1])), logits(effective_model(model, {}))
    assert (expected - base).abs().max() > 0.05
    assert (logits(peft_model(model, tmp_path / "peft")) - expected).abs().max() < 1e-4
    if architecture == "llama":
        export(run="run", out="merged", step=None, format="merged")
        assert (logits(merged_model(tmp_path / "merged")) - expected).abs().max() < 1e-4
        return
    says = (
        "one weight for its embedding and LM head: adapters on model.decoder.embed_tokens, lm_head can't be told apart"
    )
    with pytest.raises(ConfigError, match=says):
        export(run="run", out="merged", step=None, format="merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_not_merged_into(export, tiny_models, tmp_path):
    """Its weights are packed; the adapter beside them is no trouble."""
    model = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    made = make(tmp_path / "run", model, SPACES["lora-B"])
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (model / "config.json").write_text(json.dumps(config))
    path = tmp_path / "run" / journal.FILE_NAME
    contents = journal.read(path)
    path.unlink()
    with journal.Journal.create(path, {**contents.header, "weights": weights_hash(model)}) as log:
        for record in contents.steps:
            log.append(record)
    says = f"format=merged adds the adapter to the base weights, and those of {model} are quantised; take format=peft"
    with pytest.raises(ConfigError, match=re.escape(says)):
        export(run="run", out="out", step=None, format="merged")
    assert not (tmp_path / "out").exists()
    assert made.digests[-1] in export(run="run", out="out", step=None, format="peft")


# vLLM


def test_vllm_loads_what_is_exported(export, runs, tiny_models, tmp_path):
    """The merged checkpoint gives the tuned log-probabilities; a stack of folds fills a slot with the change."""
    from vllm.lora.request import LoRARequest

    from zoray.engines.vllm.engine import Vllm
    from zoray.records import TokenSequence

    made, base = runs["lozo"], tiny_models["llama"]
    tokens = TOKENS[0].numpy().astype(np.int32)
    rows = np.arange(len(tokens) - 1, dtype=np.int32)
    sequence = TokenSequence(tokens, rows, tokens[1:], rows, len(rows))
    said = export(run=made.folder, out="merged", step=3, format="merged")
    assert "merged, float32" in said
    engine = Vllm(slots=2, max_tokens=256, kv_cache_gib=0.25).start(
        tmp_path / "merged", "float32", linear_matrices(base), Lora(rank=8, alpha=8.0), seed=0
    )
    expected = logits(effective_model(base, made.effective[3])).log_softmax(-1)[rows, tokens[1:]]
    (found,) = engine.score_base([sequence])
    assert np.abs(found - expected.numpy()).max() < 1e-4
    before = logits(effective_model(base, {})).log_softmax(-1)[rows, tokens[1:]]
    assert (before - expected).abs().max() > 0.05

    said = export(run=made.folder, out="stack", step=3)
    assert "stack of all folds, rank 4" in said
    assert engine.llm.llm_engine.add_lora(LoRARequest("stack", 1, str(tmp_path / "stack")))
    scorer = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._zoray
    scorer.manager.activate_adapter(1)
    slot = scorer.manager.lora_index_to_id.index(1)
    for name, (a, b, *_) in scorer.contents.sites.items():
        change = made.effective[3][name] - made.effective[0][name]
        assert np.abs((b[slot, 0] @ a[slot, 0]).numpy() - change).max() < 1e-5 and np.abs(change).max() > 1e-3
