"""A listener with a node behind it that only remembers whom it got, and a client that speaks raw bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from broker.config import Config, Limits, Server, parse_address
from broker.identity import Credentials, Identified, Identity
from broker.metrics import Metrics
from broker.net.addresses import Peer
from broker.net.handshake import Handshakes
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.net.listener import Listener
from broker.net.tls import Tls

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
"""The key of the example in RFC 6455, section 1.3."""
TIMEOUT = 10.0
"""Seconds after which a test that waits has failed."""


class Connection(asyncio.BufferedProtocol):
    """In place of the native connection.

    Like that one it has the attribute of a plain protocol: uvloop would keep the handshake's if there were none.
    """

    buffer = bytearray(65536)
    data_received = None

    def __init__(self, node: Node, transport: asyncio.Transport) -> None:
        self.node = node
        self.transport = transport
        self.received = b""

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]
        self.node.heard.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.node.established.remove(self)
        self.node.left.set()


class Taken(NamedTuple):
    """What a node was given."""

    upgrade_response: bytes
    rest: bytes
    peer: Peer
    window_bits: int


class Node:
    """In place of the node."""

    def __init__(self) -> None:
        self.draining = False
        self.metrics = Metrics()
        self.taken: list[Taken] = []
        self.identities: list[Identity | None] = []
        """Of those that were taken."""
        self.credentials: list[Credentials] = []
        """What it was asked about."""
        self.answers_later = False
        """Whether the test gives the answers about tokens."""
        self.answers: list[Callable[[Identified], None]] = []
        """What takes its answers."""
        self.established: list[Connection] = []
        self.heard = asyncio.Event()
        self.left = asyncio.Event()
        self.on_disconnect: Callable[[Peer], None] | None = None

    @property
    def tokens(self) -> list[str | None]:
        return [credentials.token for credentials in self.credentials]

    def peers(self) -> list[Peer]:
        return []

    @property
    def connections(self) -> int:
        return len(self.established)

    def identify(self, credentials: Credentials, done: Callable[[Identified], None]) -> None:
        self.credentials.append(credentials)
        if self.answers_later:
            self.answers.append(done)
        else:
            done(None)

    def connect(
        self,
        transport: asyncio.Transport,
        upgrade_response: bytes,
        rest: bytes,
        peer: Peer,
        window_bits: int = 0,
        identity: Identity | None = None,
    ) -> None:
        connection = Connection(self, transport)
        self.established.append(connection)
        self.identities.append(identity)
        self.taken.append(Taken(upgrade_response, rest, peer, window_bits))
        transport.set_protocol(connection)
        transport.write(upgrade_response)


class Reply(NamedTuple):
    """An answer in HTTP."""

    status: int
    headers: dict[str, str]
    body: str


class Client:
    """One connection, raw."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        """Everything up to and with the empty line."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), TIMEOUT)

    async def rest(self) -> bytes:
        """Everything until the other side says that nothing more comes. A reset is an error."""
        return await asyncio.wait_for(self.reader.read(), TIMEOUT)

    async def reply(self) -> Reply:
        """The answer, which must be the last thing on this connection and as long as it says."""
        head, _, body = (await self.rest()).partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return Reply(int(status.split()[1]), headers, body.decode())

    async def close(self) -> None:
        self.writer.close()
        try:
            await asyncio.wait_for(self.writer.wait_closed(), TIMEOUT)
        except OSError:
            return

    async def reset(self) -> None:
        """End the connection as a crash does, with a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()
        await self.close()


class Harness:
    """A listener, its handshakes with their limiter, and its node."""

    def __init__(self, handshakes: Handshakes, node: Node, listener: Listener) -> None:
        self.handshakes = handshakes
        self.limiter = handshakes.limiter
        self.node = node
        self.listener = listener
        self.clients: list[Client] = []

    @property
    def address(self) -> str:
        return self.listener.addresses[0]

    async def connect(self, address: str | None = None) -> Client:
        there = parse_address(address or self.address)
        if there.path:
            client = Client(*await asyncio.open_unix_connection(there.path))
        else:
            client = Client(*await asyncio.open_connection(there.host, there.port))
        self.clients.append(client)
        return client

    async def ask(self, request: bytes) -> Reply:
        """The answer to a request that is refused."""
        client = await self.connect()
        client.send(request)
        reply = await client.reply()
        await client.close()
        return reply

    async def ask_raw(self, request: bytes) -> bytes:
        """All bytes of the answer to a request that is refused."""
        client = await self.connect()
        client.send(request)
        answer = await client.rest()
        await client.close()
        return answer

    async def upgrade(self, request: bytes, address: str | None = None) -> Client:
        """A client whose request is accepted."""
        client = await self.connect(address)
        client.send(request)
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        return client


@asynccontextmanager
async def harness(
    listen: str = "127.0.0.1:0",
    *,
    capacity: Capacity | None = None,
    origins: list[str] | None = None,
    path: str = "/",
    open_timeout: float = TIMEOUT,
    tls: Tls | None = None,
    compression: bool = False,
    max_head: int = 16_384,
    **server: Any,
) -> AsyncIterator[Harness]:
    """A harness that listens, and is empty again at the end."""
    config = Config(
        server=Server(listen=[listen], origins=origins or [], path=path, compression=compression, **server),
        limits=Limits(open_timeout=open_timeout, max_head=max_head),
    )
    node = Node()
    limiter = ConnectionLimiter(config.limits, node, capacity or Capacity(1000, 100))
    handshakes = Handshakes(config, node, limiter, asyncio.get_running_loop())
    listener = Listener(handshakes, notsent_lowat=config.limits.notsent_lowat, tls=tls)
    await listener.open(parse_address(listen))
    opened = Harness(handshakes, node, listener)
    try:
        yield opened
    finally:
        listener.close()
        for client in opened.clients:
            await client.close()
        for connection in list(node.established):
            connection.transport.abort()
        handshakes.close()
        await handshakes.wait_empty(TIMEOUT)
        await until(lambda: not node.established)


async def until(condition: Callable[[], bool], timeout: float | None = None) -> None:
    """Let the loop turn until the condition holds, for things that tell nobody when they happen."""
    async with asyncio.timeout(TIMEOUT if timeout is None else timeout):
        while not condition():  # noqa: ASYNC110 -- see above
            await asyncio.sleep(0.001)


def request(
    line: str = "GET / HTTP/1.1", *more: str, without: str = "", host: str = "broker.example", key: str = KEY
) -> bytes:
    """A request for a WebSocket, with more header lines, and without one."""
    headers = [
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    kept = [header for header in headers if not without or not header.startswith(f"{without}:")]
    return "\r\n".join([line, *kept, *more, "", ""]).encode("latin-1")
