"""A half-closed or aborted connection gets no broken frame.

A stream subscribes, shuts its sending side down (FIN) while events are on their way, and reads on to the end. What it
still gets must be whole frames, or at the very end one that was cut off: never a cut frame with something else behind
it. The events carry consecutive numbers and a checksum, so that each byte of a stream is known beforehand, but for the
gaps that tell what was dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest

from tests.faults.traffic import CLOSE, Client, Clients, command, frame, publish
from tests.fixtures_broker import RunningBroker, start_broker

AT_ONCE = 150
"""Streams that end at one time. With so many, some have read on before the broker comes to their second write."""
PATIENCE = 20.0
SIZE = 3000
"""Bytes of filling in an event: so many that a socket takes only a part of what a turn has for it."""
NUMBERS = 1000
"""Events are numbered up to this, and then again from 0."""
BURSTS = [20, 64]
"""Events that come at one time: so many that one write has all of them, or not."""
ABNORMAL = b"\x83\x80\x00\x00\x00\x00"
"""A frame with an opcode that does not exist: the broker answers with a close frame and sends no more."""


def data(number: int) -> str:
    """The data of an event: its number, a filling, and the checksum of both."""
    text = f"{number:06}" + chr(97 + number % 26) * SIZE
    return f"{text}{zlib.crc32(text.encode()):08x}"


def server_frame(payload: bytes) -> bytes:
    """One text frame as the broker sends it."""
    assert 126 <= len(payload) < 65536
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


PUBLISHES = [command("publish", topic="load", data=data(number)) for number in range(NUMBERS)]
EVENTS = [server_frame(b'{"op":"event","topic":"load","data":"%s"}' % data(n).encode()) for n in range(NUMBERS)]
GAP = b'{"op":"gap","topic":"load","missed":'


def fault(stream: bytes) -> str:
    """What is wrong with all that a stream has read up to its end; empty if nothing is."""
    at, expected = 0, None
    while at < len(stream):
        if expected is None:
            found = stream.find(b'"data":"', at, at + 60)
            expected = int(stream[found + 8 : found + 14]) if found >= 0 and len(stream) >= found + 14 else 0
        event = EVENTS[expected % NUMBERS]
        if stream.startswith(event, at):
            at += len(event)
            expected += 1
            continue
        rest = stream[at : at + len(event)]
        if at + len(rest) == len(stream) and event.startswith(rest):
            return ""  # an event that was cut off, and nothing behind it
        if rest[0] == 0x80 | CLOSE:
            return "" if len(stream) - at <= 2 + (rest[1] if len(rest) > 1 else 0) else f"more behind the close at {at}"
        size = rest[1] if len(rest) > 1 else len(GAP)
        gap = rest[2 : 2 + size]
        if rest[0] != 0x81 or size > 125 or not (gap.startswith(GAP) or GAP.startswith(gap)):
            return f"at byte {at} of {len(stream)}, event {expected} does not follow, but {rest[:40]!r}"
        if len(gap) < size:
            return "" if at + 2 + len(gap) >= len(stream) else f"a cut gap at {at}"
        expected += json.loads(gap)["missed"]
        at += 2 + size
    return ""


def read_to_the_end(
    streams: list[Client], after: Callable[[Client, int], None] = lambda stream, size: None
) -> list[bytes]:
    """Read from all streams until the broker has closed each of them; `after` is called after each read."""
    read = {stream: bytearray() for stream in streams}
    by_socket = {stream.sock: stream for stream in streams}
    until = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.sock, selectors.EVENT_READ)
        while selector.get_map():
            left = until - time.monotonic()
            assert left > 0, f"{len(selector.get_map())} streams were not closed"
            for key, _ in selector.select(left):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                stream = by_socket[sock]
                try:
                    came = sock.recv(65536)
                except ConnectionResetError:
                    came = b""
                if not came:
                    selector.unregister(sock)
                    continue
                read[stream] += came
                after(stream, len(read[stream]))
    return [bytes(came) for came in read.values()]


def faults(streams: list[bytes]) -> list[str]:
    """What is wrong with each stream that is broken."""
    return [found for stream in streams if (found := fault(stream))]


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    with start_broker(environ={"WSBROKER_LIMITS__PING_INTERVAL": "0"}) as running:
        yield running


@pytest.fixture
def clients(broker: RunningBroker) -> Iterator[Clients]:
    with Clients(broker.port) as opened:
        yield opened


@contextlib.contextmanager
def stopped(broker: RunningBroker) -> Iterator[None]:
    """What is sent to the broker meanwhile, it finds at one time."""
    os.kill(broker.program.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.program.pid, signal.SIGCONT)


def streams(clients: Clients, count: int = AT_ONCE) -> list[Client]:
    """Streams whose sockets take little, which have read all that came so far."""
    return clients.crowd(count, command("subscribe", topic="load"), receive_buffer=16_384)


# How a stream ends.


def shut_down(stream: Client) -> None:
    stream.sock.shutdown(socket.SHUT_WR)


def shut_down_behind_close(stream: Client) -> None:
    stream.send(frame(b"\x03\xe8", CLOSE))
    shut_down(stream)


def shut_down_behind_command(stream: Client) -> None:
    stream.send(publish("elsewhere"))
    shut_down(stream)


def break_protocol(stream: Client) -> None:
    stream.send(ABNORMAL)


def break_protocol_and_shut_down(stream: Client) -> None:
    break_protocol(stream)
    shut_down(stream)


ENDS = [shut_down, shut_down_behind_close, shut_down_behind_command, break_protocol, break_protocol_and_shut_down]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.replace("_", " "))
def test_streams_that_end_as_events_come_get_no_broken_frame(
    broker: RunningBroker, clients: Clients, end: Callable[[Client], None]
) -> None:
    """The broker finds a burst of events and the end of each stream at one time, and nothing waits for the streams."""
    publisher = clients.connect()
    broken: list[str] = []
    for burst in BURSTS:
        ending = streams(clients)
        with stopped(broker):
            publisher.send(*PUBLISHES[:burst])
            for stream in ending:
                end(stream)
        broken += faults(read_to_the_end(ending))
        publisher.settle()
    assert broken == [], f"{len(broken)} streams are broken"


def test_streams_that_end_under_load_beside_others_that_are_reset_get_no_broken_frame(clients: Clients) -> None:
    """Events come all the time; each stream ends somewhere between two reads, when it has read so much."""
    chosen = random.Random(7)
    broken: list[str] = []
    for _ in range(3):
        publisher = clients.connect()
        ending = streams(clients, 50)
        end_at = {stream: chosen.randrange(200_000) for stream in ending}
        others = streams(clients, 50)
        enough = threading.Event()

        def load(publisher: Client = publisher, enough: threading.Event = enough) -> None:
            while not enough.is_set():
                for start in range(0, NUMBERS, 100):
                    publisher.send(*PUBLISHES[start : start + 100])

        def after(stream: Client, size: int, end_at: dict[Client, int] = end_at, others: list[Client] = others) -> None:
            if size >= end_at.get(stream, size + 1):
                del end_at[stream]
                chosen.choice([shut_down, shut_down, shut_down_behind_close])(stream)
                others.pop().reset()

        loader = threading.Thread(target=load)
        loader.start()
        try:
            broken += faults(read_to_the_end(ending, after))
        finally:
            enough.set()
            loader.join()
    assert broken == [], f"{len(broken)} streams are broken"


# The check itself.


@pytest.mark.parametrize("size", [0, 1, 2, 5, 50, len(EVENTS[2]) - 1])
def test_a_stream_may_end_with_a_cut_frame(size: int) -> None:
    assert fault(EVENTS[0] + EVENTS[1] + EVENTS[2][:size]) == ""


def test_a_stream_may_have_gaps_whole_or_cut_at_its_end() -> None:
    gap = GAP + b'3,"reason":"overflow"}'
    gap = bytes([0x81, len(gap)]) + gap
    assert fault(EVENTS[0] + gap + EVENTS[4]) == ""
    for size in range(len(gap)):
        assert fault(EVENTS[0] + gap[:size]) == ""


@pytest.mark.parametrize("size", [1, 5, 50, len(EVENTS[1]) - 1])
def test_a_cut_frame_with_another_one_behind_it_is_noticed(size: int) -> None:
    assert fault(EVENTS[0] + EVENTS[1][:size] + EVENTS[2]) != ""
    assert fault(EVENTS[0] + EVENTS[1][:size] + EVENTS[2][:100]) != ""


def test_a_lost_event_without_a_gap_is_noticed() -> None:
    assert fault(EVENTS[0] + EVENTS[2]) != ""
