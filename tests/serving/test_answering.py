"""What the gateway knows of versions: requests never wait for the tuner, and a promotion takes effect at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from gatewayed import settings_of

from zoray.serving.deployments import application as app
from zoray.serving.http.door import Refused


class Tuner:
    """In the place of the tuner's handle. While it `hangs`, it is being started anew."""

    def __init__(self):
        self.live, self.names, self.hangs, self.slow = "mail@25", ["mail@25", "mail@50"], False, 0.0
        self.call = SimpleNamespace(remote=self._call)

    async def _call(self, name, *arguments):
        if self.hangs:
            await asyncio.sleep(3600)
        if name == "promote":
            self.live = arguments[0]
            return None, "", None
        found = {"live": self.live, "names": list(self.names)}
        await asyncio.sleep(self.slow)
        return None, "", found


class Engine:
    """In the place of the engines' handle: answers that last until they are let go."""

    def __init__(self):
        self.over = asyncio.Event()

    def options(self, stream):
        return SimpleNamespace(answer=SimpleNamespace(remote=self._answer))

    async def _answer(self, kind, body, version):
        await self.over.wait()
        yield 200, False, b"{}"


@pytest.fixture
def settings(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "listen_here_only", lambda: None)
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(app, "LOST_SECONDS", 0.1)
    monkeypatch.setattr(app, "START_SECONDS", 0.2)
    return settings_of(chat_model, tmp_path / "store")


def run(settings, story):
    """A story of (gateway, tuner, engine)."""

    async def main():
        tuner, engine = Tuner(), Engine()
        gateway = app.Gateway(settings, None, engine, tuner)
        await story(gateway, tuner, engine)
        if gateway._looking is not None:
            gateway._looking.cancel()

    asyncio.run(main())


def test_what_is_live_is_known_without_the_tuner_once_it_has_been_told(settings):
    async def story(gateway, tuner, engine):
        assert await gateway.resolve(None) == "mail@25" and await gateway.resolve("live") == "mail@25"
        tuner.hangs = True
        began = asyncio.get_running_loop().time()
        for _ in range(50):
            assert await gateway.resolve("live") == "mail@25" and await gateway.resolve("mail@50") == "mail@50"
        assert asyncio.get_running_loop().time() - began < 0.05
        assert await gateway.names() == ["tiny", "live", "mail@25", "mail@50"]
        with pytest.raises(Refused, match="does not exist"):
            await gateway.resolve("mail@75")

    run(settings, story)


def test_what_the_gate_promotes_answers_soon(settings):
    async def story(gateway, tuner, engine):
        assert await gateway.resolve("live") == "mail@25"
        tuner.live = "mail@50"
        await asyncio.sleep(0.2)
        assert await gateway.resolve("live") == "mail@50"

    run(settings, story)


def test_a_question_of_before_a_promotion_does_not_undo_it(settings):
    async def story(gateway, tuner, engine):
        assert await gateway.resolve("live") == "mail@25"
        tuner.slow = 0.08
        await asyncio.sleep(0.04)  # the next question has been answered, but the answer is under way
        await gateway.promote("mail@50")
        for _ in range(30):
            assert await gateway.resolve("live") == "mail@50"
            await asyncio.sleep(0.01)
        gateway.forget()
        tuner.live, tuner.names = None, []
        for _ in range(30):
            assert await gateway.resolve("live") is None
            await asyncio.sleep(0.01)

    run(settings, story)


def test_before_the_tuner_has_said_what_is_live_only_the_base_model_answers(settings):
    """Else the base model would answer for what is live."""

    async def story(gateway, tuner, engine):
        tuner.hangs = True
        assert await gateway.resolve("tiny") is None
        with pytest.raises(Refused, match="not known yet") as caught:
            await gateway.resolve("live")
        assert caught.value.status == 503
        tuner.hangs = False
        assert await gateway.resolve("live") == "mail@25"

    run(settings, story)


def test_requests_beyond_those_that_may_wait_are_told_to_come_again(settings, monkeypatch):
    monkeypatch.setattr(app, "MOST_WAITING", 3)
    monkeypatch.setattr(app, "AT_ONCE", 2)

    async def story(gateway, tuner, engine):
        async def ask():
            return [part async for part in gateway.answer("chat", {}, None)]

        waiting = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="too many requests") as caught:
            await ask()
        assert caught.value.status == 503
        waiting.pop().cancel()  # one hangs up
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(ask()))
        engine.over.set()
        assert await asyncio.gather(*waiting) == [[(200, False, b"{}")]] * 5
        assert gateway._answering == 0

    run(settings, story)
