"""`python -m zoray.prepare`: the default model and data into the cache, so that a run needs no network.

A second call finds both, and imports neither torch nor transformers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from zoray.models import SMOLLM2_135M, Model, package_folder
from zoray.records import ConfigError
from zoray.tasks.movie_reviews import published_file, published_path


def prepare(what: str, target: Path, make: Callable[[], Path]) -> None:
    """Make `target` unless it is there (and check it if so), and say so in one line."""
    start, there = time.perf_counter(), target.exists()
    make()
    print(f"{what}: {target} ({'already there' if there else f'{time.perf_counter() - start:.1f} s'})", flush=True)


def main() -> None:
    """Prepare everything that `python -m zoray.launch` uses by default."""
    try:
        prepare("model", package_folder(SMOLLM2_135M)[1], Model(SMOLLM2_135M).resolve)
        prepare("data", published_path(), published_file)
    except ConfigError as error:
        sys.exit(f"zoray.prepare: {error}")


if __name__ == "__main__":
    main()
