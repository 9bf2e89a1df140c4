"""Compressed messages (RFC 7692): they are read as `websockets` reads them, and an event is deflated once for all."""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from broker._speedups import FrameError, FrameReader
from tests.speedups.echoes import MAX_SIZE, served, served_by_websockets
from tests.speedups.model import FILLING, Client, World
from tests.speedups.transports import SlowPipe, SlowSocket
from tests.speedups.turns import Loop
from tests.speedups.wire import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, client_frame, examples, server_frames

TAIL = b"\x00\x00\xff\xff"
FULL = 15
SHORTEST = 128
"""The least payload that is deflated (MIN_DEFLATE in deflate.pxi)."""
RSV1 = 4

HELLO = [
    ("one block", "f2 48 cd c9 c9 07 00"),
    ("a block without compression", "00 05 00 fa ff 48 65 6c 6c 6f 00"),
    ("a final block", "f3 48 cd c9 c9 07 00 00"),
    ("a final block, and nothing behind it", "f3 48 cd c9 c9 07 00"),
    ("two blocks", "f2 48 05 00 00 00 ff ff ca c9 c9 07 00"),
    ("two final blocks", "f3 48 05 00 cb c9 c9 07 00 00"),
]
"""The message "Hello", mostly as in RFC 7692, section 7.2.3."""


@pytest.fixture
def world() -> Iterator[World]:
    world = World(Loop())
    yield world
    world.end()


def deflated(message: bytes, level: int = 6, mode: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """The payload of a compressed message (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    payload = deflater.compress(message) + deflater.flush(mode)
    return payload.removesuffix(TAIL) if mode == zlib.Z_SYNC_FLUSH else payload + b"\x00"


def compressed_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A compressed message in one frame, as a client sends it."""
    return client_frame(opcode, payload, reserved=RSV1)


def compressed_fragments(opcode: int, fragments: Sequence[bytes]) -> list[bytes]:
    """A compressed message in so many frames."""
    last = len(fragments) - 1
    return [
        client_frame(CONTINUATION if i else opcode, part, fin=i == last, reserved=0 if i else RSV1)
        for i, part in enumerate(fragments)
    ]


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    return [stream[a:b] for a, b in pairwise([0, *sorted(places), len(stream)])]


def reader(max_size: int = 2**20) -> FrameReader:
    return FrameReader(max_size=max_size, inflates=True)


# Reading


@examples(300)
@given(st.data())
def test_inflates_like_websockets(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(_messages(), max_size=5)))
    outcome = served([stream], window_bits=FULL)
    assert outcome == served_by_websockets(stream, window_bits=FULL)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    assert served(cut(stream, places), window_bits=FULL) == outcome


@examples(40)
@given(st.data())
def test_inflating_does_not_depend_on_segment_boundaries(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(_messages(), min_size=1, max_size=2)))
    outcome = served([stream], window_bits=FULL)
    assert outcome.code is None
    for place in range(len(stream) + 1):
        assert served([stream[:place], stream[place:]], window_bits=FULL) == outcome
    assert served([bytes([byte]) for byte in stream], window_bits=FULL) == outcome


@examples(300)
@given(st.data())
def test_arbitrary_compressed_bytes_are_handled(data: st.DataObject) -> None:
    """What is no deflate is an error for both; but some of what is, `websockets` takes for its end."""
    payload = bytearray(deflated(data.draw(st.text(max_size=300)).encode(), data.draw(st.integers(0, 9))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(payload)))
        payload[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    stream = compressed_frame(bytes(payload), BINARY)
    outcome = served([stream], window_bits=FULL)
    theirs = served_by_websockets(stream, window_bits=FULL)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    if theirs.code == 1002:
        assert outcome.code == 1007
    elif theirs.code is None and len(payload) <= MAX_SIZE:
        inflater.decompress(payload + TAIL)
        assert inflater.eof or outcome == theirs
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    assert served(cut(stream, places), window_bits=FULL) == outcome


@pytest.mark.parametrize(("name", "payload"), HELLO, ids=[name for name, _ in HELLO])
def test_rfc_examples_are_inflated(name: str, payload: str) -> None:
    data = bytes.fromhex(payload)
    assert reader().feed(compressed_frame(data)) == [(TEXT, b"Hello")]
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            parts = compressed_fragments(BINARY, [data[:first], data[first:second], data[second:]])
            stream = b"".join([parts[0], client_frame(PING), *parts[1:], client_frame(BINARY, b"\xff")])
            assert reader().feed(stream) == [(PING, b""), (BINARY, b"Hello"), (BINARY, b"\xff")]


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x02\x00", b"\x03\x00"])
def test_encodings_of_an_empty_message_are_accepted(payload: bytes) -> None:
    assert reader().feed(compressed_frame(payload)) == [(TEXT, b"")]


def test_compression_is_per_message() -> None:
    stream = (
        client_frame(TEXT, b"plain")
        + b"".join(compressed_fragments(TEXT, cut(deflated(b"compressed"), [3, 7])))
        + client_frame(TEXT, b"pl", fin=False)
        + client_frame(CONTINUATION, b"ain")
        + compressed_frame(deflated(b"\xff\xfe"), BINARY)
        + client_frame(BINARY, b"\xff\xfe")
    )
    expected = [(TEXT, b"plain"), (TEXT, b"compressed"), (TEXT, b"plain"), (BINARY, b"\xff\xfe"), (BINARY, b"\xff\xfe")]
    assert reader().feed(stream) == expected


@pytest.mark.parametrize(
    ("stream", "code", "why"),
    [
        (client_frame(TEXT, reserved=2), 1002, "reserved"),
        (client_frame(TEXT, reserved=1), 1002, "reserved"),
        (client_frame(TEXT, reserved=RSV1 | 1), 1002, "reserved"),
        (client_frame(PING, reserved=RSV1), 1002, "reserved"),
        (client_frame(CLOSE, reserved=RSV1), 1002, "reserved"),
        (client_frame(3, reserved=RSV1), 1002, "opcode 3"),
        (client_frame(TEXT, fin=False) + client_frame(CONTINUATION, reserved=RSV1), 1002, "reserved"),
        (client_frame(TEXT, reserved=RSV1, fin=False) + client_frame(CONTINUATION, reserved=RSV1), 1002, "reserved"),
        (client_frame(TEXT, fin=False) + client_frame(TEXT, reserved=RSV1), 1002, "a new message"),
        (compressed_frame(b"\x06"), 1007, "cannot be inflated"),
        (compressed_frame(b"\x00\x05\x00\x00\x00hello"), 1007, "cannot be inflated"),
        (b"".join(compressed_fragments(TEXT, [b"\xff", b"\xff"])), 1007, "cannot be inflated"),
        (compressed_frame(deflated(b"\xff")), 1007, "not UTF-8"),
        (compressed_frame(deflated(b"a\xe2\x82")), 1007, "not UTF-8"),
        (b"".join(compressed_fragments(TEXT, cut(deflated(b"\xed\xa0\x80"), [2]))), 1007, "not UTF-8"),
    ],
)
def test_invalid_deflate_data_closes_the_connection(stream: bytes, code: int, why: str) -> None:
    outcome = served([client_frame(BINARY, b"before") + stream + client_frame(BINARY, b"behind")], window_bits=FULL)
    assert outcome.sent == [(BINARY, b"before")]
    assert outcome.code == code
    assert why in outcome.reason


def test_compressed_frame_without_negotiation_is_an_error() -> None:
    assert served([compressed_frame(deflated(b"a"))[:1]]).code == 1002


def test_message_that_uses_an_earlier_window_is_an_error() -> None:
    deflater = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    first, second = (
        (deflater.compress(b"once upon a time") + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
        for _ in range(2)
    )
    outcome = served([compressed_frame(first) + compressed_frame(second)], window_bits=FULL)
    assert (outcome.sent, outcome.code) == ([(TEXT, b"once upon a time")], 1007)


# Reading: bounds


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("size", [64, MAX_SIZE, 65536, 200_000])
def test_max_size_applies_to_the_inflated_message(level: int, size: int) -> None:
    for filling in (FILLING * 2, b"a" * 2 * size, random.Random(size).randbytes(size + 1)):
        message = filling[:size]
        for whole in (True, False):
            payload = deflated(message, level)
            parts = [payload] if whole else cut(payload, range(0, len(payload), len(payload) // 3))
            found = reader(size).feed(b"".join(compressed_fragments(BINARY, parts)))
            assert found == [(BINARY, message)]
            payload = deflated(filling[: size + 1], level)
            parts = [payload] if whole else cut(payload, range(0, len(payload), len(payload) // 3))
            with pytest.raises(FrameError, match=f"longer than {size} bytes") as caught:
                reader(size).feed(b"".join(compressed_fragments(BINARY, parts)))
            assert caught.value.code == 1009


def test_maximally_compressed_message_is_accepted() -> None:
    """All literals of nine bits, in one block of the fixed codes, as an encoder may write that knows no others."""
    message = bytes(range(144, 256)) * 10
    bits = "010"  # not final, fixed codes, in the order in which bits are packed (RFC 1951, section 3.1.1)
    bits += "".join(f"{byte - 144 + 0b110010000:09b}" for byte in message)
    bits += "0000000" + "000"  # end of block, and the head of the empty one whose rest is left out
    bits += "0" * (-len(bits) % 8)
    payload = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    assert len(payload) > len(message) * 9 // 8
    assert reader(len(message)).feed(compressed_frame(payload, BINARY)) == [(BINARY, message)]


def test_compressed_message_over_the_possible_size_is_refused_early() -> None:
    bound = MAX_SIZE + MAX_SIZE // 8 + 64
    early = client_frame(BINARY, reserved=RSV1, length=bound + 1, form=16)[:4]
    assert served([early], window_bits=FULL).code == 1009
    early = client_frame(BINARY, reserved=RSV1, length=bound, form=16)[:4]
    assert served([early], window_bits=FULL).code is None
    stream = compressed_fragments(BINARY, [bytes(MAX_SIZE), bytes(65)])
    stream[1] = client_frame(CONTINUATION, fin=False, length=bound - MAX_SIZE + 1)
    assert served(stream, window_bits=FULL).code == 1009


def test_deflate_bomb_is_inflated_only_up_to_max_size() -> None:
    most = 2**20
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([*(deflater.compress(bytes(most)) for _ in range(100)), deflater.flush(zlib.Z_SYNC_FLUSH)])
    assert len(bomb) < most
    for stream in (compressed_frame(bomb), b"".join(compressed_fragments(TEXT, cut(bomb, [5, 5000])))):
        bombed = reader(most)
        tracemalloc.start()
        try:
            with pytest.raises(FrameError, match="longer than") as caught:
                bombed.feed(stream)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert caught.value.code == 1009
        assert peak < 4 * most


def test_a_message_of_many_streams_is_refused() -> None:
    """Each costs a new inflater, and a copy of what is left."""
    final = deflated(b"a", mode=zlib.Z_FINISH)[:-1]
    assert reader().feed(compressed_frame(final * 63)) == [(TEXT, b"a" * 63)]
    with pytest.raises(FrameError, match="too many parts") as caught:
        reader().feed(compressed_frame(final * 64))
    assert caught.value.code == 1009
    with pytest.raises(FrameError, match="longer than 40 bytes"):
        reader(40).feed(compressed_frame(final * 41))


# Writing


class Oracle:
    """The client's side of `websockets`."""

    def __init__(self) -> None:
        self.extension = PerMessageDeflate(True, True, FULL, FULL)

    def read(self, frames: list[Frame]) -> list[bytes]:
        return [bytes(self.extension.decode(frame).data) for frame in frames if frame.opcode is Opcode.TEXT]


def raw_frames(data: bytes | bytearray) -> list[Frame]:
    """The frames that a server sent, as they are."""
    frames = []
    place = 0
    while place < len(data):
        size, head = data[place + 1], 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[place + 2 : place + head], "big")
        payload = bytes(data[place + head : place + head + size])
        frames.append(Frame(Opcode(data[place] & 15), payload, rsv1=bool(data[place] & 0x40)))
        place += head + size
    assert place == len(data)
    return frames


def compressed(client: Client) -> list[bool]:
    """Of each event that a client was sent, whether it was compressed."""
    found = raw_frames(client.transport.received)
    assert not any(frame.rsv1 for frame in found if frame.opcode is not Opcode.TEXT)
    events = zip(found, Oracle().read(found), strict=True)
    return [frame.rsv1 for frame, message in events if message.startswith(b'{"op":"event"')]


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
@given(sizes=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 300) | st.integers(0, 90_000)), max_size=9))
@examples(100)
def test_clients_with_and_without_compression_get_the_same_events(
    kind: type[SlowPipe], sizes: list[tuple[str, int]]
) -> None:
    world = World(Loop())
    clients = [world.connect(kind(world.loop), window_bits) for window_bits in (0, FULL, 9, FULL)]
    for client in clients:
        world.subscribe(client, "*", 20)
        client.transport.drain(None)
    for topic, size in sizes:
        world.publish(topic, size)
    world.end()
    plain, *others = [
        sorted(message for message in Oracle().read(raw_frames(client.transport.received)) if b'"event"' in message)
        for client in clients
    ]
    assert len(plain) == len(sizes)
    assert others == [plain] * 3
    for client in clients:
        assert not any(compressed(client)) or client.connection.deflates


def test_event_is_deflated_once_for_all_subscribers(world: World) -> None:
    clients = [world.connect(kind(world.loop), FULL) for kind in (SlowPipe, SlowSocket) for _ in range(3)]
    behind = [clients[0], clients[3]]
    for client in clients:
        world.subscribe(client, "a", 20)
        world.turn()
        client.transport.drain(None)
    for client in behind:
        client.transport.block()
    for size in (9000, 1000, 200):
        world.publish("a", size)
    world.turn()
    for size in (9000, 1000, 200):
        world.publish("a", size)
    assert clients[0].connection.blocked
    for _ in range(4):
        world.turn()
        for client in clients:
            client.transport.drain(None)
    assert all(len(client.stream) == 6 for client in clients)
    assert world.context.deflated == 6
    assert all(compressed(client) == [True] * 6 for client in clients)


def test_queued_event_is_deflated_once(world: World) -> None:
    clients = [world.connect(SlowPipe(world.loop), FULL) for _ in range(3)]
    for client in clients:
        world.subscribe(client, "a", 2)
        client.transport.block()
    world.publish("a", 1000)
    world.turn()
    for _ in range(5):
        world.publish("a", 1000)
    world.turn()
    # What is dropped costs nothing.
    assert world.context.deflated == 1
    for _ in range(3):
        for client in clients:
            client.transport.drain(None)
        world.turn()
    assert all(compressed(client) == [True] * 3 for client in clients)
    assert world.context.deflated == 3


def test_nothing_is_deflated_without_negotiation(world: World) -> None:
    clients = [world.connect(kind(world.loop), window) for kind in (SlowPipe, SlowSocket) for window in (0, 9, 14)]
    for client in clients:
        world.subscribe(client, "a")
    for _ in range(10):
        world.publish("a", 1000)
    world.turn()
    for client in clients:
        client.transport.drain(None)
    assert world.context.deflated == 0
    assert not any(any(compressed(client)) for client in clients)


def test_short_or_incompressible_events_are_sent_uncompressed(world: World) -> None:
    client = world.connect(SlowPipe(world.loop), FULL)
    hub, noise = world.hub, random.Random(3).randbytes(3000)
    subscription = hub.subscribe(client.connection, "a", max_queue=9, overflow="drop_oldest", echo=True)
    world.loop.turn()
    client.transport.received.clear()
    for payload in (b"a" * (SHORTEST - 1), b"a" * SHORTEST, noise, b"a" * 65536):
        hub.audience("a").publish("a", payload)
    world.loop.turn()
    frames = raw_frames(client.transport.received)
    assert [frame.rsv1 for frame in frames] == [False, True, False, True]
    assert world.context.deflated == 3
    read = Oracle().read(frames)
    assert read == [b"a" * (SHORTEST - 1), b"a" * SHORTEST, noise, b"a" * 65536]
    client.transport.received.clear()
    hub.unsubscribe(subscription)


def test_answers_and_gaps_are_sent_uncompressed(world: World) -> None:
    client = world.connect(SlowPipe(world.loop), FULL)
    world.subscribe(client, "a", 1)
    client.transport.block()
    client.connection.answer(b'{"op":"pong"}' + b" " * 1000)
    world.turn()
    for _ in range(3):
        world.publish("a", 1000)
    client.transport.drain(None)
    world.turn()
    frames = raw_frames(client.transport.received)
    assert [(frame.rsv1, bytes(frame.data)[:11]) for frame in frames[1:3]] == [
        (False, b'{"op":"pong'),
        (False, b'{"op":"gap"'),
    ]
    assert frames[3].rsv1
    server_frames(bytes(client.transport.received[: -len(frames[3].data) - 4]))


def capacity() -> int:
    """How many bytes an empty small socket takes at once."""
    transport = SlowSocket(Loop())
    taken = int(transport.get_extra_info("socket").send(b"x" * 100_000))  # type: ignore[attr-defined]
    transport.discard()
    return taken


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("queued", [False, True])
def test_partial_write_at_every_byte_of_compressed_events(count: int, queued: bool) -> None:
    """Of a batch of deflated events, or of such that waited in a queue."""
    room = capacity()
    ends = []
    for shift in range(1, 900):
        world = World(Loop())
        client, other = world.connect(SlowSocket(world.loop), FULL), world.connect(SlowPipe(world.loop))
        for each in (client, other):
            for topic in range(count):
                world.subscribe(each, f"t{topic}", 3)
        world.turn()
        client.transport.drain(None)
        if queued:
            other.transport.block()
            world.publish("t0", 40_000)
            world.turn()
        else:
            client.connection.answer(b'{"op":"pong"}'.ljust(room - shift - 4))
        for number in range(5):
            world.publish(f"t{number % count}", 40 + 60 * number)
        if queued:
            client.transport.drain(None)
            client.connection.answer(b'{"op":"pong"}'.ljust(room - shift - 4))
        world.turn()
        ends.append(client.connection.blocked)
        world.account()
        for _ in range(3):
            client.transport.drain(None)
            world.turn()
        world.end()
        assert any(compressed(client))
    follows = ends.index(False)
    assert follows > 500, "every byte of five events"
    assert not any(ends[follows:])


# Details


@st.composite
def _messages(draw: st.DrawFn) -> bytes:
    """A valid message, most often compressed, in some fragments, with control frames between them."""
    opcode = draw(st.sampled_from([TEXT, BINARY]))
    if opcode == TEXT:
        payload = (
            (draw(st.text(max_size=20)) * draw(st.integers(1, 3))).encode()[:MAX_SIZE].decode(errors="ignore").encode()
        )
    else:
        payload = draw(st.binary(max_size=MAX_SIZE // 2))
    is_compressed = draw(st.integers(0, 3)) > 0
    if is_compressed:
        payload = deflated(payload, draw(st.integers(0, 9)))
    if len(payload) > MAX_SIZE:  # websockets refuses it
        payload = b""
    fragments = cut(payload, draw(st.lists(st.integers(0, len(payload)), max_size=4)))
    frames = []
    for number, fragment in enumerate(fragments):
        if draw(st.integers(0, 3)) == 0:
            frames.append(client_frame(draw(st.sampled_from([PING, PONG])), draw(st.binary(max_size=5))))
        reserved = RSV1 if is_compressed and number == 0 else 0
        last = number == len(fragments) - 1
        frames.append(client_frame(CONTINUATION if number else opcode, fragment, fin=last, reserved=reserved))
    return b"".join(frames)
