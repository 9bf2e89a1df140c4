"""Servers for the load program to load, and a way to run it."""

import asyncio
import os
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from websockets.asyncio.server import ServerConnection, serve, unix_serve
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

from bench.peers import RELAY_TOPIC, Talk, event
from broker.cli import load as load_program

RELAY = {
    "subscribe": "sub t%t",
    "answer": "ok",
    "subscriber_greetings": 1,
    "publisher_greetings": 0,
    "publish": event(Talk()),
    "event": event(Talk()),
}

Send = Callable[[Iterable[ServerConnection], str], Coroutine[object, object, None]]


async def send_to_each(subscribers: Iterable[ServerConnection], message: str) -> None:
    for subscriber in subscribers:
        await subscriber.send(message)


@dataclass
class Relay:
    """The relay protocol, with its own count of what was published; `send` is what a test wants to go wrong."""

    send: Send
    published: int = 0
    connections: int = 0
    port: int = 0
    heads: list[str] = field(default_factory=list)
    """The request line's path and the Host of each handshake."""
    subscribers: defaultdict[str, list[ServerConnection]] = field(default_factory=lambda: defaultdict(list))

    async def serve_client(self, connection: ServerConnection) -> None:
        self.connections += 1
        assert connection.request is not None
        self.heads.append(f"{connection.request.path} {connection.request.headers.get('Host')}")
        async for message in connection:
            assert isinstance(message, str)
            if message.startswith("sub "):
                self.subscribers[message[4:]].append(connection)
                await connection.ping()
                await connection.send("ok")
            else:
                self.published += 1
                await self.send(self.subscribers[message[RELAY_TOPIC]], message)


@asynccontextmanager
async def relay(
    send: Send = send_to_each,
    *,
    path: Path | None = None,
    tls: ssl.SSLContext | None = None,
    deflate: ServerPerMessageDeflateFactory | None = None,
) -> AsyncIterator[Relay]:
    """Runs a relay on a port of 127.0.0.1, or on a Unix socket."""
    started = Relay(send)
    extensions = [deflate] if deflate else None
    if path is not None:
        async with unix_serve(started.serve_client, str(path), close_timeout=0.1, compression=None):
            yield started
        return
    async with serve(
        started.serve_client, "127.0.0.1", 0, close_timeout=0.1, ssl=tls, compression=None, extensions=extensions
    ) as server:
        started.port = next(iter(server.sockets)).getsockname()[1]
        yield started


async def load(what: str, server: int | str, **options: float | str) -> tuple[int, bytes, str]:
    """Runs the load program, by default in the relay protocol: its exit status, its output, what it complained about.

    `server` is a port of 127.0.0.1 or an address.
    """
    address = f"127.0.0.1:{server}" if isinstance(server, int) else server
    arguments: dict[str, object] = {**RELAY, "patience": 1, **options}
    process = await asyncio.create_subprocess_exec(
        *load_program.command(),
        what,
        f"--server={address}",
        f"--pid={os.getpid()}",
        *(f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, complaint = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output, complaint.decode()
