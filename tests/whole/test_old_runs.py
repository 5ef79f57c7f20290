"""Run folders of 0.1 (tests/data/runs) are gone on with, replayed, evaluated and exported by today's code.

They were made by `write` below with the code of 2026-12-01, and hold the names that modules had then.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from local_pool import LocalPool, launched
from tiny import tiny_llama

from zoray import evaluate, export, replay
from zoray.run import driver, journal
from zoray.run.config import compose

RUNS = Path(__file__).parents[1] / "data" / "runs"
DIGESTS = {"feedback": "ae2efbdbd28e6eb1", "reward": "1135205fa7231926", "lozo": "cf5524a0c25e8a2c"}
MADE_IN = "/tmp/zoray-0.1"
SHARED = (
    *(
        "model=hf",
        "model.path=base",
        "engine=hf",
        "run.test=false",
        "run.steps=4",
        "run.batch=4",
        "run.tile_examples=2",
    ),
    *("run.eval_every=2", "run.digest_every=1", "run.folder=.", "logging.progress=false", "logging.curve=false"),
)
SETTINGS = {
    "feedback": ("experiment=feedback", "task=file", "task.path=lab.csv", "task.dev=4", "task.test=0"),
    "reward": (
        *("task=file", "task.path=asks.csv", "task.dev=2", "task.test=0", "run.stratify=false", "space=lora"),
        *("space.rank=2", "estimator=rloo", "objective=reward", "objective.function=zoray.rewards:length"),
        *("objective.arguments={least: 2, most: 9}", "objective.max_tokens=4"),
    ),
    "lozo": ("task=file", "task.path=lab.csv", "task.dev=4", "task.test=0", "space=lozo", "space.rank=2"),
}


def exact_llama(folder: Path) -> Path:
    """A tiny model whose weights are whole numbers by 128, so that they are the same on any processor."""
    from safetensors.torch import load_file, save_file

    tiny_llama(folder)
    (path,) = folder.glob("*.safetensors")
    draw = np.random.default_rng(5).integers
    drawn = {
        k: torch.from_numpy(draw(-50, 51, tuple(w.shape)) / 128).float() for k, w in sorted(load_file(path).items())
    }
    save_file({k: torch.ones_like(w) if "norm" in k else w for k, w in drawn.items()}, path, {"format": "pt"})
    return folder


def files(folder: Path) -> None:
    """The data that the runs name."""
    (folder / "lab.csv").write_text("text,label\n" + "".join(f"the film {i} is,{'ab'[i % 2]}\n" for i in range(30)))
    (folder / "asks.csv").write_text("prompt,completion\n" + "".join(f"the film {i} is, great\n" for i in range(12)))


def write(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make such a run in the working directory."""
    return launched(monkeypatch, *SHARED, *SETTINGS[name], f"run.name={name}")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return exact_llama(tmp_path_factory.mktemp("exact") / "base")


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """A working directory with the model and the data that the runs name."""
    (tmp_path / "base").symlink_to(base)
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "tune", partial(driver.tune, start_pool=LocalPool))
    return tmp_path


@pytest.mark.parametrize("name", DIGESTS)
def test_a_run_of_before_goes_on_and_is_read(here, name, monkeypatch, capsys):
    shutil.copytree(RUNS / name, here / name)
    config = here / name / "config.yaml"
    config.write_text(config.read_text().replace(MADE_IN, str(here)))
    replay.main(compose("replay", [f"run={name}"]))
    assert f"digest {DIGESTS[name]}, 4 digests on the way agree" in capsys.readouterr().out
    assert evaluate.main(compose("evaluate", [f"run={name}"])) == 0
    export.main(compose("export", [f"run={name}", "out=out", f"format={'merged' if name == 'lozo' else 'peft'}"]))
    assert list((here / "out").glob("*.safetensors"))
    path = here / name / journal.FILE_NAME
    path.write_text(
        "".join(path.read_text().splitlines(keepends=True)[:3])
    )  # as if it had been stopped after two steps
    assert launched(monkeypatch, f"run.resume={name}") == 0
    assert len(journal.read(path).steps) == 4
