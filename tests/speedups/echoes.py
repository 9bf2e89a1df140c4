"""A server that echoes, once with the native connection and once with `websockets`: what each does with a stream."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterable
from typing import NamedTuple

from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from broker._speedups import Connection
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import BINARY, CLOSE, PONG, TEXT, server_frames

MAX_SIZE = 200
"""What a message may have in most of these tests: small, so that they come near it, but more than a short head says."""

Frames = list[tuple[int, bytes]]


class Outcome(NamedTuple):
    """What a server does with a stream: the frames that it sends (it echoes messages), and how it closes."""

    sent: Frames
    code: int | None
    reason: str


class Echo:
    """Sends each message back."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def message(self, payload: bytes, text: bool) -> None:
        self.connection.answer(payload, TEXT if text else BINARY)

    def on_close(self, code: int, reason: str) -> None:
        pass


def served(pieces: Iterable[bytes | bytearray], max_size: int = MAX_SIZE, window_bits: int = 0) -> Outcome:
    """Let the native connection read a stream that comes in pieces. `window_bits` 15 lets it be compressed."""
    loop, pipe = Loop(), Pipe()
    connection = Connection(loop.context(max_size=max_size, buffer_size=64))
    connection.session = Echo(connection)
    connection.start(pipe, window_bits=window_bits)
    for piece in pieces:
        connection.data_received(piece)
    loop.turn()
    sent = server_frames(pipe.take())
    pipe.lose()
    code, reason = None, ""
    if sent and sent[-1][0] == CLOSE:
        _, payload = sent.pop()
        code, reason = (struct.unpack("!H", payload[:2])[0], payload[2:].decode()) if payload else (1005, "")
    assert all(opcode != CLOSE for opcode, _ in sent)
    assert (pipe.is_closing() or pipe.ended) == (code is not None)
    return Outcome(sent, code, reason)


class Oracle(ServerProtocol):
    """`websockets`, but that it counts a control frame between the fragments of a message to their size."""

    _most: int | None = None

    @property
    def max_message_size(self) -> int | None:
        return None if self.reader.buffer[0] & 0x08 else self._most

    @max_message_size.setter
    def max_message_size(self, most: int | None) -> None:
        self._most = most


def served_by_websockets(stream: bytes, max_size: int | None = MAX_SIZE, window_bits: int = 0) -> Outcome:
    """Let `websockets` read a stream, with an echo behind it that checks the texts."""
    server = Oracle(state=OPEN, max_size=max_size)
    if window_bits:
        server.extensions = [PerMessageDeflate(True, True, window_bits, window_bits)]
    server.receive_data(stream)
    sent: Frames = []
    message = bytearray()
    opcode = 0
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for event in server.events_received():
        assert isinstance(event, Frame)
        if event.opcode is Opcode.PING:
            sent.append((PONG, bytes(event.data)))
        if event.opcode in (Opcode.TEXT, Opcode.BINARY):
            opcode = int(event.opcode)
            message.clear()
            decode = codecs.getincrementaldecoder("utf-8")().decode
        if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            message += event.data
            if opcode == TEXT:
                try:
                    decode(event.data, event.fin)
                except UnicodeDecodeError:
                    return Outcome(sent, 1007, "")
            if event.fin:
                sent.append((opcode, bytes(message)))
    # It takes no close between the fragments of a message. RFC 6455, section 5.4, lets control frames be there.
    if str(server.parser_exc) == "incomplete fragmented message" and server.close_rcvd is not None:
        return Outcome(sent, int(server.close_rcvd.code), server.close_rcvd.reason)
    if server.close_sent is None:
        return Outcome(sent, None, "")
    return Outcome(sent, int(server.close_sent.code), server.close_sent.reason)
