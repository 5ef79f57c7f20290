"""A reward function by its path: "package.module:function", "path/to/file.py:function", or one of zoray's own by name.

Guarantees: what `load_function` returns can be called as function(prompt, completion, example, **arguments); a mistake
that shows before a call raises ConfigError. What the function returns is not checked here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from zoray.records import ConfigError
from zoray.records.paths import user_path
from zoray.records.signatures import did_you_mean

FORM = "package.module:function or path/to/file.py:function"
BUILT_IN = "zoray.scoring.rewards"
FORMERLY = "zoray.rewards"  # their place in 0.1; runs from then still resume
BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def load_function(path: str, arguments: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function at a path, which takes these arguments besides prompt, completion and example; runs its module."""
    place, name = split_path(path)
    module = _from_file(user_path(place), path) if is_file(place) else _from_name(place, path)
    found = getattr(module, name, None)
    if found is None:
        if place == BUILT_IN:
            own = ", ".join(module.__all__)
            close = did_you_mean(name, module.__all__)
            raise ConfigError(f"expected a built-in reward ({own}), or one as {FORM}; got {path!r}{close}")
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"expected {place} to have a function {name}; it has none{did_you_mean(name, names)}")
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "an async one" if callable(found) else repr(found)[:100]
        raise ConfigError(f"expected {path} to be a plain function; got {kind}")
    _check_signature(found, path, arguments or {})
    return found


def split_path(path: str) -> tuple[str, str]:
    """Module or file, and the function in it."""
    place, colon, name = path.rpartition(":") if isinstance(path, str) else ("", "", "")
    if name.isidentifier() and (not colon or place == FORMERLY):
        return BUILT_IN, name
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"expected a reward function as {FORM}; got {path!r}")
    if place == "__main__":
        raise ConfigError(f"expected a reward function in a file of its own; got {path!r}, which worker processes lack")
    return place, name


def is_file(place: str) -> bool:
    """Whether the first half of a path names a file."""
    return place.endswith(".py") or "/" in place


def absolute(path: str) -> str:
    """The path, valid in any working directory."""
    place, name = split_path(path)
    return f"{user_path(place).absolute()}:{name}" if is_file(place) else path


def _from_file(file: Path, path: str) -> ModuleType:
    """Run a file as a module of its own. Its folder goes to the end of sys.path, so that it finds its neighbours."""
    file = file.absolute()
    if not file.is_file():
        raise ConfigError(f"expected the file of the reward function {path}; there is no {file}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    name = f"reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"expected the reward function {path} in a file called something.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does
        del sys.modules[name]
        raise _failed(path, error) from error
    return module


def _from_name(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the module does
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise ConfigError(
                f"expected a module {name} for the reward function {path}; there is no {missing}. "
                "Give a file as path/to/file.py:function, or put the module's folder into PYTHONPATH"
            ) from None
        raise _failed(path, error) from error


def _failed(path: str, error: BaseException) -> ConfigError:
    """What a module raised on import, and where."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return ConfigError(f"importing the reward function {path} raised {type(error).__name__}: {error}{where}")


def _check_signature(function: Callable[..., Any], path: str, arguments: Mapping[str, Any]) -> None:
    """Check for three parameters (prompt, completion, example), and for those that `arguments` gives by name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        raise ConfigError(f"expected {path} to be a Python function; it has no signature") from None
    kinds = [parameter.kind for parameter in parameters]
    first = [parameter.name for parameter in parameters if parameter.kind in BY_POSITION][:3]
    if len(first) < 3 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown = ", ".join(str(parameter) for parameter in parameters)
        raise ConfigError(f"expected {path} to take prompt, completion and example; its parameters are ({shown})")
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name: p for p in parameters if p.kind in by_name and p.name not in first}
    unknown = [] if inspect.Parameter.VAR_KEYWORD in kinds else [key for key in arguments if key not in known]
    if unknown or any(name in arguments for name in first):
        names = ", ".join(known) or "none"
        wrong = unknown or [name for name in first if name in arguments]
        close = did_you_mean(str(wrong[0]), list(known))
        raise ConfigError(f"unknown argument {', '.join(map(repr, wrong))} of {path}; it takes {names}{close}")
    empty = inspect.Parameter.empty
    needed = [p.name for p in parameters if p.default is empty and p.kind in (*BY_POSITION, by_name[1])]
    missing = [name for name in needed if name not in first and name not in arguments]
    if missing:
        raise ConfigError(f"missing argument {', '.join(map(repr, missing))} of {path}. Give it in arguments")
