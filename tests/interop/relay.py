"""A relay between a program and the broker, which keeps what passes: the second witness beside the program itself."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

CONTINUATION, CLOSE = 0, 8
"""Opcodes (RFC 6455, 11.8). From 8 on they are of control frames."""

PATIENCE = 20.0
"""Seconds until the relay gives up waiting for the end of a connection."""


class Frame(NamedTuple):
    """The head of a frame, and the payload of a control frame."""

    final: bool
    compressed: bool
    opcode: int
    payload: bytes


class Conversation:
    """What passed on one connection."""

    def __init__(self) -> None:
        self._sent = bytearray()
        self._received = bytearray()

    @property
    def request(self) -> str:
        """The head of the client's request."""
        return head(self._sent)

    @property
    def response(self) -> str:
        """The head of the broker's response."""
        return head(self._received)

    @property
    def sent(self) -> list[Frame]:
        """The client's frames."""
        return list(frames(self._sent))

    @property
    def received(self) -> list[Frame]:
        """The broker's frames."""
        return list(frames(self._received))

    def pass_on(self, client: socket.socket, broker: socket.socket) -> None:
        """Pass everything on in both directions, until both have ended."""
        upwards = threading.Thread(target=pump, args=(client, broker, self._sent), daemon=True)
        upwards.start()
        pump(broker, client, self._received)
        upwards.join(PATIENCE)


class Relay:
    """Listens at `url`, and keeps the conversations."""

    def __init__(self, listener: socket.socket, url: str) -> None:
        port = listener.getsockname()[1]
        self.url = f"ws://127.0.0.1:{port}/"
        self.conversations: list[Conversation] = []
        self._listener = listener
        self._target = ("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))
        self._threads: list[threading.Thread] = []

    def accept(self) -> None:
        """Serve connections until the listener is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            conversation = Conversation()
            self.conversations.append(conversation)
            thread = threading.Thread(target=self._serve, args=(client, conversation), daemon=True)
            self._threads.append(thread)
            thread.start()

    def ended(self) -> None:
        """Wait until all connections have ended."""
        for thread in self._threads:
            thread.join(PATIENCE)

    def _serve(self, client: socket.socket, conversation: Conversation) -> None:
        with client, socket.create_connection(self._target) as broker:
            conversation.pass_on(client, broker)


@contextlib.contextmanager
def relay(url: str) -> Iterator[Relay]:
    """A relay to the broker at `url` (ws://127.0.0.1:port/). At the end all connections have ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        between = Relay(listener, url)
        thread = threading.Thread(target=between.accept)
        thread.start()
        try:
            yield between
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            between.ended()


def pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    """Pass bytes on and keep them, until the source ends; its end is passed on, too."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            kept += data
            # A client that has gone does not take the close frame; it was sent all the same.
            with contextlib.suppress(OSError):
                target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def head(data: bytearray) -> str:
    """What comes before the first empty line."""
    return data.partition(b"\r\n\r\n")[0].decode("latin-1")


def header(head: str, name: str) -> str | None:
    """The value of a header in a head, or None where it has none of this name."""
    found = re.search(rf"^{re.escape(name)}:[ \t]*([^\r\n]*)", head, re.MULTILINE | re.IGNORECASE)
    return found and found[1]


def frames(data: bytearray) -> Iterator[Frame]:
    """The complete frames after the head (RFC 6455, 5.2)."""
    start = data.find(b"\r\n\r\n") + 4
    while start >= 4 and len(data) >= start + 2:
        first, second = data[start], data[start + 1]
        length, place = second & 0x7F, start + 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length, place = int.from_bytes(data[place : place + size]), place + size
        mask = bytes(4)
        if second & 0x80:
            mask, place = bytes(data[place : place + 4]), place + 4
        if len(data) < place + length:
            return
        opcode = first & 0x0F
        payload = (
            bytes(byte ^ mask[at % 4] for at, byte in enumerate(data[place : place + length])) if opcode >= 8 else b""
        )
        yield Frame(bool(first & 0x80), bool(first & 0x40), opcode, payload)
        start = place + length
