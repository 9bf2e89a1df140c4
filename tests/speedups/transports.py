"""Transports that take as much as a test says, and what a client at their other end has read."""

from __future__ import annotations

import asyncio
import socket
import zlib
from asyncio import AbstractEventLoop
from typing import Any, Protocol

import uvloop

from broker._speedups import Connection, Subscription
from tests.speedups.turns import Loop
from tests.speedups.wire import client_frame

CHUNK = 65536
"""More than a socket with a small send buffer holds."""


class Turning(Protocol):
    """A loop that turns when a test says so."""

    def turn(self) -> None: ...
    def as_loop(self) -> AbstractEventLoop: ...


class SlowPipe:
    """A transport without a socket: the connection hands it everything, and it holds what its kernel does not take.

    `room` is how many bytes that kernel still takes, None for any number. It behaves as uvloop's transports do with
    `set_write_buffer_limits(high=0)`: `pause_writing` comes within `write`, `resume_writing` and `connection_lost` from
    the loop.
    """

    def __init__(self, loop: Loop) -> None:
        self.room: int | None = None
        self.received = bytearray()
        """What the client at the other end has read."""
        self.writes = 0
        """How often the connection has written."""
        self.reading = True
        """Whether the connection wants to read."""
        self.protocol: Any = None
        self.subscriptions: list[Subscription] = []
        """Kept here for a test that has no session to keep them."""
        self._loop = loop
        self._held = bytearray()
        self._paused = False
        self._ending = False
        self._lost = False

    # What the connection asks.

    def write(self, data: bytes | memoryview) -> None:
        """Take bytes; tell the connection to pause if not all of them fit."""
        self.writes += 1
        if self._lost:
            return
        self._held += data if self._held else bytes(data)[self._take(data) :]
        if self._held and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0
        assert low is None

    def pause_reading(self) -> None:
        """What the client sends comes all the same, as bytes do that were read before the pause."""
        self.reading = False

    def resume_reading(self) -> None:
        """Nothing is ever held back on the way in."""
        self.reading = True

    def close(self) -> None:
        """Close once all is written."""
        self._ending = True
        if not self._held:
            self.abort()

    def abort(self) -> None:
        """Close now; the connection hears of it from the loop."""
        if not self._lost:
            self._lost = True
            self._held.clear()
            self._loop.call_soon(self.lose)

    # What a test does.

    def attach(self, connection: Connection, window_bits: int = 0) -> None:
        """Let a connection take over."""
        connection.start(self, window_bits=window_bits)  # type: ignore[arg-type]  # it does what is asked of it

    def block(self) -> None:
        """Take nothing any more."""
        self.room = 0

    def drain(self, size: int | None) -> None:
        """Let the client read: there is room for `size` bytes more, for any number if it is None."""
        self.room = None if size is None or self.room is None else self.room + size
        self._go_on()

    def send(self, opcode: int, payload: bytes) -> None:
        """Let the client send one frame."""
        self.protocol.feed(client_frame(opcode, payload))

    def lose(self) -> None:
        """Break down, or end after `close`."""
        self._lost = True
        self._held.clear()
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)

    def vanish(self) -> None:
        """Let the other end be gone without a word."""
        self.abort()

    def discard(self) -> None:
        """Let go of what the transport holds of the system."""

    def _go_on(self) -> None:
        del self._held[: self._take(self._held)]
        if self._held or self._lost:
            return
        if self._paused:
            self._paused = False
            self._loop.call_soon(self._resume)
        if self._ending:
            self.abort()

    def _resume(self) -> None:
        if self.protocol is not None:
            self.protocol.resume_writing()

    def _take(self, data: bytes | bytearray | memoryview) -> int:
        size = len(data) if self.room is None else min(len(data), self.room)
        self.received += data[:size]
        if self.room is not None:
            self.room -= size
        return size


class SlowSocket(SlowPipe):
    """A transport with a real socket, whose send buffer is as small as the kernel allows: the connection sends on it
    directly, and hands over only what is left of a frame.

    What the client does not read fills the socket. It reads only in `drain`, so there is no `room` to be set, and
    `block` does nothing.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._ours, self._theirs = small_sockets()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._ours if name == "socket" else default

    def block(self) -> None:
        """Nothing is read until `drain`."""

    def drain(self, size: int | None) -> None:
        """Let the client read `size` bytes, or all that come if it is None."""
        if size is not None:
            self.received += read(self._theirs, size)
            self._go_on()
            return
        while data := read(self._theirs, CHUNK):
            self.received += data
            self._go_on()

    def lose(self) -> None:
        """Break down, or end after `close`; what was written before is still read."""
        super().lose()
        self._ours.close()
        while data := read(self._theirs, CHUNK):
            self.received += data
        self.discard()

    def vanish(self) -> None:
        """Let the other end be gone without a word: who writes finds out, so the transport does if it has to."""
        self._theirs.close()
        if self._held:
            self.abort()

    def discard(self) -> None:
        """Close both ends of the socket."""
        self._ours.close()
        self._theirs.close()

    def _take(self, data: bytes | bytearray | memoryview) -> int:
        sent = 0
        try:
            while sent < len(data):
                sent += self._ours.send(data[sent:])
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.abort()
        return sent


class UvloopSocket(SlowSocket):
    """The same, and the transport is uvloop's."""

    def __init__(self, loop: UvloopTurns) -> None:
        self.received = bytearray()
        self._turns = loop
        self._ours, self._theirs = small_sockets()
        opening: Any = loop.loop.create_unix_connection(asyncio.Protocol, sock=self._ours)
        self._transport, _ = loop.loop.run_until_complete(opening)

    def attach(self, connection: Connection, window_bits: int = 0) -> None:
        self.protocol = connection
        connection.start(self._transport, window_bits=window_bits)

    def drain(self, size: int | None) -> None:
        self.received += read(self._theirs, CHUNK if size is None else size)

    def lose(self) -> None:
        self._transport.abort()
        self._turns.turn()
        self.drain(None)
        self.protocol = None
        self.discard()

    def vanish(self) -> None:
        self._theirs.close()

    def discard(self) -> None:
        self._theirs.close()


class UvloopTurns:
    """uvloop's event loop."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()

    def turn(self) -> None:
        """Some turns: what comes of the first one's end takes some more."""
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    def as_loop(self) -> AbstractEventLoop:
        return self.loop


def small_sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends; what is sent on the first one soon has to wait."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return ours, theirs


def read(sock: socket.socket, size: int) -> bytes:
    """Read what is there; nothing at the end too."""
    try:
        return sock.recv(size) if sock.fileno() >= 0 else b""
    except (BlockingIOError, ConnectionResetError):
        return b""


def frames_in(data: bytes | bytearray, deflated: bool = False) -> tuple[list[tuple[int, bytes]], int]:
    """Cut what a server sent into its whole frames, as (opcode, payload), and say how many bytes they are.

    `deflated` says that texts may be compressed; they are inflated.
    """
    found: list[tuple[int, bytes]] = []
    place = 0
    while len(data) - place >= 2:
        opcode, size, head = data[place] & 0x0F, data[place + 1], 2
        compressed = data[place] == 0xC1 and deflated
        assert compressed or data[place] == 0x80 | opcode
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[place + 2 : place + head], "big")
        if len(data) < place + head + size:
            break
        payload = bytes(data[place + head : place + head + size])
        found.append((opcode, inflated(payload) if compressed else payload))
        place += head + size
    return found, place


def inflated(payload: bytes) -> bytes:
    """The message of a compressed payload, which stands alone (RFC 7692, section 7.2.2)."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(payload + b"\x00\x00\xff\xff")
