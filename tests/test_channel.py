"""Sockets between driver and replicas: whole messages of any size, and nobody without the key gets in."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import TYPE_CHECKING

import pytest

from zoray import channel
from zoray.channel import Listener, connect
from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"


def nothing() -> None:
    """What `accept` calls while it waits."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener(HOST, 0)
    yield found
    found.close()


@pytest.mark.parametrize("size", [0, 1, 4 << 10, 40 << 10, 8 << 20])
def test_messages_of_any_size_go_both_ways(size, listener):
    with ThreadPoolExecutor() as threads:
        far = threads.submit(connect, listener.address, listener.key)
        near = listener.accept(nothing, 10)
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        for sender, receiver in ((near, far.result()), (far.result(), near)):
            sent = threads.submit(sender.send_bytes, message)
            assert receiver.recv_bytes() == message
            sent.result()


def test_messages_are_sent_at_once_and_a_lost_node_is_noticed(listener):
    with ThreadPoolExecutor() as threads:
        far = threads.submit(connect, listener.address, listener.key)
        for connection in (listener.accept(nothing, 10), far.result()):
            same = socket.socket(fileno=connection.fileno())
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == channel.KEEPALIVE["TCP_KEEPIDLE"]
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 8) == bytes(8)  # an answer may take hours
            same.detach()


def test_a_closed_end_is_noticed_at_once(listener):
    with ThreadPoolExecutor() as threads:
        far = threads.submit(connect, listener.address, listener.key)
        near = listener.accept(nothing, 10)
        far.result().close()
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
    with ThreadPoolExecutor() as pool:
        far = pool.submit(connect, listener.address, listener.key)
        listener.accept(nothing, 20).send_bytes(b"welcome")
        assert far.result().recv_bytes() == b"welcome"
    for thread in threads:
        thread.join()


def test_a_replica_with_another_key_is_told_so(listener):
    with ThreadPoolExecutor() as threads:
        refused = threads.submit(connect, listener.address, b"another run's")
        with pytest.raises(TimeoutError, match="nobody has connected"):
            listener.accept(nothing, 1.5)
        with pytest.raises(ConfigError, match=rf"expected the driver at {HOST}:{listener.address[1]}.*cluster.port"):
            refused.result()


def test_waiting_can_be_given_up(listener):
    def give_up() -> None:
        raise InterruptedError("the actor is gone")

    with pytest.raises(InterruptedError, match="gone"):
        listener.accept(give_up, 60)


def test_a_driver_that_is_not_there(listener):
    listener.close()
    with pytest.raises(ConfigError, match=r"expected the driver at .*[Rr]efused.*has to be open"):
        connect(listener.address, b"key")


def test_a_port_that_is_taken(listener):
    with pytest.raises(ConfigError, match=rf"expected to listen .*{listener.address[1]}.*cluster.port"):
        Listener(HOST, listener.address[1])
