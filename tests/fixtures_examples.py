"""An example's program, run as its README says."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping

from tests.fixtures_broker import Program, start_program

OPEN = re.compile(r"open (?P<address>http://\S+)")
CONNECTED = re.compile(r"connected to ")


@contextlib.contextmanager
def start_example(name: str, broker: str, environ: Mapping[str, str] | None = None) -> Iterator[Example]:
    """Run `python -m examples.name` against a broker. It is connected; at the end it must exit 0 in peace."""
    with start_program("-m", f"examples.{name}", "--port", "0", "--broker", broker, environ=environ) as program:
        address = program.wait_for(OPEN)["address"]
        program.wait_for(CONNECTED)
        yield Example(program, address)
        if program.running:
            program.terminate()
            assert program.wait() == 0, program.output


class Example:
    """A running example; `address` is that of its page."""

    def __init__(self, program: Program, address: str) -> None:
        self.program = program
        self.address = address


class Relay:
    """A TCP relay before a broker, which can lose its connections and stay away for a while."""

    def __init__(self, port: int) -> None:
        self._broker = port
        self._away = False
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes, both ways."""
        if self._away:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._broker)
        self._writers |= {writer, there_writer}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        self._writers -= {writer, there_writer}

    def cut(self) -> None:
        """Lose all connections, and take none until `mend`."""
        self._away = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Take connections again."""
        self._away = False


@contextlib.asynccontextmanager
async def start_relay(port: int) -> AsyncIterator[Relay]:
    """Run a relay before the broker at a port of loopback."""
    relay = Relay(port)
    server = await asyncio.start_server(relay.handle, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
