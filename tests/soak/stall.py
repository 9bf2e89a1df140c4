"""Subscribers that stop reading, beside others that read on, and a publisher at full speed, on a real broker.

The publisher sends the next batch when all who read have the last one, so it is as fast as the broker and those are.
What those who read get is compared byte by byte. When the others read again, what they read and their gaps must account
for every event.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.fixtures_broker import RunningBroker
from tests.fixtures_node import masked
from tests.net.harness import request
from tests.speedups.transports import frames_in
from tests.speedups.wire import TEXT

BATCH: Final = 16
KEYS: Final = 10
MAX_QUEUE: Final = 256
DATA: Final = 1000
"""Bytes of data in an event, about."""
PATIENCE: Final = 30.0

TERMS: Final[list[dict[str, Any]]] = [
    {"overflow": "drop_oldest"},
    {"overflow": "drop_newest"},
    {"overflow": "latest"},
    {"overflow": "drop_oldest", "credit": 5},
]
"""What the stalled subscribe with, in turn."""

# A queued event is held once, however many wait for it: frame, object, key, and mark (policy `latest`). Those
# with the same policy hold the same events, but for those who stopped a little earlier: twice as many for each policy.
WINDOWS: Final = 2 * len(TERMS)
EVENT: Final = 300
# In each queue it has its place, in a ring that may be twice as long as the queue; under `latest` an entry of a dict.
PLACE: Final = 2 * 40 + 100
LEEWAY: Final = 4 * 2**20
"""For the process itself: what malloc keeps, Python's own arenas, the code that is read for the first time."""


@dataclass
class Outcome:
    """What came of it: sizes in bytes, times in seconds."""

    published: int
    before: int
    most: int
    bound: int
    alone: list[float] = field(default_factory=list)
    """How long each batch took while nobody was stalled."""
    beside: list[float] = field(default_factory=list)
    """The same beside those who were."""

    def __str__(self) -> str:
        grown, allowed = (self.most - self.before) / 2**20, (self.bound - self.before) / 2**20
        alone, beside = p99(self.alone) * 1000, p99(self.beside) * 1000
        return (
            f"{self.published:,} events; RSS grew by {grown:.1f} MiB, the limits allow {allowed:.1f} MiB; "
            f"p99 of a batch {alone:.2f} ms with nobody stalled, {beside:.2f} ms beside the stalled"
        )


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


class Peer:
    """A raw connection to the broker."""

    def __init__(self, broker: RunningBroker, *, small: bool) -> None:
        self.sock = socket.socket()
        if small:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", broker.port))
        self.sock.sendall(request(host=f"127.0.0.1:{broker.port}"))
        self.received = b""
        self._until(b'"op":"welcome"')
        self._until(b"}")

    def tell(self, **command: Any) -> None:
        self.sock.sendall(masked(json.dumps(command).encode()))

    def subscribe(self, **policy: Any) -> None:
        self.received = b""
        self.tell(op="subscribe", id=1, topic="load", max_queue=MAX_QUEUE, **policy)
        self._until(b'"op":"ok","id":1,"topic":"load"}')
        self.received = b""

    def _until(self, part: bytes) -> None:
        while part not in self.received:
            more = self.sock.recv(65536)
            assert more, "the broker has closed"
            self.received += more


def stall(broker: RunningBroker, *, stalled: int, healthy: int, seconds: float) -> Outcome:
    """Publish for `seconds` with nobody stalled, then for `seconds` beside so many; then let those read."""
    readers = [Peer(broker, small=False) for _ in range(healthy)]
    publisher = Peer(broker, small=False)
    for peer in readers:
        peer.subscribe()
    load = Load(publisher, readers)
    alone = load.run(seconds)
    others = [Peer(broker, small=True) for _ in range(stalled)]
    for number, peer in enumerate(others):
        peer.subscribe(**TERMS[number % len(TERMS)])
    first = load.published
    before = rss(broker)
    bound = before + MAX_QUEUE * (WINDOWS * (load.size + EVENT) + stalled * PLACE) + LEEWAY
    outcome = Outcome(0, before, before, bound, alone)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcome.beside += load.run(min(0.5, seconds))
        outcome.most = max(outcome.most, rss(broker))
    outcome.published = load.published - first
    for number, peer in enumerate(others):
        read_again(peer, TERMS[number % len(TERMS)], first, load.published)
    for peer in (*readers, publisher, *others):
        peer.sock.close()
    return outcome


class Load:
    """Publishes batches, and reads them."""

    def __init__(self, publisher: Peer, readers: list[Peer]) -> None:
        self.published = 0
        self.size = len(event(0))
        self._publisher = publisher
        self._readers = readers
        self._selector = selectors.DefaultSelector()
        for peer in readers:
            self._selector.register(peer.sock, selectors.EVENT_READ, bytearray())

    def run(self, seconds: float) -> list[float]:
        """Go on for so long. Returns how long each batch took from the first byte to the last reader."""
        times = []
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            numbers = range(self.published, self.published + BATCH)
            self._publisher.sock.sendall(b"".join(masked(command(number)) for number in numbers))
            self.published += BATCH
            self._read(b"".join(event(number) for number in numbers))
            times.append(time.monotonic() - now)
        return times

    def _read(self, expected: bytes) -> None:
        left = len(self._readers)
        while left:
            ready = self._selector.select(PATIENCE)
            assert ready, "an event did not come"
            for key, _ in ready:
                received: bytearray = key.data
                received += key.fileobj.recv(65536)  # type: ignore[union-attr]
                if len(received) >= len(expected):
                    assert received == expected
                    received.clear()
                    left -= 1


def payload(number: int) -> str:
    return f'"key":"{number % KEYS}","data":[{number:12},"{"x" * DATA}"]'


def command(number: int) -> bytes:
    return f'{{"op":"publish","topic":"load",{payload(number)}}}'.encode()


def event(number: int) -> bytes:
    text = f'{{"op":"event","topic":"load",{payload(number)}}}'.encode()
    return b"\x81\x7e" + len(text).to_bytes(2, "big") + text


def read_again(peer: Peer, policy: dict[str, Any], first: int, end: int) -> None:
    """Read all there is, and check that it is the stream of the policy."""
    overflow = policy["overflow"]
    numbers: list[int] = []
    missed: dict[str, int] = {}
    data = b""
    if "credit" in policy:
        peer.tell(op="credit", topic="load", add=10 * MAX_QUEUE)
    while len(numbers) + sum(missed.values()) < end - first:
        more = peer.sock.recv(1 << 20)
        assert more, "the broker has closed"
        data += more
        frames, size = frames_in(data)
        data = data[size:]
        for opcode, text in frames:
            assert opcode == TEXT
            message = json.loads(text)
            if message["op"] == "gap":
                missed[message["reason"]] = missed.get(message["reason"], 0) + message["missed"]
            else:
                number = message["data"][0]
                # A gap is at its place: what was read and what was missed are all that was published before.
                assert number == first + len(numbers) + sum(missed.values())
                numbers.append(number)
    assert len(numbers) + sum(missed.values()) == end - first
    assert set(missed) == {"conflated" if overflow == "latest" else "overflow"}
    if overflow == "drop_newest":
        assert numbers == list(range(first, first + len(numbers)))
        assert len(numbers) >= MAX_QUEUE
    elif overflow == "drop_oldest":
        assert numbers[-MAX_QUEUE:] == list(range(end - MAX_QUEUE, end))
    else:
        # Before them there is what the kernel took.
        assert numbers[-KEYS:] == list(range(end - KEYS, end))


def rss(broker: RunningBroker) -> int:
    """What the broker has in memory."""
    pages = int(Path(f"/proc/{broker.program.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
