"""The server that the Autobahn suite tests: the broker's listener, handshake and native connection with an echo for a
session. Prints its URL, and serves until it is terminated."""

from __future__ import annotations

import asyncio

import uvloop

from broker._speedups import Connection, Reactor
from broker.config import Address, Config, Limits, Server
from broker.net.gate import Gate, Room
from broker.net.listener import Listener
from broker.tally import Tally

TEXT, BINARY = 1, 2

# Group 9 sends messages of up to 16 MiB, in fragments of as little as 64 bytes, and reads its echoes when it is done.
MAX_SIZE = 16 * 2**20
MAX_FRAGMENTS = MAX_SIZE // 64
MAX_ANSWERS = 2 * MAX_SIZE


class Echo:
    """Sends each message back as it came."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def message(self, payload: bytes, text: bool) -> None:
        """Answer with the same payload, text with text and binary with binary."""
        self.connection.answer(payload, TEXT if text else BINARY)

    def left(self, code: int, reason: str) -> None:
        """Nothing: an echo has nobody to tell."""


class EchoNode:
    """What the handshake hands connections to, in place of the broker's node."""

    draining = False

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.tally = Tally()

    @property
    def connections(self) -> int:
        """How many connections are established."""
        return self.reactor.connections

    def connect(self, transport: asyncio.Transport, greeting: bytes, rest: bytes, peer: str) -> None:
        """Begin to echo on a socket whose handshake was taken."""
        connection = Connection(self.reactor, None)
        connection.session = Echo(connection)
        connection.start(transport, greeting)
        connection.feed(rest)


async def serve() -> None:
    """Serve echoes on a free port of loopback."""
    loop = asyncio.get_running_loop()
    config = Config(server=Server(anonymous=True), limits=Limits(max_size=MAX_SIZE, max_fragments=MAX_FRAGMENTS))
    reactor = Reactor(
        loop,
        encode_gap=lambda topic, missed, reason: b"",
        max_size=config.limits.max_size,
        max_fragments=config.limits.max_fragments,
        max_answers=MAX_ANSWERS,
    )
    reactor.start()
    listener = Listener(Gate(config, EchoNode(reactor), Room(connections=100, extra=10), loop))
    await listener.open(Address(host="127.0.0.1", port=0))
    print(f"ws://{listener.addresses[0]}/", flush=True)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(serve())
