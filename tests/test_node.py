"""One broker process: what it takes over, and that it assumes nothing about where its engine is."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.frames import Close

from broker import session
from broker.config import Config, Limits, Server
from broker.engines.base import Event, HistoryPage, InterestDone, Position, PublishDone, Unavailable
from broker.engines.memory import MemoryEngine
from broker.errors import CloseCode, CommandError
from broker.rules import Retention, Rules
from broker.session import Published
from tests.engines.late import LateEngine, LateServer
from tests.fixtures_node import masked, serving
from tests.net.harness import request, until


@pytest.fixture
async def server() -> LateServer:
    return LateServer()


@pytest.fixture
async def engine(server: LateServer) -> LateEngine:
    return server.engine()


# Connections


async def test_commands_sent_with_the_request_are_executed_after_welcome() -> None:
    async with serving() as harness:
        reader, writer = await asyncio.open_connection(*harness.address.split(":"))
        commands = [b'{"op":"ping","id":%d}' % n for n in range(3)]
        first, half, *_ = (masked(command) for command in commands)
        writer.write(request(host=harness.address) + first + half[:7])
        received = await reader.readuntil(b'{"op":"pong","id":0}')
        assert received.index(b"\r\n\r\n") < received.index(b'"op":"welcome"') < received.index(b'"op":"pong"')
        writer.write(half[7:])
        await reader.readuntil(b'{"op":"pong","id":1}')
        writer.close()
        await writer.wait_closed()


async def test_each_connection_is_counted_and_has_a_session() -> None:
    async with serving() as harness:
        clients = [await harness.connect() for _ in range(5)]
        assert harness.node.connections == 5
        assert set(harness.node.sessions) == {client.session for client in clients}
        assert all(str(harness.session(client).peer).startswith("127.0.0.1:") for client in clients)
        await clients[0].close()
        await until(lambda: harness.node.connections == 4)
        assert set(harness.node.sessions) == {client.session for client in clients[1:]}


async def test_stop_aborts_remaining_connections() -> None:
    async with serving() as harness:
        client = await harness.subscriber("a")
        await harness.node.stop()
        assert await client.closed() is None  # no close frame
        assert harness.node.sessions == {}
        await harness.node.start()  # for the end of the harness


# An engine in this process


async def test_fast_path_is_used_with_an_in_process_engine() -> None:
    async with serving() as harness:
        subscriber, publisher = await harness.subscriber("a"), await harness.connect()
        for n in range(10):
            await publisher.ask("publish", topic="a", data=n)
        assert await subscriber.data(10) == list(range(10))
        assert harness.node.context.fast_publishes == 9


# An engine somewhere else


async def test_fast_path_is_not_used_with_a_remote_engine(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        subscriber, publisher = await harness.subscriber("a", ">"), await harness.connect()
        for n in range(10):
            assert (await publisher.ask("publish", topic="a", data=n))["receivers"] == 1
        assert await subscriber.data(10) == list(range(10))
        assert engine.published == 10
        assert harness.node.context.fast_publishes == 0
        assert len(harness.node.hub.routes) == 0


async def test_engine_that_answers_out_of_order_keeps_event_order_and_answers_once(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        subscriber = await harness.subscriber("a.*", "a.1", ">")
        publishers = [await harness.connect() for _ in range(3)]
        for n in range(100):
            for place, publisher in enumerate(publishers):
                await publisher.tell("publish", topic=f"a.{n % 4}", data=[place, n], id=n)
        data = await subscriber.data(300)
        await subscriber.nothing()
        for place in range(3):
            for topic in range(4):
                mine = [n for by, n in data if by == place and n % 4 == topic]
                assert mine == list(range(topic, 100, 4))
        orders = []
        for publisher in publishers:
            answers = [await publisher.next() for _ in range(100)]
            assert all(answer["op"] == "ok" and answer["receivers"] == 1 for answer in answers)
            orders.append([answer["id"] for answer in answers])
            assert sorted(orders[-1]) == list(range(100))
        # It was out of step indeed.
        assert any(order != sorted(order) for order in orders)


async def test_offset_and_epoch_of_the_engine_are_passed_on() -> None:
    async with serving(LateServer(keeps=True).engine()) as harness:
        client = await harness.subscriber("a")
        for n in (1, 2):
            answer = await client.ask("publish", topic="a", data=n)
            assert answer == {"op": "ok", "receivers": 1, "queued": 0, "dropped": 0, "epoch": "late", "offset": n}
            assert await client.text() == f'{{"op":"event","topic":"a","data":{n},"offset":{n}}}'


async def test_two_nodes_share_events(server: LateServer) -> None:
    async with serving(server.engine()) as one, serving(server.engine()) as other:
        near, far = await one.subscriber("a.>", echo=False), await other.subscriber("a.*", "a.b")
        # A receipt counts this node's subscribers; `echo` is for the publisher's own connection.
        assert (await near.ask("publish", topic="a.b", data=1, key="k"))["receivers"] == 0
        assert await far.next() == {"op": "event", "topic": "a.b", "key": "k", "data": 1}
        assert (await far.ask("publish", topic="a.b", data=2))["receivers"] == 1
        assert await far.data(1) == [2]
        assert await near.data(1) == [2]
        await far.nothing()
        await near.nothing()


async def test_engine_interest_follows_the_first_and_last_subscriber(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        one = await harness.subscriber("a", "b.*")
        assert engine.asked == [("a", True), ("b.*", True)]
        other = await harness.subscriber("a")
        await one.ask("subscribe", topic="a", max_queue=1)
        await one.ask("unsubscribe", topic="a")
        await one.ask("unsubscribe", topic="a")
        assert engine.asked[2:] == []
        await other.close()
        await until(lambda: engine.asked[2:] == [("a", False)])
        await one.close()
        await until(lambda: engine.asked[3:] == [("b.*", False)])
        await until(lambda: engine.interests == {})


async def test_engine_failure_is_answered_with_unavailable(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        subscriber, client = await harness.subscriber("a"), await harness.connect()
        engine.cut()
        error = {"op": "error", "code": "unavailable", "message": "the engine has lost its connection", "retry": True}
        assert await client.ask("publish", topic="a", data=1) == error
        await client.tell("publish", topic="a", data=1)
        assert await client.next() == error
        engine.mend()
        assert (await subscriber.next())["op"] == "gap"
        assert (await client.ask("publish", topic="a", data=2))["receivers"] == 1
        assert await subscriber.data(1) == [2]


async def test_publishers_get_unavailable_when_the_engine_queue_is_full(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        client = await harness.connect()
        server.bound = 5
        server.hang()
        for n in range(8):
            await client.tell("publish", topic="a", data=n, id=n)
        refused = [await client.next() for _ in range(3)]
        assert {answer["code"] for answer in refused} == {"unavailable"}
        assert {answer["id"] for answer in refused} == {5, 6, 7}
        server.go_on()
        assert {(await client.next())["id"] for _ in range(5)} == {0, 1, 2, 3, 4}


async def test_reading_pauses_at_max_inflight_and_resumes(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine, max_inflight=5) as harness:
        subscriber, client, other = await harness.subscriber("a"), await harness.connect(), await harness.connect()
        server.hang()
        for n in range(200):
            await client.tell("publish", topic="a", data=n, id=n)
        await client.tell("ping", id="last")
        await until(lambda: engine.published == 5)
        # Others are read, and it stays at that.
        for _ in range(20):
            assert await other.ask("ping") == {"op": "pong"}
        assert engine.published == 5
        assert harness.session(client).inflight == 5
        await other.tell("publish", topic="a", data="other", id=1)
        await until(lambda: engine.published == 6)
        server.go_on()
        answers = [await client.next() for _ in range(201)]
        assert Counter(answer["id"] for answer in answers) == Counter([*range(200), "last"])
        assert all(answer["op"] in ("ok", "pong") for answer in answers)
        assert await other.answer(1)
        data = await subscriber.data(201)
        data.remove("other")
        assert data == list(range(200))
        assert harness.session(client).inflight == 0


async def test_reload_with_a_larger_max_inflight_stops_no_client(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine, max_inflight=2) as harness:
        client = await harness.connect()
        server.hang()
        for n in range(5):
            await client.tell("publish", topic="a", data=n, id=n)
        await until(lambda: engine.published == 2)
        harness.node.reconfigure(Config(server=Server(listen=["127.0.0.1:0"]), limits=Limits(max_inflight=64)))
        server.go_on()
        assert {(await client.next())["id"] for _ in range(5)} == set(range(5))


async def test_reading_resumes_at_half_of_max_inflight(engine: LateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[PublishDone] = []
    async with serving(engine, max_inflight=4) as harness:
        client, other = await harness.connect(), await harness.connect()
        monkeypatch.setattr(engine, "publish", lambda event, retention, tell: done.append(tell))
        for n in range(9):
            await client.tell("publish", topic="a", data=n, id=n)
        await until(lambda: len(done) == 4)
        done[0](Position())
        assert await other.ask("ping") == {"op": "pong"}
        assert await other.ask("ping") == {"op": "pong"}
        assert len(done) == 4
        done[1](Position())
        await until(lambda: len(done) == 6)
        for n in range(2, 9):
            await until(partial(has_more_than, done, n))
            done[n](Position())
        assert {(await client.next())["id"] for _ in range(9)} == set(range(9))


def has_more_than(found: list[PublishDone], number: int) -> bool:
    return len(found) > number


async def test_answer_does_not_end_a_throttle_pause(engine: LateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "THROTTLE_SECONDS", 3600.0)
    async with serving(engine) as harness:
        client, other = await harness.connect(), await harness.connect()
        harness.node.set_memory_pressure(True)
        assert (await client.ask("publish", topic="a", data=1))["op"] == "ok"
        await client.tell("publish", topic="a", data=2, id=2)
        for _ in range(3):
            assert await other.ask("ping") == {"op": "pong"}
        assert engine.published == 1
        harness.session(client).connection.end_pause()
        assert (await client.answer(2))["op"] == "ok"
        harness.session(client).connection.end_pause()


async def test_pending_publishes_never_exceed_max_inflight(engine: LateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    async with serving(engine, max_inflight=3) as harness:
        client = await harness.connect()
        session = harness.session(client)
        publish = engine.publish

        def watch(*arguments: Any) -> None:
            nonlocal most
            publish(*arguments)
            most = max(most, session.inflight)

        monkeypatch.setattr(engine, "publish", watch)
        for n in range(300):
            await client.tell("publish", topic=f"a.{n % 3}", data=n, id=n)
        assert {(await client.next())["id"] for _ in range(300)} == set(range(300))
        assert most == 3


async def test_close_during_a_pause_is_handled(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine, max_inflight=2) as harness:
        client, subscriber = await harness.connect(), await harness.subscriber("a")
        server.hang()
        for n in range(4):
            await client.tell("publish", topic="a", data=n, id=n)
        closing = asyncio.create_task(client.close())
        await until(lambda: engine.published == 2)
        server.go_on()
        await closing
        assert client.socket.close_code == 1000
        # The commands came before the close frame.
        assert await subscriber.data(4) == [0, 1, 2, 3]


async def test_answer_to_a_closed_publisher_is_ignored(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        client, subscriber = await harness.subscriber("a", echo=False), await harness.subscriber("a")
        server.hang()
        await client.tell("publish", topic="a", data=1, id=1)
        await until(lambda: engine.published == 1)
        client.socket.transport.abort()
        await until(lambda: harness.node.connections == 1)
        server.go_on()
        assert await subscriber.data(1) == [1]
        assert (await subscriber.ask("publish", topic="a", data=2))["receivers"] == 1


async def test_possible_loss_is_announced_to_each_subscriber_at_its_place(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        exact, pattern, both = [
            await harness.subscriber("a.b"),
            await harness.subscriber("a.*"),
            await harness.subscriber("a.b", ">"),
        ]
        elsewhere = await harness.subscriber("b", "$sys.>")
        # All in one turn, and all the same in this order.
        harness.node.deliver(Event("a.b", b"1"))
        harness.node.lost("a.b")
        harness.node.deliver(Event("a.b", b"2"))
        for client, topic in ((exact, "a.b"), (pattern, "a.*"), (both, "a.b")):
            assert await client.data(1) == [1]
            assert await client.text() == f'{{"op":"gap","topic":"{topic}","missed":null,"reason":"lost"}}'
            assert await client.data(1) == [2]
            await client.nothing()
        await elsewhere.nothing()


async def test_loss_gap_does_not_overtake_queued_events(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        client = await harness.subscriber("a.*", credit=0)
        harness.node.deliver(Event("a.b", b"1"))
        harness.node.lost("a.b")
        harness.node.deliver(Event("a.b", b"2"))
        await client.nothing()
        await client.ask("credit", topic="a.*", add=5)
        assert await client.data(1) == [1]
        assert await client.text() == '{"op":"gap","topic":"a.*","missed":null,"reason":"lost"}'
        assert await client.data(1) == [2]


async def test_loss_between_nodes_is_announced(server: LateServer) -> None:
    late = server.engine()
    async with serving(server.engine()) as near, serving(late) as far:
        publisher, subscriber = await near.connect(), await far.subscriber("a")
        await publisher.ask("publish", topic="a", data=1)
        assert await subscriber.data(1) == [1]
        late.cut()
        await publisher.ask("publish", topic="a", data=2)
        late.mend()
        assert await subscriber.next() == {"op": "gap", "topic": "a", "missed": None, "reason": "lost"}
        await publisher.ask("publish", topic="a", data=3)
        assert await subscriber.data(1) == [3]


async def test_pending_publishes_are_answered_when_the_engine_stops(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        client = await harness.connect()
        server.hang()
        await client.tell("publish", topic="a", data=1)
        await until(lambda: engine.published == 1)
        session = harness.session(client)
        assert session.inflight == 1
        await engine.stop()
        error = await client.next()
        assert error["code"] == "unavailable"
        assert session.inflight == 0
        await engine.start(harness.node.deliver, harness.node.lost)  # for the end of the harness


# Interest


async def test_subscribe_is_answered_once_the_engine_has_confirmed_the_interest(
    engine: LateEngine, server: LateServer
) -> None:
    async with serving(engine) as harness:
        one, other = await harness.connect(), await harness.connect()
        server.hang()
        for client in (one, other):
            await client.tell("subscribe", topic="a", id=1)
            await client.tell("subscribe", topic="a", id=2, max_queue=7)
            await client.nothing()
        assert engine.asked == [("a", True)]
        server.go_on()
        for client in (one, other):
            assert [await client.next() for _ in range(2)] == [{"op": "ok", "id": n, "topic": "a"} for n in (1, 2)]
        assert (await one.ask("publish", topic="a", data=1))["receivers"] == 2


async def test_subscription_that_the_engine_refuses_is_undone(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        one, other = await harness.connect(), await harness.connect()
        engine.cut()
        server.hang()
        for client in (one, other):
            await client.tell("subscribe", topic="a.*", id=1)
            await client.tell("subscribe", topic="a.*", id=2, max_queue=7)
            await client.nothing()
        server.go_on()
        for client in (one, other):
            answers = [await client.next() for _ in range(2)]
            assert [(answer["id"], answer["code"], answer["retry"]) for answer in answers] == [
                (1, "unavailable", True),
                (2, "unavailable", True),
            ]
            assert not harness.session(client).subscriptions
        assert harness.node.hub.filters == 0
        engine.mend()
        assert (await one.ask("unsubscribe", topic="a.*"))["code"] == "not_subscribed"
        assert (await one.ask("subscribe", topic="a.*"))["op"] == "ok"
        assert (await other.ask("publish", topic="a.b", data=1))["receivers"] == 1
        assert await one.data(1) == [1]


async def test_unsubscribe_during_a_pending_interest_answers_both(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        client = await harness.connect()
        server.hang()
        await client.tell("subscribe", topic="a", id=1)
        assert (await client.ask("unsubscribe", topic="a")) == {"op": "ok", "topic": "a"}
        await client.tell("subscribe", topic="a", id=2)
        await until(lambda: engine.asked == [("a", True), ("a", False), ("a", True)])
        server.go_on()
        assert [(await client.next())["id"] for _ in range(2)] == [1, 2]
        assert (await client.ask("publish", topic="a", data=1))["receivers"] == 1
        await client.data(1)


async def test_disconnect_during_a_pending_interest_ends_it(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine) as harness:
        client = await harness.connect()
        server.hang()
        await client.tell("subscribe", topic="a", id=1)
        await until(lambda: engine.asked == [("a", True)])
        client.socket.transport.abort()
        await until(lambda: engine.asked == [("a", True), ("a", False)])
        engine.cut()  # so that the first one is refused, with nobody to tell
        server.go_on()
        await until(lambda: not engine.under_way)
        assert harness.node.hub.filters == 0


async def test_pending_subscribes_count_as_commands_under_way(engine: LateEngine, server: LateServer) -> None:
    async with serving(engine, max_inflight=3) as harness:
        client, other = await harness.connect(), await harness.connect()
        server.hang()
        for n in range(10):
            await client.tell("subscribe", topic=f"t.{n}", id=n)
        await until(lambda: len(engine.asked) == 3)
        for _ in range(3):
            assert await other.ask("ping") == {"op": "pong"}
        assert len(engine.asked) == 3
        server.go_on()
        assert {(await client.next())["id"] for _ in range(10)} == set(range(10))


# Deliveries and their publishes


class Slow(MemoryEngine):
    """Leaves it to the test when an event is delivered and done."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.done: list[PublishDone] = []

    def is_local(self, topic: str, retention: Retention) -> bool:
        return topic == "local"

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if event.topic == "local":
            super().publish(event, retention, done)
        else:
            self.events.append(event)
            self.done.append(done)


async def test_equal_event_is_matched_to_its_publish() -> None:
    engine = Slow()
    async with serving(engine) as harness:
        publisher = await harness.subscriber("a", echo=False)
        subscriber, deaf_to_a = await harness.subscriber("a"), await harness.subscriber("b")
        for n in range(3):
            await publisher.tell("publish", topic="a", data=n, id=n)
        await until(lambda: len(engine.events) == 3)
        copies = [Event(event.topic, bytes(event.data), token=event.token) for event in engine.events]
        # Events of other nodes come in between, one with a token that nobody here knows.
        for event in (copies[0], Event("a", b"8"), copies[1], Event("a", b"9", token=17), copies[2]):
            harness.node.deliver(event)
        for done in reversed(engine.done):
            done(Position())
        answers = [await publisher.next() for _ in range(5)]
        assert [answer["data"] for answer in answers if answer["op"] == "event"] == [8, 9]
        assert [(answer["id"], answer["receivers"]) for answer in answers if answer["op"] == "ok"] == [
            (2, 1),
            (1, 1),
            (0, 1),
        ]
        assert await subscriber.data(5) == [0, 8, 1, 9, 2]
        await deaf_to_a.nothing()


async def test_second_answer_of_the_engine_is_ignored() -> None:
    engine = Slow()
    async with serving(engine) as harness:
        client = await harness.connect()
        await client.tell("publish", topic="a", data=1, id=1)
        await until(lambda: len(engine.done) == 1)
        for result in (Position(), Unavailable("no"), Position()):
            engine.done[0](result)
        assert (await client.next())["op"] == "ok"
        await client.nothing()
        assert harness.session(client).inflight == 0


async def test_engine_that_never_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.node.MAX_PENDING", 3)
    engine = Slow()
    async with serving(engine) as harness:
        for n in range(5):  # publishers come and go
            client = await harness.connect()
            await client.tell("publish", topic="a", data=n, id=n)
            await until(lambda n=n: len(engine.done) == min(n + 1, 3))  # type: ignore[misc]
            if n >= 3:
                assert (await client.next())["code"] == "unavailable"
            await client.close()
        for done in engine.done:
            done(Position())
        client = await harness.connect()
        await client.tell("publish", topic="a", data=5, id=5)
        await until(lambda: len(engine.done) == 4)
        engine.done[3](Position())
        assert (await client.next())["op"] == "ok"


async def test_only_local_topics_take_the_fast_path() -> None:
    engine = Slow()
    async with serving(engine) as harness:
        client = await harness.subscriber("local", "a")
        for n in range(3):
            assert (await client.ask("publish", topic="local", data=n))["receivers"] == 1
            await client.tell("publish", topic="a", data=n, id=n)
            await until(lambda n=n: len(engine.done) == n + 1)  # type: ignore[misc]
            harness.node.deliver(engine.events[n])
            engine.done[n](Position())
            assert (await client.answer(n))["receivers"] == 1
        assert harness.node.context.fast_publishes == 2
        assert "local" in harness.node.hub.routes
        assert "a" not in harness.node.hub.routes


async def test_engine_that_fails_after_its_answer_causes_no_second_one() -> None:
    class Failing(MemoryEngine):
        def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
            super().publish(event, retention, done)
            raise RuntimeError("a fault of the engine")

        def interest(self, filter: str, on: bool, done: InterestDone) -> None:
            super().interest(filter, on, done)
            if on:
                raise RuntimeError("a fault of the engine")

    with capture_logs() as entries:
        async with serving(Failing()) as harness:
            client = await harness.connect()
            assert (await client.ask("subscribe", topic="a"))["op"] == "ok"
            assert (await client.ask("publish", topic="a", data=1))["receivers"] == 1
            assert await client.data(1) == [1]
            await client.nothing()
            assert harness.session(client).inflight == 0
    errors = [entry["event"] for entry in entries if entry["log_level"] == "error"]
    assert errors == ["engine failed after its answer"] * 2


async def test_engine_that_fails_at_an_interest_leaves_no_subscription() -> None:
    class Failing(MemoryEngine):
        def interest(self, filter: str, on: bool, done: InterestDone) -> None:
            raise RuntimeError("a fault of the engine")

    async with serving(Failing()) as harness:
        client = await harness.connect()
        assert (await client.ask("subscribe", topic="a"))["code"] == "internal"
        assert harness.node.hub.filters == 0
        assert not harness.session(client).subscriptions
        assert harness.session(client).inflight == 0


# Use cases without a WebSocket


async def test_publish_without_a_connection_has_a_receipt() -> None:
    async with serving() as harness:
        subscriber = await harness.subscriber("a.*")
        results: list[Published | CommandError] = []
        harness.node.publish("a.b", b"1", "k", results.append)
        assert results == [Published(Position(), 1, 0, 0)]
        assert await subscriber.next() == {"op": "event", "topic": "a.b", "key": "k", "data": 1}
        for topic, code in (("a.*", "bad_topic"), ("$sys.a", "bad_topic")):
            with pytest.raises(CommandError) as refused:
                harness.node.publish(topic, b"1", None, results.append)
            assert refused.value.code == code
        assert len(results) == 1


async def test_history_is_read_where_the_rule_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = LateServer()
    engine = server.engine()
    monkeypatch.setattr(Rules, "retention", lambda self, topic: Retention(events=10 if topic.startswith("a") else 0))
    async with serving(engine) as harness:
        client = await harness.connect()
        for n in range(3):
            await client.ask("publish", topic="a", data=n)
        results: list[HistoryPage | CommandError] = []
        with pytest.raises(CommandError, match="keeps no history"):
            harness.node.history("b", None, 10, results.append)
        harness.node.history("a", Position("late", 1), 10, results.append)
        await until(lambda: len(results) == 1)
        assert isinstance(results[0], HistoryPage)
        assert [(event.offset, bytes(event.data)) for event in results[0].events] == [(2, b"1"), (3, b"2")]
        harness.node.history("a.never", None, 10, results.append)
        engine.cut()
        harness.node.history("a", None, 10, results.append)
        await until(lambda: len(results) == 3)
        assert [result.code for result in results if isinstance(result, CommandError)] == ["unavailable"] * 2


async def test_operator_disconnects_a_session() -> None:
    async with serving() as harness:
        client, other = await harness.subscriber("a"), await harness.connect()
        assert harness.node.disconnect(client.session)
        assert await client.closed() == Close(CloseCode.DISCONNECTED, "disconnected")
        await until(lambda: client.session not in harness.node.sessions)
        assert not harness.node.disconnect(client.session)
        assert await other.ask("ping") == {"op": "pong"}


async def test_possible_loss_in_a_pattern_is_announced_to_all_subscribers_of_its_topics(engine: LateEngine) -> None:
    async with serving(engine) as harness:
        clients = {topic: await harness.subscriber(topic) for topic in ("a.b", "a.*", "a.>", "*.b", ">", "a.c.d")}
        both = await harness.subscriber("a.b", "*.*")
        elsewhere = await harness.subscriber("b", "a", "b.>", "$sys.>")
        harness.node.deliver(Event("a.b", b"1"))
        harness.node.lost("a.*")
        harness.node.deliver(Event("a.b", b"2"))
        for topic, client in clients.items():
            if topic == "a.c.d":
                await client.nothing()
                continue
            assert await client.data(1) == [1]
            assert await client.next() == {"op": "gap", "topic": topic, "missed": None, "reason": "lost"}
            assert await client.data(1) == [2]
        messages = [await both.next() for _ in range(4)]
        assert {message["topic"] for message in messages if message["op"] == "gap"} == {"a.b", "*.*"}
        assert [message["data"] for message in messages if message["op"] == "event"] == [1, 2]
        await elsewhere.nothing()
