"""A client that does no harm: it sends the command `ping` every few milliseconds and notes the slowest answer.

    python tests/faults/bystander.py PORT PID INTERVAL LIMIT

A process of its own, so that nothing but the broker can hold it up; of the standard library alone, so that it starts
quickly. It writes `ready` once it is connected, stops at the end of its standard input, and then writes the slowest
answer and the number of answers. It also stops at an answer that takes longer than LIMIT seconds.

An answer is as slow as the broker, process PID, has worked on other things until it came. On a machine that does
nothing else this is how long the answer took; on a busy one it leaves out how long the broker itself had to wait.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from pathlib import Path

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def main(port: int, pid: int, interval: float, limit: float) -> None:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(limit)
    sock.sendall(UPGRADE)
    answered(sock, b'"welcome"')
    slowest, answers = 0.0, 0
    say("ready")
    over = False
    while not over:
        over = stopped(interval)  # one more ping, for what has just begun
        sent, worked = time.monotonic(), work(pid)
        sock.sendall(ping(answers))
        try:
            answered(sock, b'"pong"')
        except TimeoutError:
            over = True
        slowest = max(slowest, min(time.monotonic() - sent, work(pid) - worked))
        answers += 1
    say(f"{slowest} {answers}")


def ping(number: int) -> bytes:
    """One frame with the command; its mask is zero (RFC 6455, section 5.3)."""
    payload = b'{"op":"ping","id":%d}' % number
    return bytes([0x81, 0x80 | len(payload)]) + bytes(4) + payload


def answered(sock: socket.socket, text: bytes) -> None:
    """Read until an answer with this text has come. Only one is awaited at a time."""
    got = b""
    while text not in got:
        data = sock.recv(65536)
        if not data:
            raise EOFError("the broker closed the connection")
        got += data


def work(pid: int) -> float:
    """Seconds for which a process' main thread has been on a processor."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def stopped(interval: float) -> bool:
    """Wait for the time of the next ping, or for the end of standard input, which is True."""
    return bool(select.select([sys.stdin], [], [], interval)[0])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
