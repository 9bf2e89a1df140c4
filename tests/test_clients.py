"""Clients from end to end, against the broker as a process of its own: `websockets`, asyncio and sync, and our own.

Browsers are in tests/browser, Node's `ws` is in tests/node.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets.asyncio.client
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import Close
from websockets.protocol import State
from websockets.typing import Subprotocol

from broker import __version__
from broker.cli.lines import json_value
from broker.errors import CommandError
from tests.fixtures_broker import ROOT, RunningBroker, start_broker
from tests.fixtures_command import Process, Result, finish, start, wsbroker
from wsbroker_client import Closed, CommandRefused
from wsbroker_client.connection import Connection, connect
from wsbroker_client.publisher import Publisher

PATIENCE = 30.0
PROTOCOL = [Subprotocol("wsbroker.v1")]


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    """One broker for the tests that do not stop it. Each test has topics of its own."""
    with start_broker() as broker:
        yield broker


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


def command(op: str, **fields: Any) -> str:
    return json.dumps({"op": op, **fields})


# websockets, asyncio


async def test_websockets_asyncio_subscribes_publishes_receives_and_closes(broker: RunningBroker, topic: str) -> None:
    async with websockets.asyncio.client.connect(broker.url, subprotocols=PROTOCOL) as client:
        assert client.subprotocol == "wsbroker.v1"
        welcome = json.loads(await client.recv())
        assert (welcome["op"], welcome["version"]) == ("welcome", 1)
        await client.send(command("subscribe", id=1, topic=f"{topic}.*"))
        assert json.loads(await client.recv()) == {"op": "ok", "id": 1, "topic": f"{topic}.*"}
        data = {"bid": 1.0843, "name": "Zürich 🚀", "deep": [[], {}]}
        await client.send(command("publish", id="two", topic=f"{topic}.a", key="k", data=data))
        first, second = json.loads(await client.recv()), json.loads(await client.recv())
        event, ok = (first, second) if first["op"] == "event" else (second, first)
        assert event == {"op": "event", "topic": f"{topic}.a", "key": "k", "data": data}
        assert ok == {"op": "ok", "id": "two", "receivers": 1, "queued": 0, "dropped": 0}
        await client.send(command("unsubscribe", id=3, topic=f"{topic}.*"))
        assert json.loads(await client.recv())["id"] == 3
        await client.send(command("publish", id=4, topic=f"{topic}.a", data=1))
        assert json.loads(await client.recv())["receivers"] == 0
        pong = await client.ping()
        await pong
        await client.close(1000, "enough")
        assert client.protocol.close_rcvd is not None
        assert client.protocol.close_rcvd.code == 1000


async def test_websockets_asyncio_is_closed_with_bye_and_1001() -> None:
    with start_broker() as broker:
        async with websockets.asyncio.client.connect(broker.url) as client:
            assert json.loads(await client.recv())["op"] == "welcome"
            broker.program.terminate()
            bye = json.loads(await client.recv())
            assert (bye["op"], bye["reason"]) == ("bye", "shutdown")
            assert 0 <= bye["retry_after_ms"] <= 5000
            with pytest.raises(ConnectionClosedOK) as caught:
                await client.recv()
            assert caught.value.rcvd == Close(1001, "going_away")
        assert await asyncio.to_thread(broker.program.wait) == 0


async def test_websockets_asyncio_may_send_binary_and_fragmented_commands(broker: RunningBroker, topic: str) -> None:
    async with websockets.asyncio.client.connect(broker.url) as client:
        await client.recv()
        await client.send(command("subscribe", id=1, topic=topic).encode())
        assert isinstance(await client.recv(), str)
        text = command("publish", topic=topic, data="x" * 1000)
        await client.send(text[at : at + 7] for at in range(0, len(text), 7))
        assert json.loads(await client.recv())["data"] == "x" * 1000


async def test_websockets_asyncio_clients_see_one_order(broker: RunningBroker, topic: str) -> None:
    async def subscribe() -> list[int]:
        async with websockets.asyncio.client.connect(broker.url) as client:
            await client.recv()
            await client.send(command("subscribe", id=1, topic=topic, max_queue=2000))
            await client.recv()
            ready.release()
            return [json.loads(await client.recv())["data"] for _ in range(600)]

    async def publish(name: int) -> None:
        async with websockets.asyncio.client.connect(broker.url) as client:
            await client.recv()
            for number in range(200):
                await client.send(command("publish", topic=topic, data=name * 1000 + number))
            await client.send(command("ping", id=1))
            assert json.loads(await client.recv()) == {"op": "pong", "id": 1}

    ready = asyncio.Semaphore(0)
    subscribers = [asyncio.create_task(subscribe()) for _ in range(5)]
    for _ in subscribers:
        await ready.acquire()
    await asyncio.gather(*(publish(name) for name in range(3)))
    first, *others = await asyncio.gather(*subscribers)
    assert all(other == first for other in others)
    for name in range(3):
        assert [data for data in first if data // 1000 == name] == [name * 1000 + number for number in range(200)]


# websockets, sync


def test_websockets_sync_subscribes_publishes_receives_and_closes(broker: RunningBroker, topic: str) -> None:
    with websockets.sync.client.connect(broker.url, subprotocols=PROTOCOL) as client:
        assert client.subprotocol == "wsbroker.v1"
        assert json.loads(client.recv(PATIENCE))["op"] == "welcome"
        client.send(command("subscribe", id=1, topic=f"{topic}.>"))
        assert json.loads(client.recv(PATIENCE))["op"] == "ok"
        for number in range(100):
            client.send(command("publish", topic=f"{topic}.a.b", data={"n": number}))
        assert [json.loads(client.recv(PATIENCE))["data"]["n"] for _ in range(100)] == list(range(100))
        assert client.ping().wait(PATIENCE)
    assert client.protocol.state is State.CLOSED
    assert client.protocol.close_rcvd is not None
    assert client.protocol.close_rcvd.code == 1000


def test_websockets_sync_is_closed_with_bye_and_1001() -> None:
    with start_broker() as broker, websockets.sync.client.connect(broker.url) as client:
        assert json.loads(client.recv(PATIENCE))["op"] == "welcome"
        broker.program.terminate()
        assert json.loads(client.recv(PATIENCE))["op"] == "bye"
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(PATIENCE)
        assert caught.value.rcvd == Close(1001, "going_away")
        assert broker.program.wait() == 0


# The client of this package


async def take(client: Connection, count: int) -> list[Any]:
    messages: list[Any] = []
    async for message in client:
        messages.append(message)
        if len(messages) == count:
            break
    return messages


async def test_broker_client_subscribes_publishes_receives_and_closes(broker: RunningBroker, topic: str) -> None:
    async with connect(broker.url) as client:
        assert client.welcome["server"] == f"wsbroker/{__version__}"
        await client.subscribe(f"{topic}.*", max_queue=10, overflow="drop_newest")
        answer = await client.publish(f"{topic}.a", {"x": 1}, key="k")
        assert (answer.receivers, answer.dropped) == (1, 0)
        (event,) = await take(client, 1)
        assert event == {"op": "event", "topic": f"{topic}.a", "key": "k", "data": {"x": 1}}
        await client.ping()
        await client.unsubscribe(f"{topic}.*")
        with pytest.raises(CommandRefused, match="not_subscribed"):
            await client.unsubscribe(f"{topic}.*")
        with pytest.raises(CommandRefused, match="bad_topic"):
            await client.publish("$mine", 1)


async def test_broker_client_is_closed_with_bye_and_1001() -> None:
    with start_broker() as broker:
        async with connect(broker.url) as client:
            broker.program.terminate()
            with pytest.raises(Closed) as caught:
                await client.raise_when_closed()
            assert (caught.value.close_code, caught.value.retry) == (1001, True)
            assert caught.value.retry_after_ms is not None
        assert await asyncio.to_thread(broker.program.wait) == 0


async def test_what_the_command_line_lets_through_the_broker_takes(broker: RunningBroker, topic: str) -> None:
    """Also at the limits of depth and size."""
    failures: list[tuple[int | None, str]] = []
    values = [b"[" * 63 + b"]" * 63, b"[" * 64 + b"]" * 64, b'"\\ud800"', b"1e999", b"-0", b'{"a":1,"a":2}']
    accepted = [value for value in values if is_accepted(value)]
    assert values[0] in accepted
    assert values[1] not in accepted
    async with connect(broker.url) as client:
        publisher = Publisher(client, topic, failed=lambda number, error: failures.append((number, error.code)))
        largest = client.welcome["max_size"] - len(b'{"op":"publish","id":1,"topic":"","data":""}') - len(topic)
        texts = [b'"%b"' % (b"x" * largest), b'"%b"' % (b"x" * (largest + 1))]
        await publisher.publish(enumerate([*texts, *accepted], 1))
        await publisher.finish()
        assert failures == [(2, "limit")]
        assert publisher.published == 1 + len(accepted)


def is_accepted(value: bytes) -> bool:
    try:
        json_value(value)
    except CommandError:
        return False
    return True


@pytest.mark.parametrize("data", [b"", b"x", b'1,"topic":"other"', b'1,"data":2', b"1}", b"\xff", b'"\xff"', b"[" * 65])
def test_invalid_json_is_not_let_through(data: bytes) -> None:
    with pytest.raises(CommandError, match="bad_json"):
        json_value(data)


# The commands


async def until_subscribed(url: str, topic: str, count: int = 1) -> None:
    """Wait until so many `sub` are there."""
    async with connect(url) as client:
        while (await client.publish(topic, "are you there?")).receivers != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def lines_of(process: Process) -> list[Any]:
    """Read what a `sub` prints, up to an event "end", without the questions of `until_subscribed`."""
    assert process.stdout is not None
    found: list[Any] = []
    while True:
        line = json.loads(await process.stdout.readline())
        if line.get("data") == "end":
            return found
        if line.get("data") != "are you there?":
            found.append(line)


async def test_sub_prints_what_pub_publishes(broker: RunningBroker, topic: str) -> None:
    lines = b'1\n{ "a" : "b" }\n"end"\n'
    async with start("sub", f"{topic}.*", "--url", broker.url) as one, start("sub", ">", "--url", broker.url) as all_:
        await until_subscribed(broker.url, f"{topic}.x", 2)
        assert await wsbroker("pub", f"{topic}.x", "--key", "k", "--url", broker.url, stdin=lines) == Result(0, "", "")
        for process in (one, all_):
            assert await lines_of(process) == [
                {"op": "event", "topic": f"{topic}.x", "key": "k", "data": 1},
                {"op": "event", "topic": f"{topic}.x", "key": "k", "data": {"a": "b"}},
            ]


async def test_pub_and_sub_work_over_a_unix_socket(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/ws.sock"
    async with start("serve", "--listen", url) as serving:
        assert serving.stderr is not None
        while b"ready" not in await serving.stderr.readline():
            pass
        async with start("sub", "t", "--url", url) as process:
            await until_subscribed(url, "t")
            assert await wsbroker("pub", "t", "--url", url, stdin=b'"hello"\n"end"\n') == Result(0, "", "")
            assert [event["data"] for event in await lines_of(process)] == ["hello"]
            serving.terminate()
            ended = await finish(process)
            assert ended.status == 75
            assert "1001 going_away" in ended.err
        assert (await finish(serving)).status == 0


async def test_sub_prints_every_event_or_a_gap_at_its_place(broker: RunningBroker, topic: str) -> None:
    """20,000 lines as fast as they go: what `sub` does not print, gaps count."""
    count = 20_000
    async with start("sub", topic, "--url", broker.url) as process:
        await until_subscribed(broker.url, topic)
        reading = asyncio.create_task(lines_of(process))
        numbers = b"".join(b"%d\n" % number for number in range(count))
        assert await wsbroker("pub", topic, "--url", broker.url, stdin=numbers) == Result(0, "", "")
        # Published by itself: in a flood it might be the one that is dropped.
        assert await wsbroker("pub", topic, '"end"', "--url", broker.url) == Result(0, "", "")
        expected = 0
        for line in await reading:
            if line["op"] == "gap":
                expected += line["missed"]
            else:
                assert line["data"] == expected
                expected += 1
        assert expected == count


def test_memory_of_pub_does_not_grow_with_the_input(broker: RunningBroker, topic: str) -> None:
    def peak(lines: int) -> int:
        """The most memory that `pub` had for so many lines of 500 bytes, in bytes."""
        line = b'"' + b"x" * 497 + b'"\n'
        arguments = [sys.executable, "-m", "broker", "pub", topic, "--url", broker.url]
        process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE)
        assert process.stdin is not None
        for _ in range(lines // 100):
            process.stdin.write(line * 100)
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss * 1024

    # 15 MB of lines. What is held at once is a chunk of 64 kB and a window.
    assert peak(30_000) - peak(100) < 3_000_000


async def feed(process: Process) -> None:
    """Write numbers, one a line, for as long as they are read."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        for number in itertools.count():
            process.stdin.write(b"%d\n" % number)
            await process.stdin.drain()


async def test_events_reported_by_pub_are_delivered_during_a_shutdown() -> None:
    # Queues that nothing overflows, and the time to empty them: whatever is missing then was lost.
    environ = {
        "WSBROKER_LIMITS__MAX_QUEUE": str(2**24),
        "WSBROKER_LIMITS__MAX_QUEUE_LIMIT": str(2**24),
        "WSBROKER_LIMITS__MAX_OUTBOX": str(2**30),
        "WSBROKER_LIMITS__DRAIN_TIMEOUT": "60",
    }
    with start_broker(environ=environ) as broker:
        async with (
            start("sub", "t", "--url", broker.url) as subscriber,
            start("pub", "t", "--url", broker.url) as publisher,
        ):
            assert publisher.stdin is not None
            assert subscriber.stdout is not None
            await until_subscribed(broker.url, "t")
            feeding = asyncio.create_task(feed(publisher))
            lines = [await subscriber.stdout.readline() for _ in range(5000)]
            broker.program.terminate()
            lines += (await subscriber.stdout.read()).splitlines()
            assert await subscriber.wait() == await publisher.wait() == 75
            feeding.cancel()
            assert publisher.stderr is not None
            said = re.search(r"([\d,]+) lines were published", (await publisher.stderr.read()).decode())
            assert said
            messages = [json.loads(line) for line in lines]
            assert {message["op"] for message in messages} == {"event"}
            numbers = [message["data"] for message in messages if message["data"] != "are you there?"]
            assert numbers == list(range(len(numbers)))
            assert len(numbers) >= int(said[1].replace(",", "")) > 0
        assert await asyncio.to_thread(broker.program.wait) == 0
