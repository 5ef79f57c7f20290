"""`python -m zoray.replay run=DIR [step=K|best]`: rebuild the state from a journal and print its digest.

Needs no engine, and no model unless the run folds into its base weights: the journal's header has the shapes and the
seed. Every digest in the journal is checked.
"""

from __future__ import annotations

from typing import Any

from zoray.methods.spaces import from_record
from zoray.models.folder import load_matrices
from zoray.records import ConfigError
from zoray.records.paths import user_path
from zoray.records.process import streams
from zoray.run import journal
from zoray.run.config import run_main
from zoray.run.folder import base_of_run
from zoray.run.journal import replay
from zoray.run.reports.history import resolve_step

__all__ = ["main", "replay"]


def main(config: Any) -> int:
    """Print step and digest; fails if the output can't be written."""
    if config.run is None:
        raise ConfigError(
            "expected the folder of a run: python -m zoray.replay run=runs/NAME (and step=K or step=best)"
        )
    folder = user_path(config.run)
    contents = journal.read(folder / journal.FILE_NAME)
    step, header = resolve_step(config.step, folder, len(contents.steps)), contents.header
    weights = None
    if from_record(header["space"]).folds:
        weights = load_matrices(base_of_run(folder, header), header["matrices"], header["dtype"])
    state = replay(contents, step, weights=weights)
    checked = sum(noted.digest is not None for noted in contents.steps[:step])
    print(f"step {step} of {len(contents.steps)}, digest {state.digest()}, {checked} digests on the way agree")
    return int(streams.lost())


if __name__ == "__main__":
    run_main("replay", main)
