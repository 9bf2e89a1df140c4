"""The native connection: control frames, closing, keep-alive, pauses and bounds, mostly on real sockets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import broker._speedups
from broker._speedups import CONNECTION_STATES, Audience, Connection, Filter, LoopContext, Subscription
from broker.config import Config
from broker.engines.memory import MemoryEngine
from broker.net.addresses import UNKNOWN
from broker.node import Node
from tests.speedups.sockets import PATIENCE, Client, running
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    client_frame,
    close_frame,
    closed_with,
    examples,
    server_frames,
)

OPEN, CLOSING, CLOSED = map(CONNECTION_STATES.index, ("open", "closing", "closed"))

# A kernel's buffers on both sides are smaller than this, so whoever sends so much meets their end.
A_LOT = 16 * 2**20


# Messages


async def test_messages_are_passed_to_the_session_with_their_type() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, "é".encode()) + client_frame(BINARY, b"\xff") + client_frame(TEXT))
        await peer.until(lambda: len(peer.messages) == 3)
        assert peer.messages == [("é".encode(), True), (b"\xff", False), (b"", True)]


async def test_upgrade_response_is_sent_first() -> None:
    async with running() as server:
        server.upgrade_response = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
        client, peer = await server.connect()
        peer.connection.answer(b"hello")
        assert await client.raw(len(server.upgrade_response)) == server.upgrade_response
        assert await client.frame() == (TEXT, b"hello")


async def test_bytes_after_the_handshake_are_read() -> None:
    async with running() as server:
        client, peer = await server.connect()
        stream = client_frame(TEXT, b"first") + client_frame(TEXT, b"second")
        peer.connection.feed(stream[:15])
        peer.connection.feed(b"")
        await client.send(stream[15:])
        await peer.until(lambda: len(peer.messages) == 2)
        assert [payload for payload, _ in peer.messages] == [b"first", b"second"]


async def test_ten_thousand_frames_in_one_segment() -> None:
    async with running() as server:
        client, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(payload)
        numbers = [str(number).encode() for number in range(10_000)]
        sending = asyncio.create_task(client.send(b"".join(client_frame(TEXT, number) for number in numbers)))
        assert [await client.frame() for _ in numbers] == [(TEXT, number) for number in numbers]
        await sending


async def test_large_message_is_received_and_sent() -> None:
    payload = bytes(range(256)) * 16384
    async with running(max_size=len(payload), max_answers=2 * len(payload)) as server:
        client, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(payload, BINARY)
        await client.send(client_frame(BINARY, payload))
        assert await client.frame() == (BINARY, payload)


def test_answers_of_a_turn_are_sent_in_one_write() -> None:
    connection, pipe, loop = _on_a_pipe()
    for number in range(10):
        connection.answer(b"%d" % number)
    connection.data_received(client_frame(PING, b"p"))
    assert pipe.take() == b""
    loop.turn()
    assert pipe.writes == 1
    assert server_frames(pipe.take()) == [*((TEXT, b"%d" % number) for number in range(10)), (PONG, b"p")]


# Ping and pong


@pytest.mark.parametrize("payload", [b"", b"x", b"\xff" * 125])
async def test_a_ping_is_answered_with_its_payload(payload: bytes) -> None:
    async with running() as server:
        client, _ = await server.connect()
        await client.send(client_frame(PING, payload))
        assert await client.frame() == (PONG, payload)


async def test_a_ping_is_answered_between_the_fragments_of_a_message() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, b"a", fin=False) + client_frame(PING, b"now"))
        assert await client.frame() == (PONG, b"now")
        await client.send(client_frame(CONTINUATION, b"b"))
        await peer.until(lambda: peer.messages == [(b"ab", True)])


async def test_unsolicited_pong_is_ignored() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(PONG, b"?") + client_frame(TEXT, b"a"))
        await peer.until(lambda: peer.messages == [(b"a", True)])


# Keep-alive


async def test_silent_client_is_closed() -> None:
    async with running(ping_interval=0.05, ping_timeout=0.05, close_timeout=0.05) as server:
        client, peer = await server.connect()
        frames = await client.frames()
        assert frames[0] == (PING, b"")
        assert closed_with(frames) == 4001
        assert await peer.end() == (4001, "ping_timeout")


async def test_client_that_answers_pings_stays_open() -> None:
    async with running(ping_interval=0.3, ping_timeout=0.25) as server:
        client, peer = await server.connect()
        for _ in range(3):
            assert await client.frame() == (PING, b"")
            await client.send(client_frame(PONG))
        await client.send(client_frame(TEXT, b"here"))
        await peer.until(lambda: peer.messages == [(b"here", True)])
        assert peer.ends == []


class Time:
    """The clock of a context: it goes on when a test says so, and the sweep comes as often as it would."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float, context: LoopContext, loop: Loop, tick: float = 0.5) -> None:
        for _ in range(round(seconds / tick)):
            self.now += tick
            context.sweep()
            loop.turn()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(broker._speedups, "monotonic", time)
    return time


def test_pings_are_sent_at_the_interval(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    pinged = []
    for _ in range(1000):
        time.pass_by(0.5, connection.context, loop)
        if pipe.take():
            pinged.append(time.now)
            connection.data_received(client_frame(PONG))
    assert connection.state == OPEN
    assert pinged[0] <= 1000 + 25 + 1
    assert all(25 <= late - early <= 26 for early, late in pairwise(pinged))
    assert len(pinged) >= 500 // 26
    pipe.lose()


def test_pings_are_sent_at_the_interval_for_any_connect_time(time: Time) -> None:
    loop = Loop()
    context = loop.context(ping_interval=25, ping_timeout=10, close_timeout=5)
    pipes: list[Pipe] = []
    pinged: dict[int, list[float]] = {}
    for step in range(400):
        if step % 3 == 0 and len(pipes) < 100:
            pipes.append(Pipe())
            Connection(context).start(pipes[-1])
        time.pass_by(0.5, context, loop)
        for number, pipe in enumerate(pipes):
            if pipe.take():
                pinged.setdefault(number, []).append(time.now)
                assert pipe.connection is not None
                pipe.connection.data_received(client_frame(PONG))
    for times in pinged.values():
        assert all(25 <= late - early <= 26 for early, late in pairwise(times))
    assert len(pinged) == 100
    for pipe in pipes:
        pipe.lose()


def test_any_received_byte_is_a_sign_of_life(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    for byte in client_frame(TEXT, bytes(100)):
        time.pass_by(9, connection.context, loop)
        connection.data_received(bytes([byte]))
    assert connection.state == OPEN
    pipe.lose()


def test_silent_connection_is_closed_at_the_timeout_and_not_before(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    while not pipe.take():
        time.pass_by(0.5, connection.context, loop)
    time.pass_by(9.5, connection.context, loop)
    assert connection.state == OPEN
    time.pass_by(1, connection.context, loop)
    assert connection.state == CLOSING
    assert closed_with(server_frames(pipe.take())) == 4001
    time.pass_by(4, connection.context, loop)
    assert not pipe.is_closing()
    time.pass_by(1.5, connection.context, loop)
    assert pipe.is_closing()
    pipe.lose()


def test_long_lived_connection_is_closed_when_silent(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    for _ in range(3):
        while not pipe.take():
            time.pass_by(0.5, connection.context, loop)
        connection.data_received(client_frame(PONG) + client_frame(TEXT, b"alive"))
    time.pass_by(36, connection.context, loop)
    assert connection.state == CLOSING
    pipe.lose()


def test_blocked_loop_time_does_not_count_as_silence(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    while not pipe.take():
        time.pass_by(0.5, connection.context, loop)
    time.pass_by(3600, connection.context, loop, tick=3600)
    assert connection.state == OPEN
    time.pass_by(8, connection.context, loop)
    assert connection.state == OPEN
    connection.data_received(client_frame(PONG))
    time.pass_by(10, connection.context, loop)
    assert connection.state == OPEN
    pipe.lose()


def test_paused_connection_is_not_closed_as_silent(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    connection.pause()
    time.pass_by(1000, connection.context, loop)
    assert connection.state == OPEN
    connection.resume()
    loop.turn()
    time.pass_by(40, connection.context, loop)
    assert connection.state_name == "disconnected", "closed, and cut after `close_timeout`"
    pipe.lose()


def test_interval_of_zero_sends_no_pings(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=0, ping_timeout=10, close_timeout=5)
    time.pass_by(1000, connection.context, loop)
    assert connection.state == OPEN
    assert pipe.take() == b""
    connection.close()
    time.pass_by(6, connection.context, loop)
    assert pipe.is_closing()
    pipe.lose()


def test_closed_connection_is_not_swept(time: Time) -> None:
    connection, pipe, loop = _on_a_pipe(ping_interval=25, ping_timeout=10, close_timeout=5)
    context = connection.context
    others = [Pipe() for _ in range(5)]
    for other in others:
        Connection(context).start(other)
    others[0].lose()  # the first of the list, one amid it, and the last
    others[2].connection = None  # this one forgot to say good-bye
    others[4].lose()
    pipe.lose()
    del connection
    gc.collect()
    time.pass_by(40, context, loop)
    for alive in (others[1], others[3]):
        assert closed_with(server_frames(alive.take())) == 4001
        alive.lose()


# Closing


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "going away"), (3000, "é" * 61), (4999, "x")])
async def test_close_is_echoed_and_the_connection_ends(code: int, reason: str) -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(close_frame(code, reason))
        assert await client.frames() == [(CLOSE, code.to_bytes(2) + reason.encode())]
        assert await peer.end() == (code, reason)


async def test_close_without_a_code_is_echoed_without_a_code() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(CLOSE))
        assert await client.frames() == [(CLOSE, b"")]
        assert await peer.end() == (1005, "")


async def test_commands_before_a_close_are_answered() -> None:
    async with running() as server:
        client, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(payload)
        await client.send(client_frame(TEXT, b"a") + client_frame(PING) + close_frame(1000) + client_frame(TEXT, b"b"))
        assert await client.frames() == [(TEXT, b"a"), (PONG, b""), (CLOSE, b"\x03\xe8")]
        assert peer.messages == [(b"a", True)]


async def test_server_close_waits_for_the_echo() -> None:
    async with running() as server:
        client, peer = await server.connect()
        peer.connection.close(4503, "disconnected")
        assert await peer.end() == (4503, "disconnected")
        assert await client.frame() == (CLOSE, b"\x11\x97disconnected")
        # The answer may be a while in coming; what comes before it does not count any more.
        await client.send(client_frame(TEXT, b"late") + client_frame(PING))
        await client.send(client_frame(TEXT, b"a", fin=False) + close_frame(4503))
        assert await client.frames() == []
        assert peer.messages == []
        assert peer.ends == [(4503, "disconnected")]


async def test_server_close_times_out() -> None:
    async with running(close_timeout=0.05) as server:
        client, peer = await server.connect()
        peer.connection.close(1001)
        assert closed_with([await client.frame() or (0, b"")]) == 1001
        assert await client.frame() is None


async def test_simultaneous_close_ends_cleanly() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(close_frame(3000))
        peer.connection.close(3001)
        frames = await client.frames()
        assert closed_with(frames) in (3000, 3001)
        assert await peer.end() in ((3000, ""), (3001, ""))


async def test_answers_before_a_close_are_sent() -> None:
    async with running() as server:
        client, peer = await server.connect()
        for number in range(3):
            peer.connection.answer(b"%d" % number)
        peer.connection.close(1000)
        peer.connection.answer(b"too late")
        peer.connection.close(1001)
        frames = [await client.frame() for _ in range(4)]
        assert frames == [(TEXT, b"0"), (TEXT, b"1"), (TEXT, b"2"), (CLOSE, b"\x03\xe8")]


async def test_finish_closes_after_queued_data() -> None:
    async with running(max_answers=2 * A_LOT) as server:
        client, peer = await server.connect(receive=4096)
        for _ in range(64):
            peer.connection.answer(bytes(A_LOT // 64), BINARY)
        peer.connection.finish(1001, "going_away")
        for _ in range(64):
            assert await client.frame() == (BINARY, bytes(A_LOT // 64))
        assert await client.frame() == (CLOSE, b"\x03\xe9going_away")
        assert await peer.end() == (1001, "going_away")


def test_a_long_reason_is_cut_between_characters() -> None:
    for reason, sent in (
        ("x" * 124, b"x" * 123),
        ("é" * 62, "é".encode() * 61),
        ("x" + "é" * 61, b"x" + "é".encode() * 61),
    ):
        connection, pipe, loop = _on_a_pipe()
        connection.close(1000, reason)
        loop.turn()
        assert server_frames(pipe.take()) == [(CLOSE, b"\x03\xe8" + sent)]
        pipe.lose()


def test_finish_sends_the_queue_and_close_discards_it() -> None:
    for end, expected in (("finish", [(TEXT, b"event"), (CLOSE, b"\x03\xe9")]), ("close", [(CLOSE, b"\x03\xe9")])):
        connection, pipe, loop = _on_a_pipe()
        interest = Filter("a")
        subscription = Subscription(connection, interest, max_queue=5)
        connection.pause_writing()
        assert Audience(connection.context, (interest,)).publish("a", b"event") == (1, 1, 0)
        loop.turn()
        getattr(connection, end)(1001, "")
        loop.turn()
        assert pipe.take() == b""
        connection.resume_writing()
        loop.turn()
        assert server_frames(pipe.take()) == expected
        assert subscription.connection is None
        assert connection.session is None
        assert connection.context.subscriptions == 0
        with pytest.raises(ValueError, match="not open"):
            Subscription(connection, interest, max_queue=5)
        pipe.lose()


# Mistakes: the close frame must arrive, whatever else is on its way.
#
# Closing a socket in which something lies unread sends a reset, and a reset takes away what the other side has not read
# yet (RFC 1122, section 4.2.2.13). So the server goes on reading until the client closes.


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (client_frame(3), 1002),
        (client_frame(TEXT, b"abc", key=None), 1002),
        (client_frame(TEXT, b"\xff"), 1007),
        (client_frame(BINARY, bytes(70_000)), 1009),
        (close_frame(1006), 1002),
        (close_frame(1000, b"\xff"), 1007),
        (client_frame(CLOSE, b"\x03"), 1002),
    ],
    ids=["reserved opcode", "unmasked", "no UTF-8", "too big", "close code", "close reason", "half a close code"],
)
async def test_protocol_error_is_answered_while_data_arrives(wrong: bytes, code: int) -> None:
    async with running(max_size=65536) as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, b"before") + wrong + client_frame(TEXT, b"behind"))
        await client.send(bytes(A_LOT))
        frames = await client.frames()
        assert closed_with(frames) == code
        await client.send(bytes(A_LOT))  # it may go on, too
        assert (await peer.end())[0] == code
        assert [payload for payload, _ in peer.messages] == [b"before"]


async def test_protocol_error_after_a_server_close_keeps_the_close() -> None:
    async with running() as server:
        client, peer = await server.connect()
        peer.connection.close(1001, "going_away")
        await client.send(client_frame(3))
        await client.send(bytes(A_LOT))
        assert await client.frames() == [(CLOSE, b"\x03\xe9going_away")]


async def test_client_that_stays_after_a_protocol_error_is_aborted() -> None:
    async with running(close_timeout=0.05) as server:
        client, _ = await server.connect()
        await client.send(client_frame(3))
        assert closed_with(await client.frames()) == 1002
        await server.until_empty()


# The end without a close


async def test_disconnect_without_a_close_is_1006() -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, b"a"))
        client.end_writing()
        assert await peer.end() == (1006, "connection lost")
        assert peer.messages == [(b"a", True)]
        assert await client.frames() == []


@pytest.mark.parametrize("size", [1, 5, 8, 60_000])
async def test_disconnect_within_a_frame_is_1006(size: int) -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, b"a" * 70_000)[:size])
        client.end_writing()
        assert (await peer.end())[0] == 1006
        assert peer.messages == []


@pytest.mark.parametrize("size", [0, 1, 5, 8, 60_000])
async def test_a_reset_is_1006(size: int) -> None:
    async with running() as server:
        client, peer = await server.connect()
        await client.send(client_frame(TEXT, b"a" * 70_000)[:size])
        client.reset()
        assert (await peer.end())[0] == 1006
        assert peer.connection.state == CLOSED


async def test_abort_sends_nothing() -> None:
    async with running() as server:
        client, peer = await server.connect()
        peer.connection.abort()
        assert (await peer.end())[0] == 1006
        assert await client.frames() == []
        peer.connection.abort()
        peer.connection.close()
        peer.connection.answer(b"nobody")
        peer.connection.pause()
        peer.connection.resume()


async def test_closed_connection_is_freed() -> None:
    async with running() as server:
        for leave in (client_frame(CLOSE), client_frame(3), client_frame(TEXT, b"abc")[:-1]):
            client, peer = await server.connect()
            connection = weakref.ref(peer.connection)
            await client.send(leave)
            client.end_writing()
            await peer.end()
            await client.frames()
            await server.until_empty()
            del peer
            gc.collect()
            assert connection() is None


# Pauses


async def test_pause_stops_reading_and_loses_nothing() -> None:
    async with running() as server:
        client, peer = await server.connect(receive=65536)
        peer.do = lambda payload, text: peer.connection.pause()
        numbers = [str(number).encode() for number in range(A_LOT // 1000)]
        stream = b"".join(client_frame(TEXT, number + bytes(1000)) for number in numbers)
        sending = asyncio.create_task(client.send(stream))
        await peer.until(lambda: bool(peer.messages))
        # The kernels' buffers fill, and then the client can send no more.
        done, _ = await asyncio.wait([sending], timeout=0.2)
        assert not done
        assert len(peer.messages) == 1
        assert server.context.bytes_in <= 256 * 1024
        peer.do = lambda payload, text: None
        peer.connection.resume()
        await sending
        await peer.until(lambda: len(peer.messages) == len(numbers))
        assert [payload[:-1000] for payload, _ in peer.messages] == numbers


@examples(200)
@given(st.data())
def test_pause_at_any_message_loses_nothing(data: st.DataObject) -> None:
    connection, pipe, loop = _on_a_pipe()
    session = connection.session
    assert isinstance(session, Remember)
    number = data.draw(st.integers(1, 12))
    stream = b"".join(
        client_frame(TEXT, b"%d" % i, fin=False) + client_frame(PING) + client_frame(CONTINUATION)
        for i in range(number)
    )
    session.pause_at = data.draw(st.sets(st.integers(0, number - 1)))
    place = 0
    while place < len(stream) or not pipe.is_reading():
        if not pipe.is_reading():
            for step in data.draw(st.lists(st.sampled_from(["pause", "resume", "turn"]), max_size=5)):
                {"pause": connection.pause, "resume": connection.resume, "turn": loop.turn}[step]()
            connection.resume()
            loop.turn()
            continue
        size = data.draw(st.integers(1, 30))
        connection.data_received(stream[place : place + size])
        place += size
    loop.turn()
    assert session.messages == [b"%d" % i for i in range(number)]
    assert server_frames(pipe.take()) == [(PONG, b"")] * number
    pipe.lose()


def test_data_received_during_a_pause_is_kept() -> None:
    connection, pipe, loop = _on_a_pipe()
    session = connection.session
    assert isinstance(session, Remember)
    connection.pause()
    for byte in client_frame(TEXT, b"a") + client_frame(TEXT, b"b"):
        connection.data_received(bytes([byte]))
    assert session.messages == []
    connection.resume()
    loop.turn()
    assert session.messages == [b"a", b"b"]
    pipe.lose()


def test_slow_commands_of_a_client_yield_to_others() -> None:
    connection, pipe, loop = _on_a_pipe()
    other, other_pipe = _beside(connection, Quick)
    connection.session = Slow(connection)
    slow, quick = _messages(connection), _messages(other)
    commands = [b"%d" % number for number in range(10)]
    stream = b"".join(map(client_frame, [TEXT] * 10, commands))
    connection.data_received(stream[:-1])
    assert slow == commands[:1]
    assert not pipe.is_reading()
    connection.data_received(stream[-1:])
    for turn in range(2, 11):
        other.data_received(client_frame(TEXT, b"quick"))
        assert len(quick) == turn - 2, "this turn has no time left"
        loop.turn_once()
        assert len(quick) == turn - 1
        assert other_pipe.is_reading()
        assert slow == commands[:turn]
    loop.turn()
    assert pipe.is_reading()
    connection.session = Quick(connection)
    connection.data_received(stream)
    assert _messages(connection) == commands
    assert pipe.is_reading()
    for each in (pipe, other_pipe):
        each.lose()


def test_a_turn_carries_out_one_slow_command_however_many_connections_send_one() -> None:
    connection, _, loop = _on_a_pipe()
    crowd = [_beside(connection, Slow)[0] for _ in range(20)]
    for each in crowd:
        each.data_received(client_frame(TEXT, b"a") + client_frame(TEXT, b"b"))

    def messages() -> list[int]:
        return [len(_messages(each)) for each in crowd]

    assert sum(messages()) == 1
    while sum(messages()) < 40:
        before = messages()
        loop.turn_once()
        # One that has waited for its first turn, and one of those with more commands.
        assert 1 <= sum(messages()) - sum(before) <= 2
        assert max(messages()) - min(messages()) <= 2
    loop.turn()
    assert messages() == [2] * 20


def test_a_client_waits_one_turn_beside_any_number_with_long_queues_of_slow_commands() -> None:
    connection, _, loop = _on_a_pipe()
    crowd = [_beside(connection, Slow)[0] for _ in range(20)]
    for each in crowd:
        each.data_received(client_frame(TEXT, b"slow") * 50)
    other, _ = _beside(connection, Quick)
    while any(not _messages(each) for each in crowd):
        loop.turn_once()
    for number in range(20):
        other.data_received(client_frame(TEXT, b"quick"))
        loop.turn_once()
        assert len(_messages(other)) == number + 1


def test_those_that_wait_for_their_turn_get_it_though_new_ones_come_all_the_time() -> None:
    connection, _, loop = _on_a_pipe()
    crowd = [_beside(connection, Slow)[0] for _ in range(5)]
    for each in crowd:
        each.data_received(client_frame(TEXT, b"slow") * 3)
    for _ in range(30):
        new, _ = _beside(connection, Slow)
        new.data_received(client_frame(TEXT, b"new"))
        loop.turn_once()
    assert [len(_messages(each)) for each in crowd] == [3] * 5


def test_a_connection_that_is_lost_while_it_waits_for_its_turn_is_not_read() -> None:
    connection, pipe, loop = _on_a_pipe()
    connection.session = Slow(connection)
    connection.data_received(client_frame(TEXT, b"a") * 3)
    other, other_pipe = _beside(connection, Quick)
    messages = _messages(other)
    other.data_received(client_frame(TEXT, b"b"))
    other_pipe.lose()
    pipe.lose()
    del other, connection, pipe, other_pipe
    gc.collect()
    loop.turn()
    assert messages == []


def test_close_after_slow_commands_is_handled() -> None:
    connection, pipe, loop = _on_a_pipe(close_timeout=PATIENCE)
    session = connection.session
    assert isinstance(session, Remember)
    connection.context.command_time = 0.0
    connection.data_received(client_frame(TEXT, b"a") + client_frame(TEXT, b"b") + close_frame(1000, ""))
    assert session.messages == [b"a"]
    loop.turn()
    assert session.messages == [b"a", b"b"]
    assert closed_with(server_frames(pipe.take())) == 1000
    pipe.lose()


def test_pauses_for_different_reasons_are_independent() -> None:
    connection, pipe, loop = _on_a_pipe()
    connection.pause_for(3600.0)
    connection.pause()
    connection.resume()
    loop.turn()
    assert not pipe.is_reading()
    connection.pause()
    connection.end_pause()
    loop.turn()
    assert not pipe.is_reading()
    connection.resume()
    loop.turn()
    assert pipe.is_reading()
    pipe.lose()


def test_data_received_during_pauses_is_read_once_and_in_order() -> None:
    connection, pipe, loop = _on_a_pipe()
    session = connection.session
    assert isinstance(session, Remember)
    session.pause_at = set(range(0, 40, 3))
    for number in range(0, 40, 4):
        connection.data_received(b"".join(client_frame(TEXT, b"%d" % n) for n in range(number, number + 4)))
        if number % 3:
            connection.resume()
            loop.turn()
    while len(session.messages) < 40:
        connection.resume()
        loop.turn()
    assert session.messages == [b"%d" % n for n in range(40)]
    pipe.lose()


def test_pause_directly_after_a_resume_is_kept() -> None:
    connection, pipe, loop = _on_a_pipe()
    connection.pause()
    connection.resume()
    connection.pause()
    loop.turn()
    assert not pipe.is_reading()
    connection.resume()
    loop.turn()
    assert pipe.is_reading()
    pipe.lose()


async def test_paused_connection_can_be_closed() -> None:
    # The peer's close frame has to be read, although it lies behind what was not read yet.
    async with running(close_timeout=PATIENCE) as server:
        client, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.pause()
        await client.send(client_frame(TEXT, b"a") + client_frame(TEXT, b"b"))
        await peer.until(lambda: bool(peer.messages))
        peer.connection.close(4000, "slow_consumer")
        peer.connection.pause()
        assert closed_with([await client.frame() or (0, b"")]) == 4000
        await client.send(close_frame(4000))
        assert await client.frames() == []
        assert [payload for payload, _ in peer.messages] == [b"a"]


# Bounds


async def test_client_that_does_not_read_answers_is_closed() -> None:
    async with running(max_answers=100_000, close_timeout=PATIENCE) as server:
        client, peer = await server.connect(receive=4096)
        bystander, other = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(payload * 10)
        other.do = lambda payload, text: other.connection.answer(payload)
        command = client_frame(TEXT, bytes(1000))
        most = 0
        while not peer.ends:
            await client.send(command)
            await bystander.send(client_frame(TEXT, b"x"))
            assert await bystander.frame() == (TEXT, b"x")
            most = max(most, peer.connection.queued_bytes)
        assert peer.ends == [(4003, "not_reading")]
        # One answer may be more than the bound; nothing beyond that one is kept.
        assert most <= 100_000 + 2 * 10_010
        # When it reads after all, it gets what was answered, and why it is closed.
        frames: list[tuple[int, bytes]] = []
        while not frames or frames[-1][0] != CLOSE:
            frames.append(await client.frame() or (0, b""))
        assert closed_with(frames) == 4003
        assert set(frames[:-1]) == {(TEXT, bytes(10_000))}
        await bystander.send(client_frame(TEXT, b"y"))
        assert await bystander.frame() == (TEXT, b"y")


async def test_client_that_does_not_read_pongs_is_closed() -> None:
    async with running(max_answers=20_000) as server:
        client, peer = await server.connect(receive=4096)
        ping = client_frame(PING, bytes(125)) * 100
        while not peer.ends:
            await client.send(ping)
        assert peer.ends == [(4003, "not_reading")]


async def test_client_that_reads_may_get_many_answers() -> None:
    # What one turn produces goes out at its end: it is no sign of a client that does not read.
    async with running(max_answers=1000) as server:
        client, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(bytes(500), BINARY)
        await client.send(client_frame(TEXT, b"x") * 100)
        for _ in range(100):
            assert await client.frame() == (BINARY, bytes(500))
        assert peer.ends == []


def test_answers_of_one_turn_are_bounded() -> None:
    connection, pipe, loop = _on_a_pipe(max_answers=100_000)
    session = connection.session
    assert isinstance(session, Remember)
    session.answer = bytes(1000)
    connection.data_received(client_frame(TEXT, b"x") * 1000)
    loop.turn()
    assert session.most <= 100_000
    assert server_frames(pipe.take()) == [(TEXT, bytes(1000))] * 1000
    pipe.lose()


# The others do not notice


@pytest.fixture
async def served() -> AsyncIterator[tuple[Client, Client, Client]]:
    """Three clients of a whole node."""
    loop = asyncio.get_running_loop()
    node = Node(Config(), MemoryEngine(), loop)
    await node.start()
    listening = await loop.create_server(lambda: _Join(node), "127.0.0.1", 0)
    clients: list[Client] = []
    try:
        for _ in range(3):
            clients.append(await Client.connect(listening.sockets[0].getsockname()[1]))
            welcome = await clients[-1].frame()
            assert welcome is not None
            assert b'"op":"welcome"' in welcome[1]
        yield clients[0], clients[1], clients[2]
    finally:
        for client in clients:
            client.close()
        listening.close()
        await node.stop()


@pytest.mark.parametrize("warm", [False, True], ids=["slow path", "fast path"])
async def test_text_that_is_not_utf8_closes_its_sender_alone(
    served: tuple[Client, Client, Client], *, warm: bool
) -> None:
    subscriber, publisher, other = served
    await subscriber.send(client_frame(TEXT, b'{"op":"subscribe","id":1,"topic":"a"}'))
    assert await subscriber.frame() == (TEXT, b'{"op":"ok","id":1,"topic":"a"}')
    if warm:
        await other.send(client_frame(TEXT, b'{"op":"publish","topic":"a","data":0}'))
        assert await subscriber.frame() == (TEXT, b'{"op":"event","topic":"a","data":0}')
    bad = b'{"op":"publish","id":2,"topic":"a","data":"\xc3("}'
    await publisher.send(client_frame(BINARY, bad))
    answer = await publisher.frame()
    assert answer is not None
    assert msgspec.json.decode(answer[1])["code"] == "bad_json"
    await publisher.send(client_frame(TEXT, bad))
    assert closed_with(await publisher.frames()) == 1007
    await other.send(client_frame(TEXT, b'{"op":"publish","id":3,"topic":"a","data":"ok"}'))
    assert await other.frame() == (TEXT, b'{"op":"ok","id":3,"receivers":1,"queued":0,"dropped":0}')
    assert await subscriber.frame() == (TEXT, b'{"op":"event","topic":"a","data":"ok"}')


async def test_many_broken_clients_do_not_disturb_others() -> None:
    async with running(close_timeout=0.05) as server:
        good, peer = await server.connect()
        peer.do = lambda payload, text: peer.connection.answer(payload)
        bad = [
            client_frame(3),
            client_frame(TEXT, b"\xff"),
            client_frame(TEXT, b"abc")[:5],
            client_frame(TEXT, b"abc", fin=False),
            close_frame(1006),
            client_frame(BINARY, length=2**63, form=64),
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
        ]
        for number in range(160):
            client, broken = await server.connect()
            broken.do = lambda payload, text: None
            await client.send(bad[number % len(bad)])
            if number % 3 == 0:
                client.reset()
            elif number % 3 == 1:
                client.end_writing()
            message = client_frame(TEXT, b"%d" % number)
            await good.send(message[:3])
            await good.send(message[3:])
            assert await good.frame() == (TEXT, b"%d" % number)


# Details


class Remember:
    """A session that may pause its connection at some messages, or answer all."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.messages: list[bytes] = []
        self.pause_at: set[int] = set()
        self.answer = b""
        self.most = 0
        """How many bytes waited for the client, at the most."""

    def message(self, payload: bytes, text: bool) -> None:
        self.messages.append(payload)
        if self.answer:
            self.connection.answer(self.answer)
            self.most = max(self.most, self.connection.queued_bytes)
        if len(self.messages) - 1 in self.pause_at:
            self.connection.pause()

    def on_close(self, code: int, reason: str) -> None:
        pass


class Slow(Remember):
    """A session whose commands each take more time than a turn has, whatever the clock says."""

    def message(self, payload: bytes, text: bool) -> None:
        super().message(payload, text)
        self.connection.context.command_time = 0.0


class Quick(Remember):
    """A session whose commands take no time to speak of, whatever the clock says."""

    def message(self, payload: bytes, text: bool) -> None:
        super().message(payload, text)
        self.connection.context.command_time = 3600.0


def _beside(connection: Connection, kind: type[Remember]) -> tuple[Connection, Pipe]:
    """Another connection of the same loop."""
    other, pipe = Connection(connection.context), Pipe()
    other.session = kind(other)
    other.start(pipe)
    return other, pipe


def _messages(connection: Connection) -> list[bytes]:
    """What has come for its session, which is a Remember."""
    assert isinstance(connection.session, Remember)
    return connection.session.messages


def _on_a_pipe(**limits: float) -> tuple[Connection, Pipe, Loop]:
    loop, pipe = Loop(), Pipe()
    connection = Connection(loop.context(**limits))  # type: ignore[arg-type]
    connection.session = Remember(connection)
    connection.start(pipe)
    return connection, pipe, loop


class _Join(asyncio.Protocol):
    """Hands each connection to a node, as the handshake does."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.node.connect(cast(asyncio.Transport, transport), b"", b"", UNKNOWN)
