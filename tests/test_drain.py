"""How a broker ends: what was answered `ok` has been delivered, and everybody is told when to come back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Opcode

from broker.errors import CloseCode
from tests.engines.late import LateEngine, LateServer
from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_node import Client, Harness, masked, serving
from tests.net.harness import until
from tests.test_session import fill

GOING_AWAY = Close(CloseCode.GOING_AWAY, "going_away")


# In the middle of a load


class Load:
    """Publishers with ids at full speed and subscribers that read, against a broker in a process of its own."""

    def __init__(self, publishers: list[ClientConnection], subscribers: list[ClientConnection]) -> None:
        self.publishers = publishers
        self.subscribers = subscribers
        self.answered: list[dict[int, list[str]]] = [{} for _ in publishers]
        """What each publisher was told, by id: `ok`, or the code of an error."""
        self.received: list[list[tuple[int, int]]] = [[] for _ in subscribers]
        self.byes: list[int] = []
        self.closes: list[Close | None] = []
        self.under_load = asyncio.Event()

    async def run(self) -> None:
        """Go on until the broker closes all connections."""
        await asyncio.gather(
            *(self._publish(place) for place in range(len(self.publishers))),
            *(self._read_answers(place) for place in range(len(self.publishers))),
            *(self._read_events(place) for place in range(len(self.subscribers))),
        )

    async def _publish(self, place: int) -> None:
        connection, answered = self.publishers[place], self.answered[place]
        n = 0
        try:
            while True:
                for _ in range(50):
                    await connection.send(f'{{"op":"publish","id":{n},"topic":"load.{place}","data":[{place},{n}]}}')
                    n += 1
                while n - len(answered) > 200:
                    await asyncio.sleep(0)
                    if connection.close_code is not None:
                        return
        except ConnectionClosed:
            return

    async def _read_answers(self, place: int) -> None:
        async for message in self._messages(self.publishers[place]):
            told = message["code"] if message["op"] == "error" else message["op"]
            self.answered[place].setdefault(message["id"], []).append(told)
            if all(len(answered) > 1000 for answered in self.answered):
                self.under_load.set()

    async def _read_events(self, place: int) -> None:
        async for message in self._messages(self.subscribers[place]):
            assert message["op"] == "event", message
            by, n = message["data"]
            self.received[place].append((by, n))

    async def _messages(self, connection: ClientConnection) -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                message = json.loads(await connection.recv())
                if message["op"] == "bye":
                    assert message["reason"] == "shutdown"
                    self.byes.append(message["retry_after_ms"])
                else:
                    yield message
        except ConnectionClosed as closed:
            self.closes.append(closed.rcvd)


async def opened(broker: RunningBroker, *commands: str) -> ClientConnection:
    connection = await connect(broker.url, proxy=None, compression=None, max_queue=None, ping_interval=None)
    assert json.loads(await connection.recv())["op"] == "welcome"
    for command in commands:
        await connection.send(command)
        assert json.loads(await connection.recv())["op"] == "ok"
    return connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_events_answered_ok_are_delivered_by_a_drain_under_load(number: signal.Signals) -> None:
    roomy = {
        "WSBROKER_LIMITS__MAX_QUEUE": "65536",
        "WSBROKER_LIMITS__MAX_OUTBOX": "100000000",
        "WSBROKER_LIMITS__DRAIN_TIMEOUT": "60",
        "WSBROKER_LIMITS__RECONNECT_SPREAD": "3",
    }
    # At its end this says that the exit status was 0, and that there was no traceback on standard error.
    with start_broker(environ=roomy) as broker:
        subscribe = '{"op":"subscribe","id":1,"topic":"%s"}'
        load = Load(
            [await opened(broker) for _ in range(3)],
            [
                await opened(broker, *(subscribe % f"load.{place}" for place in range(3))),
                await opened(broker, subscribe % "load.*"),
                await opened(broker, subscribe % ">", subscribe % "load.1"),
            ],
        )
        running = asyncio.create_task(load.run())
        await asyncio.wait({running, asyncio.create_task(load.under_load.wait())}, return_when="FIRST_COMPLETED")
        assert not running.done()
        os.kill(broker.program.pid, number)
        await asyncio.to_thread(broker.program.wait_for, re.compile("draining"))
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", broker.port)
        await running
        assert await asyncio.to_thread(broker.program.wait) == 0
        assert "error" not in broker.program.output

    assert load.closes == [GOING_AWAY] * 6
    assert len(load.byes) == 6
    assert all(0 <= bye <= 3000 for bye in load.byes)
    assert len(set(load.byes)) > 1
    for answered in load.answered:
        assert all(len(told) == 1 for told in answered.values())
        assert {told for [told] in answered.values()} <= {"ok", "draining"}
        # Commands are carried out in order, so from the first that is refused on all are.
        outcomes = [answered[n][0] for n in sorted(answered)]
        assert outcomes == sorted(outcomes, reverse=True)
    for received in load.received:
        assert len(received) == len(set(received))
        for place, answered in enumerate(load.answered):
            mine = [n for by, n in received if by == place]
            assert mine == list(range(len(mine)))
            assert {n for n, [told] in answered.items() if told == "ok"} <= set(mine)


# bye to all clients


async def test_bye_spreads_the_reconnect_delays() -> None:
    async with serving(reconnect_spread=2.0) as harness:
        clients = [await harness.connect() for _ in range(40)]
        await harness.node.drain(10)
        assert harness.node.connections == 0
        delays = []
        for client in clients:
            assert await client.closed() == GOING_AWAY
            [bye] = await client.remaining_messages()
            assert list(bye) == ["op", "reason", "retry_after_ms"]
            assert (bye["op"], bye["reason"]) == ("bye", "shutdown")
            delays.append(bye["retry_after_ms"])
        assert all(isinstance(delay, int) and 0 <= delay <= 2000 for delay in delays)
        assert len(set(delays)) > 20
        # Spread over the whole time, not bunched: each half of it has some (all in one: once in 10^11 runs).
        assert min(delays) < 1000 < max(delays)


async def test_deferred_commands_are_executed_before_a_drain_ends() -> None:
    async with serving() as harness:
        client = await harness.connect()
        harness.node.context.command_time = 0.0  # one in a turn, as if each took long
        commands = [f'{{"op":"publish","id":{n},"topic":"t{n}","data":{n}}}'.encode() for n in range(100)]
        client.socket.transport.write(b"".join(map(masked, commands)))
        assert (await client.next())["op"] == "ok"  # all of it has been read then
        assert harness.node.context.published < 100
        await harness.node.drain(10)
        answers = await client.remaining_messages()
        assert [answer["op"] for answer in answers] == ["ok"] * 99 + ["bye"]
        assert [answer.get("id") for answer in answers] == [*range(1, 100), None]


async def test_drain_without_connections_ends() -> None:
    async with serving() as harness:
        await harness.node.drain(3600)
        assert harness.node.draining


async def test_drain_of_more_clients_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.node.BYES_PER_TURN", 2)
    async with serving() as harness:
        clients = [await harness.connect() for _ in range(5)]
        # One goes by itself, while the others get bye.
        await asyncio.gather(harness.node.drain(10), clients[-1].close())
        for client in clients[:-1]:
            assert await client.closed() == GOING_AWAY


async def test_commands_in_the_socket_buffer_are_executed() -> None:
    async with serving() as harness:
        subscriber, publisher = await harness.subscriber("a"), await harness.connect()
        for n in range(500):
            await publisher.tell("publish", topic="a", data=n, id=n)
        await harness.node.drain(10)
        answers = [message for message in await publisher.remaining_messages() if message["op"] != "bye"]
        assert [(answer["id"], answer["op"]) for answer in answers] == [(n, "ok") for n in range(500)]
        events = [message for message in await subscriber.remaining_messages() if message["op"] != "bye"]
        assert [event["data"] for event in events] == list(range(500))


async def test_slow_reader_gets_its_queue_before_the_close() -> None:
    async with serving(max_queue=1000) as harness:
        slow, publisher = await harness.deaf(), await harness.connect()
        await slow.tell("subscribe", topic="a", id=1)
        await slow.until(b'"op":"ok"')
        for _ in range(200):
            answer = await publisher.ask("publish", topic="a", data="x" * 5000)
        assert answer["queued"] == 1
        draining = asyncio.create_task(harness.node.drain(30))
        received = await slow.until(b"going_away")
        assert received.count(b'{"op":"event"') == 200
        assert received.count(b'{"op":"bye"') == 1
        assert b'{"op":"gap"' not in received
        assert received.endswith(bytes((0x88, 12, 1001 >> 8, 1001 & 255)) + b"going_away")
        await slow.send_raw(masked(b"\x03\xe9", opcode=Opcode.CLOSE))
        await draining


async def test_retire_sends_bye_gradually() -> None:
    async with serving() as harness:
        clients = [await harness.connect() for _ in range(20)]
        retiring = asyncio.create_task(harness.node.retire(30))
        going = [asyncio.create_task(client.closed()) for client in clients]
        gone = 0
        # One in 1.2 seconds: of the first three, each goes while most of the others are served.
        for _ in range(3):
            done, _ = await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED, timeout=30)
            gone += len(done)
            going = [task for task in going if not task.done()]
            assert gone + harness.node.connections == 20
            assert harness.node.connections >= 15
        retiring.cancel()
        await harness.node.drain(30)
        await asyncio.gather(*going)


async def test_drain_sends_no_second_bye_to_retired_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.node.BYE_SHARE", 0.001)  # all at once, and then it waits for them
    async with serving(close_timeout=0.1) as harness:
        slow = await harness.deaf()
        await slow.tell("subscribe", id=1, topic="t")
        await slow.until(b'"id":1', b"}")
        publisher = await harness.connect()
        while not harness.node.context.queued:
            await publisher.ask("publish", topic="t", data="x" * 5000)
        retiring = asyncio.create_task(harness.node.retire(30))
        assert (await publisher.closed()) == GOING_AWAY
        await asyncio.sleep(0.05)
        assert harness.node.connections == 1  # its close waits behind what it has not read
        retiring.cancel()
        draining = asyncio.create_task(harness.node.drain(30))
        assert (await slow.rest()).count(b'"op":"bye"') == 1
        await draining


async def test_client_that_does_not_read_is_aborted_at_the_drain_timeout() -> None:
    # Nothing but the end of the drain would end these two within the time that the test may take.
    async with serving(close_timeout=3600, ping_interval=0) as harness:
        full, mute, publisher = await harness.deaf(), await harness.deaf(), await harness.connect()
        fine = await harness.subscriber("a")
        await full.tell("subscribe", topic="a", id=1)
        await full.until(b'"op":"ok"')
        for _ in range(200):
            answer = await publisher.ask("publish", topic="a", data="x" * 5000)
        assert answer["queued"] == 1
        await harness.node.drain(0.2)
        await until(lambda: not harness.node.connections)
        assert harness.node.sessions == {}
        # `full` was never reached by its close frame; `mute` was, and did not answer.
        assert b"going_away" not in await full.rest()
        assert (await mute.rest()).endswith(b"going_away")
        assert await fine.closed() == GOING_AWAY
        assert [message["op"] for message in await fine.remaining_messages()] == ["event"] * 200 + ["bye"]


# While something is under way in the engine


class Draining:
    """A drain that waits for the engine."""

    def __init__(self, harness: Harness, publisher: Client, server: LateServer, task: asyncio.Task[None]) -> None:
        self.harness = harness
        self.publisher = publisher
        self.server = server
        self.task = task


async def begin_drain(harness: Harness, server: LateServer, engine: LateEngine, timeout: float = 30) -> Draining:
    """One publish with the id `first` is under way when it begins."""
    publisher = await harness.connect()
    server.hang()
    published = engine.published
    await publisher.tell("publish", topic="a", data="first", id="first")
    await until(lambda: engine.published == published + 1)
    task = asyncio.create_task(harness.node.drain(timeout))
    await until(lambda: harness.node.draining)
    return Draining(harness, publisher, server, task)


@pytest.fixture
async def server() -> LateServer:
    return LateServer()


@pytest.fixture
async def engine(server: LateServer) -> LateEngine:
    return server.engine()


async def test_pending_publish_is_answered_before_bye(server: LateServer, engine: LateEngine) -> None:
    async with serving(engine) as harness:
        subscriber = await harness.subscriber("a")
        drain = await begin_drain(harness, server, engine)
        for _ in range(5):
            assert await subscriber.ask("ping") == {"op": "pong"}
        assert not drain.task.done()
        server.go_on()
        await drain.task
        assert [message["op"] for message in await drain.publisher.remaining_messages()] == ["ok", "bye"]
        assert [message["op"] for message in await subscriber.remaining_messages()] == ["event", "bye"]
        assert await subscriber.closed() == GOING_AWAY


async def test_commands_are_refused_while_draining(server: LateServer, engine: LateEngine) -> None:
    async with serving(engine) as harness:
        client = await harness.subscriber("b")
        drain = await begin_drain(harness, server, engine)
        error = {"op": "error", "code": "draining", "message": "the broker is shutting down", "retry": True}
        for _ in range(2):
            assert await client.ask("publish", topic="a", data=1) == error
            assert await client.ask("subscribe", topic="a") == error
            assert await client.ask("subscribe", topic="b", max_queue=1) == error
        await client.tell("publish", topic="a", data=1)
        assert await client.next() == error
        # A mistake is still one, and what takes nothing from the broker is still done.
        assert (await client.ask("publish", topic="a b", data=1))["code"] == "bad_topic"
        assert await client.ask("ping") == {"op": "pong"}
        assert await client.ask("unsubscribe", topic="b") == {"op": "ok", "topic": "b"}
        assert engine.published == 1
        server.go_on()
        await drain.task


async def test_fast_path_is_disabled_while_draining() -> None:
    async with serving() as harness:
        client, waited_for = await harness.subscriber("a"), await harness.connect()
        for n in range(2):
            await client.ask("publish", topic="a", data=n)
        assert harness.node.context.fast_publishes == 1
        # This engine is never waited for; the drain is made to, so that there is time to publish.
        session = harness.session(waited_for)
        session.inflight = 1
        draining = asyncio.create_task(harness.node.drain(30))
        await until(lambda: harness.node.draining)
        assert (await client.ask("publish", topic="a", data=2))["code"] == "draining"
        assert harness.node.context.fast_publishes == 1
        assert await client.data(2) == [0, 1]
        await client.nothing()
        session.inflight = 0
        await draining


async def test_handshakes_are_refused_while_draining(server: LateServer, engine: LateEngine) -> None:
    async with serving(engine) as harness:
        drain = await begin_drain(harness, server, engine)
        with pytest.raises(InvalidStatus) as refused:
            await harness.connect()
        assert refused.value.response.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        server.go_on()
        await drain.task


async def test_drain_waits_for_the_engine_no_longer_than_the_timeout(server: LateServer, engine: LateEngine) -> None:
    async with serving(engine) as harness:
        drain = await begin_drain(harness, server, engine, timeout=0.2)
        await drain.task
        await until(lambda: not harness.node.connections)
        # It is not told `ok`, and it is told that the broker goes.
        assert [message["op"] for message in await drain.publisher.remaining_messages()] == ["bye"]


async def test_subscriber_without_credit_does_not_delay_a_drain() -> None:
    async with serving() as harness:
        client, publisher = await harness.subscriber("a", credit=1), await harness.connect()
        for n in range(2):
            await publisher.ask("publish", topic="a", data=n)
        await harness.node.drain(30)
        assert await client.closed() == await publisher.closed() == GOING_AWAY
        assert [message["op"] for message in await client.remaining_messages()] == ["event", "bye"]


async def test_parked_publisher_is_answered_before_bye() -> None:
    async with serving() as harness:
        slow, publisher = await harness.deaf(), await harness.connect()
        await slow.tell("subscribe", topic="a", id=1, overflow="block", max_queue=1)
        await slow.until(b'"op":"ok"')
        await fill(publisher, "a")
        await publisher.tell("publish", topic="a", data="last", id="last")
        await until(lambda: harness.session(publisher).connection.parked_publishes == 1)
        draining = asyncio.create_task(harness.node.drain(30))
        await until(lambda: harness.node.draining)
        for _ in range(10):
            await asyncio.sleep(0)
        await slow.until(b'"data":"last"}', b"going_away")
        await slow.close()
        await draining
        assert [message["op"] for message in await publisher.remaining_messages()] == ["ok", "bye"]
        assert await publisher.closed() == GOING_AWAY


async def test_commands_behind_a_parked_publish_are_answered_before_bye(server: LateServer, engine: LateEngine) -> None:
    async with serving(engine, max_inflight=5) as harness:
        subscriber, client = await harness.subscriber("a"), await harness.connect()
        server.hang()
        for n in range(50):
            await client.tell("publish", topic="a", data=n, id=n)
        await until(lambda: engine.published == 5)
        draining = asyncio.create_task(harness.node.drain(30))
        await until(lambda: harness.node.draining)
        server.go_on()
        await draining
        messages = [message for message in await client.remaining_messages() if message["op"] != "bye"]
        assert Counter(message["id"] for message in messages) == Counter(range(50))
        done = [message["id"] for message in messages if message["op"] == "ok"]
        assert {message["code"] for message in messages if message["op"] == "error"} <= {"draining"}
        events = [message["data"] for message in await subscriber.remaining_messages() if message["op"] == "event"]
        assert events == sorted(done)
        assert len(done) >= 5
