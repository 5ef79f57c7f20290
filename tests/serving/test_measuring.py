"""How the tuner has a version measured: once, however long that takes, and by another engine if one has died."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from zoray.engines.shared.throttle import Closed
from zoray.serving.deployments import application as app
from zoray.serving.deployments.engine import EngineServer
from zoray.serving.store import NotFound

FOUND = object()


def raised_there(cause: Exception) -> Exception:
    """What a caller gets of an exception that was raised in an engine."""
    return RayTaskError("measure", "traceback", cause).as_instanceof_cause()


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def measure(monkeypatch, cancelled):
    """Measure with an engine that does one thing after the other: exceptions are raised, anything else is returned."""
    clock = SimpleNamespace(now=0.0)
    sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)  # noqa: E731
    monkeypatch.setattr(app, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))  # no other thread's

    def run(*does, stops_after=1000):
        def result(timeout_s):
            clock.now += timeout_s
            one = next(what)
            if isinstance(one, Exception):
                raise one
            return one

        def remote(version, dev):
            asked.append(version)
            return SimpleNamespace(result=result, cancel=lambda: cancelled.append(version))

        asked, what = [], iter(does)
        tuner = object.__new__(app.TunerServer)
        tuner._engine = SimpleNamespace(measure=SimpleNamespace(remote=remote))
        return tuner._measure(lambda: clock.now >= stops_after, "mail@25"), asked

    return run


def test_one_that_takes_long_is_asked_for_once(measure):
    slow = [GetTimeoutError("not yet"), TimeoutError("not assigned yet")] * 400
    assert measure(*slow, FOUND) == (FOUND, ["mail@25"])


def test_an_engine_that_has_died_is_replaced(measure):
    assert measure(RayActorError(), raised_there(RuntimeError("no data yet")), FOUND) == (FOUND, ["mail@25"] * 3)


def test_a_version_that_is_gone_is_said_at_once(measure):
    with pytest.raises(NotFound, match="there is no version"):
        measure(raised_there(NotFound("there is no version mail@25")))


def test_the_engines_own_time_limit_is_tried_again_and_not_for_ever(measure):
    busy = raised_there(TimeoutError("all slots are in use"))
    assert measure(busy, busy, FOUND) == (FOUND, ["mail@25"] * 3)
    with pytest.raises(TimeoutError):
        measure(*[busy] * 1000)


def test_it_ends_when_the_job_is_to_stop(measure, cancelled):
    with pytest.raises(KeyboardInterrupt):
        measure(*[GetTimeoutError("not yet")] * 1000, stops_after=30)
    assert cancelled == ["mail@25"]


def test_an_engine_holds_the_slot_until_a_cancelled_measurement_has_ended():
    """Else the slot could be written while something is scored under it."""
    held, ended = [], []

    @asynccontextmanager
    async def hold(version):
        held.append(version)
        try:
            yield 3
        finally:
            assert ended == [3]
            held.remove(version)

    def score(slot, dev, stopping):
        while not stopping():
            time.sleep(0.01)
        time.sleep(0.05)
        ended.append(slot)
        raise Closed

    async def main():
        server = object.__new__(EngineServer)
        server._measuring = asyncio.Lock()
        server.versions, server.member = SimpleNamespace(held=hold), SimpleNamespace(measure=score)
        task = asyncio.create_task(server.measure("mail@25"))
        await asyncio.sleep(0.05)
        assert held == ["mail@25"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held == [] and not server._measuring.locked()

    asyncio.run(main())
