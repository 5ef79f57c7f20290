"""Ray Serve's replicas listen for each other on all of a machine's addresses, and unpickle what they are sent.

Ray's token guards them where Ray asks for one; nobody else is to reach them at all. Calls between them are actors'
calls as long as Serve is not told otherwise, so that nothing needs these ports.
"""

from __future__ import annotations

from typing import Any


def listen_here_only() -> None:
    """Let the replica in this process listen on 127.0.0.1; to be called by its constructor, before it listens.

    Raises:
        RuntimeError: this version of Ray does it in another way.
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
