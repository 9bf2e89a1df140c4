"""The native connection on real sockets: a server of nothing else, and a client that sends what a test wants it to."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

from websockets.frames import Frame
from websockets.streams import StreamReader

from broker._speedups import Connection, LoopContext
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.messages import encode_gap
from tests.speedups.wire import THREADS

PATIENCE = 10.0
"""Seconds after which a test that waits has failed."""


class Peer:
    """The session of a connection in place of the broker's: it remembers, and may `do` something with a message."""

    def __init__(self, context: LoopContext) -> None:
        self.connection = Connection(context)
        self.connection.session = self
        self.messages: list[tuple[bytes, bool]] = []
        self.do: Callable[[bytes, bool], None] = lambda payload, text: None
        self.ends: list[tuple[int, str]] = []
        self.news = asyncio.Condition()

    def message(self, payload: bytes, text: bool) -> None:
        self.messages.append((payload, text))
        self.do(payload, text)
        self._tell()

    def on_close(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))
        self._tell()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true that comes with a message or the end."""
        async with asyncio.timeout(PATIENCE), self.news:
            await self.news.wait_for(condition)

    async def end(self) -> tuple[int, str]:
        """Wait until the connection takes part no more; code and reason, which are told once."""
        await self.until(lambda: bool(self.ends))
        (end,) = self.ends
        return end

    def _tell(self) -> None:
        self._task = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self.news:
            self.news.notify_all()


class Client:
    """The other end, which reads only when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader = StreamReader()
        self._parsing: Generator[None, None, Frame] | None = None

    @classmethod
    async def connect(cls, port: int, receive: int | None = None) -> Client:
        """Connect to loopback. `receive` is the size of the receive buffer in bytes."""
        sock = socket.socket()
        if receive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._loop.sock_sendall(self.sock, data)

    async def raw(self, size: int) -> bytes:
        """So many bytes as they are."""
        data = b""
        async with asyncio.timeout(PATIENCE):
            while len(data) < size:
                data += await self._loop.sock_recv(self.sock, size - len(data))
        return data

    async def frame(self) -> tuple[int, bytes] | None:
        """The next frame, which must be whole, unmasked and valid; None at the end. A reset is an error."""
        while True:
            if self._parsing is None:
                self._parsing = Frame.parse(self._reader.read_exact, mask=False)
            try:
                next(self._parsing)
            except StopIteration as done:
                self._parsing = None
                frame: Frame = done.value
                assert frame.fin
                return int(frame.opcode), bytes(frame.data)
            except EOFError:
                assert not self._reader.buffer, "the server stopped within a frame"
                return None
            async with asyncio.timeout(PATIENCE):
                data = await self._loop.sock_recv(self.sock, 65536)
            if data:
                self._reader.feed_data(data)
            else:
                self._reader.feed_eof()

    async def frames(self) -> list[tuple[int, bytes]]:
        """All frames until the end."""
        frames = []
        while (frame := await self.frame()) is not None:
            frames.append(frame)
        return frames

    def end_writing(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection as a crash does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Server:
    """Accepts connections and gives each to a native connection."""

    def __init__(self, context: LoopContext) -> None:
        self.context = context
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self.upgrade_response = b""
        self.clients: list[Client] = []
        self.port = 0

    async def connect(self, *, receive: int | None = None) -> tuple[Client, Peer]:
        """Both ends of a new connection. `receive` is the size of the client's receive buffer in bytes."""
        client = await Client.connect(self.port, receive)
        self.clients.append(client)
        async with asyncio.timeout(PATIENCE):
            return client, await self.accepted.get()

    async def until_empty(self) -> None:
        """Wait until the last connection is gone."""
        async with asyncio.timeout(PATIENCE):
            while self.context.connections:  # noqa: ASYNC110 -- a connection's last breath is told to nobody
                await asyncio.sleep(0.001)

    def accept(self) -> asyncio.Protocol:
        return _Accept(self)


class _Accept(asyncio.Protocol):
    """In place of the handshake."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = Peer(self.server.context)
        peer.connection.start(transport, self.server.upgrade_response)
        self.server.accepted.put_nowait(peer)


@asynccontextmanager
async def running(**limits: Any) -> AsyncIterator[Server]:
    """A server with these limits; at the end all its connections must go."""
    loop = asyncio.get_running_loop()
    context = LoopContext(loop, Limits(**limits), encode_gap=encode_gap, close_reasons=CLOSE_REASONS, threads=THREADS)
    context.shared_work = 0
    server = Server(context)
    server.context.start()
    listening = await loop.create_server(server.accept, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        for client in server.clients:
            client.close()
        listening.close()
        await server.until_empty()
        server.context.stop()
