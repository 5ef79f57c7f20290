"""The command line of a benchmark: key=value pairs over some defaults."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def parse(arguments: Sequence[str], defaults: Mapping[str, str]) -> dict[str, str]:
    """The defaults with what is given; exits with the keys there are where one is unknown."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    if unknown := given.keys() - defaults.keys():
        sys.exit(f"expected {', '.join(defaults) or 'no arguments'}; got {', '.join(sorted(unknown))}")
    return {**defaults, **given}
