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
    `set_write_buffer_limits(high=0)` (uvloop/handles/stream.pyx and basetransport.pyx):

    - `pause_writing` comes within `write`, `resume_writing` and `connection_lost` come from the loop.
    - `close` with an empty buffer, and `abort` at any time, drop every later write without a word. `connection_lost`
      comes in the next turn of the loop. Until then the socket is open, so that who has its descriptor can send on it.
    - `close` with something in the buffer takes further writes until the buffer is empty. Then `resume_writing` comes
      first, and `connection_lost` in the turn after it.
    - A write after `write_eof`, and one after `connection_lost`, raise RuntimeError.
    """

    def __init__(self, loop: Loop) -> None:
        self.room: int | None = None
        self.received = bytearray()
        """What the client at the other end has read."""
        self.writes = 0
        """How often the connection has written."""
        self.reading = True
        """Whether the connection wants to read."""
        self.writing_ended = False
        """Whether the client has ended its direction of the connection (FIN)."""
        self.protocol: Any = None
        self.subscriptions: list[Subscription] = []
        """Kept here for a test that has no session to keep them."""
        self._loop = loop
        self._held = bytearray()
        self._paused = False
        self._closing = False
        self._lost = False  # what is written is dropped
        self._eof = False
        self._closed = False
        self._fin_waits = False

    # What the connection asks.

    def write(self, data: bytes | memoryview) -> None:
        """Take bytes; tell the connection to pause if not all of them fit."""
        if self._closed:
            raise RuntimeError("the handler is closed")
        if self._eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        self.writes += 1
        if self._lost:
            return
        self._held += data if self._held else bytes(data)[self._take(data) :]
        if self._held and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        """End this direction once all is written."""
        if self._closed:
            raise RuntimeError("the handler is closed")
        if not self._eof:
            self._eof = True
            if not self._held:
                self._shut_down()

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._closing

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
        """Nothing is ever held back on the way in, but for the client's FIN."""
        self.reading = True
        if self._fin_waits:
            self._loop.call_soon(self._read_fin)

    def close(self) -> None:
        """Close once all is written."""
        if self._closing:
            return
        self._closing = True
        if not self._held:
            self._lost = True
            self._loop.call_soon(self.lose)

    def abort(self) -> None:
        """Close now; the connection hears of it from the loop."""
        if not self._lost:
            self._closing = self._lost = True
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

    def end_writing(self) -> None:
        """Let the client end its direction of the connection (FIN). It still reads."""
        if not self.writing_ended:
            self.writing_ended = self._fin_waits = True
            if self.reading:
                self._read_fin()

    def lose(self) -> None:
        """Break down, or end after `close`."""
        self._closing = self._lost = True
        self._held.clear()
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)
        self._closed = True

    def vanish(self) -> None:
        """Let the other end be gone without a word."""
        self.abort()

    def discard(self) -> None:
        """Let go of what the transport holds of the system."""

    def _read_fin(self) -> None:
        if not self._fin_waits or self._closing or not self.reading:
            return
        self._fin_waits = False
        if not self.protocol.eof_received():
            self.close()

    def _go_on(self) -> None:
        if not self._held:
            return
        del self._held[: self._take(self._held)]
        if not self._held and not self._lost:
            self._loop.call_soon(self._written)

    def _written(self) -> None:
        if self._held or self._lost:
            return
        if self._paused:
            self._paused = False
            self.protocol.resume_writing()
        if self._held or self._lost:
            return
        if self._closing:
            self._loop.call_soon(self.lose)
        elif self._eof:
            self._shut_down()

    def _shut_down(self) -> None:
        """Nothing more is written; the client reads to the end."""

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

    small = True

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._ours, self._theirs = small_sockets() if self.small else sockets()

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

    def _shut_down(self) -> None:
        self._ours.shutdown(socket.SHUT_WR)

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


class RoomySocket(SlowSocket):
    """The same with a send buffer of the usual size: it takes all that one turn brings, unless that is very much."""

    small = False


class UvloopSocket(SlowSocket):
    """The same, and the transport is uvloop's."""

    def __init__(self, loop: UvloopTurns) -> None:
        self.received = bytearray()
        self.writing_ended = False
        self._turns = loop
        self._ours, self._theirs = small_sockets()
        opening: Any = loop.loop.create_unix_connection(asyncio.Protocol, sock=self._ours)
        self._transport, _ = loop.loop.run_until_complete(opening)

    def attach(self, connection: Connection, window_bits: int = 0) -> None:
        self.protocol = connection
        connection.start(self._transport, window_bits=window_bits)

    def drain(self, size: int | None) -> None:
        self.received += read(self._theirs, CHUNK if size is None else size)

    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())

    def end_writing(self) -> None:
        if not self.writing_ended:
            self.writing_ended = True
            self._theirs.shutdown(socket.SHUT_WR)

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


def sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


def small_sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends; what is sent on the first one soon has to wait."""
    ours, theirs = sockets()
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
        assert size < 128, "a server masks nothing"
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[place + 2 : place + head], "big")
        if len(data) < place + head + size:
            break
        payload = bytes(data[place + head : place + head + size])
        found.append((opcode, inflated(payload) if compressed else payload))
        place += head + size
    return found, place


def check_tail(tail: bytes | bytearray) -> None:
    """Check what stands behind the last whole frame of a stream, as far as it is not compressed: a frame that was cut,
    and nothing behind it."""
    assert tail.count(b'{"op":"') <= 1, "a frame follows one that was cut"


def inflated(payload: bytes) -> bytes:
    """The message of a compressed payload, which stands alone (RFC 7692, section 7.2.2)."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(payload + b"\x00\x00\xff\xff")
