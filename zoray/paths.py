"""Paths as people write them in a setting or a file of settings, where no shell has been at work."""

from __future__ import annotations

import re
from pathlib import Path

from zoray.records import ConfigError

VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{\w+\})(/|$)")


def user_path(path: object) -> Path:
    """The path, with a `~` or `~user` at its beginning expanded as a shell does.

    Raises:
        ConfigError: no such user, or no home is known; or the path begins with a variable that the shell has left as
            it is, and nothing is called that.
    """
    given = Path(str(path))
    if VARIABLE.match(str(path)) and not Path(name := given.parts[0]).exists():
        raise ConfigError(
            f"expected a path; got {str(path)!r}, in which the shell has not replaced {name}. Use double quotes, or in "
            f"a file of settings ${{oc.env:{name.strip('${}')}}}"
        )
    try:
        return given.expanduser()
    except RuntimeError:  # Python's own says no more
        raise ConfigError(
            f"expected a path; got {str(path)!r}, and nobody knows the home of {given.parts[0]}. Write the whole path, "
            "or set HOME"
        ) from None
