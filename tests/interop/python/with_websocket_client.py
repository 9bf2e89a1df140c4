"""websocket-client, which blocks and does not compress."""

from __future__ import annotations

import asyncio

import websocket
from websocket import ABNF

from tests.interop.python.steps import PATIENCE, SUBPROTOCOL, run


class Client:
    """As the steps need it. Nothing else runs on the loop, so that its calls may block."""

    version = websocket.__version__

    async def connect(self, url: str) -> None:
        self._socket = websocket.create_connection(url, subprotocols=[SUBPROTOCOL], timeout=PATIENCE)

    async def send(self, text: str) -> None:
        self._socket.send(text)

    async def send_fragments(self, parts: list[str]) -> None:
        for place, part in enumerate(parts):
            opcode = ABNF.OPCODE_CONT if place else ABNF.OPCODE_TEXT
            self._socket.send_frame(ABNF.create_frame(part, opcode, fin=int(place == len(parts) - 1)))

    async def receive(self) -> str:
        return str(self._socket.recv())

    async def close(self) -> int | None:
        self._socket.send_close(1000)
        opcode, payload = self._socket.recv_data(control_frame=True)
        self._socket.shutdown()
        return int.from_bytes(payload[:2]) if opcode == ABNF.OPCODE_CLOSE else None


if __name__ == "__main__":
    asyncio.run(run(Client()))
