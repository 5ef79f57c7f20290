"""From the command line to components: compose the Hydra config, build the components, say plainly what is wrong.

Used by the mains only. Nothing here imports torch, vLLM or Ray, so a mistake in the command line costs a second.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from zoray.records import ConfigError, JournalError, ReplicaLost

USAGE_EXIT, FAILURE_EXIT = 2, 1


def conf_dir() -> Path:
    """The folder of the configs: `conf/` of a checkout, or the copy that the wheel brings along."""
    here = Path(__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def run_main(config_name: str, function: Callable[[Any], int | None]) -> NoReturn:
    """Compose `config_name` with the command line's overrides, call `function(config)`, exit.

    Hydra's own flags (--help, --cfg, --multirun, ...) go to Hydra. Errors of ours are printed as one message, without a
    traceback; any other exception is a defect and keeps its traceback.
    """
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        import hydra

        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(
            lambda config: _guarded(lambda: function(config))
        )()
        sys.exit(0)
    sys.exit(_guarded(lambda: function(compose(config_name, arguments))))


def _guarded(call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    except (JournalError, ReplicaLost, FloatingPointError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE_EXIT


def compose(config_name: str, overrides: list[str]) -> Any:
    """The composed config. Raises ConfigError where Hydra refuses an override, with the nearest name that exists."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"expected arguments of the form key=value; got {override!r}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return hydra_compose(config_name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            plain = hydra_compose(config_name, [])
            raise ConfigError(_explain(str(error), overrides, plain)) from None


def _explain(message: str, overrides: list[str], plain: Any) -> str:
    """What Hydra found wrong, in one sentence, with what to write instead."""
    key_match = re.search(r"Could not override '([^']+)'", message)
    if key_match:
        return unknown_key(key_match.group(1), plain)
    for override in overrides:
        key, _, value = override.partition("=")
        options = group_options(key.lstrip("+~"))
        if options and value not in options and f"{key.lstrip('+')}/{value}" in message:
            return f"expected {key}=one of {', '.join(options)}; got {value!r}{_did_you_mean(value, options)}"
    missing_group = re.search(r"Could not (?:find|load) '([^']+)'", message)
    if missing_group:
        return f"there is no config {missing_group.group(1)!r}: {message.splitlines()[0]}"
    return message.strip().splitlines()[0]


def unknown_key(key: str, plain: Any) -> str:
    """The message for a key that the config does not have."""
    parent, _, leaf = key.rpartition(".")
    node = plain
    for part in parent.split(".") if parent else []:
        if not hasattr(node, "keys") or part not in node:
            return unknown_key(".".join(parent.split(".")[: parent.split(".").index(part) + 1]), plain)
        node = node[part]
    known = [str(name) for name in node if name != "_target_"] if hasattr(node, "keys") else []
    where = f"{parent} has" if parent else "the top level has"
    return f"unknown config key {key!r}; {where} {', '.join(known) or 'no keys'}{_did_you_mean(leaf, known)}"


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f". Did you mean {close[0]}?" if close else ""


def group_options(group: str) -> list[str]:
    """The configs of a group, e.g. `task` -> [file, movie_reviews, sst2]."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml")) if group else []


def build(config: Any) -> Any:
    """Instantiate a component (or a dict of them) from its config; every error in it is a ConfigError.

    A `_target_` is code to import: configs come from the user's own command line and files, never from the network.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf.errors import OmegaConfBaseException

    try:
        return instantiate(config, _convert_="all")
    except OmegaConfBaseException as error:
        raise ConfigError(f"config value missing or wrong: {str(error).splitlines()[0]}") from None
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, ConfigError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected:
            target = str(config.get("_target_", "")) if hasattr(config, "get") else ""
            raise ConfigError(f"unknown config key {unexpected.group(1)!r} for {target or 'this component'}") from None
        raise ConfigError(f"{str(error).splitlines()[0]} {cause or ''}".strip()) from None


def build_experiment(config: Any) -> Any:
    """All components of a run from the composed `config.yaml`."""
    from omegaconf import OmegaConf

    from zoray.experiment import Experiment

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    return Experiment(**{name: build(config[name]) for name in Experiment.__dataclass_fields__})


def load_run_config(folder: Path) -> Any:
    """The config that a run was started with.

    Raises:
        ConfigError: the folder is not a run's.
    """
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"expected the folder of a run (with config.yaml and journal.jsonl); got {str(folder)!r}")
    return OmegaConf.load(path)
