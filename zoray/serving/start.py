"""Ray and Ray Serve under a server: started here, or joined."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zoray.cluster import Cluster, connect, leave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoray.serving.settings import Settings


@contextmanager
def started(settings: Settings) -> Iterator[str]:
    """The application, answering at the address that this yields, until the context is left."""
    owns = connect(Cluster(dashboard=settings.dashboard), print)
    own_ray = owns and not Cluster().joins
    try:
        from ray import serve

        from zoray.serving.app import APP, application
        from zoray.serving.placing import check_room

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it has to tell is said by zoray.serve

        if own_ray:
            check_room(settings)
        try:
            serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
            serve.run(application(settings), name=APP, route_prefix="/")
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            yield f"http://{host}:{settings.port}"
            serve.delete(APP)  # answers at hand have some seconds to end
        finally:
            if not own_ray:  # else Serve ends with Ray, without the error that its own shutdown has Ray print
                serve.shutdown()
    finally:
        leave(owns)
