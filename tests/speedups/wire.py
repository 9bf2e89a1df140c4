"""The bytes of a connection: frames as a client sends them, and what a server sent taken apart again."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from websockets.frames import Close, Frame, Opcode
from websockets.streams import StreamReader

from broker._speedups import mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

KEY = b"\x37\xfa\x21\x3d"
"""The masking key of the examples in RFC 6455, section 5.7."""

SHORT, MEDIUM, LONG = 7, 16, 64
"""The three forms of a length, by their bits (RFC 6455, section 5.2)."""

TIMES = float(os.environ.get("FUZZ_TIMES", "1"))
"""How much more `make fuzz` tries than the tests do."""

THREADS = int(os.environ.get("SENDER_THREADS", "1"))
"""Threads that send, in the tests that do not say how many. With 3, all tests are tried with threads."""

_Test = TypeVar("_Test", bound=Callable[..., None])


def examples(number: int) -> Callable[[_Test], _Test]:
    """Try a property on so many examples. None of them fails for being slow: the machine may be busy."""
    return settings(
        max_examples=max(1, int(number * TIMES)),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def client_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    key: bytes | None = KEY,
    form: int | None = None,
    length: int | None = None,
) -> bytes:
    """One frame as a client sends it, or as it must not: `reserved` has the three bits, `key` None is no mask.

    `form` is the form of the length, by default the shortest, `length` what is written there, by default the truth.
    """
    length = len(payload) if length is None else length
    form = form or (SHORT if length < 126 else MEDIUM if length < 65536 else LONG)
    first = fin << 7 | reserved << 4 | opcode
    masked = 0x80 if key is not None else 0
    if form == SHORT:
        head = struct.pack("!BB", first, masked | length)
    elif form == MEDIUM:
        head = struct.pack("!BBH", first, masked | 126, length)
    else:
        head = struct.pack("!BBQ", first, masked | 127, length)
    return head + (payload if key is None else key + mask(payload, key))


def close_frame(code: int, reason: str | bytes = b"") -> bytes:
    """A close frame as a client sends it."""
    return client_frame(CLOSE, struct.pack("!H", code) + (reason if isinstance(reason, bytes) else reason.encode()))


def server_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Opcodes and payloads of what a server sent, which must be whole frames, unmasked and not fragmented."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    frames = []
    while data:
        parsing = Frame.parse(reader.read_exact, mask=False)
        try:
            next(parsing)
        except StopIteration as done:
            frame: Frame = done.value
        assert frame.fin
        frames.append((int(frame.opcode), bytes(frame.data)))
        data = data[len(frame.serialize(mask=False)) :]
    return frames


def closed_with(frames: list[tuple[int, bytes]]) -> int | None:
    """The code in the close frame, which must be the last frame if there is one; 1005 if it has none."""
    assert all(opcode != Opcode.CLOSE for opcode, _ in frames[:-1])
    if not frames or frames[-1][0] != Opcode.CLOSE:
        return None
    return int(Close.parse(frames[-1][1]).code)
