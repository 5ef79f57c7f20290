"""The application: gateway, tuner and engines as Ray Serve deployments, and how they are started."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from traceback import format_tb
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError

from zoray.engines.shared.openai import EngineGone
from zoray.models.folder import linear_matrices, load_tokenizer
from zoray.records import ConfigError, disk
from zoray.run.config import compose
from zoray.serving.deployments.devices import gpus
from zoray.serving.deployments.engine import EngineServer
from zoray.serving.deployments.logs import keep_log
from zoray.serving.deployments.loopback import listen_here_only
from zoray.serving.http.routes import Refused, build_app
from zoray.serving.learning.tuner import Tuner
from zoray.serving.settings import settings_of
from zoray.serving.store import NotFound, claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from zoray.serving.settings import Settings

log = logging.getLogger(__name__)
APP = "zoray"  # the application's name in Ray Serve
LIVE = "live"  # the model name that stands for the current live version
MEASURE_SECONDS = 600.0  # how long a failing measurement is repeated: engines take a while to start
START_SECONDS = 30.0  # how long a request waits for a tuner that has never answered
LOST_SECONDS = 5.0  # how long a call to the tuner is waited for
LOOK_SECONDS = 0.5  # between questions to the tuner about the live version
TAKEOVER_SECONDS = 60.0  # how long the previous tuner may take to end
AT_ONCE = 64  # requests that an engine answers at the same time
MOST_WAITING = 512  # requests waiting besides those being answered; further ones are told to try again
QUIET = {"enable_access_log": False}  # engines ask the tuner twice a second


class TunerServer:
    """The tuner as a deployment of one replica; its calls run in threads, since they read and write files."""

    def __init__(self, settings: Settings) -> None:
        listen_here_only()
        keep_log(settings.folder, "tuner")
        self._claim = claim(Path(settings.folder), TAKEOVER_SECONDS)
        self.tuner = Tuner(settings, self._measure)
        self._engine: Any = None
        # Slow imports, before any request waits for them; and in one thread: transformers' own are not thread-safe.
        load_tokenizer(settings.model.resolve())
        linear_matrices(settings.model.resolve())
        import datasets  # noqa: F401

        self.tuner.start()

    async def call(self, name: str, *arguments: Any) -> tuple[str | None, str, Any]:
        """(kind of error or None, its text, result): an exception would reach the gateway as one of Ray's."""
        if not hasattr(getattr(self.tuner, name, None), "public"):
            return "ConfigError", f"there is no {name}", None
        try:
            return None, "", await asyncio.to_thread(getattr(self.tuner, name), *arguments)
        except NotFound as error:
            return "NotFound", str(error), None
        except ConfigError as error:
            return "ConfigError", self.tuner.plainly(str(error)), None
        except OSError as error:
            if not disk.refuses(error):
                raise
            log.warning("%s: %s", name, error)
            return "OSError", "", (error.errno, error.strerror, error.filename)
        except Exception as error:  # its text may hold what people have written
            log.error("%s in %s:\n%s", type(error).__name__, name, "".join(format_tb(error.__traceback__)))
            raise

    async def where(self) -> Any:
        """See Tuner.where."""
        return self.tuner.where()

    def _measure(self, stopping: Callable[[], bool], version: str | None, dev: bool = True) -> Any:
        """Measure with any engine that has the job's data, however long it is busy; if it dies, another one is asked.

        Raises:
            ConfigError: from the engine (NotFound: the version has been deleted).
            KeyboardInterrupt: the job should stop.
        """
        asked, failing = None, None
        while not stopping():
            try:
                if self._engine is None:
                    self._engine = serve.get_deployment_handle("Engine", app_name=APP)
                asked = asked or self._engine.measure.remote(version, dev)
                return asked.result(timeout_s=1.0)
            except RayTaskError as error:  # before TimeoutError: the engine's own is both
                if isinstance(error.cause, ConfigError):
                    raise error.cause from None
                failed = error
            except TimeoutError:  # still at work; Ray's TimeoutError is a RayError as well
                continue
            except (RayError, RuntimeError) as error:
                failed = error
            asked, failing = None, failing or time.monotonic()
            if time.monotonic() - failing > MEASURE_SECONDS:
                raise failed
            time.sleep(1.0)
        if asked is not None:
            asked.cancel()
        raise KeyboardInterrupt


class Calls:
    """The tuner's calls for the gateway: `await calls.jobs()`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            kind, text, result = await self._handle.call.remote(name, *arguments)
            if kind == "OSError":
                raise OSError(*result)
            if kind is not None:
                raise (NotFound if kind == "NotFound" else ConfigError)(text)
            return result

        return call


class Gateway:
    """What the HTTP routes act on."""

    def __init__(self, settings: Settings, key: str | None, engine: Any, tuner: Any) -> None:
        listen_here_only()
        keep_log(settings.folder, "gateway")
        self.settings, self.key = settings, key
        self._engine, self.tuner = engine, Calls(tuner)
        self._live: str | None = None
        self._names: list[str] = []
        self._changes = 0  # changes of the live version by requests to this gateway
        self._looking: asyncio.Task[None] | None = None
        self._seen = asyncio.Event()  # the tuner has named the live version at least once
        self._ready = False
        self._answering = 0
        self._most = AT_ONCE * settings.replicas + MOST_WAITING

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve's hook for an app whose routes belong to an object."""
        return build_app(self)

    async def ready(self) -> bool:
        """Whether an engine has come up."""
        if not self._ready:
            with suppress(RayError, TimeoutError):
                self._ready = await asyncio.wait_for(self._engine.ready.remote(), 1.0)
        return self._ready

    async def names(self) -> list[str]:
        """The model names that requests may use: the base, `live`, and each version."""
        await self._look()
        return [self.settings.name, LIVE, *self._names]  # type: ignore[list-item]

    async def resolve(self, model: Any) -> str | None:
        """The version that answers a request, None for the base model; fixed from here on."""
        if model == self.settings.name:
            return None
        if self._looking is None:
            self._looking = asyncio.create_task(self._keep_looking())
        try:
            await asyncio.wait_for(self._seen.wait(), START_SECONDS)
        except TimeoutError:
            raise Refused(503, "the live version is not known yet; try again soon") from None
        if model in (None, "", LIVE):
            return self._live
        if model not in self._names:
            await self._look()
        if model not in self._names:
            raise Refused(404, f"The model `{str(model)[:100]}` does not exist.", "model")
        return model

    async def promote(self, version: str) -> dict[str, Any]:
        """Make a version (or the base model, by its name) live from now on."""
        chosen = None if version == self.settings.name else version
        await self.tuner.promote(chosen)
        self._live, self._changes = chosen, self._changes + 1
        return {"live": chosen}

    def forget(self) -> None:
        """All versions are gone."""
        self._live, self._names, self._changes = None, [], self._changes + 1

    async def answer(self, kind: str, body: dict[str, Any], version: str | None) -> AsyncIterator[Any]:
        """An engine's answer; if it dies before it has said anything, another engine is asked."""
        if self._answering >= self._most:
            raise Refused(503, "too many requests are waiting already; try again in a few seconds")
        self._answering += 1
        try:
            async for part in self._answer(kind, body, version):
                yield part
        finally:
            self._answering -= 1

    async def _answer(self, kind: str, body: dict[str, Any], version: str | None) -> AsyncIterator[Any]:
        for pause in (0.0, 3.0, 10.0):
            said = False
            await asyncio.sleep(pause)
            try:
                async for part in self._engine.options(stream=True).answer.remote(kind, body, version):
                    said = True
                    yield part
                return
            except RayError as error:
                wrong = isinstance(error, RayTaskError) and not isinstance(error.cause, EngineGone)
                if said or wrong or pause == 10.0:
                    raise

    async def _look(self) -> None:
        """Ask the tuner which version is live; while the tuner restarts, the last answer counts."""
        changes = self._changes
        with suppress(RayError, TimeoutError):
            found = await asyncio.wait_for(self.tuner.answering(), LOST_SECONDS)
            if changes == self._changes:  # else the answer may be outdated
                self._live, self._names = found["live"], found["names"]
                self._seen.set()

    async def _keep_looking(self) -> None:
        """Poll the tuner: a promoted version answers within a second, and no request waits for the tuner."""
        while True:
            try:
                await self._look()
            except Exception as error:  # this loop must last as long as the gateway
                log.warning("the tuner did not name the live version: %s", type(error).__name__)
            await asyncio.sleep(LOOK_SECONDS)


def application(settings: Settings) -> Any:
    """The Serve application."""
    deployment: Any = serve.deployment  # its types know plain functions only
    tuner = deployment(TunerServer).options(
        name="Tuner", num_replicas=1, max_ongoing_requests=64, logging_config=QUIET, ray_actor_options={"num_cpus": 0}
    )
    engine = deployment(EngineServer).options(
        name="Engine",
        num_replicas=settings.replicas,
        max_ongoing_requests=AT_ONCE,
        logging_config=QUIET,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus(settings)},
    )
    gateway = deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=2 * (AT_ONCE * settings.replicas + MOST_WAITING),  # room for the page, health and rollback
        logging_config=QUIET,  # paths hold names that people have given
        ray_actor_options={"num_cpus": 0},
    )
    tuned = tuner.bind(settings)
    return gateway.bind(settings, settings.key, engine.bind(settings, tuned), tuned)


def build(arguments: dict[str, Any]) -> Any:
    """The Serve application for a Serve config file (`import_path: zoray.serving:build`) and `serve run`.

    `arguments` are settings of conf/serve.yaml as on the command line of zoray.serve, {"serve.replicas": 2}, or nested,
    {"serve": {"replicas": 2}}. They come from the cluster's owner. Serve's own proxies listen, usually on all
    addresses: without serve.host=127.0.0.1 a key is needed.

    Raises:
        ConfigError: a setting is invalid.
    """
    given = {"serve.host": "0.0.0.0", **_flat(arguments)}
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return application(settings_of(compose("serve", overrides)))


def _flat(arguments: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{parent}{key}.") if inner else {f"{parent}{key}": value}
    return found
