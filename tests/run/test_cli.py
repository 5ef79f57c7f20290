"""The command line: what is wrong is said in one line, at once, with what to write instead."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zoray.records import ConfigError
from zoray.run.config import build, build_experiment, compose
from zoray.run.folder import load_run_config

HEAVY = ("torch", "vllm", "ray", "transformers")


def run(*arguments: str, module: str = "zoray.launch", **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def message(*overrides: str, config: str = "config") -> str:
    """What a command line is refused with, in composing or in building."""
    with pytest.raises(ConfigError) as error:
        build_experiment(compose(config, list(overrides)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("space.rnak=8", ["unknown config key 'space.rnak'", "space has rank, alpha, targets", "Did you mean rank?"]),
        ("+space.foo=1", ["unknown config key 'space.foo'", "space has rank, alpha"]),
        ("++space.rnak=1", ["unknown config key 'space.rnak'", "Did you mean rank?"]),
        ("logging.wandb.mod=offline", ["'logging.wandb.mod'", "logging.wandb has mode, project", "Did you mean mode?"]),
        ("run.name.first=x", ["unknown config key 'run.name.first'; run.name has no keys"]),
        ("foo=1", ["unknown config key 'foo'; the keys are model, task, objective"]),
        ("+foo.bar=1", ["unknown config key 'foo.bar'; the keys are model"]),
        ("estimater=two_point", ["unknown config key 'estimater'", "Did you mean estimator?"]),
        ("task=moviereviews", ["task to be one of boolq, cb, ", "got 'moviereviews'. Did you mean movie_reviews?"]),
        ("model=org/name", ["model to be one of gemma3-270m, hf, smollm2-135m; got 'org/name'", "model.KEY=VALUE"]),
        ("engine=null", ["engine to be one of hf, vllm; got 'null'"]),
        ("steps", ["arguments of the form key=value; got 'steps'", "--help"]),
        ("=3", ["arguments of the form key=value; got '=3'"]),
        ("~space.rank", ["arguments of the form key=value; got '~space.rank'"]),
        ("space.rank=abc", ["space.rank to be a whole number; got 'abc'"]),
        ("space.rank=", ["space.rank to be a whole number; got ''"]),
        ("space.rank=0", ["space.rank to be a whole number from 1 to 512", "got 0"]),
        ("run.steps=0", ["run.steps to be a whole number of at least 1; got 0"]),
        ("optimizer.lr=fast", ["optimizer.lr to be a number; got 'fast'"]),
        ("run.test=maybe", ["run.test to be true or false; got 'maybe'"]),
        ("run.name=null", ["run.name to be text; got None"]),
        ("run.name=2026", ["run.name to be text; got 2026", "'run.name=\"2026\"'"]),
        ("run=3", ["run to be a component's settings; got 3"]),
        ("space.rank=???", ["no default and must be given: space.rank=..."]),
        ("task.template={text} It was", ["can't read the value of", "'task.template=\"{text} It was\"'"]),
        ("task.path=a,b.csv", ["expected one value; got 'task.path=a,b.csv'", "'task.path=\"a,b.csv\"'", "--multirun"]),
        ("task.words={no: x, yes: y}", ["task.words={no: x, yes: y}"]),
        ("space.rank=${nope}", ["nope"]),
        ("optimizer.momentum=true", ["optimizer.momentum to be a number; got True"]),
        ("optimizer.momentum=1", ["optimizer.momentum in [0, 1); got 1"]),
        ("optimizer.link=sign", ["optimizer.link to be", "or null; got 'sign'"]),
        ("estimator.antithetic=1", ["estimator.antithetic to be true or false; got 1"]),
        ("run.select=first", ["run.select to be best or last; got 'first'"]),
        ("run.patience=-1", ["run.patience to be a whole number of 0 or more; got -1"]),
        ("run.patience=best", ["run.patience to be a whole number; got 'best'"]),
        ("space.rank=${oc.env:ZORAY_NO_SUCH_NAME}", ["ZORAY_NO_SUCH_NAME"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_write_instead(override, says):
    text = message(override)
    assert all(part in text for part in says), text


def test_settings_of_the_chosen_option_are_named_and_not_those_of_the_default():
    text = message("task=file", "task.min_ratin=1")
    assert "task has path, words, text_column" in text and "min_rating" not in text


def test_settings_inside_a_nested_component_are_checked_like_those_of_its_parent():
    for override, says in (
        ("optimizer.link.betta=0.5", "'optimizer.link.betta'; optimizer.link has beta, epsilon. Did you mean beta?"),
        ("optimizer.link.beta=high", "expected optimizer.link.beta to be a number; got 'high'"),
        ("optimizer.link.beta=1", "expected optimizer.link.beta to be in [0, 1); got 1"),
    ):
        assert says in message("optimizer=adaptive", override)
    assert "optimizer.link has no keys" in message("optimizer.link.beta=0.5")  # sgd has none


def test_what_has_no_default_must_be_given():
    assert message("task=file", "model=hf") == (
        "these settings have no default and must be given: model.path=..., task.path=..."
    )


@pytest.mark.parametrize(
    ("main", "override", "known"),
    [
        (
            "evaluate",
            "space=lozo",
            "run, step, adapter, split, shots, shots_seed, predictions, model, engine, task, objective",
        ),
        ("replay", "task=sst2", "run, step"),
        ("export", "engine=hf", "run, out, step, format, dtype, rank"),
    ],
)
def test_a_group_that_a_main_does_not_have(main, override, known):
    text = message(override, config=main)
    assert override.split("=")[0] in text and "lacks" not in text, text
    assert message("stepp=3", config=main) == f"unknown config key 'stepp'; the keys are {known}. Did you mean step?"


def test_a_plus_is_harmless_where_the_key_exists():
    assert compose("config", ["+space.rank=3", "++run.steps=5", "+engine=hf"]) == compose(
        "config", ["space.rank=3", "run.steps=5", "engine=hf"]
    )


def test_a_later_value_wins_and_text_may_be_quoted():
    config = compose("config", ["space.rank=3", "space.rank=4", 'task.template="{text} It, was"', "run.name='2026'"])
    assert (config.space.rank, config.task.template, config.run.name) == (4, "{text} It, was", "2026")


def test_a_component_that_is_not_ours_and_a_config_of_another_version():
    with pytest.raises(ConfigError, match=r"space._target_ to name a class; got zoray.methods.Hira"):
        build({"_target_": "zoray.methods.Hira"}, "space")
    with pytest.raises(ConfigError, match=r"unknown config key 'space.variant'; space has rank"):
        build({"_target_": "zoray.methods.Lora", "variant": 1}, "space")
    config = OmegaConf.masked_copy(compose("config", []), ["model", "run"])
    with pytest.raises(ConfigError, match="lacks task, objective, space"):
        build_experiment(config)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"expected the folder of a run .* got"):
        load_run_config(tmp_path)
    (tmp_path / "config.yaml").write_text("run: [1\n")
    with pytest.raises(ConfigError, match=r"config.yaml is not readable"):
        load_run_config(tmp_path)


# what the shell sees


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["space.rnak=8"], "error: unknown config key 'space.rnak'"),
        (["run.steps=0"], "error: expected run.steps to be a whole number of at least 1; got 0"),
        (["--cfg", "job", "space.rnak=8"], "error: unknown config key 'space.rnak'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_exit_code_2_and_no_traceback(arguments, says, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "--bogus" in arguments
    assert not list(tmp_path.iterdir())


def test_a_sweep_with_a_mistake_fails_too(tmp_path):
    done = run("--multirun", "run.seed=1,2", "space.rank=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: expected space.rank to be a whole number from 1 to 512") == 2


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--multirun", "run.steps=0"]], ids=" ".join)
def test_an_experiment_goes_with_hydras_flags(arguments, tmp_path):
    """Which see the arguments as they are typed."""
    done = run(*arguments, "experiment=lozo_opt13b_sst2", cwd=tmp_path)
    if "--cfg" in arguments:
        assert done.returncode == 0 and "_target_: zoray.methods.Lozo" in done.stdout and "steps: 20000" in done.stdout
    else:
        assert done.stderr == "error: expected run.steps to be a whole number of at least 1; got 0\n"


@pytest.mark.parametrize(
    ("module", "key", "usage", "more"),
    [
        ("zoray.replay", "step", "expected the folder of a run", []),
        ("zoray.evaluate", "split", "expected a run, or a model and a task", []),
        ("zoray.export", "format", "expected python -m zoray.export run=runs/NAME out=DIR", ["out=there"]),
    ],
)
def test_the_other_mains_say_what_they_need(module, key, usage, more, tmp_path):
    for arguments, says in ([], usage), ([f"{key}x=1"], f"Did you mean {key}?"):
        done = run(*arguments, module=module, cwd=tmp_path)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    done = run("run=nowhere", *more, module=module, cwd=tmp_path)
    assert done.returncode == 2 and "nowhere/journal.jsonl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "task=sst2"], ["space.rank=no"]])
def test_help_and_mistakes_are_quick_and_import_nothing_heavy(arguments, tmp_path):
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('heavy', [name for name in {HEAVY} if name in sys.modules]))\n"
        f"sys.argv = ['launch', *{arguments}]\n"
        "runpy.run_module('zoray.launch', run_name='__main__')\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # not of the clock: others may be busy
    assert done.stdout.endswith("heavy []\n")
    assert seconds < 3
    if arguments == ["--help"]:
        assert done.returncode == 0 and done.stdout.startswith("python -m zoray.launch: tune a model.")
        assert "task: boolq, cb, " in done.stdout
        assert "rank: 2" in done.stdout and not done.stderr
    elif arguments[0] == "--cfg":
        assert done.returncode == 0 and "_target_: zoray.methods.Lora" in done.stdout
        assert ("stanfordnlp/sst2" in done.stdout) == ("task=sst2" in arguments)
    else:
        assert done.returncode == 2
    assert not [name for name in os.listdir(tmp_path) if name != "runs"]


@pytest.mark.parametrize("swap", ["space=lora", "estimator=rloo"])
def test_an_experiment_keeps_its_own_space_and_estimator(swap):
    """Those of another one may have the same keys, whose values would silently be the experiment's."""
    with pytest.raises(ConfigError, match=rf"experiment=movie_reviews with its own .*; got {swap} beside it"):
        compose("config", ["experiment=movie_reviews", swap])
    assert compose("config", ["experiment=movie_reviews", "space.rank=3"]).space.rank == 3
    assert compose("config", [swap]) is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "zoray.launch experiment=movie_reviews"),
        (["ARGS=run.steps=5"], "zoray.launch experiment=movie_reviews run.steps=5"),
        (["EXPERIMENT=null", "ARGS=space=lozo"], "zoray.launch  space=lozo"),
        (["ARGS=run.resume=runs/a"], "zoray.launch  run.resume=runs/a"),
    ],
)
def test_make_run_is_the_experiment_unless_told_otherwise(given, expected):
    root = Path(__file__).parents[2]
    outer = ("ARGS", "EXPERIMENT", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")  # of the make that runs this
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "-n", "run", *given]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1].endswith(expected)


@pytest.mark.parametrize("typed", [r"{text}\nIt was", r"{text}\\nIt was", r"{text},\tIt was"])
def test_advice_to_quote_means_what_was_typed(typed):
    with pytest.raises(ConfigError) as refused:
        compose("config", ["task=file", f"task.template={typed}"])
    (advice,) = [word for word in shlex.split(str(refused.value).rpartition("as well: ")[2])]
    pasted, meant = (
        compose("config", ["task=file", one]).task.template for one in (advice, f'task.template="{typed}"')
    )
    assert pasted == meant
