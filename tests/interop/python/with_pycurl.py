"""libcurl, by pycurl: `CONNECT_ONLY`, then calls that send and receive frames. It does not compress."""

from __future__ import annotations

import asyncio
import select

import pycurl

from tests.interop.python.steps import PATIENCE, SUBPROTOCOL, run


class Client:
    """As the steps need it. Nothing else runs on the loop, so that its calls may block."""

    version = pycurl.version_info()[1]

    async def connect(self, url: str) -> None:
        self._curl = pycurl.Curl()
        self._curl.setopt(pycurl.URL, url)
        self._curl.setopt(pycurl.CONNECT_ONLY, 2)
        self._curl.setopt(pycurl.HTTPHEADER, [f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"])
        self._curl.setopt(pycurl.TIMEOUT, int(PATIENCE))
        self._curl.perform()

    async def send(self, text: str) -> None:
        self._send(text.encode(), pycurl.WS_TEXT)

    async def send_fragments(self, parts: list[str]) -> None:
        for place, part in enumerate(parts):
            more = pycurl.WS_CONT if place < len(parts) - 1 else 0
            self._send(part.encode(), pycurl.WS_TEXT | more)

    async def receive(self) -> str:
        payload, _ = self._frame()
        return payload.decode()

    async def close(self) -> int | None:
        self._curl.ws_close(1000)
        payload, flags = self._frame()
        self._curl.close()
        return int.from_bytes(payload[:2]) if flags & pycurl.WS_CLOSE else None

    def _send(self, payload: bytes, flags: int) -> None:
        """Send one frame. libcurl says how much of it the socket took."""
        sent = 0
        while sent < len(payload):
            try:
                sent += self._curl.ws_send(payload[sent:], flags)
            except BlockingIOError:
                select.select([], [self._socket()], [], PATIENCE)

    def _frame(self) -> tuple[bytes, int]:
        """Wait for a frame; the broker sends each message as one. Gives its payload and libcurl's flags."""
        payload = b""
        while True:
            try:
                chunk, meta = self._curl.ws_recv(65536)
            except BlockingIOError:
                select.select([self._socket()], [], [], PATIENCE)
                continue
            payload += chunk
            if meta.bytesleft == 0:
                return payload, meta.flags

    def _socket(self) -> int:
        descriptor: int = self._curl.getinfo(pycurl.ACTIVESOCKET)
        return descriptor


if __name__ == "__main__":
    asyncio.run(run(Client()))
