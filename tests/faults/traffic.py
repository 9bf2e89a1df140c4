"""Clients on raw sockets that send bytes made beforehand, and take apart what the broker sends.

A client of a library would spend its time in Python; these keep the broker busy, and not themselves. All of it is
bounded in time, and all sockets are on loopback.
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from tests.speedups.wire import BINARY, CLOSE, CONTINUATION, PING, TEXT, client_frame

__all__ = ["BINARY", "CLOSE", "CONTINUATION", "PING", "TEXT"]

PATIENCE = 20.0
"""Seconds for what must happen sooner or later. Far more than it takes, also on a busy machine."""
NO_MASK = bytes(4)
"""A masking key that changes nothing."""
AT_A_TIME = 64
"""How many connections are opened at one time: a listener's backlog is bounded."""
COMPRESSED = 4
"""The first reserved bit of a frame's head (RFC 7692, section 6)."""

Fields = dict[str, Any]


def frame(payload: bytes, opcode: int = TEXT, *, fin: bool = True, compressed: bool = False) -> bytes:
    """One frame as a client sends it."""
    return client_frame(opcode, payload, fin=fin, reserved=COMPRESSED * compressed, key=NO_MASK)


def command(op: str, **fields: Any) -> bytes:
    """One frame with a command."""
    return frame(json.dumps({"op": op, **fields}, separators=(",", ":")).encode())


def publish(topic: str, size: int = 100, **fields: Any) -> bytes:
    """One frame with a publish; its data is a string of `size` bytes."""
    return command("publish", topic=topic, **fields, data="x" * size)


def deflate(payload: bytes) -> bytes:
    """Compress one message (RFC 7692, section 7.2.1)."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(b"\x00\x00\xff\xff")


def upgrade(compression: bool = False) -> bytes:
    """The request of a handshake."""
    extension = b"Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n" if compression else b""
    return (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n" + extension + b"\r\n"
    )


def split_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Opcodes and payloads of the whole frames that a server sent, and what is left behind them."""
    frames = []
    start = 0
    while len(data) - start >= 2:
        first, size = data[start], data[start + 1]
        at = start + 2
        if size == 126:
            if len(data) < at + 2:
                break
            size, at = int.from_bytes(data[at : at + 2], "big"), at + 2
        elif size == 127:
            if len(data) < at + 8:
                break
            size, at = int.from_bytes(data[at : at + 8], "big"), at + 8
        if len(data) < at + size:
            break
        frames.append((first & 0x0F, data[at : at + size]))
        start = at + size
    return frames, data[start:]


class Client:
    """One connection. What it does not read stays in the kernel, and then in the broker."""

    def __init__(
        self, port: int, *, compression: bool = False, receive_buffer: int | None = None, behind: bytes = b""
    ) -> None:
        """Connect and send the request of the handshake, with `behind` right behind it; `opened` reads the answer."""
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(upgrade(compression) + behind)
        self._rest = b""
        self._messages: deque[Fields] = deque()

    def opened(self) -> Client:
        """Read the answer of the handshake and `welcome`."""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._receive()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.until("welcome")
        return self

    def send(self, *frames: bytes) -> None:
        """Send frames."""
        self.sock.sendall(b"".join(frames))

    def messages(self, seconds: float = PATIENCE) -> Iterator[Fields]:
        """Give the messages that come, until the broker closes the connection. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while True:
            frames, self._rest = split_frames(self._rest)
            for opcode, payload in frames:
                if opcode == TEXT:
                    self._messages.append(json.loads(payload))
                elif opcode == CLOSE:
                    self._messages.append({"op": "close", "code": int.from_bytes(payload[:2], "big")})
            while self._messages:
                yield self._messages.popleft()
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the broker said nothing more")
            self.sock.settimeout(left)
            try:
                self._rest += self._receive()
            except EOFError:
                return

    def until(self, op: str, seconds: float = PATIENCE, **fields: Any) -> list[Fields]:
        """Read up to a message with this `op` and these fields; return all that came, this one last."""
        came = []
        for message in self.messages(seconds):
            came.append(message)
            if message["op"] == op and all(message.get(name) == value for name, value in fields.items()):
                return came
            assert message["op"] != "close", f"closed with {message['code']}"
        raise AssertionError(f"closed before {op}")

    def ask(self, op: str, **fields: Any) -> Fields:
        """Send a command and return its answer; what came before it is dropped."""
        self.send(command(op, id="ask", **fields))
        for message in self.messages():
            if message.get("id") == "ask":
                return message
        raise AssertionError(f"closed before the answer to {op}")

    def settle(self) -> Client:
        """Wait until the broker has carried out all commands sent so far; what came meanwhile is dropped."""
        self.ask("ping")
        return self

    def close(self) -> None:
        """End the connection without a close frame."""
        self.sock.close()

    def reset(self) -> None:
        """End the connection by a reset (RST)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _receive(self) -> bytes:
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError("the broker closed the connection")
        return data


class Clients:
    """The clients of one test. Closes them all at the end of its block."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._all: list[Client] = []

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._all:
            client.close()

    def connect(self, *frames: bytes, compression: bool = False, receive_buffer: int | None = None) -> Client:
        """One client, with these commands carried out."""
        client = Client(self.port, compression=compression, receive_buffer=receive_buffer).opened()
        self._all.append(client)
        client.send(*frames)
        return client.settle()

    def crowd(self, count: int, *frames: bytes, receive_buffer: int | None = None) -> list[Client]:
        """So many clients, with these commands carried out for each."""
        behind = b"".join(frames)
        crowd: list[Client] = []
        while len(crowd) < count:
            some = [
                Client(self.port, receive_buffer=receive_buffer, behind=behind)
                for _ in range(min(AT_A_TIME, count - len(crowd)))
            ]
            self._all += some
            crowd += [client.opened().settle() for client in some]
        return crowd

    def subscribe(self, topics: Iterable[str], *, receive_buffer: int | None = None, **options: Any) -> Client:
        """One client with these subscriptions."""
        commands = (command("subscribe", topic=topic, **options) for topic in topics)
        return self.connect(*commands, receive_buffer=receive_buffer)


def play(
    sends: Mapping[Client, bytes], seconds: float, readers: Iterable[Client] = (), *, may_close: bool = False
) -> bool:
    """Send all of these bytes at once, each by its client; whether the broker carried them out in this time.

    What the senders and `readers` are sent meanwhile is read and dropped, so nothing else can be read from them
    afterwards. With `may_close` the broker may close a sender, which is an end as well.
    """
    end = command("ping", id="played")
    waiting = {client.sock: memoryview(data + end) for client, data in sends.items()}
    under_way = {client.sock: b"" for client in sends}
    until = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for client in {*sends, *readers}:
            client.sock.setblocking(False)
            stack.callback(_restore, client)
            both = selectors.EVENT_READ | (selectors.EVENT_WRITE if client in sends else 0)
            selector.register(client.sock, both)
        while under_way and (left := until - time.monotonic()) > 0:
            for key, events in selector.select(left):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    if events & selectors.EVENT_WRITE and (data := waiting[sock]):
                        data = waiting[sock] = data[sock.send(data[: 1 << 20]) :]
                        if not data:
                            selector.modify(sock, selectors.EVENT_READ)
                    came = sock.recv(1 << 18) if events & selectors.EVENT_READ else None
                except BlockingIOError:
                    continue
                except (ConnectionResetError, BrokenPipeError):
                    came = b""
                if came == b"":
                    assert may_close or sock not in waiting, "the broker closed a sender"
                    selector.unregister(sock)
                    under_way.pop(sock, None)
                elif came and sock in under_way:
                    under_way[sock] = (under_way[sock] + came)[-200:]
                    if b'"id":"played"' in under_way[sock]:
                        del under_way[sock]
    return not under_way


def _restore(client: Client) -> None:
    if client.sock.fileno() >= 0:
        client.sock.settimeout(PATIENCE)
