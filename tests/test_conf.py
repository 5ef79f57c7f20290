"""Every file in conf/ composes, builds and spells its component's signature; conf/ is found in checkout and wheel."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from zoray.cli import build, build_experiment, compose, conf_dir, group_options
from zoray.experiment import Experiment

ROOT = Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml"))
MAINS = {"config.yaml": "launch", "evaluate.yaml": "evaluate", "replay.yaml": "replay"}
OPTIONS = [name.removesuffix(".yaml") for name in FILES if "/" in name]
REQUIRED = {  # what has no default
    "model/hf": ["model.path=org/name"],
    "task/file": ["task.path=mail.csv", "task.words={no: ' private', yes: ' urgent'}"],
}


def signature(target: str) -> set[str]:
    module, _, name = target.rpartition(".")
    return set(inspect.signature(getattr(import_module(module), name)).parameters)


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
    assert len(MAINS) + sum(len(group_options(group)) for group in groups) == len(FILES) >= 16


def test_the_default_run_builds():
    config = compose("config", [])
    experiment = build_experiment(config)
    assert experiment.run.steps == config.run.steps and experiment.spec.seed == config.run.seed


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_composes_builds_and_travels(name):
    group, option = name.split("/")
    config = compose("config", [f"{group}={option}", *REQUIRED.get(name, [])])
    part = getattr(build_experiment(config), group)
    assert f"{type(part).__module__}.{type(part).__qualname__}" == config[group]._target_
    assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize("name", FILES)
def test_every_component_is_spelled_out_and_explained(name):
    config = OmegaConf.load(ROOT / "conf" / name)
    assert isinstance(config, DictConfig)
    found = blocks(config)
    assert bool(found) == (name == "config.yaml" or "/" in name)
    for block in found:
        assert set(map(str, block)) - {"_target_"} == signature(block._target_), block._target_
    lines = (ROOT / "conf" / name).read_text().partition("\nhydra:")[0].splitlines()
    assert lines[0].startswith("# ")
    bare = [line for line in lines if ": " in line and "#" not in line and not line.strip().startswith(("_", "- "))]
    assert not bare, "settings without an explanation"


def test_evaluate_takes_the_runs_engine_or_another():
    assert compose("evaluate", ["run=x"]).engine is None
    for given in ("engine=hf", "+engine=hf"):
        config = compose("evaluate", ["run=x", given, "engine.device=cuda"])
        assert build(config.engine, "engine").device == "cuda"
    assert set(compose("evaluate", [])) == {"run", "step", "split", "engine"}
    assert set(compose("replay", [])) == {"run", "step"}


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
    where = [sys.executable, "-c", "import zoray.cli; print(zoray.cli.conf_dir())"]
    done = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == site / "zoray" / "conf"
