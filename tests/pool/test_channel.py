"""Sockets between driver and replicas: whole messages of any size, and nobody without the key gets in."""

from __future__ import annotations

import os
import queue
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import TYPE_CHECKING, ClassVar

import pytest

from zoray.pool import sockets as channel
from zoray.pool.sockets import Listener, connect
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

HOST = "127.0.0.1"


def arrivals(listener: Listener, seconds: float = 20.0) -> list[tuple[Connection, bytes]]:
    """Those who come within some seconds, at least one; none if nobody does."""
    end = time.monotonic() + seconds
    while select.select([listener], [], [], max(0, end - time.monotonic()))[0]:
        if found := listener.arrivals():  # a ring may be left from before
            return found
    return []


def pair(listener: Listener) -> tuple[Connection, Connection]:
    """(driver's end, replica's end)."""
    far = connect(listener.address, listener.key)
    far.send_bytes(b"hello")
    ((near, hello),) = arrivals(listener)
    assert hello == b"hello"
    return near, far


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener(HOST, 0)
    yield found
    found.close()


@pytest.mark.parametrize("size", [0, 1, 4 << 10, 40 << 10, 8 << 20])
def test_messages_of_any_size_go_both_ways(size, listener):
    with ThreadPoolExecutor() as threads:
        near, far = pair(listener)
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        for sender, receiver in ((near, far), (far, near)):
            sent = threads.submit(sender.send_bytes, message)
            assert receiver.recv_bytes() == message
            sent.result()


def test_messages_are_sent_at_once_and_a_lost_node_is_noticed(listener):
    near, far = pair(listener)
    for connection, seconds in (
        (near, channel.STUCK_SECONDS),
        (far, 0),
    ):  # the driver may have nothing to say for hours
        same = socket.socket(fileno=connection.fileno())
        assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == channel.KEEPALIVE["TCP_KEEPIDLE"]
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 8)[0] == seconds
        same.detach()


def test_a_message_that_stops_in_the_middle_does_not_hold_the_driver(listener, monkeypatch):
    monkeypatch.setattr(channel, "STUCK_SECONDS", 1)
    near, far = pair(listener)
    os.write(far.fileno(), struct.pack("!i", 1000) + b"the beginning")
    with pytest.raises(OSError):
        near.recv_bytes()


def test_a_closed_end_is_noticed_at_once(listener):
    near, far = pair(listener)
    far.close()
    with pytest.raises(EOFError):
        near.recv_bytes()


def stranger(kind: str, address: tuple[str, int]) -> None:
    """Somebody without the key: silent, noisy, gone at once, or a program that has another key."""
    if kind == "other key":
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            Client(address, authkey=b"guess")
        return
    peer = socket.create_connection(address)
    if kind == "noisy":
        peer.sendall(b"GET / HTTP/1.1\r\nHost: zoray\r\n\r\n" + b"\xff" * 4096)
    if kind != "gone":
        time.sleep(2.5)
    peer.close()


@pytest.mark.parametrize("kind", ["silent", "noisy", "gone", "other key"])
def test_strangers_are_dropped_and_replicas_still_get_in(kind, listener, monkeypatch):
    monkeypatch.setattr(channel, "PROOF_SECONDS", 1)
    threads = [threading.Thread(target=stranger, args=(kind, listener.address)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    near, far = pair(listener)
    near.send_bytes(b"welcome")
    assert far.recv_bytes() == b"welcome" and time.monotonic() - began < 0.9  # nobody waits for strangers
    for thread in threads:
        thread.join()


def test_a_replica_that_nobody_has_taken_is_let_go_when_the_listener_closes(listener):
    far = connect(listener.address, listener.key)
    far.send_bytes(b"hello")
    assert select.select([listener], [], [], 20)[0]
    listener.close()
    assert far.poll(20)
    with pytest.raises(EOFError):
        far.recv_bytes()


class Counted(channel.Connection):
    """Counts how often it is closed: a second time may close a descriptor that another has been given since."""

    every: ClassVar[list[Counted]] = []

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.closes = 0
        self.every.append(self)

    def close(self) -> None:
        self.closes += 1
        super().close()


class SlowQueue(queue.SimpleQueue):
    """Holds a thread up between handing a connection over and ringing."""

    def __init__(self) -> None:
        super().__init__()
        self.put_once = threading.Event()

    def put(self, *args, **options) -> None:
        super().put(*args, **options)
        self.put_once.set()
        time.sleep(0.5)


@pytest.mark.parametrize("moment", ["handed over", "being handed over", "still proving itself"])
def test_a_replica_that_comes_while_the_listener_closes_is_closed_once(moment, listener, monkeypatch):
    monkeypatch.setattr(Counted, "every", [])
    monkeypatch.setattr(channel, "Connection", Counted)
    if moment == "being handed over":
        listener._come = SlowQueue()
    far = connect(listener.address, listener.key)
    if moment != "still proving itself":
        far.send_bytes(b"hello")
        if moment == "handed over":
            assert select.select([listener], [], [], 20)[0]
        else:
            assert listener._come.put_once.wait(20)
    listener.close()
    if moment == "still proving itself":
        far.send_bytes(b"hello")
    assert far.poll(20)
    with pytest.raises(EOFError):
        far.recv_bytes()
    time.sleep(1)  # whoever would close it again has had the time to
    assert [one.closes for one in Counted.every if one is not far] == [1]


def test_a_listener_closes_in_the_middle_of_a_crowd():
    """A served job that had ended well was marked as failed: two threads closed one connection (EBADF)."""
    for _ in range(20):
        listener = Listener(HOST, 0)
        with ThreadPoolExecutor(8) as threads:
            tries = [threads.submit(connect, listener.address, listener.key) for _ in range(8)]
            time.sleep(0.005)
            for near, _ in listener.arrivals():
                near.close()
            listener.close()
            for one in tries:
                with suppress(ConfigError):  # came too late
                    one.result().close()


def test_replicas_are_found_where_nobody_has_listened_to_the_bell(listener):
    with pytest.raises(BlockingIOError):
        while True:
            listener._ringer.send(b"!" * 64)
    for _ in range(2):
        pair(listener)


def test_a_limit_that_is_refused_leaves_the_connection_to_its_owner(listener):
    near, far = pair(listener)
    with pytest.raises(struct.error):
        channel._limit(near, 1 << 63)
    near.send_bytes(b"still here")
    assert far.recv_bytes() == b"still here"


def test_a_replica_with_another_key_is_told_so(listener):
    with pytest.raises(ConfigError, match=rf"expected the driver at {HOST}:{listener.address[1]}.*cluster.port"):
        connect(listener.address, b"another run's")
    assert arrivals(listener, 0.5) == []


def test_a_driver_that_is_not_there(listener):
    listener.close()
    with pytest.raises(ConfigError, match=r"expected the driver at .*[Rr]efused.*must be open"):
        connect(listener.address, b"key")


def test_a_port_that_is_taken(listener):
    with pytest.raises(ConfigError, match=rf"expected to listen .*{listener.address[1]}.*cluster.port"):
        Listener(HOST, listener.address[1])
