"""History on the wire: since, last, live, the history command, replay, dedup; with the memory engine and a late one."""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import structlog

from broker.config import Limits, TopicRule
from broker.engines.memory import MemoryEngine
from broker.engines.sqlite import SqliteEngine
from tests.engines.late import LateServer
from tests.fixtures_node import Client, Harness, serving
from tests.net.harness import until

RULES = (
    TopicRule("log.*", history=1000),
    TopicRule("few.*", history=3),
    TopicRule("fat.*", history=10_000_000),
    TopicRule("table.*", history=1000, compact=True),
    TopicRule("queue.*", history=100_000, overflow="replay"),
)
CUTS = int(os.environ.get("CUTS", "20"))
"""How often a subscriber is cut off."""
Serve = Callable[..., AbstractAsyncContextManager[Harness]]


@asynccontextmanager
async def with_memory(**limits: Any) -> AsyncIterator[Harness]:
    limits = {"history_bytes": 2**32, **limits}
    async with serving(MemoryEngine(Limits(**limits)), topics=RULES, **limits) as harness:
        yield harness


@asynccontextmanager
async def with_late(**limits: Any) -> AsyncIterator[Harness]:
    """An engine that answers late, and whose events come behind the answers about them."""
    async with serving(LateServer(bound=1_000_000).engine(), topics=RULES, **limits) as harness:
        yield harness


@asynccontextmanager
async def with_sqlite(**limits: Any) -> AsyncIterator[Harness]:
    """The engine whose publishes wait for a commit, on the fast path too."""
    limits = {"history_bytes": 2**32, **limits}
    with tempfile.TemporaryDirectory() as folder:
        engine = SqliteEngine(Path(folder) / "broker.db", Limits(**limits), "normal")
        async with serving(engine, topics=RULES, **limits) as harness:
            yield harness


@pytest.fixture(params=[with_memory, with_late, with_sqlite], ids=["memory", "late", "sqlite"])
def serve(request: pytest.FixtureRequest) -> Serve:
    found: Serve = request.param
    return found


async def published(client: Client, topic: str, *data: Any, **fields: Any) -> dict[str, Any]:
    """Publish events, one after the other; the last answer."""
    answer: dict[str, Any] = {}
    for each in data:
        answer = await client.ask("publish", topic=topic, data=each, **fields)
        assert answer["op"] == "ok", answer
    return answer


def shown(message: dict[str, Any]) -> Any:
    """A message in short: an event as (offset, data), a gap as (reason, missed, from, to), `live` as (live, offset)."""
    match message["op"]:
        case "event":
            return message["offset"], message["data"]
        case "gap":
            return message["reason"], message["missed"], message.get("from"), message.get("to")
        case "live":
            return "live", message["offset"]
    return message


async def read(client: Client, count: int) -> list[Any]:
    return [shown(await client.next()) for _ in range(count)]


async def test_publish_and_subscribe_are_answered_with_the_position(serve: Serve) -> None:
    async with serve() as harness:
        client = await harness.connect()
        answer = await published(client, "log.a", 1, 2, 3)
        epoch = answer["epoch"]
        assert (answer["offset"], type(epoch)) == (3, str)
        assert await client.ask("subscribe", topic="log.a") == {
            "op": "ok",
            "topic": "log.a",
            "epoch": epoch,
            "offset": 3,
        }
        assert await client.ask("subscribe", topic="log.*") == {"op": "ok", "topic": "log.*"}
        assert await client.ask("subscribe", topic="other") == {"op": "ok", "topic": "other"}
        await published(client, "log.a", 4)
        assert await client.next() == {"op": "event", "topic": "log.a", "data": 4, "offset": 4}
        await published(client, "other", 5)
        assert await client.next() == {"op": "event", "topic": "other", "data": 5}
        await client.nothing()


async def test_client_goes_on_where_it_was(serve: Serve) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        epoch = (await published(publisher, "log.a", *range(10)))["epoch"]
        answer = await client.ask("subscribe", topic="log.a", since={"epoch": epoch, "offset": 6})
        assert answer == {"op": "ok", "topic": "log.a", "epoch": epoch, "offset": 10, "recovered": True}
        assert await read(client, 5) == [(7, 6), (8, 7), (9, 8), (10, 9), ("live", 10)]
        await published(publisher, "log.a", "new", "newer")
        assert await read(client, 2) == [(11, "new"), (12, "newer")]
        await client.nothing()


@pytest.mark.parametrize(
    ("last", "events"),
    [
        (1, [(9, 8)]),
        (2, [(8, 7), (9, 8)]),
        (3, [(7, 6), (8, 7), (9, 8)]),
        (99, [(7, 6), (8, 7), (9, 8)]),
        ("all", None),
    ],
)
async def test_newest_kept_events_come_first(serve: Serve, last: int | str, events: list[Any] | None) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        await published(publisher, "few.a", *range(9))
        answer = await client.ask("subscribe", topic="few.a", last=last)
        assert (answer["offset"], "recovered" in answer) == (9, False)
        expected = [(7, 6), (8, 7), (9, 8)] if events is None else events
        assert await read(client, len(expected) + 1) == [*expected, ("live", 9)]
        await published(publisher, "few.a", "new")
        assert await read(client, 1) == [(10, "new")]


async def test_expired_events_are_announced_before_those_that_are_kept(serve: Serve) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        epoch = (await published(publisher, "few.a", *range(9)))["epoch"]
        answer = await client.ask("subscribe", topic="few.a", since={"epoch": epoch, "offset": 2})
        assert answer["recovered"] is False
        assert await read(client, 5) == [("expired", 4, 3, 6), (7, 6), (8, 7), (9, 8), ("live", 9)]


@pytest.mark.parametrize(("epoch", "offset"), [("another", 8), (None, 100)])
async def test_other_numbering_is_announced(serve: Serve, epoch: str | None, offset: int) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        answer = await published(publisher, "few.a", *range(9))
        since = {"epoch": epoch or answer["epoch"], "offset": offset}
        answer = await client.ask("subscribe", topic="few.a", since=since)
        assert answer["recovered"] is False
        assert await read(client, 5) == [("epoch", None, None, None), (7, 6), (8, 7), (9, 8), ("live", 9)]


async def test_topic_without_events_yet_can_be_gone_on_with() -> None:
    async with with_memory() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        at = await client.ask("subscribe", topic="log.new", last="all")
        assert await read(client, 1) == [("live", 0)]
        await client.ask("unsubscribe", topic="log.new")
        since = {"epoch": at["epoch"], "offset": at["offset"]}
        assert (await client.ask("subscribe", topic="log.new", since=since))["recovered"] is True
        assert await read(client, 1) == [("live", 0)]
        await client.ask("unsubscribe", topic="log.new")
        await published(publisher, "log.new", "first")
        assert (await client.ask("subscribe", topic="log.new", since=since))["recovered"] is True
        assert await read(client, 2) == [(1, "first"), ("live", 1)]
        answer = await client.ask("subscribe", topic="log.other", since={"epoch": "another", "offset": 5})
        assert (answer["recovered"], answer["offset"]) == (False, 0)
        assert await read(client, 2) == [("epoch", None, None, None), ("live", 0)]


async def test_compacted_topic_is_a_table(serve: Serve) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        for key, data in (("a", 1), ("b", 1), ("a", 2), ("c", 1), ("b", None), ("a", 3)):
            answer = await published(publisher, "table.t", data, key=key)
        await client.ask("subscribe", topic="table.t", last="all")
        assert await read(client, 4) == [(4, 1), (5, None), (6, 3), ("live", 6)]
        await client.ask("unsubscribe", topic="table.t")
        await published(publisher, "table.t", 4, key="a")
        answer = await client.ask("subscribe", topic="table.t", since={"epoch": answer["epoch"], "offset": 1})
        assert answer["recovered"] is True, "what was superseded is not missing"
        assert await read(client, 4) == [(4, 1), (5, None), (7, 4), ("live", 7)]


async def test_replay_flows_under_credit(serve: Serve) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        await published(publisher, "log.a", *range(5))
        await client.ask("subscribe", topic="log.a", last="all", credit=2)
        assert await read(client, 2) == [(1, 0), (2, 1)]
        await client.nothing()
        await published(publisher, "log.a", 5)
        await client.ask("credit", topic="log.a", add=3)
        assert await read(client, 3) == [(3, 2), (4, 3), (5, 4)]
        await client.nothing()
        await client.ask("credit", topic="log.a", add=1)
        assert await read(client, 2) == [(6, 5), ("live", 6)]
        await client.ask("credit", topic="log.a", add=1)
        await published(publisher, "log.a", 6, 7)
        assert await read(client, 1) == [(7, 6)]
        await client.nothing()


async def test_subscription_that_exists_is_replayed_from_another_place(serve: Serve) -> None:
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        epoch = (await published(publisher, "log.a", *range(4)))["epoch"]
        await client.ask("subscribe", topic="log.a")
        await published(publisher, "log.a", 4)
        assert await read(client, 1) == [(5, 4)]
        await client.ask("subscribe", topic="log.a", since={"epoch": epoch, "offset": 3})
        assert await read(client, 3) == [(4, 3), (5, 4), ("live", 5)]
        await published(publisher, "log.a", 5)
        assert await read(client, 1) == [(6, 5)]


async def test_history_is_read_in_pages(serve: Serve) -> None:
    async with serve() as harness:
        client = await harness.connect()
        epoch = (await published(client, "log.a", *range(5)))["epoch"]
        await published(client, "log.a", "k", key="key")
        newest = await client.ask("history", topic="log.a", last=2)
        assert newest == {
            "op": "ok",
            "epoch": epoch,
            "offset": 6,
            "events": [{"offset": 5, "data": 4}, {"offset": 6, "key": "key", "data": "k"}],
            "more": False,
        }
        offset, seen = 0, []
        while True:
            since = {"epoch": epoch, "offset": offset}
            page = await client.ask("history", topic="log.a", since=since, limit=4)
            assert page["recovered"] is True
            seen += [event["offset"] for event in page["events"]]
            offset = seen[-1]
            if not page["more"]:
                break
        assert seen == [1, 2, 3, 4, 5, 6]
        assert len((await client.ask("history", topic="log.a", last="all"))["events"]) == 6
        other = await client.ask("history", topic="log.a", since={"epoch": "x", "offset": 3})
        assert (other["recovered"], len(other["events"])) == (False, 6)


async def test_answer_to_history_has_no_more_than_max_size_bytes(serve: Serve) -> None:
    async with serve(max_size=1000) as harness:
        client = await harness.connect()
        answer = await published(client, "log.a", *["x" * 300] * 5)
        since = {"epoch": answer["epoch"], "offset": 0}
        page = await client.ask("history", topic="log.a", since=since)
        assert ([event["offset"] for event in page["events"]], page["more"]) == ([1, 2, 3], True)
        page = await client.ask("history", topic="log.a", last="all")
        assert ([event["offset"] for event in page["events"]], page["more"]) == ([3, 4, 5], False)


async def test_repeated_publish_is_answered_with_the_first_position(serve: Serve) -> None:
    async with serve() as harness:
        client = await harness.subscriber("log.a", "plain")
        first = await client.ask("publish", topic="log.a", data=1, dedup="x")
        again = await client.ask("publish", topic="log.a", data=1, dedup="x")
        assert again == {**first, "receivers": 0, "duplicate": True}
        assert (await client.ask("publish", topic="plain", data=2, dedup="x"))["receivers"] == 1
        assert (await client.ask("publish", topic="plain", data=2, dedup="x"))["duplicate"] is True
        assert [message["data"] for message in (await client.next(), await client.next())] == [1, 2]
        await client.nothing()


async def test_slow_subscriber_under_replay_gets_every_event(serve: Serve) -> None:
    async with serve() as harness:
        publisher, deaf = await harness.connect(), await harness.deaf()
        await deaf.tell("subscribe", id=1, topic="queue.a")
        await deaf.until(b'"op":"ok"')
        session = harness.session(deaf)
        for n in range(3000):
            await publisher.tell("publish", topic="queue.a", data=[n, "x" * 1000])
        await publisher.nothing()
        (subscription,) = (session.subscriptions or {}).values()
        await until(lambda: subscription.newest >= 3000)
        assert subscription.lag > 0
        assert session.connection.queued_bytes <= harness.node.limits.max_outbox // 4
        received = (await deaf.until(b'"offset":3000}')).decode("latin-1")
        offsets = [int(part.split("}")[0]) for part in received.split('"offset":')[1:]]
        assert offsets[-2000:] == list(range(1001, 3001))
        assert offsets == list(range(offsets[0], 3001))


async def test_patterns_and_topics_without_history_have_no_replay(serve: Serve) -> None:
    async with serve() as harness:
        client = await harness.connect()
        for topic in ("other", "queue.*", "log.>"):
            assert (await client.ask("subscribe", topic=topic, overflow="replay"))["code"] == "no_history"
        await client.ask("subscribe", topic="queue.*")
        (found,) = (harness.session(client).subscriptions or {}).values()
        assert found.overflow == "drop_oldest"


# Under load


LEAD = 3000


class Load:
    """Publishes to some topics at full speed, from connections of its own, until it is stopped; but never more than
    LEAD events ahead of what a reader has `seen`, or its backlog would only grow."""

    def __init__(self, harness: Harness, topics: list[str], keys: int = 0) -> None:
        self.harness = harness
        self.topics = topics
        self.keys = keys
        self.sent = dict.fromkeys(topics, 0)
        self.seen = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    async def __aenter__(self) -> Self:
        for topic in self.topics:
            client = await self.harness.connect()
            self._tasks.append(asyncio.create_task(self._publish(client, topic)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def _publish(self, client: Client, topic: str) -> None:
        while not self._ending:
            await until(lambda: self._ending or self.sent[topic] <= self.seen + LEAD)
            for _ in range(20):
                self.sent[topic] += 1
                number = self.sent[topic]
                fields = {"key": f"k{random.randrange(self.keys)}"} if self.keys else {}
                await client.tell("publish", topic=topic, data=number, **fields)
            await client.ask("ping")


async def cut(client: Client) -> None:
    """End a connection without a word."""
    client.socket.transport.abort()
    await client.closed()


async def test_subscriber_that_is_cut_off_gets_each_event_once_in_order(serve: Serve) -> None:
    """It comes back with `since` while the topic is published to at full speed; CUTS times."""
    async with serve() as harness, Load(harness, ["fat.a", "fat.b"]) as load:
        random.seed(5)
        expected = 1
        epoch = None
        for _ in range(CUTS):
            client = await harness.connect()
            place = {"last": "all"} if epoch is None else {"since": {"epoch": epoch, "offset": expected - 1}}
            overflow = random.choice(["drop_oldest", "drop_newest", "latest", "replay", "close"])
            answer = await client.ask("subscribe", topic="fat.a", overflow=overflow, max_queue=5000, **place)
            assert answer["op"] == "ok", answer
            assert answer.get("recovered", True) is True
            epoch = answer["epoch"]
            live = False
            for _ in range(random.randrange(3000)):
                message = await client.next()
                if message["op"] == "live":
                    assert not live
                    assert message["offset"] == expected - 1
                    live = True
                    continue
                assert (message["op"], message["topic"]) == ("event", "fat.a"), message
                assert (message["offset"], message["data"]) == (expected, expected)
                expected += 1
                load.seen = expected
            await cut(client)
            harness.clients.remove(client)
        assert load.sent["fat.a"] >= expected


async def test_table_of_a_client_that_is_cut_off_equals_that_of_the_broker(serve: Serve) -> None:
    async with serve() as harness:
        table: dict[str, Any] = {}
        offset, epoch = 0, None
        random.seed(6)
        async with Load(harness, ["table.t"], keys=50) as load:
            for _ in range(50):
                client = await harness.connect()
                place = {"last": "all"} if epoch is None else {"since": {"epoch": epoch, "offset": offset}}
                answer = await client.ask("subscribe", topic="table.t", overflow="replay", **place)
                assert answer.get("recovered", True) is True
                epoch = answer["epoch"]
                for _ in range(random.randrange(200)):
                    message = await client.next()
                    if message["op"] == "event":
                        assert message["offset"] > offset
                        offset = load.seen = message["offset"]
                        table[message["key"]] = message["data"]
                    else:
                        assert message["op"] == "live", message
                await cut(client)
                harness.clients.remove(client)
        client = await harness.connect()
        await client.ask("subscribe", topic="table.t", since={"epoch": epoch, "offset": offset})
        while (message := await client.next())["op"] == "event":
            table[message["key"]] = message["data"]
        assert message["op"] == "live"
        page = await client.ask("history", topic="table.t", last="all", limit=1000)
        assert table == {event["key"]: event["data"] for event in page["events"]}


async def test_nothing_remains_of_replays_and_topics() -> None:
    async with with_memory(history_topics=10) as harness:
        client = await harness.connect()
        for n in range(50):
            await published(client, f"log.t{n}", n)
            await published(client, f"plain.t{n}", n)
            await client.ask("subscribe", topic=f"log.t{n}", last=1)
            await client.ask("unsubscribe", topic=f"log.t{n}")
        engine = harness.node.engine
        assert isinstance(engine, MemoryEngine)
        assert (len(engine.store), len(harness.node.recovery)) == (10, 0)


async def test_fast_path_keeps_what_the_slow_path_keeps() -> None:
    async with with_memory() as harness:
        client, reader = await harness.connect(), await harness.subscriber("log.a")
        commands = [
            '{"op":"publish","id":7,"topic":"log.a","data":{ "x" : [1.50, "\\u00fc"] }}',
            '{"op":"publish","id":7,"topic":"log.a","key":"ü","data":null}',
            '{"op":"publish","id":7,"topic":"log.a","key":"","data":"' + "x" * 70_000 + '"}',
        ]
        for slow in commands:
            await client.send(slow.replace('"op"', '"\\u006fp"'))
            before = await client.answer(7)
            fast = harness.node.context.fast_publishes
            await client.send(slow)
            after = await client.answer(7)
            assert harness.node.context.fast_publishes == fast + 1
            assert after == {**before, "offset": before["offset"] + 1}
            first, second = await reader.text(), await reader.text()
            assert first.replace(f'"offset":{before["offset"]}', f'"offset":{after["offset"]}') == second
            await reader.ask("subscribe", topic="log.a", last=2)
            assert [await reader.text(), await reader.text()] == [first, second], "the same bytes"
            assert json.loads(await reader.text())["op"] == "live"


async def test_replay_of_a_subscription_with_latest(serve: Serve) -> None:
    """What `latest` had noted of queued events is forgotten when a replay begins."""
    async with serve() as harness:
        publisher, client = await harness.connect(), await harness.connect()
        await published(publisher, "log.a", *range(5))
        await client.ask("subscribe", topic="log.a")
        for _ in range(2):
            assert (await client.ask("subscribe", topic="log.a", overflow="latest", last=3))["op"] == "ok"
            assert await read(client, 4) == [(3, 2), (4, 3), (5, 4), ("live", 5)]


async def test_history_of_a_topic_that_nothing_was_published_to(serve: Serve) -> None:
    async with serve() as harness:
        client = await harness.connect()
        answer = await client.ask("history", topic="log.a", last=10)
        assert (answer["op"], answer["offset"], answer["events"]) == ("ok", 0, [])
        known = {"epoch": answer["epoch"], "offset": 0}
        assert (await client.ask("history", topic="log.a", since=known))["recovered"]
        assert not (await client.ask("history", topic="log.a", since={"epoch": "other", "offset": 7}))["recovered"]
        assert (await client.ask("history", topic="none"))["code"] == "no_history"


async def test_table_comes_again_where_a_removal_expires_while_it_is_replayed() -> None:
    rules = [TopicRule("t.*", history=100, compact=True, tombstone_age=1.0)]
    async with serving(MemoryEngine(Limits()), topics=rules) as harness:
        publisher, client = await harness.connect(), await harness.connect()
        for key, data in (("a", 1), ("b", 1), ("c", None), ("d", 1)):
            await published(publisher, "t.a", data, key=key)
        await client.ask("subscribe", topic="t.a", last="all", credit=2)
        assert await read(client, 2) == [(1, 1), (2, 1)]
        log = harness.node.engine.log("t.a")
        assert log is not None
        await until(lambda: log.count == 3)  # the removal of `c` is dropped
        await client.tell("credit", topic="t.a", add=100)
        assert await read(client, 5) == [("expired", None, None, None), (1, 1), (2, 1), (4, 1), ("live", 4)]


async def test_second_replay_ends_the_first_and_has_its_own_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the first is under way when it is asked for."""
    monkeypatch.setattr("broker.engines.sqlite.TRANSACTION", 0)
    async with slow_sqlite(0.0) as (harness, engine):
        publisher = await harness.connect()
        epoch = (await published(publisher, "log.a", *range(20)))["epoch"]
        engine.committing = lambda: time.sleep(0.03)
        for pause in range(0, 120, 8):
            client = await harness.connect()
            await client.tell("subscribe", id="first", topic="log.a", since={"epoch": epoch, "offset": 15})
            await asyncio.sleep(pause / 1000)
            await client.tell("subscribe", id="second", topic="log.a", since={"epoch": epoch, "offset": 5})
            while (await client.next()).get("id") != "second":
                pass
            assert await read(client, 16) == [*((n + 1, n) for n in range(5, 20)), ("live", 20)], pause


async def test_change_of_the_policy_while_a_page_is_read() -> None:
    async with slow_sqlite(0.0) as (harness, engine):
        publisher, client = await harness.connect(), await harness.connect()
        await client.ask("subscribe", topic="queue.a", overflow="replay", credit=1)
        await published(publisher, "queue.a", *range(5))
        engine.committing = lambda: time.sleep(0.1)
        with structlog.testing.capture_logs() as logs:
            await client.tell("credit", topic="queue.a", add=10)
            await asyncio.sleep(0.03)
            await client.ask("subscribe", topic="queue.a", overflow="drop_oldest")
            engine.committing = None
            await published(publisher, "queue.a", 5)
            messages = [shown(await client.next())]
            while messages[-1] != (6, 5):
                messages.append(shown(await client.next()))
        assert [each for each in logs if each["log_level"] == "error"] == []
        missing = sum(each[1] for each in messages if each[0] == "overflow")
        assert missing + len([each for each in messages if isinstance(each[0], int)]) == 6


@asynccontextmanager
async def slow_sqlite(seconds: float) -> AsyncIterator[tuple[Harness, SqliteEngine]]:
    """An engine each of whose transactions lasts so long."""
    with tempfile.TemporaryDirectory() as folder:
        engine = SqliteEngine(Path(folder) / "broker.db", Limits(), "normal")
        engine.committing = lambda: time.sleep(seconds)
        async with serving(engine, topics=RULES) as harness:
            yield harness, engine
