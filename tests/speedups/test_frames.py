"""Frames are read as `websockets` reads them, wherever TCP cuts them, and written as `websockets` writes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import EXTERNAL_CLOSE_CODES, Frame, Opcode

from broker._speedups import FrameError, FrameReader, frame, is_close_code
from tests.speedups.echoes import MAX_SIZE, Outcome, served, served_by_websockets
from tests.speedups.wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    KEY,
    LONG,
    MEDIUM,
    PING,
    PONG,
    SHORT,
    TEXT,
    client_frame,
    close_frame,
    examples,
)

# Reading: whatever comes


@examples(400)
@given(st.data())
def test_reads_frames_like_websockets(data: st.DataObject) -> None:
    frames = data.draw(st.lists(_frames(), max_size=12))
    stream = b"".join(frames)
    outcome = served([stream])
    _assert_like_websockets(outcome, stream)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    assert served(_cut(stream, places)) == outcome


@examples(300)
@given(st.data())
def test_reads_arbitrary_bytes_like_websockets(data: st.DataObject) -> None:
    stream = bytearray(b"".join(data.draw(st.lists(_frames(), max_size=6))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(stream)))
        stream[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    outcome = served([stream])
    _assert_like_websockets(outcome, bytes(stream))
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    assert served(_cut(bytes(stream), places)) == outcome


@examples(60)
@given(st.data())
def test_reading_does_not_depend_on_segment_boundaries(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(_messages(), max_size=3)))
    outcome = served([stream])
    _assert_like_websockets(outcome, stream)
    assert outcome.code is None
    for place in range(len(stream) + 1):
        assert served([stream[:place], stream[place:]]) == outcome
    assert served([bytes([byte]) for byte in stream]) == outcome


# Reading: messages


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 65537])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_reads_every_form_of_length(opcode: int, size: int) -> None:
    payload = bytes(i % 127 for i in range(size))
    stream = client_frame(opcode, payload)
    expected = [(opcode, payload)]
    for place in (*range(20), *range(len(stream) - 3, len(stream) + 1), size // 2):
        reader = FrameReader()
        assert reader.feed(stream[:place]) + reader.feed(stream[place:]) == expected


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_puts_fragments_together_around_control_frames(opcode: int) -> None:
    stream = (
        client_frame(opcode, b"Hel", fin=False)
        + client_frame(PING, b"are you there?")
        + client_frame(CONTINUATION, b"", fin=False)
        + client_frame(PONG)
        + client_frame(CONTINUATION, b"lo", fin=True)
        + client_frame(BINARY, b"next")
    )
    reader = FrameReader()
    assert reader.feed(stream) == [(PING, b"are you there?"), (PONG, b""), (opcode, b"Hello"), (BINARY, b"next")]


def test_joins_a_character_split_across_fragments() -> None:
    text = "Grüße, 한국, 😀".encode()
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            stream = (
                client_frame(TEXT, text[:first], fin=False)
                + client_frame(CONTINUATION, text[first:second], fin=False)
                + client_frame(CONTINUATION, text[second:])
            )
            assert FrameReader().feed(stream) == [(TEXT, text)]


def test_binary_messages_are_not_checked_for_utf8() -> None:
    stream = client_frame(BINARY, b"\xff\xfe") + client_frame(BINARY, b"\xc3", fin=False) + client_frame(CONTINUATION)
    assert FrameReader().feed(stream) == [(BINARY, b"\xff\xfe"), (BINARY, b"\xc3")]


def test_buffer_grows_with_a_fragmented_message() -> None:
    payload = bytes(range(256)) * 1000
    fragments = [payload[i : i + 100] for i in range(0, len(payload), 100)]
    reader = FrameReader(max_size=len(payload))
    frames = [client_frame(BINARY, fragments[0], fin=False)]
    frames += [client_frame(CONTINUATION, fragment, fin=False) for fragment in fragments[1:]]
    assert [reader.feed(each) for each in frames] == [[]] * len(frames)
    assert reader.feed(client_frame(CONTINUATION)) == [(BINARY, payload)]


# Reading: mistakes


@dataclass
class Mistake:
    """A frame that closes the connection, as soon as so many of its bytes are there."""

    name: str
    wrong: bytes
    code: int
    seen_at: int
    before: bytes = field(default=b"")


FRAGMENT = client_frame(TEXT, b"a", fin=False)
MANY = client_frame(CONTINUATION, bytes(MAX_SIZE - 1), fin=False)
HALF = client_frame(TEXT, b"\xe0", fin=False)

MISTAKES = [
    *(Mistake(f"reserved bits {bits:03b}", client_frame(TEXT, reserved=bits), 1002, 1) for bits in range(1, 8)),
    *(Mistake(f"opcode {opcode}", client_frame(opcode), 1002, 1) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *(
        Mistake(f"fragmented control frame {opcode}", client_frame(opcode, fin=False), 1002, 1)
        for opcode in (CLOSE, PING, PONG)
    ),
    *(
        Mistake(f"control frame {opcode} of 126 bytes", client_frame(opcode, bytes(126)), 1002, 2)
        for opcode in (CLOSE, PING, PONG)
    ),
    *(
        Mistake(f"control frame {opcode} with a long length", client_frame(opcode, bytes(5), form=LONG), 1002, 2)
        for opcode in (CLOSE, PING, PONG)
    ),
    Mistake("continuation of nothing", client_frame(CONTINUATION, b"a"), 1002, 1),
    Mistake("continuation of a whole message", client_frame(CONTINUATION), 1002, 1, client_frame(TEXT, b"a")),
    Mistake("continuation of an ended message", client_frame(CONTINUATION), 1002, 1, FRAGMENT + client_frame(0, b"b")),
    Mistake("text before the end of a message", client_frame(TEXT, b"b"), 1002, 1, FRAGMENT),
    Mistake("binary before the end of a message", client_frame(BINARY, b"b"), 1002, 1, FRAGMENT),
    *(
        Mistake(f"unmasked frame {opcode}", client_frame(opcode, b"abc", key=None), 1002, 2)
        for opcode in (TEXT, BINARY, CLOSE, PING, PONG)
    ),
    Mistake("unmasked empty frame", client_frame(TEXT, key=None), 1002, 2),
    *(
        Mistake(f"{size} written with 16 bits", client_frame(BINARY, bytes(size), form=MEDIUM), 1002, 4)
        for size in (0, 1, 125)
    ),
    *(
        Mistake(f"{size} written with 64 bits", client_frame(BINARY, bytes(size), form=LONG), 1002, 10)
        for size in (0, 125, 126, 127)
    ),
    Mistake("65535 written with 64 bits", client_frame(BINARY, form=LONG, length=65535), 1002, 10),
    *(
        Mistake(f"length {length:#x}", client_frame(BINARY, form=LONG, length=length), 1002, 10)
        for length in (2**63, 2**63 + 1, 2**64 - 1)
    ),
    *(
        Mistake(f"too big with {length:#x}", client_frame(BINARY, form=LONG, length=length), 1009, 10)
        for length in (65536, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
    ),
    Mistake("one byte too big", client_frame(BINARY, bytes(MAX_SIZE + 1)), 1009, 4),
    Mistake("one byte too big in two fragments", client_frame(0, bytes(MAX_SIZE)), 1009, 4, FRAGMENT),
    Mistake("one byte too big in three fragments", client_frame(0, b"a"), 1009, 2, FRAGMENT + MANY),
    Mistake("no UTF-8", client_frame(TEXT, b"\xff"), 1007, 7),
    Mistake("no UTF-8 at the beginning of a long text", client_frame(TEXT, b"\xff" + b"a" * 99), 1007, 7),
    Mistake("an end within a character", client_frame(TEXT, b"a\xe2\x82"), 1007, 9),
    Mistake("no UTF-8 in the first fragment", client_frame(TEXT, b"a\xc0", fin=False), 1007, 8),
    Mistake("no UTF-8 over two fragments", client_frame(0, b"\x80\x80"), 1007, 7, HALF),
    Mistake("a character never ended", client_frame(0), 1007, 6, client_frame(TEXT, b"\xe2\x82", fin=False)),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_protocol_error_is_reported_at_its_first_byte(mistake: Mistake) -> None:
    whole = client_frame(BINARY, b"before")
    reader = FrameReader(max_size=MAX_SIZE)
    early = whole + mistake.before + mistake.wrong[: mistake.seen_at - 1]
    assert reader.feed(early)[0] == (BINARY, b"before")
    with pytest.raises(FrameError) as caught:
        reader.feed(mistake.wrong[mistake.seen_at - 1 :] + client_frame(BINARY, b"behind"))
    assert caught.value.code == mistake.code
    # In one piece it is the same: what came before counts, what comes behind does not.
    outcome = served([early + mistake.wrong[mistake.seen_at - 1 :] + client_frame(BINARY, b"behind")])
    assert outcome.code == mistake.code
    assert outcome.sent[0] == (BINARY, b"before")
    assert (BINARY, b"behind") not in outcome.sent
    assert outcome.reason == caught.value.reason == str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_incomplete_frame_is_not_an_error(mistake: Mistake) -> None:
    outcome = served([mistake.before, mistake.wrong[: mistake.seen_at - 1]])
    assert outcome.code is None


def test_message_of_max_size_is_accepted() -> None:
    whole = client_frame(BINARY, bytes(MAX_SIZE))
    parts = client_frame(BINARY, bytes(MAX_SIZE - 1), fin=False) + client_frame(0, b"a", fin=False) + client_frame(0)
    reader = FrameReader(max_size=MAX_SIZE)
    assert [len(payload) for _, payload in reader.feed(whole + parts + whole)] == [MAX_SIZE] * 3


def test_control_frame_between_fragments_does_not_count_towards_max_size() -> None:
    reader = FrameReader(max_size=3)
    stream = client_frame(TEXT, b"abc", fin=False) + client_frame(PING, bytes(125)) + client_frame(0)
    assert reader.feed(stream) == [(PING, bytes(125)), (TEXT, b"abc")]


@pytest.mark.parametrize("payload", [b"", b"a"])
def test_a_message_has_at_most_4096_fragments(payload: bytes) -> None:
    first, more = client_frame(TEXT, payload, fin=False), client_frame(0, payload, fin=False)
    reader = FrameReader(max_fragments=4096)
    for _ in range(2):  # they are counted anew for each message
        assert reader.feed(first + 4094 * more + client_frame(0, payload)) == [(TEXT, payload * 4096)]
    assert reader.feed(first + 4095 * more) == []
    with pytest.raises(FrameError, match="more than 4096 fragments") as caught:
        reader.feed(client_frame(0, payload))
    assert caught.value.code == 1009


def test_control_frames_do_not_count_as_fragments() -> None:
    reader = FrameReader(max_fragments=2)
    stream = client_frame(TEXT, b"a", fin=False) + 5 * client_frame(PING) + client_frame(0, b"b")
    assert reader.feed(stream) == 5 * [(PING, b"")] + [(TEXT, b"ab")]


def test_messages_before_a_protocol_error_are_returned() -> None:
    reader = FrameReader()
    assert reader.feed(client_frame(TEXT, b"a") + client_frame(PING) + client_frame(3)) == [(TEXT, b"a"), (PING, b"")]
    for data in (b"", client_frame(TEXT, b"b")):
        with pytest.raises(FrameError, match="opcode 3 is reserved"):
            reader.feed(data)


# Reading: the close


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1014, 3000, 3999, 4000, 4999])
@pytest.mark.parametrize("reason", ["", "bye", "Grüße", "x" * 123])
def test_close_is_echoed(code: int, reason: str) -> None:
    assert served([close_frame(code, reason)]) == Outcome([], code, reason)
    assert served([bytes([byte]) for byte in close_frame(code, reason)]) == Outcome([], code, reason)


def test_close_without_a_code_is_echoed() -> None:
    assert served([client_frame(CLOSE)]) == Outcome([], 1005, "")


@pytest.mark.parametrize("code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_reserved_close_code_is_a_protocol_error(code: int) -> None:
    assert served([close_frame(code)]).code == 1002


def test_close_payload_of_one_byte_is_a_protocol_error() -> None:
    assert served([client_frame(CLOSE, b"\x03")]).code == 1002


@pytest.mark.parametrize("reason", [b"\xff", b"\xed\xa0\x80", b"abc\xc3"])
def test_close_reason_that_is_not_utf8_is_an_error(reason: bytes) -> None:
    assert served([close_frame(1000, reason)]).code == 1007


def test_bytes_after_a_close_are_ignored() -> None:
    behind = client_frame(PING) + client_frame(TEXT, b"a") + client_frame(3)
    assert served([close_frame(1000) + behind, behind]) == Outcome([], 1000, "")


def test_close_inside_a_fragmented_message_is_accepted() -> None:
    assert served([FRAGMENT + close_frame(1001)]) == Outcome([], 1001, "")


def test_accepts_the_close_codes_that_websockets_accepts() -> None:
    for code in range(65536):
        assert is_close_code(code) == (code in EXTERNAL_CLOSE_CODES or 3000 <= code < 5000)


# Writing


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 255, 256, 65535, 65536, 65537, 2**24 + 1])
def test_writes_every_form_of_length(size: int) -> None:
    payload = bytes(size)
    assert frame(TEXT, payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


@examples(100)
@given(st.sampled_from(list(Opcode)), st.binary(max_size=125))
def test_writes_frames_like_websockets(opcode: Opcode, payload: bytes) -> None:
    expected = Frame(opcode, payload).serialize(mask=False)
    assert frame(opcode, payload) == expected
    assert frame(opcode, memoryview(bytearray(payload))) == expected


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_a_connection_writes_every_form_of_length(size: int) -> None:
    payload = b"x" * size
    assert served([client_frame(TEXT, payload)], max_size=size) == Outcome([(TEXT, payload)], None, "")


# Details


def _assert_like_websockets(ours: Outcome, stream: bytes) -> None:
    theirs = served_by_websockets(stream)
    if ours.code is not None and theirs.code is None:
        # It waits for the whole frame before it looks at some parts of the head, or at the text: here it is.
        theirs = served_by_websockets(stream + bytes(65535 + 14))
    unenforced = ("shortest form", "highest bit", "125 bytes")  # RFC 6455, sections 5.2 and 5.5
    if ours.code == 1002 and (theirs.code is None or any(rule in ours.reason for rule in unenforced)):
        # It does not know the rule, or waits for a control frame as long as a wrong head promises.
        assert theirs.sent[: len(ours.sent)] == ours.sent
        return
    if ours.code == 1002 and theirs.code == 1009:
        # A frame is both: it looks at the size first.
        theirs = served_by_websockets(stream, max_size=None)
        if theirs.code is None:
            theirs = theirs._replace(code=1002)
    if theirs.code == 1007 and ours.reason.endswith("must not be sent as a close code"):
        # A close is both: it looks at the text first.
        theirs = theirs._replace(code=1002)
    assert (ours.sent, ours.code) == (theirs.sent, theirs.code)


def _cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    return [stream[a:b] for a, b in pairwise([0, *sorted(places), len(stream)])]


TEXTS = st.one_of(
    st.text(max_size=20).map(str.encode),
    st.sampled_from([b"", b"x" * 125, b"x" * 126, "ß".encode() * 64, b"x" * MAX_SIZE]),
    st.sampled_from([b"\xff", b"a\xe2\x82", b"\xed\xa0\x80"]),
)
PAYLOADS = st.one_of(TEXTS, st.binary(max_size=20))
CLOSES = st.one_of(
    st.just(b""),
    st.binary(max_size=4),
    st.tuples(st.sampled_from([1000, 1001, 1005, 1006, 1007, 1015, 2999, 3000, 4999, 5000]), TEXTS).map(
        lambda close: struct.pack("!H", close[0]) + close[1][:123]
    ),
)
KEYS = st.one_of(st.just(KEY), st.just(bytes(4)), st.binary(min_size=4, max_size=4))


@st.composite
def _frames(draw: st.DrawFn) -> bytes:
    """A frame that is often right where it stands, and sometimes wrong in one way."""
    opcode = draw(st.sampled_from([TEXT, BINARY, CONTINUATION, CONTINUATION, PING, PONG, TEXT, BINARY, CLOSE]))
    payload = draw(CLOSES if opcode == CLOSE else PAYLOADS)
    if opcode >= CLOSE:
        payload = payload[:125]
    fin = opcode >= CLOSE or draw(st.booleans())
    key = draw(KEYS)
    wrong = draw(st.integers(0, 30))
    if wrong == 1:
        return client_frame(opcode, payload, fin=fin, key=None)
    if wrong == 2:
        return client_frame(opcode, payload, fin=fin, key=key, reserved=draw(st.integers(1, 7)))
    if wrong == 3:
        return client_frame(draw(st.sampled_from([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])), payload, fin=fin, key=key)
    if wrong == 4:
        return client_frame(draw(st.sampled_from([CLOSE, PING, PONG])), payload[:125], fin=False, key=key)
    if wrong == 5:
        return client_frame(draw(st.sampled_from([CLOSE, PING, PONG])), payload + bytes(126), key=key)
    if wrong == 6:
        return client_frame(draw(st.sampled_from([TEXT, BINARY])), payload + bytes(MAX_SIZE), fin=fin, key=key)
    if wrong == 7:
        length = draw(st.sampled_from([2**16, 2**32, 2**63 - 1]))
        return client_frame(BINARY, payload, fin=fin, key=key, form=LONG, length=length)
    if wrong == 8:
        return client_frame(BINARY, payload, fin=fin, key=key, form=draw(st.sampled_from([MEDIUM, LONG])))
    return client_frame(opcode, payload, fin=fin, key=key, form=SHORT if len(payload) < 126 else None)


@st.composite
def _messages(draw: st.DrawFn) -> bytes:
    """A valid message in some fragments, with control frames between them."""
    opcode = draw(st.sampled_from([TEXT, BINARY]))
    payload = draw(st.text(max_size=40)).encode() if opcode == TEXT else draw(st.binary(max_size=130))
    places = draw(st.lists(st.integers(0, len(payload)), max_size=4))
    fragments = _cut(payload, places)
    frames = []
    for number, fragment in enumerate(fragments):
        if draw(st.integers(0, 3)) == 0:
            frames.append(client_frame(draw(st.sampled_from([PING, PONG])), draw(st.binary(max_size=5))))
        last = number == len(fragments) - 1
        frames.append(client_frame(CONTINUATION if number else opcode, fragment, fin=last, key=draw(KEYS)))
    return b"".join(frames)
