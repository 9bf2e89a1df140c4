"""A broker for the tests of the client: it does as a test says, also what the real one never does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve, unix_serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from broker.config import Limits
from broker.messages import Credit, Ping, Publish, Subscribe, Unsubscribe, decode, encode_error, encode_ok, encode_pong

WELCOME = b'{"op":"welcome","version":1,"session":"s1","server":"fake","ping":25,"max_size":4096,"max_queue":256}'

Behaviour = Callable[["FakeBroker", ServerConnection], Awaitable[None]]


class FakeBroker:
    """Keeps what it was sent, and answers as `behaviour` does; by default as a broker without patterns and queues."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or answer
        self.url = ""
        self.requests: list[Request] = []
        self.received: list[dict[str, Any]] = []
        self.subscribers: list[tuple[str, ServerConnection]] = []
        self.subscribed = asyncio.Event()
        self.closed: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.requests.append(connection.request)
        with contextlib.suppress(ConnectionClosed):
            await self.behaviour(self, connection)
            await connection.wait_closed()
        frame = connection.protocol.close_rcvd
        self.closed.put_nowait((frame.code, frame.reason) if frame is not None else (1006, ""))

    async def commands(self, connection: ServerConnection) -> AsyncIterator[dict[str, Any]]:
        """Greets, and gives each command as it comes."""
        await connection.send(WELCOME, text=True)
        async for payload in connection:
            command = msgspec.json.decode(payload)
            self.received.append(command)
            yield command

    async def emit(self, topic: str, event: bytes) -> int:
        """Sends a whole message to all subscribers of a topic, and says how many there were."""
        to = [connection for name, connection in self.subscribers if name == topic]
        for connection in to:
            await connection.send(event, text=True)
        return len(to)


async def answer(fake: FakeBroker, connection: ServerConnection) -> None:
    """Behave as a broker does."""
    async for fields in fake.commands(connection):
        command = decode(msgspec.json.encode(fields), Limits().max_depth)
        if isinstance(command, Publish):
            key = b"" if command.key is None else b'"key":' + msgspec.json.encode(command.key) + b","
            topic = msgspec.json.encode(command.topic)
            event = b'{"op":"event","topic":%b,%b"data":%b}' % (topic, key, bytes(command.data))
            receivers = await fake.emit(command.topic, event)
            reply = encode_ok(command.id or 0, receivers=receivers, queued=0, dropped=0)
        elif isinstance(command, Subscribe):
            fake.subscribers.append((command.topic, connection))
            fake.subscribed.set()
            reply = encode_ok(command.id or 0, topic=command.topic)
        elif isinstance(command, Unsubscribe | Credit):
            if command.id is None:
                continue
            reply = encode_ok(command.id or 0, topic=command.topic)
        elif isinstance(command, Ping):
            reply = encode_pong(command.id)
        else:
            reply = encode_error(command.id, "bad_command", "the fake cannot do this")
        await connection.send(reply, text=True)


def closing(code: int, reason: str = "") -> Behaviour:
    """Make a behaviour: send welcome, wait for one command, and close."""

    async def close(fake: FakeBroker, connection: ServerConnection) -> None:
        async for _ in fake.commands(connection):
            await connection.close(code, reason)

    return close


def saying(*messages: bytes) -> Behaviour:
    """Make a behaviour: send exactly these messages to whoever connects."""

    async def say(fake: FakeBroker, connection: ServerConnection) -> None:
        for message in messages:
            await connection.send(message, text=True)
        await connection.wait_closed()

    return say


def refusing(status: HTTPStatus, body: str, **headers: str) -> Callable[[ServerConnection, Request], Response]:
    """Make what `running` takes as `process_request`: answer every request with this status instead of a WebSocket."""

    def refuse(connection: ServerConnection, request: Request) -> Response:
        response = connection.respond(status, body)
        for name, value in headers.items():
            response.headers[name.replace("_", "-")] = value
        return response

    return refuse


@contextlib.asynccontextmanager
async def running(
    behaviour: Behaviour | None = None, *, unix: str | None = None, **options: Any
) -> AsyncIterator[FakeBroker]:
    """Run a fake broker on a port of its own, or on a Unix socket."""
    fake = FakeBroker(behaviour)
    options = {"subprotocols": [Subprotocol("wsbroker.v1")], "compression": None, "close_timeout": 1} | options
    server: Server
    if unix is not None:
        fake.url = f"unix:{unix}"
        context = unix_serve(fake.handle, unix, **options)
    else:
        context = serve(fake.handle, "127.0.0.1", 0, **options)
    async with context as server:
        if unix is None:
            fake.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield fake
