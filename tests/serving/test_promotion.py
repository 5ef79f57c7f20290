"""Versions: kept as they come or made of a journal, judged once, and never against what people have chosen."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from gatewayed import settings_of
from journalled import make
from journalled import measured as noted
from tiny import tiny_llama

from zoray.methods.spaces import Lora
from zoray.models.adapters import peft_space, read_factors
from zoray.models.folder import linear_matrices, weights_hash
from zoray.records import ConfigError, Evaluation
from zoray.serving.gate import Measured
from zoray.serving.learning import versions
from zoray.serving.learning.promotion import BY_HAND, KEPT, Promotion, overruled
from zoray.serving.store import NotFound, Store

SPACE = Lora(rank=2, alpha=4.0)
HITS = (1.0,) * 10 + (0.0,) * 10
BASE = Measured(0.5, 0.7, 20.0, "accuracy", HITS)


@pytest.fixture
def settings(chat_model, tmp_path):
    return settings_of(chat_model, tmp_path / "store")


@pytest.fixture
def store(settings):
    return Store(settings.folder)


@pytest.fixture
def made(store, settings, tmp_path):
    """A job of five steps, of the server's own model and space."""
    folder = store.new_job("mail", {"created_at": 1.0}, {"status": "succeeded"})
    return make(folder / "run", settings.model.path, SPACE)


def factors(store, name, settings):
    folder = store.version_folder(name)
    return read_factors(folder, peft_space(folder), linear_matrices(settings.model.path))


def meta(store, name):
    return json.loads((store.version_folder(name) / "meta.json").read_text())


@pytest.mark.parametrize("step", [0, 3, 5])
def test_any_step_of_a_job_becomes_a_version_out_of_its_journal(store, settings, made, step):
    versions.make_sure(store, f"mail@{step}", settings)
    found = meta(store, f"mail@{step}")
    assert found["digest"] == made.digests[step] and found["step"] == step
    assert found["passed"] is False and found["compared_with"] is None and found["measured"]["loss"] is None
    parts = factors(store, f"mail@{step}", settings)
    for name, base in made.effective[0].items():
        change = (parts[f"{name}.lora_B"].double() @ parts[f"{name}.lora_A"].double()).numpy()
        np.testing.assert_array_equal(base + SPACE.scaling * change, made.effective[step][name])


def test_a_step_that_was_evaluated_keeps_its_numbers(store, settings, made):
    noted(made.folder, (3, "dev", 0.7), (4, "test", 0.6), (4, "dev", 0.8))
    versions.make_sure(store, "mail@4", settings)
    assert meta(store, "mail@4")["measured"] == {
        **{"score": 0.8, "loss": 0.5, "perplexity": None, "metric": "accuracy", "rows": 10}
    }


@pytest.mark.parametrize("name", ["mail@6", "post@1", "mail", "mail@x", "mail@²", "../mail@1", "mail@1/..", "Mail@1"])
def test_what_no_journal_has_is_not_there(store, settings, made, name):
    with pytest.raises(NotFound, match="there is no version"):
        versions.make_sure(store, name, settings)
    assert not list(store.folder.glob("versions/*"))


def test_a_damaged_journal_is_said_without_its_path(store, settings, made):
    path = made.folder / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":7', 1))
    with pytest.raises(ConfigError, match="expected a whole journal of mail to make mail@1 from") as caught:
        versions.make_sure(store, "mail@1", settings)
    assert str(store.folder) not in str(caught.value)


def test_what_another_rank_or_model_has_learnt_is_refused_and_not_answered_with(store, settings, made, tmp_path):
    versions.make_sure(store, "mail@5", settings)
    store.set_live("mail@5", BY_HAND)
    versions.check_live(store, settings)
    wider = replace(settings, space=replace(settings.space, rank=4))
    with pytest.raises(
        ConfigError, match=r"mail@5 to be of space.rank=4 .*; it is of space.rank=2 space.alpha=4. Start"
    ):
        versions.check_live(store, wider)
    other = tiny_llama(tmp_path / "other", seed=7)
    moved = replace(settings, model=replace(settings.model, path=str(other)))
    assert weights_hash(other) != weights_hash(settings.model.path)
    with pytest.raises(ConfigError, match=r"mail@5 to be learnt from .*; it is of another base model"):
        versions.check_live(store, moved)


def test_a_live_version_that_is_gone_from_disk_is_made_again_or_missed(store, settings, made):
    versions.make_sure(store, "mail@5", settings)
    store.set_live("mail@5", BY_HAND)
    digest = meta(store, "mail@5")["digest"]
    for keep in (True, False):
        for path in store.version_folder("mail@5").iterdir():
            path.unlink()
        store.version_folder("mail@5").rmdir()
        if keep:
            versions.check_live(store, settings)
            assert meta(store, "mail@5")["digest"] == digest
    store.delete_job("mail")
    with pytest.raises(ConfigError, match=r"there is no version mail@5. Delete .*live.json to go back"):
        versions.check_live(store, settings)


def evaluation(step, score=0.5):
    return Evaluation(step, "dev", 0.5, score, 20, 100, 1.0)


@pytest.fixture
def job(store, settings, made):
    """A job whose versions are each worth what a test says: `job.score(step, hits)`."""

    def note(kind, message, **more):
        events.append({"kind": kind, "message": message, "time": time.time(), **more})

    def measure(version, dev):
        measured.append(version if dev else (version, "neutral text"))
        if not dev:
            return Measured(math.nan, math.nan, BASE.perplexity)
        hits = (1.0,) * worth.get(version, 10)
        return replace(BASE, score=len(hits) / 20, rows=hits + (0.0,) * (20 - len(hits)))

    def score(step, hits, rows=None):
        worth[f"mail@{step}"] = hits
        pool = SimpleNamespace(adapter=lambda: (arrays, "digest"))
        promotion.evaluated("mail", events, pool, evaluation(step, hits / 20), rows)
        return store.live()

    arrays = SPACE.open(linear_matrices(settings.model.path), 0).arrays()
    events, worth, measured = [], {}, []
    promotion = Promotion(settings, store, measure, note, store.set_live)
    note("started", "")
    return SimpleNamespace(score=score, events=events, note=note, measured=measured)


def test_what_passes_is_live_and_the_next_one_has_to_beat_it(store, job):
    assert job.score(25, 14) == "mail@25"
    assert job.score(50, 14) == "mail@25"  # as good is not better
    assert job.score(75, 18) == "mail@75"
    assert meta(store, "mail@50")["compared_with"]["version"] == "mail@25"
    assert "rows" in meta(store, "mail@50")["measured"] and meta(store, "mail@50")["measured"]["rows"] == 20
    assert job.measured == ["mail@25", None, "mail@50", "mail@75"]  # each once


def test_rows_that_the_run_has_just_evaluated_are_not_scored_again(store, job):
    """The same verdicts as when each version is measured on them, and as many forward passes less."""

    def rows(hits):
        return np.array((1.0,) * hits + (0.0,) * (20 - hits))

    assert job.score(0, 10, rows(10)) is None and not store.version_names()
    assert job.score(25, 14, rows(14)) == "mail@25"
    assert job.score(50, 15) == "mail@25"  # resumed there: its rows are not known, and one more hit may be luck
    assert job.score(75, 18, rows(18)) == "mail@75"
    assert job.measured == [*((version, "neutral text") for version in ("mail@25", None)), "mail@50", job.measured[-1]]
    assert job.measured[-1] == ("mail@75", "neutral text")
    found = meta(store, "mail@25")
    assert found["measured"]["score"] == 0.7 and found["measured"]["rows"] == 20
    assert found["measured"]["metric"] == "accuracy" and found["measured"]["perplexity"] == BASE.perplexity
    assert found["compared_with"]["score"] == 0.5


def test_a_step_is_judged_once_even_if_its_evaluation_comes_again(job):
    job.score(25, 14)
    before = len(job.events)
    job.score(25, 20)
    assert len(job.events) == before


def test_what_people_have_chosen_meanwhile_is_not_undone_until_they_resume_the_job(store, job):
    assert job.score(25, 14) == "mail@25"
    store.set_live(None, BY_HAND)
    assert job.score(50, 18) is None
    assert [event["kind"] for event in job.events[-2:]] == ["evaluated", "held"]
    assert meta(store, "mail@50")["passed"] is True
    job.note("paused", BY_HAND)
    job.note("queued", BY_HAND)
    assert job.score(75, 20) == "mail@75"


def test_choices_of_before_a_job_do_not_hold_it():
    events = [{"kind": "created", "time": 1.0}, {"kind": "started", "time": 5.0}]
    assert not overruled(events, [{"version": None, "reason": BY_HAND, "time": 4.0}])
    assert not overruled(events, [{"version": "x@1", "reason": "passed the gate", "time": 6.0}])
    assert overruled(events, [{"version": None, "reason": BY_HAND, "time": 6.0}])


def test_the_last_versions_are_kept_and_all_that_have_been_live(store, job):
    job.score(1, 14)
    for step in range(2, KEPT + 6):
        job.score(step, 10)
    kept = {version["step"] for version in store.versions()}
    assert kept == {1, *range(6, KEPT + 6)}
