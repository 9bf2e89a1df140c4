"""picows, which hands out frames and does not compress."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from tests.interop.python.steps import SUBPROTOCOL, run


class Listener(WSListener):
    """Keeps the texts that come, and the code of the close frame."""

    def __init__(self) -> None:
        self.texts: asyncio.Queue[str] = asyncio.Queue()
        self.code: int | None = None

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Called for each frame; the broker sends each message as one."""
        if frame.msg_type == WSMsgType.TEXT:
            assert frame.fin
            self.texts.put_nowait(frame.get_payload_as_utf8_text())
        elif frame.msg_type == WSMsgType.CLOSE:
            self.code = frame.get_close_code().value
            transport.disconnect()


class Client:
    """As the steps need it."""

    version = version("picows")

    async def connect(self, url: str) -> None:
        headers = {"Sec-WebSocket-Protocol": SUBPROTOCOL}
        self._transport, listener = await ws_connect(Listener, url, extra_headers=headers)
        assert isinstance(listener, Listener)
        self._listener = listener

    async def send(self, text: str) -> None:
        self._transport.send(WSMsgType.TEXT, text.encode())

    async def send_fragments(self, parts: list[str]) -> None:
        for place, part in enumerate(parts):
            kind = WSMsgType.CONTINUATION if place else WSMsgType.TEXT
            self._transport.send(kind, part.encode(), fin=place == len(parts) - 1)

    async def receive(self) -> str:
        return await self._listener.texts.get()

    async def close(self) -> int | None:
        self._transport.send_close(WSCloseCode.OK)
        await self._transport.wait_disconnected()
        return self._listener.code


if __name__ == "__main__":
    asyncio.run(run(Client()))
