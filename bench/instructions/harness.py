"""A node with clients but without a network: what the cases count is the code of the broker, not the kernel's.

A client is a transport whose socket is a UDP socket connected to one that nobody reads. The kernel takes every datagram
and throws away what does not fit, so a send always succeeds, at the price of a system call that callgrind does not
count. No datagram is longer than 65,507 bytes: a case keeps what it sends in one turn below that.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from broker import messages
from broker._speedups import Connection
from broker.config import Config, Limits, Server, TopicRule
from broker.engines.memory import MemoryEngine
from broker.net.addresses import UNKNOWN
from broker.node import Node

TEXT = 1
KEY = bytes(4)
"""A masking key that changes nothing, so that the same buffer can be read again and again."""
PADDING = "The quick brown fox jumps over the lazy dog, and so on. "


class Loop:
    """As much of an event loop as the data path asks for. A case flushes by itself, so what is to be called is dropped;
    by C code, so that it costs next to nothing."""

    def __init__(self) -> None:
        self.call_soon: Callable[..., object] = deque[object](maxlen=1).append

    def call_later(self, delay: float, callback: Callable[..., object]) -> None:
        """Time stands still."""


class Sink:
    """A socket that takes everything, as much of it as a connection asks for. Both ends close with the last user."""

    family = socket.AF_INET

    def __init__(self) -> None:
        with (
            socket.socket(self.family, socket.SOCK_DGRAM) as far,
            socket.socket(self.family, socket.SOCK_DGRAM) as near,
        ):
            far.bind(("127.0.0.1", 0))
            near.connect(far.getsockname())
            self._far, self._near = far.detach(), near.detach()

    def fileno(self) -> int:
        return self._near

    def __del__(self) -> None:
        os.close(self._near)
        os.close(self._far)


class Wire(asyncio.Transport):
    """A transport with a socket that takes everything."""

    def __init__(self) -> None:
        super().__init__({"socket": Sink()})

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is ever buffered."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Whom to call is known to the case."""

    def abort(self) -> None:
        """A socket that fails would make everything counted after it worthless."""
        raise RuntimeError("the socket of a case failed")


class Engine(MemoryEngine):
    """Without its sweep, for which there is no running loop here."""

    def begin_sweep(self) -> None:
        pass


class Harness:
    """One node and its clients, on the broker's defaults but for the keep-alive."""

    def __init__(self, *topics: TopicRule) -> None:
        self._wire = Wire()  # one for all clients
        limits = Limits(ping_interval=0)
        # Threads would share the work, by chance.
        config = Config(server=Server(threads=1), limits=limits, topics=list(topics))
        self.node = Node(config, Engine(), cast(asyncio.AbstractEventLoop, Loop()))
        self.node.context.command_time = 3600.0  # under callgrind everything takes long
        asyncio.run(self.node.engine.start(self.node.deliver, self.node.lost))
        self.context = self.node.context

    def connect(self) -> Connection:
        """A client that was told `welcome`."""
        self.node.connect(self._wire, b"", b"", UNKNOWN)
        return next(reversed(self.node.sessions.values())).connection

    def subscribe(self, topic: str, **options: Any) -> Connection:
        """A client that subscribed to a topic."""
        connection = self.connect()
        connection.feed(frame(messages.encode_command(messages.Subscribe(topic, **options))))
        self.context.flush()
        return connection

    def turns(self, connection: Connection, *payloads: bytes) -> Callable[[], None]:
        """Return a whole turn of the loop: these messages arrive by one read, and what came of them is sent.

        They stay in the receive buffer: nothing else may be read by `connection.buffer_updated`.
        """
        frames = b"".join(map(frame, payloads))
        buffer = connection.get_buffer(-1)
        if len(frames) > len(buffer):
            raise ValueError("more than one read takes")
        buffer[: len(frames)] = frames
        updated, flush, size = connection.buffer_updated, self.context.flush, len(frames)

        def turn() -> None:
            updated(size)
            flush()

        return turn


def frame(payload: bytes, opcode: int = TEXT, fin: bool = True) -> bytes:
    """One frame as a client sends it (RFC 6455, section 5.2)."""
    first = opcode | fin << 7
    size = len(payload)
    if size < 126:
        head = bytes([first, 0x80 | size])
    elif size < 65536:
        head = bytes([first, 0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([first, 0x80 | 127]) + size.to_bytes(8, "big")
    return head + KEY + payload


def text(size: int, alphabet: str = PADDING) -> bytes:
    """So many bytes of UTF-8, or a few less where the next character does not fit."""
    characters = (alphabet * (size // len(alphabet) + 1))[:size]
    return characters.encode()[:size].decode(errors="ignore").encode()


def publish(topic: str = "prices.eurusd", size: int = 128, id: int | None = None, key: str | None = None) -> bytes:
    """A publish command with `size` bytes of data, quotes included."""
    data = b'"' + text(size - 2) + b'"'
    fields = [b'{"op":"publish"']
    if id is not None:
        fields.append(b'"id":%d' % id)
    fields.append(b'"topic":"%s"' % topic.encode())
    if key is not None:
        fields.append(b'"key":"%s"' % key.encode())
    return b",".join([*fields, b'"data":' + data + b"}"])


def document(size: int) -> bytes:
    """A JSON array of about `size` bytes, with what a document usually has: objects, numbers, strings, escapes."""
    entry = b'{"id":184467,"name":"caf\\u00e9 \\"au lait\\"","price":1.0843e-2,"tags":["a","bc",null,true],"at":[1,-2]}'
    entries: Sequence[bytes] = [entry] * max(1, size // (len(entry) + 1))
    return b"[" + b",".join(entries) + b"]"
