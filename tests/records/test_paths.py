"""Paths with ~ in every setting that takes one, and how Hydra's grammar is kept out of them."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from gatewayed import settings_of

from zoray.models.folder import cache_dir
from zoray.records import ConfigError, JournalError
from zoray.records.paths import user_path
from zoray.run.config import compose, readable
from zoray.run.experiment import Run
from zoray.scoring.rewards.judging.functions import absolute
from zoray.serving.client import Client
from zoray.serving.commands import VERBS


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_home_is_expanded_at_the_beginning_only(home):
    assert user_path("~/runs") == home / "runs"
    assert user_path("~") == home
    assert user_path("~root/x") == Path("~root/x").expanduser() != Path("~root/x")
    assert [user_path(path) for path in ("a/~", "/a~b", "runs", "~~".join("ab"))] == [
        *map(Path, ("a/~", "/a~b", "runs", "a~~b"))
    ]


def test_who_has_no_home_is_said():
    with pytest.raises(ConfigError, match="'~nobody-of-that-name/x'; the home of ~nobody-of-that-name is unknown"):
        user_path("~nobody-of-that-name/x")


def test_a_variable_that_no_shell_has_replaced_is_refused(home, monkeypatch):
    with pytest.raises(ConfigError, match=r"did not expand \$HOME. Use double quotes, or .* \$\{oc.env:HOME\}"):
        user_path("$HOME/runs")
    assert user_path("$5.csv") == Path("$5.csv")
    monkeypatch.chdir(home)
    (home / "$HOME").mkdir()  # which is what somebody else has made of it
    assert user_path("$HOME/runs") == Path("$HOME/runs")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/runs", "~/runs"),
        ("'~/runs'", "~/runs"),
        ('"~/runs"', "~/runs"),
        ("~", "~"),
        ("~ada/runs", "~ada/runs"),
        ("/data/a~b", "/data/a~b"),
        ("~/my runs, too", "~/my runs, too"),
        ("~/Ada's", "~/Ada's"),
        ("läufe", "läufe"),
        ("~/a\\", "~/a\\"),
        ("~/${run.seed}", "~/0"),
        ("runs", "runs"),
    ],
)
def test_a_path_needs_no_quotes_for_hydra(typed, meant):
    assert compose("config", [readable(f"run.folder={typed}")]).run.folder == meant


@pytest.mark.parametrize("argument", ["run.steps=3", "task=file", "~task", "--help", "a=[1,ü]", "a={b: ~}", "ü", "a="])
def test_other_arguments_stay_as_they_are(argument):
    assert readable(argument) == argument


def test_the_folder_of_a_run(home):
    assert Run(name="a", folder="~/runs").path == home / "runs" / "a"
    assert Run(name="a", folder="x", resume="~/runs/a").path == home / "runs" / "a"


def test_the_folder_of_a_server(home, tiny_models):
    assert settings_of(tiny_models["llama"], Path("~/store")).folder == str(home / "store")


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("replay", ["run=~/none"], "{home}/none/journal.jsonl"),
        ("evaluate", ["run=~/none"], "{home}/none/journal.jsonl"),
        ("evaluate", ["model=hf", "model.path=x", "task=sst2", "predictions=~/there"], "~/there not to exist"),
        ("evaluate", ["model=hf", "model.path=x", "task=sst2", "adapter=~/none"], "{home}/none"),
        ("export", ["run=x", "out=~/there"], "{home}/there not to exist"),
        ("export", ["run=~/none", "out=~/new"], "{home}/none/journal.jsonl"),
        ("launch", ["run.resume=~/none"], "'{home}/none'"),
    ],
)
def test_every_command_expands_what_it_is_given(home, monkeypatch, command, arguments, says):
    (home / "there").mkdir()
    arguments = [readable(argument) for argument in arguments]
    monkeypatch.setattr("sys.argv", [command, *arguments])
    with pytest.raises((ConfigError, JournalError)) as raised:
        import_module(f"zoray.{command}").main(compose("config" if command == "launch" else command, arguments))
    assert says.format(home=home) in str(raised.value)


def test_an_upload(home):
    with pytest.raises(ConfigError, match=f"can't read {home}/none.csv"):
        VERBS["upload"](Client("http://127.0.0.1:1"), Namespace(file="~/none.csv"))


def test_files_of_rewards(home):
    assert absolute("~/mine.py:reward") == f"{home}/mine.py:reward"


def test_the_cache(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("ZORAY_CACHE", "~/kept")
    assert cache_dir() == home / "kept"
