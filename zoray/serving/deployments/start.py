"""Ray and Ray Serve under a server: started here, or joined."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zoray.pool.on_ray.cluster import connect, leave
from zoray.pool.settings import Cluster
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoray.serving.settings import Settings

# How Ray Serve's proxy answers when the gateway is gone. Ray reads the variable where the proxy runs.
PROXY = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "zoray.serving.deployments.proxy:middlewares")


@contextmanager
def started(settings: Settings) -> Iterator[str]:
    """Run the application until the context is left; yields its address."""
    on_term = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault(*PROXY)  # for Ray's processes
    owns = connect(Cluster(dashboard=settings.dashboard), print)
    signal.signal(signal.SIGTERM, on_term)  # Ray's handler ends in an abort while engines start
    own_ray = owns and not Cluster().joins
    try:
        from ray import serve

        from zoray.serving.deployments.application import APP, application
        from zoray.serving.deployments.devices import check_room

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # zoray.serve prints what matters

        if own_ray:
            check_room(settings)
        else:
            _check_free()
        try:
            _listen(settings)
            serve.run(application(settings), name=APP, route_prefix="/")
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            yield f"http://{host}:{settings.port}"
            if own_ray:
                serve.delete(APP)  # answers under way have some seconds to end
        finally:
            # In a Ray of our own, Serve ends with Ray, without the error that serve.shutdown makes Ray print.
            if not own_ray:
                serve.delete(APP)
                if not serve.status().applications:  # other people's
                    serve.shutdown()
    finally:
        leave(owns)


def _listen(settings: Settings) -> None:
    """Start Ray Serve. Its port was free when the command began; another program may have taken it since."""
    from ray import serve

    try:
        serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
    except RuntimeError as error:  # from the proxy's actor; Ray makes it one of its own errors as well
        if "Failed to bind" not in str(error):
            raise
        raise ConfigError(
            f"expected to listen on {settings.host}:{settings.port}; another program has taken it while the server "
            "started. Choose another serve.port"
        ) from None


def _check_free() -> None:
    """Raise ConfigError if Ray Serve already runs on a cluster that was joined: it listens at another address."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise ConfigError(
        "expected no Ray Serve on the cluster that was joined; there is one, whose address and port are not this "
        "server's. Deploy to it with `serve run zoray.serving:build`, or unset RAY_ADDRESS"
    )
