"""The engine of a server as a Ray Serve deployment: it answers requests under versions, and tunes as a pool's replica.

One vLLM engine does both (engines/shared/engine.py). Guarantees: a request is answered by one version from its first to
its last token: a slot that a request uses is not written.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from zoray.engines.shared.throttle import Throttle
from zoray.models.adapters import peft_space, read_factors
from zoray.scoring.guidance import lens_table
from zoray.serving.deployments.devices import share_cores
from zoray.serving.deployments.logs import keep_log
from zoray.serving.deployments.loopback import listen_here_only
from zoray.serving.deployments.member import TuningMember, neutral_text
from zoray.serving.http.door import failure
from zoray.serving.learning.versions import check
from zoray.serving.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import numpy as np

    from zoray.engines.shared.engine import SharedEngine
    from zoray.serving.gate import Measured
    from zoray.serving.settings import Settings

log = logging.getLogger(__name__)
SLOT_SECONDS = 60.0  # that a request waits for a slot, where all are in use by other versions
JOIN_SECONDS = 0.5  # between questions to the tuner whether there is a job


class EngineServer:
    """What each replica of the deployment is."""

    async def __init__(self, settings: Settings, tuner: Any) -> None:
        from ray import serve

        from zoray.engines.shared.engine import SharedEngine, report, start_client
        from zoray.engines.shared.openai import OpenAI
        from zoray.models.folder import linear_matrices, load_tokenizer

        listen_here_only()
        self.settings, self._tuner = settings, tuner
        keep_log(settings.folder, f"engine-{serve.get_replica_context().rank.rank}")
        share_cores(settings, serve.get_replica_context().rank.local_rank)
        self.store, self.throttle = Store(settings.folder, clear=False), Throttle(settings.max_slowdown)
        folder, name = settings.model.resolve(), str(settings.name)
        matrices, loop = linear_matrices(folder), asyncio.get_running_loop()
        self.client = start_client(
            settings.engine,
            *(folder, name, settings.model.dtype, matrices, settings.space, settings.slots, settings.max_slowdown),
        )
        about = (settings.engine, settings.space, matrices, settings.seed, folder, self.throttle)
        self.engine: SharedEngine = await asyncio.to_thread(SharedEngine, self.client, loop, *about)
        self._matrices = matrices
        self.api = await OpenAI.open(self.client, failure)
        await self._warm()
        await asyncio.to_thread(self.engine.warm)
        report(self.client, self.throttle)
        first = settings.engine.resident
        self.versions = Versions(
            range(first, first + settings.slots), self.store.mark, self._arrays, self.engine.put, self.api.let
        )
        text = neutral_text(load_tokenizer(folder))
        if settings.estimator.guided:  # a job fits its own, if nobody asks anything then
            await asyncio.to_thread(self.engine.fit_lens, lens_table(text), settings.estimator.lens)
        self.member, self._measuring = TuningMember(self.engine, text, self.client), asyncio.Lock()
        self._joining = asyncio.create_task(self._join())

    async def _warm(self) -> None:
        """The first request of each kind takes seconds: imports, a template to be read."""
        about = {"model": self.settings.name, "max_tokens": 1}
        for kind, body in (
            ("completions", {"prompt": "a"}),
            ("chat", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            async for _ in self.api.answer(kind, {**about, **body}):  # type: ignore[dict-item]
                pass

    async def check_health(self) -> None:
        """Raises if vLLM's core is gone: Serve then starts a new replica."""
        await self.client.check_health()

    async def answer(
        self, kind: str, body: dict[str, Any], version: str | None
    ) -> AsyncIterator[tuple[int, bool, bytes]]:
        """A request's answer under a version, None for the base model; see OpenAI.answer."""
        salt = None if version is None else self.store.mark(version)
        async with self.versions.held(version):
            async for part in self.api.answer(kind, {**body, "model": version or self.settings.name}, salt):
                yield part

    async def ready(self) -> bool:
        """Whether requests can be answered: this one has been."""
        return True

    async def measure(self, version: str | None, dev: bool = True) -> Measured:
        """A version on the neutral text, and with `dev` on the dev rows of the job at hand; one at a time."""
        async with self._measuring, self.versions.held(version) as slot:
            over = threading.Event()
            task = asyncio.create_task(asyncio.to_thread(self.member.measure, slot, dev, over.is_set))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:  # the slot is held until nothing is scored under it any more
                over.set()
                await asyncio.gather(task, return_exceptions=True)
                raise

    def _arrays(self, version: str) -> dict[str, np.ndarray]:
        """A version's adapter, as Engine.adapter gives it."""
        check(self.store, version, self.settings)
        folder = self.store.version_folder(version)
        factors = read_factors(folder, peft_space(folder), self._matrices)
        return {name: factor.float().numpy() for name, factor in factors.items()}

    async def _join(self) -> None:
        """Take part in the job at hand, whenever there is one."""
        from ray import serve

        name, told = f"engine-{serve.get_replica_context().rank.rank}", ""
        while True:
            try:
                where = await self._tuner.where.remote()
                if where is not None and not self.member.busy:
                    self.member.start(name, *where)
                told = ""
            except Exception as error:  # while the tuner is restarted; Ray's errors have no type in common
                if told != (told := type(error).__name__):  # once, not twice a second
                    log.warning("the tuner does not say which job there is: %s", error)
            await asyncio.sleep(JOIN_SECONDS)


class Versions:
    """Which version lies in which slot, and how many requests use it. On one event loop only.

    Args:
        slots: of the engine, that versions may lie in.
        mark: tells a version from another one of its name, which has been deleted since, see Store.mark.
        read: a version's adapter.
        put: writes an adapter into a slot, see SharedEngine.put; like `read`, it is called in a thread.
        let: lets requests be answered by a version in a slot, or by no such version (None) any longer, see OpenAI.let.
    """

    def __init__(
        self,
        slots: Sequence[int],
        mark: Callable[[str], str],
        read: Callable[[str], dict[str, np.ndarray]],
        put: Callable[[int, dict[str, np.ndarray]], None],
        let: Callable[[str, int | None], None],
    ) -> None:
        self._mark, self._read, self._write, self._let = mark, read, put, let
        self._free = list(slots)
        self._slot: OrderedDict[str, int] = OrderedDict()  # the version used last comes last
        self._users: dict[str, int] = {}
        self._marks: dict[str, str] = {}  # what lies in the slot of a name; it may have been deleted and learnt anew
        self._turn = asyncio.Condition()

    @asynccontextmanager
    async def held(self, version: str | None) -> AsyncIterator[int]:
        """A version's slot, -1 for the base model; it stays as it is meanwhile.

        Raises:
            NotFound: there is no such version.
            TimeoutError: all slots are in use by others.
        """
        if version is None:
            yield -1
            return
        slot = await asyncio.wait_for(self._take(version), SLOT_SECONDS)
        try:
            yield slot
        finally:
            async with self._turn:
                self._users[version] -= 1
                self._turn.notify_all()

    async def _take(self, version: str) -> int:
        async with self._turn:
            mark = self._mark(version)
            while self._marks.get(version) != mark:
                stale = version if version in self._slot else None
                idle = [name for name in self._slot if not self._users[name] and stale in (None, name)]
                if self._free and stale is None:
                    await self._put(version, mark)
                elif idle:
                    self._drop(idle[0])
                else:
                    await self._turn.wait()
            self._slot.move_to_end(version)
            self._users[version] += 1
            return self._slot[version]

    async def _put(self, version: str, mark: str) -> None:
        arrays = await asyncio.to_thread(self._read, version)
        slot = self._free.pop()
        try:
            await asyncio.to_thread(self._write, slot, arrays)
        except BaseException:
            self._free.append(slot)
            raise
        self._slot[version], self._users[version], self._marks[version] = slot, 0, mark
        self._let(version, slot)

    def _drop(self, version: str) -> None:
        self._let(version, None)
        del self._users[version], self._marks[version]
        self._free.append(self._slot.pop(version))
