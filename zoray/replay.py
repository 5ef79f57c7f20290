"""`python -m zoray.replay run=DIR [step=K]`: rebuild the adapter state from a journal and print its digest.

Needs neither the model nor an engine: the journal's header has the shapes and the seed. Every digest that the run noted
on its way is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoray import journal
from zoray.cli import run_main
from zoray.records import ConfigError, JournalError
from zoray.spaces import LoraState, from_record


def replay(contents: journal.Contents, step: int | None = None, device: str = "cpu") -> LoraState:
    """The state after `step` steps (all of them if None), checked against the digests on the way.

    Raises:
        ConfigError: the journal has fewer steps.
        JournalError: a digest differs from the one that the run noted.
    """
    header, last = contents.header, len(contents.steps) if step is None else step
    if not 0 <= last <= len(contents.steps):
        raise ConfigError(f"expected step in 0..{len(contents.steps)}, the steps in this journal; got {last}")
    matrices = {name: (shape[0], shape[1]) for name, shape in header["matrices"].items()}
    state = from_record(header["space"]).open(matrices, header["run"]["seed"], device)
    for noted in contents.steps[:last]:
        if noted.digest is not None and noted.digest != state.digest():
            raise JournalError(
                f"replay differs from the run at step {noted.commit.step}: "
                f"digest {state.digest()}, the run had {noted.digest}"
            )
        state.apply(noted.commit)
    return state


def main(config: Any) -> None:
    """Print step and digest."""
    if config.run is None:
        raise ConfigError("expected the folder of a run: python -m zoray.replay run=runs/<name> [step=K]")
    if config.step is not None and not isinstance(config.step, int):
        raise ConfigError(f"expected step to be a whole number; got {config.step!r}")
    contents = journal.read(Path(str(config.run)) / journal.FILE_NAME)
    state = replay(contents, config.step)
    checked = sum(noted.digest is not None for noted in contents.steps[: state.step])
    print(f"step {state.step} of {len(contents.steps)}, digest {state.digest()}, {checked} digests on the way agree")


if __name__ == "__main__":
    run_main("replay", main)
