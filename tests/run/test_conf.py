"""Every file in conf/ composes, builds and spells its component's signature; conf/ is found in checkout and wheel."""

from __future__ import annotations

import inspect
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from zoray.methods.estimators import Evolution
from zoray.methods.estimators.feedback import Feedback
from zoray.methods.optimizers import GlobalAdaptive, Sgd, Sign
from zoray.methods.spaces import LowRank
from zoray.records import ConfigError
from zoray.run.config import build, build_experiment, compose, conf_dir, group_options
from zoray.run.experiment import Experiment
from zoray.serve import check_model, main
from zoray.serving.gate import Gate
from zoray.serving.settings import KEY, PARTS, settings_of
from zoray.serving.store import claim

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml"))
MAINS = {"config.yaml": "launch", "evaluate.yaml": "evaluate", "export.yaml": "export", "replay.yaml": "replay"}
MAINS |= {"lm_eval.yaml": "lm_eval", "serve.yaml": "serve"}
EXPERIMENTS = [name.removesuffix(".yaml") for name in FILES if name.startswith("experiment/")]  # whole runs, as presets
OPTIONS = [name.removesuffix(".yaml") for name in FILES if "/" in name and not name.startswith("experiment/")]
REQUIRED = {  # what has no default
    "model/hf": ["model.path=org/name"],
    "task/file": ["task.path=mail.csv"],
    "task/mixture": ["task.parts={movie_reviews: 2, sst2: {weight: 1, objective: answer_nll, train: 100}}"],
    "objective/reward": ["objective.function=exact_match"],
}


# learning rate, perturbation, rank (None: all weights), batch, steps, probes a step, as in papers and scripts
PUBLISHED = {
    "mezo_opt13b_sst2": (1e-7, 1e-3, 128, 16, 20_000, 2),
    "mezo_lora_opt13b_sst2": (1e-4, 1e-2, 8, 16, 20_000, 2),
    "mezo_like_opt1.3b_sst2": (1e-7, 1e-3, 128, 16, 1_000, 2),
    "lozo_opt13b_sst2": (1e-7, 1e-3, 2, 16, 20_000, 2),
    "lozo_m_opt13b_sst2": (1e-7, 1e-3, 2, 16, 20_000, 2),
    "fzoo_opt13b_sst2": (5e-5, 1e-4, None, 16, 20_000, 9),
    "es_qwen2.5_3b": (5e-4, 1e-3, None, 200, 1_000, 30),
    "eggroll_qwen3_4b": (2e-4, 1e-3, 1, 16, 300, 1_024),
}


def named(target: str) -> type:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def signature(target: str) -> set[str]:
    return set(inspect.signature(named(target)).parameters)


def blocks(config: DictConfig) -> list[DictConfig]:
    """The components in a config, nested ones too."""
    inner = [config._get_node(key) for key in config]
    below = [block for node in inner if isinstance(node, DictConfig) for block in blocks(node)]
    return [config, *below] if "_target_" in config else below


def test_every_file_is_a_main_or_an_option_of_a_group_in_use():
    assert {name for name in FILES if "/" not in name} == set(MAINS)
    assert all((ROOT / "zoray" / f"{main}.py").is_file() for main in MAINS.values())
    groups = {name.split("/")[0] for name in OPTIONS}
    assert groups == set(Experiment.__dataclass_fields__) - {"run"}
    options = sum(len(group_options(group)) for group in groups)
    assert len(MAINS) + options + len(group_options("experiment")) == len(FILES)
    assert options == len(OPTIONS) >= 20 and len(group_options("experiment")) == len(EXPERIMENTS)


def test_the_default_run_builds():
    config = compose("config", [])
    experiment = build_experiment(config)
    assert experiment.run.steps == config.run.steps and experiment.spec.seed == config.run.seed


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_composes_builds_and_travels(name):
    group, option = name.split("/")
    config = compose("config", [f"{group}={option}", *REQUIRED.get(name, [])])
    part = getattr(build_experiment(config), group)
    assert type(part) is named(config[group]._target_)
    assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_builds_and_travels(name):
    """A preset sets keys anywhere in the config, so that its parts need not be components themselves."""
    package, purpose, *_ = (ROOT / "conf" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_" and purpose.startswith("# ")
    option, required = name.split("/")[1], REQUIRED.get(name, [])
    config = compose("config", [f"+experiment={option}", *required])
    assert config == compose("config", [f"experiment={option}", *required])  # Hydra's plus may be left out
    experiment = build_experiment(config)
    assert config != compose("config", required), "an experiment that changes nothing"
    assert pickle.loads(pickle.dumps(experiment.spec)) == experiment.spec
    changed = build_experiment(compose("config", ["run.steps=7", f"experiment={option}", "optimizer=sign", *required]))
    assert changed.run.steps == 7 and changed.optimizer.link == Sign()  # what is given beside it wins


def test_a_link_is_a_component_of_its_own():
    """Nested components are found, checked against their signature, and built."""
    config = compose("config", ["optimizer=adaptive", "optimizer.link.beta=0.5"])
    assert [block._target_.rpartition(".")[2] for block in blocks(config.optimizer)] == ["Sgd", "GlobalAdaptive"]
    assert build_experiment(config).optimizer.link == GlobalAdaptive(beta=0.5)
    assert build_experiment(compose("config", ["optimizer=sign"])).optimizer.link == Sign()


@pytest.mark.parametrize("name", FILES)
def test_every_component_is_spelled_out_and_explained(name):
    config = OmegaConf.load(ROOT / "conf" / name)
    assert isinstance(config, DictConfig)
    found = blocks(config)
    preset = name.startswith("experiment/")
    assert preset or bool(found) == (name == "config.yaml" or "/" in name)
    for block in found:
        assert set(map(str, block)) - {"_target_"} == signature(block._target_), block._target_
    if name == "serve.yaml":  # its two parts are of classes that need no name
        parts = {"zoray.serving.settings.Settings": config.serve, "zoray.serving.gate.Gate": config.serve.gate}
        own = {target: signature(target) - set(PARTS) for target in parts}
        assert own == {target: set(map(str, part)) for target, part in parts.items()}
    lines = (ROOT / "conf" / name).read_text().partition("\nhydra:")[0].splitlines()
    assert lines[0].startswith("# ")
    bare = [line for line in lines if ": " in line and "#" not in line and not line.strip().startswith(("_", "- "))]
    assert not bare, "settings without an explanation"


def test_evaluate_takes_the_runs_engine_and_task_or_others():
    assert compose("evaluate", ["run=x"]).engine is None
    for given in ("engine=hf", "+engine=hf"):
        config = compose("evaluate", ["run=x", given, "engine.device=cuda"])
        assert build(config.engine, "engine").device == "cuda" and config.task is None
    assert compose("evaluate", ["run=x"]).task is None
    for given in ("task=movie_reviews", "+task=movie_reviews"):
        config = compose("evaluate", ["run=x", given, "task.dev=7"])
        assert build(config.task, "task").dev == 7 and config.engine is None


def test_the_other_mains_have_the_settings_that_they_need():
    bare, shown = {"model", "adapter"}, {"shots", "shots_seed", "predictions"}
    assert set(compose("evaluate", [])) == {"run", "step", "split", "engine", "task", "objective", *bare, *shown}
    assert set(compose("replay", [])) == {"run", "step"}
    assert set(compose("export", [])) == {"run", "out", "step", "format", "rank", "dtype"}
    assert [compose(name, []).step for name in ("evaluate", "replay", "export")] == [None, None, "best"]
    for name in ("evaluate", "replay", "export"):
        assert [compose(name, [f"step={step}"]).step for step in ("best", "3", "null")] == ["best", 3, None]


def test_experiments_have_the_published_numbers():
    ours = ("movie_reviews", "feedback", "eggroll", "concise", "json_object")
    assert {f"experiment/{name}" for name in (*PUBLISHED, *ours)} == set(EXPERIMENTS)
    for name, (lr, size, rank, batch, steps, probes) in PUBLISHED.items():
        e = build_experiment(compose("config", [f"experiment={name}"]))
        asked = e.estimator.ask(0)
        assert (e.optimizer.lr, asked[-1].scale in (size, -size), e.run.batch, e.run.steps) == (lr, True, batch, steps)
        assert len(asked) == probes and (rank is None or e.space.rank == rank), name
        assert not e.run.stratify and e.optimizer.schedule == "constant"
        if name == "mezo_lora_opt13b_sst2":
            assert (e.space.alpha, e.space.train, e.space.targets) == (16.0, "AB", ("q_proj", "v_proj"))
        if name.startswith("lozo"):
            assert (e.space.interval, e.optimizer.momentum) == (50, 0.9 if "lozo_m" in name else 0.0)
        if name.startswith(("es_", "eggroll")):
            assert (e.estimator.shaping, e.estimator.antithetic) == ("zscore", "eggroll" in name)


def test_make_run_is_feedback_and_eggroll_is_the_run_of_before():
    run, plain = (build_experiment(compose("config", [f"experiment={name}"])) for name in ("movie_reviews", "feedback"))
    assert (run.space, run.estimator, run.optimizer) == (plain.space, plain.estimator, plain.optimizer)
    assert run.estimator == Feedback() and run.run.steps * run.run.batch == 1600
    eggroll = build_experiment(compose("config", ["experiment=eggroll"]))
    assert eggroll.space == LowRank(rank=1, fold_rounding="stochastic")
    assert eggroll.estimator == Evolution(population=16, sigma=7e-4, centring="prompt")
    assert eggroll.optimizer == Sgd(lr=0.006)
    assert (eggroll.run.steps, eggroll.run.batch, eggroll.run.tile_examples) == (400, 2, 4)


def test_conf_is_found_in_a_checkout():
    assert conf_dir() == ROOT / "conf"


def test_conf_is_found_in_a_wheel(tmp_path):
    build_wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build_wheel, cwd=ROOT, check=True, capture_output=True, timeout=120)
    site = tmp_path / "site"
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    packed = {str(path.relative_to(site / "zoray" / "conf")) for path in (site / "zoray" / "conf").rglob("*.yaml")}
    assert packed == set(FILES)
    show = [sys.executable, "-m", "zoray.launch", "--cfg", "job", "task=sst2", "space.rank=3"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(show, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "rank: 3" in done.stdout and "stanfordnlp/sst2" in done.stdout
    script = site / "zoray" / "jobs" / "slurm" / "zoray.sbatch"
    assert script.read_bytes() == (ROOT / "cluster" / "slurm" / "zoray.sbatch").read_bytes()
    code = "from zoray.pool import slurm; from zoray.run import config"
    code += "; print(config.conf_dir()); print(slurm.script_path())"
    where = [sys.executable, "-c", code]
    done = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert [Path(line) for line in done.stdout.splitlines()] == [site / "zoray" / "conf", script]


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        (["estimator=two_point", "estimator.pairs=1"], 2),
        (["estimator=one_sided", "estimator.probes=8"], 9),
        (["estimator=evolution", "estimator.population=64"], 16),
        (["estimator=two_point", "engine.slots=5"], 5),
    ],
    ids=str,
)
def test_there_are_as_many_slots_as_a_step_has_probes(settings, slots):
    e = build_experiment(compose("config", settings))
    assert e.spec.engine.slots == e.spec.engine.resident == slots
    assert e.spec is e.spec and len(e.estimator.ask(0)) in (slots, 2, 64)


def test_the_default_server_is_for_this_machine_and_decays_towards_the_base(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    settings = settings_of(compose("serve", []))
    assert settings.host == "127.0.0.1" and settings.key is None and settings.gate == Gate()
    assert str(settings.name).startswith("smollm2")
    assert Path(settings.folder) == Path("serving").absolute() and not settings.space.folds
    assert settings.optimizer.anchor > 0 and settings.optimizer.link is None
    assert settings.engine.slots == len(settings.estimator.ask(0))
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings_of(compose("serve", ["serve.gate.margin=0", "serve.gpus=0"])).gate.margin == 0


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["serve.host=0.0.0.0"], None, "expected an API key in the environment variable ZORAY_API_KEY"),
        (["serve.host=example.com"], None, "since host=example.com lets others reach this server"),
        (["serve.host=::1"], "short", "expected ZORAY_API_KEY to have at least 16 characters; it has 5"),
        (["serve.port=0"], None, "expected serve.port in 1..65535; got 0"),
        (["serve.port=eighty"], None, "expected serve.port to be a whole number; got 'eighty'"),
        (["space=lozo"], None, "expected space=lora for a served model"),
        (["engine=hf"], None, "unknown config key 'engine.max_tokens'; engine has device"),
        (["serve.prot=80"], None, "unknown config key 'serve.prot'; serve has name, folder, host"),
        (["serve.gate.margn=1"], None, "Did you mean margin?"),
        (["serve.gate=null"], None, "expected serve.gate to be a component"),
        (["serve.gate.margin=-1"], None, "expected gate.margin of 0 or more; got -1"),
        (["serve.replicas=auto"], None, "expected serve.replicas to be a whole number; got 'auto'"),
        (["serve.replicas=0"], None, "expected serve.replicas to be a whole number of at least 1; got 0"),
        (["serve.max_slowdown=0.5"], None, "expected serve.max_slowdown of at least 1; got 0.5"),
        (["serve.name=live"], None, "and not `live`; got 'live'"),
        (["serve.name=../x"], None, "expected serve.name of letters"),
        (["engine.tensor_parallel=2", "serve.gpus=1"], None, "a GPU for each of engine.tensor_parallel=2; got 1"),
        (["model.path=/nowhere"], None, "/nowhere"),
        (["space.targets=[nothing]"], None, "nothing"),
    ],
    ids=str,
)
def test_a_servers_mistakes_are_named_before_a_model_loads(overrides, key, says, monkeypatch, tiny_models, tmp_path):
    monkeypatch.delenv(KEY, raising=False)
    if key:
        monkeypatch.setenv(KEY, key)
    monkeypatch.setattr("zoray.serving.deployments.start.started", None)  # nobody comes so far
    with pytest.raises(ConfigError) as error:
        main(compose("serve", [f"model.path={tiny_models['llama']}", f"serve.folder={tmp_path}", *overrides]))
    assert says in str(error.value)


def test_of_two_servers_that_start_on_a_folder_the_second_is_told_at_once(monkeypatch, tiny_models, tmp_path):
    settings = [f"model.path={tiny_models['llama']}", f"serve.folder={tmp_path}"]

    @contextmanager
    def starting(_):
        with pytest.raises(ConfigError, match="for this server alone; another one uses it"):
            main(compose("serve", [*settings, "serve.port=8009"]))
        raise ZeroDivisionError
        yield

    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("zoray.serving.deployments.start.started", starting)
    monkeypatch.setattr("zoray.serve.stops", tuple)
    for _ in range(2):  # one that has failed keeps nothing
        with pytest.raises(ZeroDivisionError):
            main(compose("serve", [*settings, "serve.port=8008"]))


def test_a_port_in_use_and_a_folder_in_use_are_refused(monkeypatch, tiny_models, tmp_path):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("zoray.serving.deployments.start.started", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"expected to listen on 127.0.0.1:{port}; .*Choose another serve.port"):
            main(compose("serve", [f"serve.port={port}"]))
    first = claim(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="for this server alone; another one uses it"):
        main(compose("serve", [f"model.path={tiny_models['llama']}", f"serve.folder={tmp_path / 'a' / 'b'}"]))
    first.close()
    claim(tmp_path / "a" / "b").close()
    with pytest.raises(ConfigError, match=r"can't write serve\.folder="):
        claim(Path("/dev/null/x"))
    check_model(settings_of(compose("serve", [f"model.path={tiny_models['llama']}"])))
    with pytest.raises(ConfigError, match="got q_proj as well"):
        check_model(
            settings_of(compose("serve", [f"model.path={tiny_models['llama']}", "space.targets=[o_proj,q_proj]"]))
        )


def test_settings_of_an_application_are_those_of_the_command_line(monkeypatch, tiny_models):
    """As `serve run` gives them, all text; and as a config file does, nested and typed."""
    from zoray.serving.deployments import application as app

    built: list[Any] = []
    monkeypatch.setattr(app, "application", built.append)
    monkeypatch.setenv(KEY, "k" * 16)
    model = str(tiny_models["llama"])
    app.build({"model.path": model, "serve.replicas": "2", "serve.gpus": "1", "serve.name": "a/b"})
    app.build({"model": {"path": model}, "serve": {"replicas": 2, "gpus": 1, "name": "a/b", "host": "0.0.0.0"}})
    assert built[0] == built[1] and built[0].replicas == 2 and built[0].host == "0.0.0.0"
    app.build({"serve": {"gate": {"automatic": False}, "requests_per_minute": None}, "space.targets": ["q_proj"]})
    assert not built[2].gate.automatic and built[2].requests_per_minute is None
    assert built[2].space.targets == ("q_proj",)
    for wrong, says in (({"serve": {"prot": 1}}, "unknown config key 'serve.prot'"), ({"x": 1}, "unknown config key")):
        with pytest.raises(ConfigError, match=says):
            app.build(wrong)
    assert len(built) == 3


@pytest.mark.parametrize(
    ("cluster", "asked", "found"),
    [(0, None, 0), (4, None, 1), (4, 0, 0), (4, 2, 2), (None, 1, 1)],
    ids=["no GPU", "GPUs", "none of them", "as asked", "no cluster yet"],
)
def test_an_engine_takes_a_gpu_where_there_are_any(cluster, asked, found, monkeypatch, tiny_models):
    from zoray.serving.deployments import devices as placing

    monkeypatch.setattr(placing.ray, "is_initialized", lambda: cluster is not None)
    monkeypatch.setattr(placing.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(cluster or 0)})
    settings = replace(settings_of(compose("serve", [])), gpus=asked)
    assert placing.gpus(settings) == found
    monkeypatch.setattr(placing, "room", lambda bundle: (cluster or 0) // bundle["GPU"])
    monkeypatch.setattr(placing, "totals", lambda: f"8 CPU, {cluster} GPU")
    placing.check_room(replace(settings, replicas=1, gpus=asked if cluster else 0))
    if cluster and found:
        with pytest.raises(ConfigError, match=f"room for 5 engines of {found} GPU each; the cluster has 8 CPU, 4 GPU"):
            placing.check_room(replace(settings, replicas=5))


def test_without_a_cluster_to_look_at_gpus_have_to_be_named(monkeypatch):
    from zoray.serving.deployments import devices as placing

    monkeypatch.setattr(placing.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"expected serve\.gpus to be a number"):
        placing.gpus(settings_of(compose("serve", [])))


@pytest.mark.parametrize(
    ("replicas", "nodes", "gpus", "number", "cores"),
    [(2, 1, 0, 0, [0, 1]), (2, 1, 0, 1, [2, 3]), (1, 1, 0, 0, None), (2, 2, 0, 0, None), (2, 1, 1, 1, None)],
)
def test_engines_of_a_node_share_its_cores(replicas, nodes, gpus, number, cores, monkeypatch):
    """Where they compute on them; None is all, without a binding."""
    from zoray.serving.deployments import devices as placing

    monkeypatch.setattr(placing.ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    monkeypatch.setattr(placing.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    bound: list[list[int]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, mine: bound.append(list(mine)))
    settings = replace(settings_of(compose("serve", [])), replicas=replicas, gpus=gpus)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray has it
    assert placing.share_cores(settings, number) == (cores or [0, 1, 2, 3])
    assert placing.os.environ["OMP_NUM_THREADS"] == ("1" if gpus else str(len(cores or "0123")))
    assert bound == ([cores] if cores else [])
