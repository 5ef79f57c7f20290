"""`python -m zoray.prepare [MODEL ...]`: models and the default data into the cache, so that a run needs no network.

A second call finds all of it, and imports neither torch nor transformers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from zoray.models.folder import GEMMA3_270M, SMOLLM2_135M, Model, package_folder
from zoray.records import ConfigError
from zoray.records.process import streams
from zoray.tasks.published.movie_reviews import published_file, published_path

MODELS = {"smollm2-135m": SMOLLM2_135M, "gemma3-270m": GEMMA3_270M}  # as in conf/model; the first is the default


def prepare(what: str, target: Path, make: Callable[[], Path]) -> None:
    """Make `target` unless it is there (and check it if so), and say so in one line."""
    start, there = time.perf_counter(), target.exists()
    make()
    print(f"{what}: {target} ({'already there' if there else f'{time.perf_counter() - start:.1f} s'})", flush=True)


def main() -> None:
    """Prepare everything that `python -m zoray.launch` uses by default, or other models than the default one."""
    names = [argument.removeprefix("model=") for argument in sys.argv[1:]] or [next(iter(MODELS))]
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"zoray.prepare: expected models out of {', '.join(MODELS)}; got {' '.join(unknown)}")
    try:
        for name in names:
            prepare("model", package_folder(MODELS[name]), Model(MODELS[name]).resolve)
        prepare("data", published_path(), published_file)
    except ConfigError as error:
        sys.exit(f"zoray.prepare: {error}")


if __name__ == "__main__":
    streams.settle()
    main()
