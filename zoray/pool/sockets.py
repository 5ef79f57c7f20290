"""Sockets between the driver and its replicas: whole messages, between processes that hold the run's key.

`multiprocessing.connection` frames the messages and lets both ends prove, before anything is unpickled, that they hold
the same key; Ray carries the key to the actors. A round trip takes 0.1 ms of a core, where an actor call takes several
and one through a compiled graph 1 to 2 (docs/results). Messages are neither encrypted nor signed, as between Ray's own
processes: the network between nodes must be private.
"""

from __future__ import annotations

import queue
import secrets
import socket
import struct
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from zoray.records import ConfigError

PROOF_SECONDS = 10  # for the other end to prove the key; a port scanner proves nothing
CONNECT_SECONDS = 60
STUCK_SECONDS = 60  # without a byte in mid-message: the other end has been stopped or cut off
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # seconds, seconds, count: a lost node in 11 s


class Listener:
    """The driver's end, where replicas connect throughout the run.

    Each connection proves its key in its own thread, so that none keeps the driver or the others waiting.

    Args:
        host: the address to listen on; 127.0.0.1 where all replicas are on this machine.
        port: 0 takes a free one.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"expected to listen for replicas on {host}:{port}; {error}. Choose another cluster.port, or 0"
            ) from error
        self.address: tuple[str, int] = (host, self._socket.getsockname()[1])
        self.key = secrets.token_bytes(32)
        self._come: queue.SimpleQueue[tuple[Connection, bytes]] = queue.SimpleQueue()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._handing_over = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="zoray-listener", daemon=True).start()

    def fileno(self) -> int:
        """Readable when a replica has connected, see `arrivals`."""
        return self._bell.fileno()

    def arrivals(self) -> list[tuple[Connection, bytes]]:
        """New connections since the last call that hold the key, each with its first message.

        A read or write on one fails after STUCK_SECONDS if the other end stops in mid-message.
        """
        with suppress(BlockingIOError):
            while self._bell.recv(1024):
                pass
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._come.get_nowait())
        return found

    def close(self) -> None:
        """Accept no more connections; those already handed out stay open, waiting ones are closed."""
        with self._handing_over:
            self._closed = True  # from here on, a connection still proving its key is closed by its own thread
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a mere close does not
        for end in (self._socket, self._bell, self._ringer):
            end.close()
        with suppress(queue.Empty):
            while True:  # else they would wait for ever
                self._come.get_nowait()[0].close()

    def _accept(self) -> None:
        while True:
            try:
                peer = self._socket.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._admit, args=(peer,), daemon=True).start()

    def _admit(self, peer: socket.socket) -> None:
        connection = _open(peer)
        try:
            _limit(connection, PROOF_SECONDS)
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            first = connection.recv_bytes()
            _limit(connection, STUCK_SECONDS)
        except (AuthenticationError, EOFError, OSError, AssertionError):  # silent, gone, or another program
            connection.close()
            return
        # One thread closes a connection, never two: the second might close a descriptor that has since been reused.
        with self._handing_over:
            if not self._closed:
                self._come.put((connection, first))
                with suppress(BlockingIOError):  # the pipe is full of unread rings: one is enough
                    self._ringer.send(b"!")
                return
        connection.close()


def connect(address: tuple[str, int], key: bytes) -> Connection:
    """A replica's end.

    Raises:
        ConfigError: the driver can't be reached, or belongs to another run.
    """
    host, port = address
    try:
        connection = _open(socket.create_connection(address, timeout=CONNECT_SECONDS))
        _limit(connection, CONNECT_SECONDS)  # the driver may be busy with others
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        _limit(connection, 0)
        return connection
    except (AuthenticationError, EOFError, OSError, AssertionError) as error:
        raise ConfigError(
            f"expected the driver at {host}:{port}, where its replicas connect; {error or type(error).__name__}. "
            "This port must be open between the nodes of a cluster; cluster.port=... sets it"
        ) from error


def _open(peer: socket.socket) -> Connection:
    """A socket as a message connection: sends at once, and the kernel closes it when the other node is lost."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS has other names for them
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(peer.detach())


def _limit(connection: Connection, seconds: int) -> None:
    """Make reads and writes fail after `seconds`; 0 means never."""
    same = socket.socket(fileno=connection.fileno())
    try:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
    finally:
        same.detach()  # still the connection's, which closes it
