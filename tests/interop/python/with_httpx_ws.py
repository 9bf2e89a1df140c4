"""httpx-ws, on httpx and wsproto. It does not compress, and does not wait for the answer to its close frame."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from importlib.metadata import version

from httpx_ws import aconnect_ws
from wsproto.events import TextMessage

from tests.interop.python.steps import SUBPROTOCOL, run

MAX_SIZE = 2**21
"""Bytes of a message that it takes; 64 kB unless set."""


class Client:
    """As the steps need it."""

    version = version("httpx-ws")

    def __init__(self, end: AsyncExitStack) -> None:
        self._end = end

    async def connect(self, url: str) -> None:
        connection = aconnect_ws(url, subprotocols=[SUBPROTOCOL], max_message_size_bytes=MAX_SIZE)
        self._socket = await self._end.enter_async_context(connection)

    async def send(self, text: str) -> None:
        await self._socket.send_text(text)

    async def send_fragments(self, parts: list[str]) -> None:
        for place, part in enumerate(parts):
            await self._socket.send(TextMessage(data=part, message_finished=place == len(parts) - 1))

    async def receive(self) -> str:
        return str(await self._socket.receive_text())

    async def close(self) -> int | None:
        await self._socket.close(1000)
        return None


async def main() -> None:
    """Run the steps; the connection lives in a context."""
    async with AsyncExitStack() as end:
        await run(Client(end))


if __name__ == "__main__":
    asyncio.run(main())
