"""A TCP proxy for tests, that does to connections what networks do: it cuts, resets, stalls, halves and delays them.

What it does is drawn from a random.Random of the caller's: the same seed gives the same row of mishaps. When they hit,
in the middle of which frame, depends on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Final

MISHAPS: Final = ("cut", "reset", "stall", "half_in", "half_out", "delay", "split")
CHUNK: Final = 4096
MAX_DELAY: Final = 0.02
"""Seconds that a chunk is delayed at most, in a delayed connection."""
STALL: Final = 0.4
"""Seconds that a stall lasts at most: some are shorter than the silence that ends a connection, some are longer."""


class Proxy:
    """Forwards from a port of its own to `target` on loopback, which may change and need not listen."""

    def __init__(self, target: int, rng: random.Random) -> None:
        self.target = target
        self.port = 0
        self.calm = False
        """No more mishaps, and new connections are forwarded as they are."""
        self.counts = dict.fromkeys(MISHAPS, 0)
        self._rng = rng
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until both sides are done."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = None
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
            link = Link(writer, there[1], self._rng)
            self._links.add(link)
            await asyncio.gather(link.forward(reader, there[1]), link.forward(there[0], writer))
        except OSError:
            pass  # nobody listens there, or one of the ends has gone
        finally:
            self._tasks.discard(task)
            if link is not None:
                self._links.discard(link)
                link.abort()
            writer.transport.abort()

    def strike(self) -> str:
        """One mishap for all connections that there are. Returns its name."""
        mishap = self._rng.choice(MISHAPS)
        self.counts[mishap] += 1
        for link in list(self._links):
            link.strike(mishap)
        return mishap

    def settle(self) -> None:
        """No mishaps from here on. Connections that are crippled by one are cut."""
        self.calm = True
        for link in list(self._links):
            link.settle()

    def freeze(self) -> None:
        """Nothing goes through the connections that there are any more; they stay open."""
        for link in self._links:
            link.freeze()

    async def end(self) -> None:
        """Cut everything, and wait for it."""
        for link in list(self._links):
            link.abort()
        while self._tasks:
            await asyncio.wait(self._tasks)


class Link:
    """One connection through the proxy."""

    def __init__(self, here: asyncio.StreamWriter, there: asyncio.StreamWriter, rng: random.Random) -> None:
        self._ends = (here, there)
        self._rng = rng
        self._delayed = False
        self._split = False
        self._crippled = False
        self._ended: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def forward(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        """Forward one direction."""
        while data := await source.read(CHUNK):
            if self._delayed:
                await asyncio.sleep(self._rng.uniform(0, MAX_DELAY))
            await self._open.wait()
            if to in self._ended:
                continue  # lost
            if self._split:
                at = self._rng.randrange(len(data))
                to.write(data[:at])
                await to.drain()
                await asyncio.sleep(0)
                data = data[at:]
                if to in self._ended:
                    continue
            to.write(data)
            await to.drain()
        if not to.is_closing() and to not in self._ended:
            self._ended.add(to)
            to.write_eof()

    def strike(self, mishap: str) -> None:
        """Do it to this connection."""
        if mishap == "cut":
            self.abort()
        elif mishap == "reset":
            for end in self._ends:
                # A close with this option, and time 0, sends RST (socket(7)).
                sock = end.get_extra_info("socket")
                if sock is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.abort()
        elif mishap == "stall":
            self._open.clear()
            asyncio.get_running_loop().call_later(self._rng.uniform(0, STALL), self._open.set)
        elif mishap in ("half_in", "half_out"):
            # Half of the connection ends: nothing more goes that way.
            end = self._ends[mishap == "half_out"]
            self._crippled = True
            if not end.is_closing() and end not in self._ended:
                self._ended.add(end)
                with contextlib.suppress(OSError):
                    end.write_eof()
        elif mishap == "delay":
            self._delayed = True
        elif mishap == "split":
            self._split = True

    def freeze(self) -> None:
        """Nothing goes through any more, and nobody is told."""
        self._open.clear()

    def settle(self) -> None:
        """Go on as if nothing had been, or end."""
        self._delayed = self._split = False
        self._open.set()
        if self._crippled:
            self.abort()

    def abort(self) -> None:
        """End both sides without waiting for what they have not taken."""
        self._open.set()
        for end in self._ends:
            end.transport.abort()


@contextlib.asynccontextmanager
async def proxying(target: int, rng: random.Random) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a port of loopback."""
    proxy = Proxy(target, rng)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
