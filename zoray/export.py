"""`python -m zoray.export run=DIR [step=K|best] [format=peft|merged] out=DIR`: any step of a run, for other programs.

run/export.py explains the files, and how exact they are.
"""

from __future__ import annotations

from typing import Any

from zoray.methods.spaces.base import MAX_RANK
from zoray.models.folder import DTYPES
from zoray.records import ConfigError, disk, require
from zoray.records.paths import user_path
from zoray.run.config import run_main
from zoray.run.export import FORMATS, write


def main(config: Any) -> None:
    """Rebuild the state and write it; print what was written and how exact it is."""
    if config.run is None or config.out is None:
        raise ConfigError(
            "expected python -m zoray.export run=runs/NAME out=DIR (and step=K or step=best, format=peft or "
            "format=merged)"
        )
    require(config.format in FORMATS, f"format to be one of {', '.join(FORMATS)}", config.format)
    ok = isinstance(config.rank, int) and 1 <= config.rank <= MAX_RANK
    require(ok, f"rank to be a whole number from 1 to {MAX_RANK}", config.rank)
    require(config.dtype in DTYPES[:4], f"dtype to be one of {', '.join(DTYPES[:4])}", config.dtype)
    folder, out = user_path(config.run), user_path(config.out)
    if out.exists():
        raise ConfigError(f"expected {out} not to exist yet; it does. Choose another folder with out=DIR")
    disk.check_place(out, "out")
    print(write(folder, out, config.step, config.format, config.rank, config.dtype))


if __name__ == "__main__":
    run_main("export", main)
