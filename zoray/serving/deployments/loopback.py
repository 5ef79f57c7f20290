"""Keeps Ray Serve's replicas on loopback: they listen on all of a machine's addresses, and unpickle what they receive.

Ray's token guards them where Ray asks for one; no other machine should reach them at all. By default Serve's replicas
call each other as actors, so nothing needs these ports.
"""

from __future__ import annotations

from typing import Any


def listen_here_only() -> None:
    """Make the replica in this process listen on 127.0.0.1; its constructor must call this, before it listens.

    Raises:
        RuntimeError: this version of Ray works differently.
    """
    from ray.serve._private import constants, replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT or getattr(bind, "here_only", False):
        return
    if bind is None:
        raise RuntimeError("expected ray.serve._private.replica.add_port_to_grpc_server; this version of Ray has none")

    def bind_here(server: Any, address: str) -> int:
        return bind(server, address.replace("[::]", "127.0.0.1").replace("0.0.0.0", "127.0.0.1"))

    bind_here.here_only = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = bind_here  # pyright: ignore[reportPrivateImportUsage]
