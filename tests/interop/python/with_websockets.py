"""websockets, its client for asyncio."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.interop.python.steps import SUBPROTOCOL, run


class Client:
    """As the steps need it."""

    version = version("websockets")
    _socket: ClientConnection

    async def connect(self, url: str) -> None:
        self._socket = await connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)])

    async def send(self, text: str) -> None:
        await self._socket.send(text)

    async def send_fragments(self, parts: list[str]) -> None:
        await self._socket.send(parts)

    async def receive(self) -> str:
        return await self._socket.recv(decode=True)

    async def close(self) -> int | None:
        await self._socket.close()
        received = self._socket.protocol.close_rcvd
        return None if received is None else received.code


if __name__ == "__main__":
    asyncio.run(run(Client()))
