"""aiohttp, its WebSocket client. It has no public call that makes fragments."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.interop.python.steps import SUBPROTOCOL, run


class Client:
    """As the steps need it."""

    version = aiohttp.__version__

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def connect(self, url: str) -> None:
        self._socket = await self._session.ws_connect(url, protocols=[SUBPROTOCOL], compress=15)

    async def send(self, text: str) -> None:
        await self._socket.send_str(text)

    async def send_fragments(self, parts: list[str]) -> None:
        raise NotImplementedError

    async def receive(self) -> str:
        return await self._socket.receive_str()

    async def close(self) -> int | None:
        await self._socket.close(code=1000)
        return self._socket.close_code


async def main() -> None:
    """Run the steps in one session."""
    async with aiohttp.ClientSession() as session:
        await run(Client(session), fragments=False)


if __name__ == "__main__":
    asyncio.run(main())
