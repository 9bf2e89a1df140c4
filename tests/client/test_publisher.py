"""Publishing many events through a window."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection

from broker.config import Limits
from tests.client.fake import FakeBroker, running
from wsbroker_client import Closed, CommandRefused
from wsbroker_client.connection import connect
from wsbroker_client.publisher import WINDOW, Publisher


class Failures:
    """Keeps what was reported."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, str]] = []

    def __call__(self, number: int | None, error: CommandRefused) -> None:
        self.seen.append((number, error.code))


def numbers(count: int) -> list[tuple[int, bytes]]:
    return [(number, b"%d" % number) for number in range(1, count + 1)]


def ok(id: int) -> bytes:
    return b'{"op":"ok","id":%d,"receivers":0,"queued":0,"dropped":0}' % id


def test_default_window_equals_max_inflight() -> None:
    assert Limits().max_inflight == WINDOW


async def test_events_are_published_in_order() -> None:
    async with running() as fake, connect(fake.url) as client:
        failures = Failures()
        publisher = Publisher(client, 'a."b"', key="k", failed=failures)
        await publisher.publish(numbers(1000))
        await publisher.publish([])
        await publisher.publish([(1001, b' {"last" : true} ')])
        await publisher.finish()
        assert publisher.published == 1001
        assert publisher.unanswered == []
        assert failures.seen == []
        assert [command["data"] for command in fake.received] == [*range(1, 1001), {"last": True}]
        assert {(command["topic"], command["key"]) for command in fake.received} == {('a."b"', "k")}


async def test_unanswered_publishes_are_bounded_by_the_window() -> None:
    under_way: list[int] = []

    async def slow(fake: FakeBroker, connection: ServerConnection) -> None:
        """Answers the oldest only when nothing more comes."""
        waiting: list[int] = []
        await connection.send(
            b'{"op":"welcome","version":1,"session":"s","server":"f","ping":0,"max_size":99,"max_queue":1}'
        )
        while True:
            try:
                async with asyncio.timeout(0.02 if waiting else None):
                    waiting.append(msgspec.json.decode(await connection.recv())["id"])
            except TimeoutError:
                under_way.append(len(waiting))
                await connection.send(ok(waiting.pop(0)), text=True)

    async with running(slow) as fake, connect(fake.url) as client:
        publisher = Publisher(client, "t", failed=Failures(), window=8)
        await publisher.publish(numbers(30))
        await publisher.finish()
        assert publisher.published == 30
    assert max(under_way) == 8


async def test_event_is_sent_without_waiting_for_more() -> None:
    async with running() as fake, connect(fake.url) as client:
        publisher = Publisher(client, "t", failed=Failures())
        await publisher.publish(numbers(1))
        await publisher.finish()
        assert len(fake.received) == 1
        await publisher.publish([(2, b"2")])
        await publisher.finish()
        assert len(fake.received) == 2


async def test_failed_event_is_reported_by_number_and_the_rest_continues() -> None:
    async def odd_only(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            answer: dict[str, Any] = {"op": "ok", "id": command["id"]}
            if command["data"] % 2 == 0:
                answer = {"op": "error", "id": command["id"], "code": "forbidden", "message": "odd!", "retry": False}
            await connection.send(msgspec.json.encode(answer), text=True)

    async with running(odd_only) as fake, connect(fake.url) as client:
        failures = Failures()
        publisher = Publisher(client, "t", failed=failures)
        events = [(1, b"1"), (4, b"4"), (5, b"5" * 5000), (6, b"7"), (9, b"8")]
        await publisher.publish(events)
        await publisher.finish()
        assert sorted(failures.seen, key=str) == [(4, "forbidden"), (5, "limit"), (9, "forbidden")]
        assert publisher.published == 2
        assert [command["data"] for command in fake.received] == [1, 4, 7, 8]


async def test_error_without_an_id_counts_as_an_answer() -> None:
    async def forgetful(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            answer: dict[str, Any] = {"op": "ok", "id": command["id"]}
            if command["data"] % 3 == 0:
                answer = {"op": "error", "code": "bad_json", "message": "too deep for me", "retry": False}
            await connection.send(msgspec.json.encode(answer), text=True)

    async with running(forgetful) as fake, connect(fake.url) as client:
        failures = Failures()
        publisher = Publisher(client, "t", failed=failures, window=4)
        await publisher.publish(numbers(60))
        await publisher.finish()
        assert publisher.published == 40
        assert failures.seen == [(None, "bad_json")] * 20


async def test_connection_loss_reports_the_outcome_of_each_event() -> None:
    async def three_then_close(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            if command["data"] == 10:
                await connection.close(1011, "internal")
            elif command["data"] <= 3:
                await connection.send(ok(command["id"]), text=True)

    async with running(three_then_close) as fake, connect(fake.url) as client:
        publisher = Publisher(client, "t", failed=Failures(), window=20)
        await publisher.publish(numbers(10))
        with pytest.raises(Closed):
            await publisher.finish()
        assert publisher.published == 3
        assert publisher.unanswered == [4, 5, 6, 7, 8, 9, 10]
        with pytest.raises(Closed):
            await publisher.publish([(11, b"11")])
