"""What the admin listener tells of clients: who they are, and how far behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker.admin.server import Admin, AdminListener
from broker.config import parse_address
from tests.admin.test_server import Reply, get
from tests.fixtures_node import Harness, serving
from tests.net.harness import until


class Desk:
    """An admin listener for a node in the process of the test."""

    def __init__(self, harness: Harness, address: str) -> None:
        self.harness = harness
        self.address = address

    async def ask(self, path: str) -> Reply:
        return await get(self.address, path)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with opened() as desk:
        yield desk


@asynccontextmanager
async def opened(**limits: Any) -> AsyncIterator[Desk]:
    async with serving(**limits) as harness:
        admin = Admin(CollectorRegistry(), lambda: None, harness.node)
        await admin.start()
        port = AdminListener(admin)
        await port.open(parse_address("127.0.0.1:0"))
        try:
            yield Desk(harness, port.addresses[0])
        finally:
            port.close()
            await admin.stop()


async def test_list_is_empty_without_sessions(desk: Desk) -> None:
    reply = await desk.ask("/v1/sessions")
    assert (reply.status, reply.json) == (200, {"total": 0, "sessions": []})
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"


async def test_sessions_with_most_queued_bytes_come_first(desk: Desk) -> None:
    publisher = await desk.harness.connect()
    clients = [await desk.harness.subscriber("a.*", credit=0, max_queue=bound) for bound in (2, 5, 3)]
    for n in range(6):
        await publisher.ask("publish", topic="a.b", data=n)
    found = (await desk.ask("/v1/sessions")).json
    assert found["total"] == 4
    assert [(each["queued"], each["dropped"]) for each in found["sessions"]] == [(5, 1), (3, 3), (2, 4), (0, 0)]
    assert [each["session"] for each in found["sessions"]] == [
        client.session for client in (clients[1], clients[2], clients[0], publisher)
    ]
    first = found["sessions"][0]
    assert first["outbox_bytes"] == sum(len(f'..{{"op":"event","topic":"a.b","data":{n}}}') for n in range(5))
    assert first["subscriptions"] == 1
    assert first["worst"]["topic"] == "a.*"
    assert first["oldest_queued_seconds"] == first["worst"]["oldest_queued_seconds"] >= 0
    host, _, port = first["peer"].rpartition(":")
    assert (host, port.isdecimal()) == ("127.0.0.1", True)
    assert found["sessions"][3]["worst"] is None
    limited = (await desk.ask("/v1/sessions?limit=2")).json
    assert limited["total"] == 4
    assert [each["queued"] for each in limited["sessions"]] == [5, 3]


async def test_session_is_shown_with_all_its_subscriptions(desk: Desk) -> None:
    publisher = await desk.harness.connect()
    client = await desk.harness.subscriber("quiet")
    await client.ask("subscribe", topic="a", overflow="latest", max_queue=7, credit=1)
    for n in range(4):
        await publisher.ask("publish", topic="a", data=n)
    found = (await desk.ask(f"/v1/sessions/{client.session}")).json
    assert [each["topic"] for each in found["subscriptions"]] == ["quiet", "a"]
    worst = found["subscriptions"][1]
    assert found["worst"] == worst
    assert worst.pop("oldest_queued_seconds") == found["oldest_queued_seconds"] >= 0
    assert worst == {
        "topic": "a",
        "overflow": "latest",
        "max_queue": 7,
        "credit": 0,
        "queued": 1,
        "dropped": 2,
        "dropped_by_reason": {"overflow": 0, "conflated": 2, "age": 0},
    }
    assert found["subscriptions"][0]["credit"] is None


async def test_parked_publisher_is_shown(desk: Desk) -> None:
    lender = await desk.harness.subscriber("a", overflow="block", max_queue=1, credit=0)
    publisher = await desk.harness.connect()
    for n in range(2):
        await publisher.tell("publish", topic="a", data=n)
    await until(lambda: desk.harness.session(publisher).connection.parked_publishes == 1)
    assert (await desk.ask(f"/v1/sessions/{publisher.session}")).json["parked"] == 1
    assert (await desk.ask(f"/v1/sessions/{lender.session}")).json["parked"] == 0
    await lender.ask("credit", topic="a", add=2)


async def test_unknown_session_gets_404(desk: Desk) -> None:
    client = await desk.harness.connect()
    assert (await desk.ask(f"/v1/sessions/{client.session}")).status == 200
    await client.close()
    await until(lambda: not desk.harness.node.sessions)
    reply = await desk.ask(f"/v1/sessions/{client.session}")
    assert (reply.status, reply.json) == (404, {"error": "there is no such session"})


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "1e2", "%D9%A3", "9" * 5000])
async def test_invalid_limit_is_refused(desk: Desk, limit: str) -> None:
    reply = await desk.ask(f"/v1/sessions?limit={limit}")
    assert (reply.status, reply.json) == (400, {"error": "limit must be from 1 to 1000"})


async def test_session_that_closes_during_the_listing_is_handled() -> None:
    async with opened() as desk:
        clients = [await desk.harness.subscriber("a", "b") for _ in range(20)]
        listed = desk.harness.node.subscription_stats(1000)
        assert next(listed)[0].id in desk.harness.node.sessions
        for client in clients:
            await client.close()
        await until(lambda: not desk.harness.node.sessions)
        assert [subscription_stats for _, subscription_stats in listed] == [[]] * 19
