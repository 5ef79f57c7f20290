"""A server's engine as a Ray Serve deployment: it answers requests under versions, and tunes as a pool's replica.

One vLLM engine does both (engines/shared/engine.py). Guarantees: one version answers a request from its first to its
last token: a slot that a request uses is not written.
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
SLOT_SECONDS = 60.0  # how long a request waits for a slot while other versions use all of them
JOIN_SECONDS = 0.5  # between questions to the tuner about a current job


class EngineServer:
    """A replica of the deployment."""

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
        if settings.estimator.guided:  # a job fits its own, if no request comes then
            await asyncio.to_thread(self.engine.fit_lens, lens_table(text), settings.estimator.lens)
        self.member, self._measuring = TuningMember(self.engine, text, self.client), asyncio.Lock()
        self._joining = asyncio.create_task(self._join())

    async def _warm(self) -> None:
        """Answer one request of each kind: the first takes seconds, for imports and a template to read."""
        about = {"model": self.settings.name, "max_tokens": 1}
        for kind, body in (
            ("completions", {"prompt": "a"}),
            ("chat", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            async for _ in self.api.answer(kind, {**about, **body}):  # type: ignore[dict-item]
                pass

    async def check_health(self) -> None:
        """Raise if vLLM's core has died: Serve then starts a new replica."""
        await self.client.check_health()

    async def answer(
        self, kind: str, body: dict[str, Any], version: str | None
    ) -> AsyncIterator[tuple[int, bool, bytes]]:
        """A request's answer by a version, None for the base model; see OpenAI.answer."""
        salt = None if version is None else self.store.mark(version)
        async with self.versions.held(version):
            async for part in self.api.answer(kind, {**body, "model": version or self.settings.name}, salt):
                yield part

    async def ready(self) -> bool:
        """Whether requests can be answered: this call itself shows it."""
        return True

    async def measure(self, version: str | None, dev: bool = True) -> Measured:
        """Measure a version on the neutral text, and with `dev` on the current job's dev rows; one at a time."""
        async with self._measuring, self.versions.held(version) as slot:
            over = threading.Event()
            task = asyncio.create_task(asyncio.to_thread(self.member.measure, slot, dev, over.is_set))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:  # hold the slot until no scoring uses it any more
                over.set()
                await asyncio.gather(task, return_exceptions=True)
                raise

    def _arrays(self, version: str) -> dict[str, np.ndarray]:
        """A version's adapter, in the form of Engine.adapter."""
        check(self.store, version, self.settings)
        folder = self.store.version_folder(version)
        factors = read_factors(folder, peft_space(folder), self._matrices)
        return {name: factor.float().numpy() for name, factor in factors.items()}

    async def _join(self) -> None:
        """Take part in the current job, whenever there is one."""
        from ray import serve

        name, told = f"engine-{serve.get_replica_context().rank.rank}", ""
        while True:
            try:
                where = await self._tuner.where.remote()
                if where is not None and not self.member.busy:
                    self.member.start(name, *where)
                told = ""
            except Exception as error:  # while the tuner restarts; Ray's errors have no common type
                if told != (told := type(error).__name__):  # once, not twice a second
                    log.warning("the tuner does not name the current job: %s", error)
            await asyncio.sleep(JOIN_SECONDS)


class Versions:
    """Which version is in which slot, and how many requests use it. For one event loop only.

    Args:
        slots: the engine's slots for versions.
        mark: tells a version from an earlier, deleted one of its name, see Store.mark.
        read: reads a version's adapter.
        put: writes an adapter into a slot, see SharedEngine.put; like `read`, it is called in a thread.
        let: lets a version in a slot answer requests, or (None) answer no longer, see OpenAI.let.
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
        self._slot: OrderedDict[str, int] = OrderedDict()  # the most recently used version comes last
        self._users: dict[str, int] = {}
        self._marks: dict[str, str] = {}  # marks of the versions in slots, which may have been deleted since
        self._turn = asyncio.Condition()

    @asynccontextmanager
    async def held(self, version: str | None) -> AsyncIterator[int]:
        """A version's slot, -1 for the base model; the slot is not written while it is held.

        Raises:
            NotFound: there is no such version.
            TimeoutError: other versions use all slots.
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
