"""States of jobs as versions that can answer requests: kept after an evaluation, or made from a job's journal.

A version is a PEFT adapter and its record. Any step of a job can be one: the journal rebuilds its state, bit for bit.
Guarantees: a version that becomes live is an adapter of this server's base model and space; an adapter of another model
or rank is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from typing import TYPE_CHECKING, Any

from zoray.methods.spaces import from_record
from zoray.models.adapters import peft_space, write_peft
from zoray.models.folder import weights_hash
from zoray.records import ConfigError, JournalError
from zoray.run import journal
from zoray.run.reports.history import read_metrics
from zoray.serving.deployments.logs import LOG
from zoray.serving.store import VERSION, NotFound, read_json, shown, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

    from zoray.methods.spaces.base import Space
    from zoray.serving.settings import Settings
    from zoray.serving.store import Store

log = logging.getLogger(__name__)
META, METRICS = "meta.json", "metrics.jsonl"
UNKNOWN = {"score": None, "loss": None, "perplexity": None, "metric": None, "rows": None}


def write(store: Store, name: str, arrays: Mapping[str, np.ndarray], space: Space, base: str) -> Path:
    """Write a version's adapter; returns its folder. An existing one stays: it is the same, and may be answering.

    `base`: the base model's name in the adapter.
    """
    with store.lock:
        if not (folder := store.new_version(name)).exists():
            write_peft(folder, arrays, space.rank, space.alpha, base, space.targets)  # type: ignore[attr-defined]
        return folder


def describe(folder: Path, weights: str, digest: str, **known: Any) -> None:
    """Write a version's record: its base model (weights_hash), the digest of its state, and more.

    If the disk refuses it, a version without a record is removed.
    """
    job, _, step = folder.name.partition("@")
    about = {"id": folder.name, "job": job, "step": int(step), "weights": weights, "digest": digest}
    try:
        write_json(folder / META, {**about, "created_at": time.time(), **known})
    except OSError:
        if not (folder / META).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def make_sure(store: Store, name: str, settings: Settings) -> None:
    """Make sure that a version exists and suits this server: one that is not kept is made from its job's journal.

    Raises:
        NotFound: there is no such job, or it has not reached that step.
        ConfigError: the version was learnt from another base model, or with another space.
    """
    try:
        there = (store.version_folder(name) / META).exists()
    except NotFound:
        there = False
    if not there:
        _replay(store, name, settings)
    check(store, name, settings)


def check_live(store: Store, settings: Settings) -> None:
    """Raise ConfigError if the live version can't answer on this server: then no request could be answered."""
    if (live := store.live()) is None:
        return
    try:
        make_sure(store, live, settings)
    except NotFound as error:
        raise ConfigError(
            f"expected the live version to exist: {error}. Delete {store.folder / 'live.json'} to go back to the base "
            "model"
        ) from None


def check(store: Store, name: str, settings: Settings) -> None:
    """Raise ConfigError unless a version is an adapter of this server's base model and space."""
    folder = store.version_folder(name)
    found, meta = peft_space(folder), folder / META  # without META, it is from this server's current job
    weights = read_json(meta).get("weights") if meta.exists() else None
    _fits(name, found.rank, found.alpha, weights, settings)


def _fits(name: str, rank: int, alpha: float, weights: str | None, settings: Settings) -> None:
    space, own = settings.space, weights_hash(settings.model.resolve())
    if (rank, alpha) != (space.rank, space.alpha):
        raise ConfigError(
            f"expected {name} to be of space.rank={space.rank} and space.alpha={space.alpha:g}; it is of "
            f"space.rank={rank} space.alpha={alpha:g}. Start the server with these to answer by it"
        )
    if weights not in (None, own):
        raise ConfigError(
            f"expected {name} to be learnt from {settings.model.path} (hash {own}); it is of another base model "
            f"(hash {weights}). Start the server with that model to answer by it"
        )


def plain(numbers: Any) -> dict[str, Any]:
    """A record of numbers for JSON, with null for NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(numbers).items()
    }


def _replay(store: Store, name: str, settings: Settings) -> None:
    """Make a version from the journal. It has measurements only if its step was evaluated."""
    job, _, number = name.partition("@")
    run = store.folder / "jobs" / job / "run"
    if not VERSION.fullmatch(name) or not (run / journal.FILE_NAME).exists():
        raise NotFound(f"there is no version {shown(name)}")
    try:
        contents = journal.read(run / journal.FILE_NAME)
        if int(number) > len(contents.steps):
            raise NotFound(f"there is no version {shown(name)}: {job} has taken {len(contents.steps)} steps")
        header, space = contents.header, from_record(contents.header["space"])
        _fits(name, space.rank, space.alpha, header["weights"], settings)
        state = journal.replay(contents, int(number))
    except JournalError as error:
        log.error("%s", error)
        raise ConfigError(
            f"expected a whole journal of {job} to make {name} from; it is damaged, the server's log says where "
            f"({LOG}/ in serve.folder)"
        ) from None
    evaluations = read_metrics(run)[1] if (run / METRICS).exists() else []
    measured = next((e for e in evaluations if (e.step, e.split) == (int(number), "dev")), None)
    known = {key: value for key, value in plain(measured).items() if key in UNKNOWN} if measured else {}
    with store.lock:
        folder = write(store, name, state.arrays(), space, header["model"])
        if not (folder / META).exists():  # else another call has made it in the meantime
            describe(
                folder,
                header["weights"],
                state.digest(),
                measured={**UNKNOWN, **known, "rows": measured and measured.count},
                compared_with=None,
                passed=False,
                reason="made from the journal; the gate has not seen it",
            )
