"""Both clients against the real broker, with history, `dedup` and presence, in memory and in SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_broker import RunningBroker, start_broker
from wsbroker_client import Client, CommandRefused, Event, Gap, Join, Leave, Live, Position
from wsbroker_client.states import Message

PACKAGE = Path(__file__).parents[2] / "clients" / "js"
RULES = """
[server]
admin = ""
engine = "{engine}"
[[topics]]
match = "h.*"
history = 5000
[[topics]]
match = "short.*"
history = 3
[[topics]]
match = "table.*"
history = 5000
compact = true
[[topics]]
match = "p.*"
presence = true
"""
MEMBERS = 25


@pytest.fixture(params=["memory", "sqlite"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    config = tmp_path / "wsbroker.toml"
    engine = "memory" if request.param == "memory" else f"sqlite://{tmp_path / 'broker.db'}"
    config.write_text(RULES.format(engine=engine))
    with start_broker("--config", str(config)) as broker:
        yield broker


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A configuration whose events outlive the broker."""
    config = tmp_path / "wsbroker.toml"
    config.write_text(RULES.format(engine=f"sqlite://{tmp_path / 'broker.db'}"))
    return config


async def publish(client: Client, topic: str, count: int) -> Position:
    """Publish 0, 1, 2, …; returns the position of the last."""
    receipts = await asyncio.gather(*(client.publish(topic, number) for number in range(count)))
    assert receipts[-1].epoch is not None
    assert receipts[-1].offset is not None
    return Position(receipts[-1].epoch, receipts[-1].offset)


async def test_history_comes_in_pages(broker: RunningBroker) -> None:
    async with Client(broker.url) as client:
        top = await publish(client, "h.t", 2_500)
        assert top.offset == 2_500
        assert [event.data async for event in client.history("h.t")] == list(range(2_500))
        assert [event.data async for event in client.history("h.t", last=1_700)] == list(range(800, 2_500))
        middle = Position(top.epoch, 1_234)
        assert [event.offset async for event in client.history("h.t", since=middle)] == list(range(1_235, 2_501))
        assert [event async for event in client.history("h.t", since=top)] == []
        with pytest.raises(CommandRefused, match="no_history"):
            await anext(client.history("none.t"))


@pytest.mark.parametrize(("last", "first"), [(3, 997), ("all", 0), (None, 500)])
async def test_subscription_begins_where_it_is_told(broker: RunningBroker, last: int | str | None, first: int) -> None:
    async with Client(broker.url) as client:
        top = await publish(client, "h.t", 1_000)
        since = Position(top.epoch, 500) if last is None else None
        subscription = client.subscribe("h.t", last=last, since=since)
        messages = subscription.messages()
        seen = []
        while not isinstance(message := await anext(messages), Live):
            assert isinstance(message, Event)
            seen.append(message.data)
        assert seen == list(range(first, 1_000))
        assert subscription.position == top
        await client.publish("h.t", "new")
        new = await anext(messages)
        assert isinstance(new, Event)
        assert (new.data, new.offset) == ("new", 1_001)


async def test_gap_says_what_is_no_longer_kept(broker: RunningBroker) -> None:
    async with Client(broker.url) as client:
        top = await publish(client, "short.t", 10)
        messages = client.subscribe("short.t", since=Position(top.epoch, 2)).messages()
        gap = await anext(messages)
        assert isinstance(gap, Gap)
        assert (gap.missed, gap.reason, gap.start, gap.stop) == (5, "expired", 3, 7)
        assert await take(messages, 3) == [7, 8, 9]


async def test_table_is_complete_and_removals_come(broker: RunningBroker) -> None:
    async with Client(broker.url) as client:
        for turn in range(3):
            for key in ("a", "b", "c"):
                await client.publish("table.t", turn, key=key)
        await client.publish("table.t", None, key="b")
        table = {}
        async for message in client.subscribe("table.t", last="all").messages():
            if isinstance(message, Live):
                break
            assert isinstance(message, Event)
            table[message.key] = message.data
        assert table == {"a": 2, "b": None, "c": 2}


async def test_repeated_publish_is_one_event(broker: RunningBroker) -> None:
    async with Client(broker.url) as client:
        receipts = [await client.publish("h.t", "x", dedup="one") for _ in range(3)]
        assert [receipt.duplicate for receipt in receipts] == [False, True, True]
        assert {receipt.offset for receipt in receipts} == {1}
        assert [event.data async for event in client.history("h.t")] == ["x"]


async def test_members_come_in_pages_and_are_told(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroker_client.client.PAGE", 10)
    async with contextlib.AsyncExitStack() as stack, Client(broker.url) as client:
        subscription = client.subscribe("p.room", presence=True, info={"me": True})
        room = subscription.messages()
        await subscription.ready()  # it is told of those who join from now on
        connections = [await stack.enter_async_context(Client(broker.url)) for _ in range(MEMBERS)]
        await asyncio.gather(*(each.subscribe("p.room", info={"n": n}).ready() for n, each in enumerate(connections)))
        members = [member async for member in client.presence("p.room")]
        assert len({member.session for member in members}) == len(members) == MEMBERS + 1
        assert sorted(m.info["n"] for m in members if m.info and "n" in m.info) == list(range(MEMBERS))
        joined = [await anext(room) for _ in range(MEMBERS)]
        assert all(isinstance(each, Join) for each in joined)
        await connections[7].close()
        left = await anext(room)
        assert isinstance(left, Leave)
        assert left.session == connections[7].welcome["session"]
        with pytest.raises(CommandRefused, match="no_presence"):
            await anext(client.presence("h.t"))


@pytest.mark.parametrize("how", ["term", "kill"])
async def test_subscription_goes_on_after_a_restart(stored: Path, how: str) -> None:
    with start_broker("--config", str(stored)) as broker:
        async with Client(broker.url) as client:
            subscription = client.subscribe("h.t")
            messages = subscription.messages()
            await subscription.ready()
            await publish(client, "h.t", 100)
            seen = await take(messages, 50)
            (broker.program.kill if how == "kill" else broker.program.terminate)()
            await asyncio.to_thread(broker.program.wait)
            with start_broker("--config", str(stored), listen=f"127.0.0.1:{broker.port}") as again:
                async with Client(again.url) as other:
                    for number in range(100, 200):
                        await other.publish("h.t", number)
                await client.publish("h.t", 200, reliable=True)
                seen += await take(messages, 151)
    assert seen == list(range(201))


async def take(messages: AsyncIterator[Message], count: int) -> list[Any]:
    """The data of so many events, between which only `live` may come."""
    data: list[Any] = []
    while len(data) < count:
        message = await anext(messages)
        if isinstance(message, Event):
            data.append(message.data)
        else:
            assert isinstance(message, Live), message
    return data


@pytest.mark.needs("node")
async def test_javascript_client(broker: RunningBroker) -> None:
    process = await asyncio.create_subprocess_exec(
        *("node", "test/kept.test.js"),
        cwd=PACKAGE,
        env={**os.environ, "BROKER": broker.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert re.search(r"^# pass [1-9]", output, re.MULTILINE), output
