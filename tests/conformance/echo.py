"""The server that the Autobahn suite tests: the broker's listener, handshake and native connection with an echo for a
session. Prints its URL, and serves until it is terminated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import uvloop

from broker._speedups import Audience, Connection, Filter, LoopContext, Subscription
from broker.config import Address, Config, Limits, Server
from broker.identity import Credentials, Identified, Identity
from broker.metrics import Metrics
from broker.net.addresses import Peer
from broker.net.handshake import Handshakes
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.net.listener import Listener

TEXT, BINARY = 1, 2

# Group 9 sends messages of up to 16 MiB, in fragments of as little as 64 bytes, and reads its echoes when it is done.
MAX_SIZE = 16 * 2**20
MAX_FRAGMENTS = MAX_SIZE // 64
MAX_ANSWERS = 2 * MAX_SIZE
# Groups 12 and 13 send 1,000 messages of up to 128 kB.
MAX_EVENTS = 1000
MAX_OUTBOX = MAX_EVENTS * 2**17


class Echo:
    """Sends each message back as it came."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.subscription: Subscription | None = None
        self.audience: Audience | None = None

    def subscribe(self) -> None:
        """Let texts go back as events, which are compressed. (Answers are not, and what is binary has no other way.)"""
        only = Filter("echo")
        self.subscription = Subscription(self.connection, only, max_queue=MAX_EVENTS, overflow="close")
        self.audience = Audience(self.connection.context, (only,))

    def message(self, payload: bytes, text: bool) -> None:
        """Answer with the same payload, text with text and binary with binary."""
        if text and self.audience is not None:
            self.audience.publish("echo", payload)
        else:
            self.connection.answer(payload, TEXT if text else BINARY)

    def on_close(self, code: int, reason: str) -> None:
        """Nothing: an echo has nobody to tell."""


class EchoNode:
    """What the handshake hands connections to, in place of the broker's node."""

    draining = False

    def __init__(self, context: LoopContext) -> None:
        self.context = context
        self.metrics = Metrics()
        self.on_disconnect: Callable[[Peer], None] | None = None

    def peers(self) -> list[Peer]:
        """Nobody counts addresses here."""
        return []

    @property
    def connections(self) -> int:
        """How many connections are established."""
        return self.context.connections

    def identify(self, credentials: Credentials, done: Callable[[Identified], None]) -> None:
        """Nobody is anybody here."""
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
        """Begin to echo on a socket whose handshake was taken."""
        connection = Connection(self.context, None)
        connection.session = echo = Echo(connection)
        connection.start(transport, upgrade_response, window_bits)
        if connection.deflates:
            echo.subscribe()
        connection.feed(rest)


async def serve() -> None:
    """Serve echoes on a free port of loopback."""
    loop = asyncio.get_running_loop()
    config = Config(
        server=Server(anonymous=True, compression=True),
        limits=Limits(max_size=MAX_SIZE, max_fragments=MAX_FRAGMENTS),
    )
    context = LoopContext(
        loop,
        msgspec.structs.replace(config.limits, max_answers=MAX_ANSWERS, max_outbox=MAX_OUTBOX),
        encode_gap=lambda *_: b"",
    )
    context.start()
    node = EchoNode(context)
    limiter = ConnectionLimiter(config.limits, node, Capacity(connections=100, extra=10))
    listener = Listener(Handshakes(config, node, limiter, loop))
    await listener.open(Address(host="127.0.0.1", port=0))
    print(f"ws://{listener.addresses[0]}/", flush=True)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(serve())
