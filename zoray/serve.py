"""`python -m zoray.serve`: answer requests, and learn from private data in between. Settings: conf/serve.yaml."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path
from typing import Any

from zoray.records import ConfigError
from zoray.records.process.stopping import stops
from zoray.run.config import run_main
from zoray.serving.learning.versions import check_live
from zoray.serving.settings import Settings, settings_of
from zoray.serving.store import Store, claim


def main(config: Any) -> int:
    """Check the settings, start the server, and serve until SIGTERM, SIGHUP or Ctrl-C."""
    settings = settings_of(config)
    key = settings.key  # refused before anything is started
    _check_port(settings.host, settings.port)
    check_model(settings)
    folder = Path(settings.folder)
    with claim(folder, lock=".server"):  # while this command runs, so that a second one is refused at once
        with claim(folder):  # the tuner holds it from here on
            check_live(Store(settings.folder, clear=False), settings)
        return _serve(settings, key)


def _serve(settings: Settings, key: str | None) -> int:
    """Start the server, and serve until a signal comes."""
    up, ended, stopping = threading.Event(), threading.Event(), stops()

    def stop(number: int, frame: object) -> None:
        again = ended.is_set() and number != signal.SIGHUP  # a shell and the system may both send SIGHUP
        if not up.is_set() or again:  # while starting, or on a second signal: at once
            raise KeyboardInterrupt
        ended.set()

    def listen() -> None:
        for number in stopping:
            signal.signal(number, stop)

    listen()
    from zoray.serving.deployments.start import started

    with started(settings) as address:
        up.set()
        listen()  # Ray has replaced the handler of SIGTERM by its own
        print(f"{settings.name} at {address}/v1 (OpenAI's API), page: {address}/", flush=True)
        if key is not None:
            print("requests need the key of ZORAY_API_KEY", flush=True)
        ended.wait()
        print("stopping; jobs continue when the server is restarted", flush=True)
    return 0


def check_model(settings: Settings) -> None:
    """Raise ConfigError unless the model is there (it is fetched or made now) and has the matrices to adapt.

    If jobs learn by feedback, its family must be one that feedback supports.
    """
    from zoray.engines.feedback.residual import family_of
    from zoray.models.folder import linear_matrices

    folder = settings.model.resolve()
    chosen = settings.space.select(linear_matrices(folder, settings.space.targets))
    if settings.estimator.guided:
        family_of(folder, chosen)


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"expected to listen on {host}:{port}; {error.strerror}. Choose another serve.port"
            ) from None


if __name__ == "__main__":
    run_main("serve", main)
