"""Tornado, its WebSocket client. It has no call that makes fragments.

Compression stays off, as it is by default. Tornado 6.6 ignores the parameters of the response that have no value, among
them `client_no_context_takeover`, which the broker always answers (RFC 7692, 7.1.1.2). Its second compressed message
then refers to the first one, and the broker closes with 1007.
"""

from __future__ import annotations

import asyncio

import tornado
from tornado.websocket import websocket_connect

from tests.interop.python.steps import SUBPROTOCOL, run


class Client:
    """As the steps need it."""

    version = tornado.version

    async def connect(self, url: str) -> None:
        self._socket = await websocket_connect(url, subprotocols=[SUBPROTOCOL])

    async def send(self, text: str) -> None:
        await self._socket.write_message(text)

    async def send_fragments(self, parts: list[str]) -> None:
        raise NotImplementedError

    async def receive(self) -> str:
        message = await self._socket.read_message()
        assert isinstance(message, str), message
        return message

    async def close(self) -> int | None:
        self._socket.close(1000)
        assert await self._socket.read_message() is None
        code: int | None = self._socket.close_code
        return code


if __name__ == "__main__":
    asyncio.run(run(Client(), fragments=False))
