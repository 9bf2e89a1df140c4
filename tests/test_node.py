"""One broker process: what it takes over, and that it assumes nothing about where its engine is."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest

from broker import session
from broker.config import Config, Limits, Server
from broker.engines.base import Event, Position, PublishDone
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
        assert all(harness.session(client).peer.startswith("127.0.0.1:") for client in clients)
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
            assert answer == {"op": "ok", "receivers": 1, "queued": 0, "dropped": 0, "offset": n}
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
