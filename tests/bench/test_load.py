"""The load program counts what really happens, and gives up loudly when it is not what was published."""

import asyncio
from collections.abc import Iterable

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Origin

from bench.measure import Flushed, Opened, Published
from tests.bench.loading import RELAY, Send, load, relay, send_to_each


@pytest.mark.parametrize(("subscribers", "topics", "window"), [(1, 1, 1), (10, 1, 4), (12, 3, 16), (20, 20, 50)])
async def test_counts_every_publish_and_every_delivery(subscribers: int, topics: int, window: int) -> None:
    async with relay() as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=subscribers, topics=topics, window=window, warmup=0.05, duration=0.2
        )
    assert (status, complaint) == (0, "")
    result = msgspec.json.decode(output, type=Published)
    assert result.total_publishes == server.published
    assert result.total_deliveries == server.published * subscribers // topics
    assert 0 < result.deliveries <= result.total_deliveries
    assert 0 < result.delivery_us.p50 <= result.delivery_us.max <= result.done_us.max
    assert result.event_bytes == len(str(RELAY["event"]).replace("%t", "00000")) + 4
    assert len(server.subscribers) == topics


async def test_unanswered_publishes_are_bounded_by_the_window() -> None:
    waiting: list[tuple[list[ServerConnection], str]] = []
    most = 0

    async def send_when_four_wait(subscribers: Iterable[ServerConnection], message: str) -> None:
        nonlocal most
        waiting.append((list(subscribers), message))
        most = max(most, len(waiting))
        if len(waiting) == 4:
            for each, waited in waiting:
                await send_to_each(each, waited)
            waiting.clear()

    async with relay(send_when_four_wait) as server:
        status, _, complaint = await load(
            "publish", server.port, subscribers=5, window=4, warmup=0, duration=0.1, patience=0.3
        )
    # Once it publishes nothing more, a last group of fewer than four may never be sent on.
    assert status == 0 or "no delivery for 0.3 s" in complaint
    assert most == 4
    assert server.published >= 4


async def lose_one(subscribers: Iterable[ServerConnection], message: str) -> None:
    await send_to_each(list(subscribers)[1:], message)


async def send_twice(subscribers: Iterable[ServerConnection], message: str) -> None:
    await send_to_each(subscribers, message)
    await send_to_each(subscribers, message)


async def change(subscribers: Iterable[ServerConnection], message: str) -> None:
    await send_to_each(subscribers, message[:-4] + "??" + message[-2:])


async def send_something_else(subscribers: Iterable[ServerConnection], message: str) -> None:
    await send_to_each(subscribers, '{"op":"gap"}')


async def close(subscribers: Iterable[ServerConnection], message: str) -> None:
    for subscriber in subscribers:
        await subscriber.close(4000, "too slow")


@pytest.mark.parametrize(
    ("send", "expected"),
    [
        (lose_one, "no delivery for 0.3 s"),
        (send_twice, "got more events than were published"),
        (change, "got an event that is not the one published"),
        (send_something_else, 'got something that is not an event: {"op":"gap"}'),
        (close, "was closed by the server: 4000 too slow"),
    ],
)
async def test_gives_up_when_deliveries_are_wrong(send: Send, expected: str) -> None:
    async with relay(send) as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=3, window=1, warmup=0, duration=5, patience=0.3
        )
    assert (status, output) == (1, b"")
    assert expected in complaint


async def test_gives_up_when_the_handshake_is_refused() -> None:
    async with serve(lambda _: asyncio.sleep(0), "127.0.0.1", 0, origins=[Origin("https://example.com")]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        status, _, complaint = await load("open", port, connections=2, base=0, subscriber_greetings=0, subscribe="")
    assert status == 1
    assert "the server refused the handshake: HTTP/1.1 403 Forbidden" in complaint


async def test_gives_up_on_an_oversized_frame() -> None:
    """Its length and what stands before it are together more than a 64-bit number holds."""

    async def promise(subscribers: Iterable[ServerConnection], message: str) -> None:
        for subscriber in subscribers:
            subscriber.transport.write(b"\x81\x7f" + b"\xff" * 8)

    async with relay(promise) as server:
        status, _, complaint = await load("publish", server.port, subscribers=1, window=1, warmup=0, duration=5)
    assert status == 1
    assert "got a frame of 18446744073709551615 bytes" in complaint


async def test_gives_up_when_nobody_listens() -> None:
    async with relay() as server:
        pass
    status, _, complaint = await load("open", server.port, connections=2, base=1)
    assert status == 1
    assert "Connection refused" in complaint


async def test_opens_idle_connections() -> None:
    async with relay() as server:
        status, output, complaint = await load("open", server.port, connections=150, base=20, settle=0.05)
    assert (status, complaint) == (0, "")
    result = msgspec.json.decode(output, type=Opened)
    assert (result.connections, result.base, server.connections) == (150, 20, 150)
    assert result.server_us_per_connect > 0
    assert len(server.subscribers["t00000"]) == 150
    assert server.published == 0


async def test_flush_waits_until_every_subscriber_has_the_event() -> None:
    async def send_slowly(subscribers: Iterable[ServerConnection], message: str) -> None:
        *first, last = subscribers
        await send_to_each(first, message)
        await asyncio.sleep(0.02)
        await last.send(message)

    async with relay(send_slowly) as server:
        status, output, complaint = await load("flush", server.port, subscribers=20, warmup=0, duration=0.2)
    assert (status, complaint) == (0, "")
    result = msgspec.json.decode(output, type=Flushed)
    assert (result.subscribers, server.connections) == (20, 21)
    assert 0 < result.publishes == server.published - 1  # one to learn from
    assert 20_000 <= result.done_us.p50 <= result.done_us.max
    assert result.event_bytes == len(str(RELAY["event"]).replace("%t", "00000")) + 4


async def test_flush_gives_up_when_a_subscriber_is_left_out() -> None:
    async def leave_out(subscribers: Iterable[ServerConnection], message: str) -> None:
        await send_to_each(list(subscribers)[1:], message)

    async with relay(leave_out) as server:
        status, _, complaint = await load("flush", server.port, subscribers=4, warmup=0, duration=1, patience=0.3)
    assert status == 1
    assert "1 of 4 subscribers have not got the event" in complaint


async def test_flush_gives_up_when_something_else_comes() -> None:
    async def send_twice(subscribers: Iterable[ServerConnection], message: str) -> None:
        for subscriber in list(subscribers)[:1]:
            await subscriber.send(message)
        await send_to_each(subscribers, message)

    async with relay(send_twice) as server:
        status, _, complaint = await load("flush", server.port, subscribers=4, warmup=0, duration=1)
    assert status == 1
    assert "connection 1 got" in complaint
