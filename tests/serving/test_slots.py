"""Versions in an engine's slots, and the engine as a member of a job's pool; without vLLM."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest

from zoray.records import TokenSequence
from zoray.serving.deployments import engine as module
from zoray.serving.deployments.engine import Versions
from zoray.serving.deployments.member import TuningMember


class Slots:
    """An engine of two slots, 3 and 4, and what requests may ask for; `marks` are those of the versions on disk."""

    def __init__(self):
        self.holds, self.let, self.marks, self.fails = {}, {}, dict.fromkeys(("a@1", "b@1", "c@1"), "first"), False
        self.versions = Versions((3, 4), self.marks.__getitem__, self.read, self.put, self.let.__setitem__)

    def read(self, version):
        return {version: self.marks[version]}

    def put(self, slot, arrays):
        if self.fails:
            raise RuntimeError("the engine has no time")
        self.holds[slot] = arrays

    async def use(self, version):
        async with self.versions.held(version) as slot:
            assert version is None or (self.holds[slot] == self.read(version) and self.let[version] == slot)
            return slot


def test_versions_take_the_place_of_those_that_nobody_has_used_for_longest():
    async def story(slots):
        assert await slots.use(None) == -1 and not slots.holds
        first, second = await slots.use("a@1"), await slots.use("b@1")
        assert {first, second} == {3, 4} and await slots.use("a@1") == first
        assert await slots.use("c@1") == second and slots.let == {"a@1": first, "b@1": None, "c@1": second}

    asyncio.run(story(Slots()))


def test_a_slot_that_a_request_uses_is_not_written(monkeypatch):
    async def story(slots):
        async with slots.versions.held("a@1") as own, slots.versions.held("b@1"):
            monkeypatch.setattr(module, "SLOT_SECONDS", 0.05)
            with pytest.raises(TimeoutError):
                await slots.use("c@1")
            monkeypatch.setattr(module, "SLOT_SECONDS", 60.0)
            waiting = asyncio.create_task(slots.use("c@1"))
            slots.marks["a@1"] = "learnt anew"  # which waits for those who use what was there
            anew = asyncio.create_task(slots.use("a@1"))
            await asyncio.sleep(0.05)
            assert slots.holds[own] == {"a@1": "first"} and not waiting.done() and not anew.done()
        await asyncio.gather(waiting, anew)

    asyncio.run(story(Slots()))


def test_a_slot_that_could_not_be_written_is_free_again():
    async def story(slots):
        slots.fails = True
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no time"):
                await slots.use("a@1")
        slots.fails = False
        assert {await slots.use("a@1"), await slots.use("b@1")} == {3, 4}

    asyncio.run(story(Slots()))


def test_a_member_measures_what_a_slot_holds_on_the_neutral_text():
    def score_slots(table, chosen, slots, stopping):
        assert slots.tolist() == [3, 3] and not stopping()
        return np.array([[-2.0], [-4.0]])

    text = [TokenSequence(np.arange(4), np.arange(3), np.arange(1, 4), np.zeros(3, np.int64), 1)] * 2
    member = TuningMember(SimpleNamespace(score_slots=score_slots), text, SimpleNamespace(errored=False))
    found = member.measure(3, False, lambda: False)
    assert found.perplexity == pytest.approx(math.e) and math.isnan(found.score) and not member.busy
    with pytest.raises(RuntimeError, match="no job's data yet"):
        member.measure(3, True, lambda: False)
