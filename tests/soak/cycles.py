"""Clients that connect, authenticate, subscribe, publish and close, again and again, on a real broker.

Every second client shows its token in the handshake, the others by `auth`. Every fourth one is reset and not closed,
and every eighth one shows a token that is not valid.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import jwt
from websockets.frames import Frame, Opcode

from tests.fixtures_broker import RunningBroker, start_broker

CONFIG: Final = """
[auth]
required = true
algorithms = ["HS256"]
secret = "{secret}"
[[roles]]
name = "default"
subscribe = ["user.{{identity}}.>"]
publish = ["user.{{identity}}.>"]
publish_rate = 1000
"""
REQUEST: Final = (
    "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{more}\r\n"
)
WORKERS: Final = 2
"""Processes that connect at the same time."""
IDENTITIES: Final = 5000
"""The names of the clients repeat after so many: more than the broker remembers of any kind (4,096)."""
PARTS: Final = 5
"""The memory is measured after each of these parts. The first one is the warm-up."""
RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, for 0 seconds: `close` resets the connection (socket(7))."""


@contextmanager
def guarded_broker() -> Iterator[tuple[RunningBroker, str]]:
    """Run a broker that requires tokens. Gives it, and the secret of its tokens."""
    secret = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wsbroker.toml"
        file.write_text(CONFIG.format(secret=secret))
        with start_broker("--config", str(file), "--admin", "") as broker:
            yield broker, secret


def cycle(cycles: int) -> list[int]:
    """Run so many cycles. Returns the resident memory of the broker after each part, in bytes."""
    each = cycles // PARTS // WORKERS
    sizes = []
    with guarded_broker() as (broker, secret), ProcessPoolExecutor(WORKERS) as pool:
        statm = Path(f"/proc/{broker.program.pid}/statm")
        for part in range(PARTS):
            first = part * each * WORKERS
            jobs = [pool.submit(run, broker.port, secret, first + worker * each, each) for worker in range(WORKERS)]
            for job in jobs:
                job.result()
            sizes.append(int(statm.read_text().split()[1]) * 4096)
    return sizes


def growth(sizes: list[int]) -> float:
    """Give the part by which the memory has grown since the warm-up."""
    return max(sizes[1:]) / sizes[0] - 1


def run(port: int, secret: str, first: int, count: int) -> None:
    """Connect so many clients, one after the other. Raises RuntimeError if one is not served."""
    for number in range(first, first + count):
        name = f"client{number % IDENTITIES}"
        is_valid, in_header = number % 8 != 0, number % 2 == 0
        token = jwt.encode({"sub": name, "exp": int(time.time()) + 600}, secret if is_valid else "wrong" * 10, "HS256")
        more = f"Authorization: Bearer {token}\r\n" if in_header else ""
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(REQUEST.format(more=more).encode())
            if not is_valid:
                read_until(sock, b"HTTP/1.1 401")
                continue
            read_until(sock, b'"op":"welcome"')
            if not in_header:
                sock.sendall(frame({"op": "auth", "id": 1, "token": token}))
                read_until(sock, b'"op":"ok"')
            sock.sendall(frame({"op": "subscribe", "topic": f"user.{name}.>"}))
            sock.sendall(frame({"op": "publish", "topic": f"user.{name}.{number % 100}", "data": number}))
            read_until(sock, b'"op":"event"')
            if number % 4 == 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            else:
                sock.sendall(Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
                read_until(sock, b"\x88\x02\x03\xe8")


def frame(command: dict[str, object]) -> bytes:
    """Make the frame of a command."""
    return Frame(Opcode.TEXT, json.dumps(command).encode()).serialize(mask=True)


def read_until(sock: socket.socket, text: bytes) -> None:
    """Read until this has come. Raises RuntimeError if the broker closes before."""
    received = b""
    while text not in received:
        part = sock.recv(65_536)
        if not part:
            raise RuntimeError(f"the connection ended after {received!r}")
        received += part
