"""A node behind a real listener, in the process of the test, so that a test can look inside; and clients for it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode

from broker.auth.authenticator import Authenticator
from broker.config import Config, Limits, Server, TopicRule, parse_address
from broker.engines.base import Engine
from broker.engines.memory import MemoryEngine
from broker.net.handshake import Handshakes
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.net.listener import Listener
from broker.net.tls import Tls
from broker.node import Node
from broker.session import Session
from tests.fixtures_certificates import Pair, loaded, trusting
from tests.net.harness import request, until

PATIENCE = 30.0
"""Seconds after which a test that waits has failed."""


@asynccontextmanager
async def serving(
    engine: Engine | None = None,
    *,
    pair: Pair | None = None,
    server: Server | None = None,
    block: Any = "local",
    topics: Sequence[TopicRule] = (),
    authenticator: Authenticator | None = None,
    **limits: Any,
) -> AsyncIterator[Harness]:
    """A node that serves on loopback, or as `server` says, under `limits` other than the defaults, with a certificate
    by TLS. At the end nothing is left of anybody."""
    server = server or Server(listen=["127.0.0.1:0"], block=block)
    config = Config(server=server, limits=Limits(**limits), topics=list(topics))
    loop = asyncio.get_running_loop()
    node = Node(config, engine or MemoryEngine(), loop, authenticator or Authenticator())
    limiter = ConnectionLimiter(config.limits, node, Capacity(1000, 100))
    handshakes = Handshakes(config, node, limiter, loop)
    tls = None if pair is None else Tls(loaded(pair, server.client_ca))
    listener = Listener(handshakes, notsent_lowat=config.limits.notsent_lowat, tls=tls)
    await node.start()
    await listener.open(parse_address(server.listen[0]))
    harness = Harness(node, listener.addresses[0], None if pair is None else trusting(pair))
    harness.handshakes = handshakes
    try:
        yield harness
    finally:
        listener.close()
        await asyncio.gather(*(client.close() for client in harness.clients))
        handshakes.close()
        await handshakes.wait_empty(PATIENCE)
        await until(lambda: not node.connections)
        await node.stop()
    assert node.sessions == {}
    assert len(node.identities) == 0
    assert node.hub.filters == 0
    assert node.context.subscriptions == 0
    assert node.context.queued == 0


class Harness:
    """A node, and who is connected to it."""

    handshakes: Handshakes

    def __init__(self, node: Node, address: str, context: ssl.SSLContext | None = None) -> None:
        self.node = node
        self.address = address
        self.context = context
        """What clients trust, where the node speaks TLS."""
        self.clients: list[Client | DeafClient] = []

    @property
    def url(self) -> str:
        return f"{'ws' if self.context is None else 'wss'}://{self.address}/"

    async def connect(self, token: str | None = None, **options: Any) -> Client:
        """A client that has been welcomed; it shows a token in a header. `options` are for websockets."""
        if token is not None:
            options["additional_headers"] = {"Authorization": f"Bearer {token}"}
        unlimited: dict[str, Any] = {"max_size": None, "max_queue": None}
        options = {"ssl": self.context, "proxy": None, "compression": None, **unlimited, **options}
        client = Client(await connect(self.url, **options))
        self.clients.append(client)
        client.welcome = await client.next()
        assert client.welcome["op"] == "welcome"
        return client

    async def subscriber(self, *topics: str, **fields: Any) -> Client:
        """A client that is subscribed to these."""
        client = await self.connect()
        for topic in topics:
            assert (await client.ask("subscribe", topic=topic, **fields))["op"] == "ok"
        return client

    async def deaf(self) -> DeafClient:
        """A client that has been welcomed, and reads nothing unless it is told to."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        host, _, port = self.address.rpartition(":")
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        client = DeafClient(sock)
        self.clients.append(client)
        await client.send_raw(request(host=self.address))
        head, _, rest = (await client.until(b'"op":"welcome"', b"}")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        welcome = rest[rest.index(b'{"op"') :].decode("latin-1")  # a ping may follow it
        client.session = json.JSONDecoder().raw_decode(welcome)[0]["session"]
        return client

    def session(self, client: Client | DeafClient) -> Session:
        """The node's side of a client."""
        return self.node.sessions[client.session]


class Client:
    """A WebSocket client that tells the answers to its own questions from all the rest, which stays in order."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.welcome: dict[str, Any] = {}
        self._rest: deque[str] = deque()
        self._ids = 1_000_000

    @property
    def session(self) -> str:
        return str(self.welcome["session"])

    async def send(self, command: str | bytes) -> None:
        """Send a message as it stands."""
        await self.socket.send(command)

    async def tell(self, op: str, **fields: Any) -> None:
        """Send a command."""
        await self.send(json.dumps({"op": op, **fields}))

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a command with an id of its own, and return the answer, without the id."""
        self._ids += 1
        await self.tell(op, **fields, id=self._ids)
        return await self.answer(self._ids)

    async def answer(self, id: int | str) -> dict[str, Any]:
        """The answer with this id, without it. What else comes is kept for `next`."""
        while True:
            text = await self._receive()
            message: dict[str, Any] = json.loads(text)
            if message.get("id") == id and message["op"] in ("ok", "error", "pong"):
                del message["id"]
                return message
            self._rest.append(text)

    async def text(self) -> str:
        """The next message that was no answer to `ask`, as it came."""
        return self._rest.popleft() if self._rest else await self._receive()

    async def next(self) -> dict[str, Any]:
        """The same, decoded."""
        message: dict[str, Any] = json.loads(await self.text())
        return message

    async def data(self, count: int) -> list[Any]:
        """What the next `count` messages hold, all of which must be events."""
        messages = [await self.next() for _ in range(count)]
        assert {message["op"] for message in messages} <= {"event"}, messages
        return [message["data"] for message in messages]

    async def nothing(self) -> None:
        """All that was sent to this client by now has been taken by the test."""
        assert (await self.ask("ping")) == {"op": "pong"}
        assert list(self._rest) == []

    async def closed(self) -> Close | None:
        """The close frame that ends the connection. What came before it is kept; None if there was none."""
        try:
            while True:
                self._rest.append(await self._receive())
        except ConnectionClosed as closed:
            return closed.rcvd

    async def remaining_messages(self) -> list[dict[str, Any]]:
        """Wait for the close, and return all messages that the test has not read."""
        await self.closed()
        return [json.loads(text) for text in self._rest]

    async def close(self) -> None:
        await asyncio.wait_for(self.socket.close(), PATIENCE)

    async def _receive(self) -> str:
        message = await asyncio.wait_for(self.socket.recv(), PATIENCE)
        assert isinstance(message, str)  # the broker always answers in text
        return message


class DeafClient:
    """A raw socket with little capacity: what it does not take stays in the broker."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.session = ""
        self._loop = asyncio.get_running_loop()

    async def send_raw(self, data: bytes) -> None:
        await asyncio.wait_for(self._loop.sock_sendall(self.sock, data), PATIENCE)

    async def tell(self, op: str, **fields: Any) -> None:
        """Send a command."""
        await self.send_raw(masked(json.dumps({"op": op, **fields}).encode()))

    async def until(self, *parts: bytes) -> bytes:
        """Read until these have come, one behind the other."""
        received = b""
        while True:
            at = 0
            for part in parts:
                at = received.find(part, at)
                if at < 0:
                    break
            else:
                return received
            more = await self.read()
            assert more, f"the connection ended after {received!r}"
            received += more

    async def rest(self) -> bytes:
        """Read until the end, whichever way it comes."""
        received = b""
        while more := await self.read():
            received += more
        return received

    async def read(self) -> bytes:
        """Read what is there; b"" at the end."""
        try:
            return await asyncio.wait_for(self._loop.sock_recv(self.sock, 65536), PATIENCE)
        except ConnectionResetError:
            return b""

    async def close(self) -> None:
        self.sock.close()


def masked(payload: bytes, opcode: Opcode = Opcode.TEXT) -> bytes:
    """One message of a client, as one frame."""
    return Frame(opcode, payload).serialize(mask=True)
