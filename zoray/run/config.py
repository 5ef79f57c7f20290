"""From the command line to components: compose the Hydra config, build the components, report errors plainly.

Used by the mains only. Nothing here imports torch, vLLM or Ray, so a mistake in the command line costs a second.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import zoray
from zoray.records import ConfigError, JournalError, ReplicaLost, disk
from zoray.records.overrides import check_whole, setting, unescaped, value_of
from zoray.records.process import streams
from zoray.records.signatures import check_signature, did_you_mean, in_quotes, unknown_key

USAGE_EXIT, FAILURE_EXIT, INTERRUPT_EXIT = 2, 1, 130
MEANT = {  # values that are not text in a mapping read by YAML
    "null": re.compile(r"(null)?\Z", re.I),
    "bool": re.compile(r"(true|false)\Z", re.I),
    "int": re.compile(r"-?(0|[1-9][0-9]*)\Z"),
    "float": re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?\Z", re.I),
}
SHOWING_FLAGS = {"--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i"}  # of Hydra's: print, run nothing


def conf_dir() -> Path:
    """The folder of the configs: `conf/` of a checkout, or the copy packed in the wheel."""
    here = Path(zoray.__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def run_main(config_name: str, function: Callable[[Any], int | None]) -> NoReturn:
    """Compose `config_name` with the command line's overrides, call `function(config)`, exit.

    Hydra's own flags (--help, --cfg, --multirun, ...) go to Hydra. zoray's errors are printed as one message without a
    traceback; any other exception is a defect and keeps its traceback.
    """
    streams.settle()
    arguments = sys.argv[1:] = [readable(argument) for argument in sys.argv[1:]]
    flags = {argument for argument in arguments if argument.startswith("-")}
    if not flags:
        sys.exit(guarded(lambda: function(compose(config_name, arguments))))
    if flags <= SHOWING_FLAGS:  # Hydra's own messages for a wrong key give advice that is wrong here
        overrides = [argument for argument in arguments if "=" in argument]
        if guarded(lambda: compose(config_name, overrides) and None):
            sys.exit(USAGE_EXIT)

    import hydra

    codes = [0]
    keys = [argument.partition("=")[0].lstrip("+") for argument in arguments if "=" in argument]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(
        lambda config: codes.append(guarded(lambda: function(_with_line_breaks(config, keys))))
    )()
    sys.exit(max(codes))


def guarded(call: Callable[[], int | None]) -> int:
    """Call, and print a zoray error as one message; returns the exit status."""
    try:
        return call() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    except (JournalError, ReplicaLost, FloatingPointError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPT_EXIT
    except OSError as error:
        if not disk.refuses(error):
            raise
        print(f"error: {'. '.join([disk.told(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        return FAILURE_EXIT


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The config with `group=option` and `key=value` overrides; a leading `+` changes nothing for a key that exists.

    Raises:
        ConfigError: an override is not key=value, a group lacks the option, or the config lacks the key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        options, settings = [], []
        try:
            base = hydra_compose(config_name)
            for override in overrides:
                key, value = _split(override)
                if group_options(key):
                    check_option(key, value)
                    options.append(f"{key}={value}")
                else:
                    settings.append((key, f"{key}={value}"))
            _check_experiment(options)
            config = hydra_compose(config_name, options) if options else base
            for key, _ in settings:
                if not key.startswith("hydra."):
                    check_key(key, config)
            if settings:
                config = hydra_compose(config_name, options + [override for _, override in settings])
            return expand_mixture(_with_line_breaks(config, [key for key, _ in settings]))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(" ".join(f"{error} {error.__cause__ or ''}".split())) from None


def _with_line_breaks(config: Any, keys: Sequence[str]) -> Any:
    r"""A config with real line breaks where the command line has \n: a shell passes a backslash and an n."""
    from omegaconf import OmegaConf

    for key in keys:
        node: Any = OmegaConf.to_container(config)
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        meant = _each_text(node, unescaped)
        if meant != node and not key.startswith("hydra."):
            print(rf"note: \n, \t or \r in {key} is read as a line break or tab; \\n stays \n", file=sys.stderr)
            OmegaConf.update(config, key, meant, merge=False)
    return config


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A plain value with all its texts changed, except the keys of mappings."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def expand_mixture(config: Any) -> Any:
    """A config whose task is a mixture of options by name, with those options' settings written out."""
    from omegaconf import DictConfig, OmegaConf, open_dict

    task = config.get("task")
    if not isinstance(task, DictConfig) or not str(task.get("_target_", "")).endswith(".Mixture"):
        return config
    if OmegaConf.is_missing(task, "parts") or not isinstance(task.parts, DictConfig):
        return config
    with open_dict(config):
        named: Any = OmegaConf.to_container(task.parts)
        for name, given in named.items():
            given = given if isinstance(given, dict) else {"weight": given}
            if "_target_" not in given:
                task.parts[name] = _mixture_part(str(name), given)
    return config


def _mixture_part(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a part: {task: OPTION, weight: 1, objective: OPTION or {OPTION: {KEY: VALUE}}, KEY: VALUE}."""
    part, where = dict(given), f"task.parts.{name}"
    objective, weight = part.pop("objective", None), part.pop("weight", 1.0)
    option, own = next(iter(objective.items())) if isinstance(objective, dict) else (objective, {})
    task = _option("task", part.pop("task", name), part, where, where)
    extra = {} if option is None else {"objective": _option("objective", option, own, where, f"{where}.objective")}
    return {"_target_": "zoray.tasks.Part", "weight": weight, "task": task, **extra}


def _option(group: str, option: object, settings: Mapping[str, Any], where: str, keys: str) -> Any:
    """An option of a group with some of its settings changed."""
    from omegaconf import OmegaConf

    check_option(group, str(option), where)
    config: Any = OmegaConf.load(conf_dir() / group / f"{option}.yaml")
    for key, value in settings.items():
        if key not in list(config.keys()):  # `in` is false for a key without a default
            raise unknown_key(f"{keys}.{key}", key, keys, [str(name) for name in config if name != "_target_"])
        config[key] = value
    return config


def _check_experiment(options: Sequence[str]) -> None:
    """Refuse experiment= with space= or estimator=: its values would silently override theirs under the same keys."""
    chosen = dict(option.split("=", 1) for option in options)
    swapped = [f"{group}={chosen[group]}" for group in ("space", "estimator") if group in chosen]
    if "experiment" in chosen and swapped:
        raise ConfigError(
            f"expected experiment={chosen['experiment']} with its own space and estimator; got {', '.join(swapped)} "
            "beside it. Leave one of them out (make run: EXPERIMENT=null), or change single settings, space.KEY=VALUE"
        )


def readable(override: str) -> str:
    """An override that Hydra's grammar can read: text with characters it has no token for (~, ü) is quoted."""
    key, equals, value = override.partition("=")
    if not equals or key.startswith(("-", "~")) or value.startswith(("[", "{", "'", '"')):
        return override
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    quoted = f"{key}={in_quotes(value)}"
    for form in (override, quoted):
        try:
            OverridesParser.create().parse_override(form)
            return form
        except HydraException:
            pass
    return override


def _split(override: str) -> tuple[str, str]:
    """(key, value) of an override, by Hydra's grammar for values; in addition, keys of a mapping may be quoted.

    Raises:
        ConfigError: the override is not key=value, or can't be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    key = key.lstrip("+")
    if not equals or not key or key.startswith("~"):
        raise ConfigError(f"expected arguments of the form key=value; got {override!r}. --help lists the keys")
    check_whole(value, f"the value of {key}")
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        several = parsed.is_sweep_override()
        found = None if several else parsed.value()
        unkeyed = isinstance(found, dict) and None in found
    except HydraException as error:
        if (mapping := _mapping(value)) is not None:
            return key, value_of(mapping)
        raise ConfigError(
            f"can't read the value of {override!r} ({str(error).splitlines()[0]}). "
            f"Quote text with special characters, for the shell as well: {setting(key, unescaped(value))}"
        ) from None
    if several:
        raise ConfigError(
            f"expected one value; got {override!r}. Write {_as_list(key, value)}{setting(key, unescaped(value))} for "
            "text, or add --multirun for a run with each value"
        )
    mapping = _mapping(value) if unkeyed else None
    return key, value if mapping is None else value_of(mapping)


def _as_list(key: str, value: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"{key}=[{value}]")
    except HydraException:  # a sweep of another form
        return ""
    return f"{shlex.quote(f'{key}=[{value}]')} for a list, "


def _mapping(value: str) -> dict[Any, Any] | None:
    """A mapping with a key that YAML can read and Hydra can't (quoted, with an accent, null)."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads unquoted values as Hydra does: no and on, 007, 12:30 and dates are text."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    for kind, form in MEANT.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", form, None)
    try:
        found = yaml.load(value, Loader=Loader) if value.lstrip().startswith("{") else None
    except (yaml.YAMLError, ValueError):
        return None
    return {"null" if key is None else key: item for key, item in found.items()} if isinstance(found, dict) else None


def check_option(group: str, option: str, where: str = "") -> None:
    """Raise ConfigError, listing the existing options, unless the group has this one."""
    options = group_options(group)
    if option not in options:
        advice = did_you_mean(option, options) or f". Settings of the chosen one are {group}.KEY=VALUE"
        name = f"{where}.{group}" if where else group
        raise ConfigError(f"expected {name} to be one of {', '.join(options)}; got {option!r}{advice}")


def check_key(key: str, config: Any) -> None:
    """Raise ConfigError, listing the existing names, unless `config` has the dotted `key`."""
    from omegaconf import DictConfig, OmegaConf

    node, parent = config, ""
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in list(node.keys()):
            known = [str(name) for name in node if name != "_target_"] if isinstance(node, DictConfig) else []
            raise unknown_key(key, part, parent, known)
        parent = f"{parent}.{part}" if parent else part
        node = None if OmegaConf.is_missing(node, part) else node[part]


def group_options(group: str) -> list[str]:
    """The configs of a group, e.g. `engine` -> [hf, vllm]; none if there is no such group."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml")) if group else []


def build(config: Any, where: str) -> Any:
    """Instantiate the component at the key `where` from its config; every error in it is a ConfigError.

    A `_target_` is code to import: configs come from the user's own command line and files, never from the network.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if OmegaConf.is_config(config) and (missing := sorted(OmegaConf.missing_keys(config))):
            needed = ", ".join(f"{where}.{key}=..." for key in missing)
            raise ConfigError(f"these settings have no default and must be given: {needed}")
        check_signature(OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config, where)
        return instantiate(config, _convert_="all")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        raise (cause or ConfigError(f"{where}: {' '.join(str(error).split())}")) from None


def build_experiment(config: Any) -> Any:
    """All components of a run from the composed `config.yaml`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zoray.run.experiment import Experiment

    try:
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:  # an interpolation such as ${oc.env:NAME} of a missing variable
        raise ConfigError(" ".join(str(error).split())) from None
    if missing:
        raise ConfigError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    absent = [name for name in Experiment.__dataclass_fields__ if name not in config]
    if absent:
        raise ConfigError(f"expected a config with all parts of a run; it lacks {', '.join(absent)}")
    return Experiment(**{name: build(config[name], name) for name in Experiment.__dataclass_fields__})
