"""The client: what it sends, how answers find who waits for them, and how events are given out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection

from broker.config import Server
from tests.client.fake import WELCOME, Behaviour, FakeBroker, closing, running, saying
from wsbroker_client import DEFAULT_URL, ClientError, Closed, CommandRefused, NotABroker, Receipt, Unreachable
from wsbroker_client.connection import MAX_BATCH, Connection, connect


def event(topic: str, data: bytes) -> bytes:
    return b'{"op":"event","topic":"%b","data":%b}' % (topic.encode(), data)


def sending(*messages: bytes) -> Behaviour:
    """Make a behaviour: send welcome, then send these, then answer commands with `ok`."""

    async def send(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.send(WELCOME, text=True)
        for message in messages:
            await connection.send(message, text=True)
        async for command in connection:
            fields = msgspec.json.decode(command)
            fake.received.append(fields)
            await connection.send(msgspec.json.encode({"op": "ok", "id": fields["id"]}), text=True)

    return send


def refusing(*errors: dict[str, Any]) -> Behaviour:
    """Make a behaviour: send welcome, and answer each command with the next of these errors."""

    async def refuse(fake: FakeBroker, connection: ServerConnection) -> None:
        rest = iter(errors)
        async for command in fake.commands(connection):
            answer = {"op": "error", "id": command["id"], "message": "no", "retry": False} | next(rest)
            await connection.send(msgspec.json.encode(answer), text=True)

    return refuse


async def take(client: Connection, count: int) -> list[Any]:
    """Read so many events and gaps."""
    messages: list[Any] = []
    async for message in client:
        messages.append(message)
        if len(messages) == count:
            break
    return messages


async def take_all(client: Connection) -> tuple[list[Any], ClientError]:
    """Read until the connection ends."""
    messages: list[Any] = []
    try:
        async for message in client:
            messages.append(message)  # noqa: PERF401 -- what came before the exception is wanted
    except ClientError as failure:
        return messages, failure
    raise AssertionError("the iteration ended without an exception")


# The welcome


def test_default_url_is_the_default_listen_address() -> None:
    assert [f"ws://{address}" for address in Server().listen] == [DEFAULT_URL]


async def test_connect_reads_welcome_and_closes_with_1000() -> None:
    async with running() as fake:
        async with connect(fake.url, token="t") as client:
            assert (client.welcome["session"], client.welcome["max_size"]) == ("s1", 4096)
        assert await fake.closed.get() == (1000, "")
        assert fake.requests[0].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([b"hello"], "not a message of the protocol"),
        ([b'{"op":"welcome","version":1}'], "not a message of the protocol"),
        ([WELCOME.replace(b'"version":1', b'"version":2')], "speaks version 2 of the protocol, this client version 1"),
        ([], "sent no `welcome` within"),
    ],
)
async def test_connect_fails_when_the_first_message_is_no_welcome(messages: list[bytes], found: str) -> None:
    async with running(saying(*messages)) as fake:
        with pytest.raises(NotABroker, match=found):
            async with connect(fake.url, timeout=5 if messages else 0.05):
                pass


async def test_connect_fails_when_the_broker_closes_before_welcome() -> None:
    async def close(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.close(1013, "try_again")

    async with running(close) as fake:
        with pytest.raises(Closed) as caught:
            async with connect(fake.url):
                pass
        assert caught.value.close_code == 1013


async def test_connect_fails_when_the_server_disconnects_before_welcome() -> None:
    async def hang_up(fake: FakeBroker, connection: ServerConnection) -> None:
        connection.transport.abort()

    async with running(hang_up) as fake:
        with pytest.raises(Unreachable, match="before it said `welcome`"):
            async with connect(fake.url):
                pass


# Commands


async def test_a_publish_is_answered() -> None:
    async with running() as fake, connect(fake.url) as client:
        answer = await client.publish("prices.eurusd", {"bid": 1.0843}, key="eurusd")
        assert (answer.receivers, answer.queued, answer.dropped) == (0, 0, 0)
        data = {"bid": 1.0843}
        assert fake.received == [{"op": "publish", "id": 1, "topic": "prices.eurusd", "key": "eurusd", "data": data}]


async def test_raw_json_data_is_sent_unchanged() -> None:
    async with running() as fake, connect(fake.url) as client:
        await client.publish_raw("t", b' {"a" : 1}\n')
        assert fake.received[0]["data"] == {"a": 1}


async def test_command_over_max_size_is_not_sent() -> None:
    async with running() as fake, connect(fake.url) as client:
        assert client.welcome["max_size"] == 4096
        limit = 4096 - len('{"op":"publish","id":1,"topic":"t","data":""}')
        await client.publish("t", "x" * limit)
        with pytest.raises(CommandRefused, match=r"limit: the command has 4,097 bytes, the broker takes at most 4,096"):
            await client.publish("t", "x" * (limit + 1))
        assert len(fake.received) == 1


async def test_subscribe_sends_only_the_given_options() -> None:
    async with running() as fake, connect(fake.url) as client:
        answer = await client.subscribe("prices.*", max_queue=64, overflow="latest", echo=False)
        await client.subscribe("t")
        await client.unsubscribe("t")
        assert answer["topic"] == "prices.*"
        assert fake.received == [
            {"op": "subscribe", "id": 1, "topic": "prices.*", "max_queue": 64, "overflow": "latest", "echo": False},
            {"op": "subscribe", "id": 2, "topic": "t"},
            {"op": "unsubscribe", "id": 3, "topic": "t"},
        ]


async def test_a_ping_is_answered() -> None:
    async with running() as fake, connect(fake.url) as client:
        await client.ping()
        assert fake.received == [{"op": "ping", "id": 1}]


async def test_error_is_raised_by_its_command() -> None:
    errors = {"code": "forbidden"}, {"code": "rate_limited", "retry": True, "retry_after_ms": 20}
    async with running(refusing(*errors)) as fake, connect(fake.url) as client:
        with pytest.raises(CommandRefused, match="forbidden: no"):
            await client.subscribe("t")
        with pytest.raises(CommandRefused) as caught:
            await client.publish("t", 1)
        assert (caught.value.retry, caught.value.retry_after_ms) == (True, 20)


async def test_answers_are_matched_by_id_in_any_order() -> None:
    async def backwards(fake: FakeBroker, connection: ServerConnection) -> None:
        waiting: list[dict[str, Any]] = []
        async for command in fake.commands(connection):
            waiting.append(command)
            if len(waiting) == 3:
                for one in reversed(waiting):
                    answer = {"op": "ok", "id": one["id"], "receivers": one["data"]}
                    await connection.send(msgspec.json.encode(answer), text=True)

    async with running(backwards) as fake, connect(fake.url) as client:
        answers: list[Receipt] = await asyncio.gather(*(client.publish("t", number) for number in range(3)))
        assert [answer.receivers for answer in answers] == [0, 1, 2]


async def test_answer_to_a_cancelled_command_is_ignored() -> None:
    asked = asyncio.Event()
    go_on = asyncio.Event()

    async def late(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            asked.set()
            await go_on.wait()
            op = "pong" if command["op"] == "ping" else "ok"
            await connection.send(msgspec.json.encode({"op": op, "id": command["id"]}), text=True)

    async with running(late) as fake, connect(fake.url) as client:
        publishing = asyncio.create_task(client.publish("t", 1))
        await asked.wait()
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        go_on.set()
        await client.ping()


async def test_answer_of_the_wrong_op_ends_the_connection() -> None:
    async with running(sending()) as fake, connect(fake.url) as client:
        with pytest.raises(NotABroker, match="answered something else"):
            await client.ping()


async def test_error_without_an_id_ends_the_connection() -> None:
    error = b'{"op":"error","code":"bad_json","message":"what?","retry":false}'
    async with running(sending(error)) as fake, connect(fake.url) as client:
        with pytest.raises(NotABroker, match=r"cannot read a command of this client: bad_json: what\?"):
            await client.raise_when_closed()


# Events


async def test_events_and_gaps_keep_their_order() -> None:
    gap = b'{"op":"gap","topic":"a.*","missed":3,"reason":"overflow"}'
    join = b'{"op":"join","topic":"a.*","session":"s2"}'
    messages = event("a.b", b"1"), gap, event("a.c", b'{"x" :2}'), join
    async with running(sending(*messages)) as fake, connect(fake.url) as client:
        first, lost, second, joined = await take(client, 4)
        assert first == {"op": "event", "topic": "a.b", "data": 1}
        assert lost == {"op": "gap", "topic": "a.*", "missed": 3, "reason": "overflow"}
        assert second["data"] == {"x": 2}
        assert joined["op"] == "join"


async def test_event_with_other_json_formatting_is_decoded() -> None:
    message = b'{ "topic":"t", "data":[1], "op":"event" }'
    async with running(sending(message)) as fake, connect(fake.url) as client:
        (only,) = await take(client, 1)
        assert only == {"op": "event", "topic": "t", "data": [1]}


async def test_credit_is_requested_and_added() -> None:
    async with running() as fake, connect(fake.url) as client:
        await client.subscribe("a", credit=5)
        assert await client.credit("a", 3) == {"op": "ok", "id": 2, "topic": "a"}
        assert fake.received == [
            {"op": "subscribe", "id": 1, "topic": "a", "credit": 5},
            {"op": "credit", "id": 2, "topic": "a", "add": 3},
        ]


async def test_unknown_ops_and_fields_are_ignored() -> None:
    news = b'{"op":"weather","sun":true}'
    later = b'{"op":"event","topic":"t","data":1,"colour":"red"}'
    async with running(sending(news, later)) as fake, connect(fake.url) as client:
        (only,) = await take(client, 1)
        assert only["data"] == 1


async def test_invalid_message_ends_the_connection() -> None:
    messages = event("t", b"1"), b'{"op":5}', event("t", b"2")
    async with running(sending(*messages)) as fake, connect(fake.url) as client:
        taken, failure = await take_all(client)
        assert [message["data"] for message in taken] == [1]
        assert isinstance(failure, NotABroker)
        assert "not a message of the protocol" in str(failure)


async def test_subscribed_publisher_gets_its_own_events() -> None:
    async with running() as fake, connect(fake.url) as client:
        await client.subscribe("t")
        answer = await client.publish("t", "hello", key="k")
        assert answer.receivers == 1
        assert await take(client, 1) == [{"op": "event", "topic": "t", "key": "k", "data": "hello"}]


async def test_events_received_before_a_close_are_yielded_before_the_error() -> None:
    async def send_and_close(fake: FakeBroker, connection: ServerConnection) -> None:
        async for _ in fake.commands(connection):
            await connection.send(event("t", b"1"), text=True)
            await connection.send(b'{"op":"bye","reason":"shutdown","retry_after_ms":1200}', text=True)
            await connection.close(1001, "going_away")

    async with running(send_and_close) as fake, connect(fake.url) as client:
        with pytest.raises(Closed):
            await client.ping()
        taken, failure = await take_all(client)
        assert len(taken) == 1
        assert isinstance(failure, Closed)
        assert str(failure).endswith("; it may be tried again after 1.2 seconds")
        assert (failure.close_code, failure.retry, failure.retry_after_ms) == (1001, True, 1200)
        assert client.failure is failure


async def test_all_waiters_get_the_close() -> None:
    async with running(closing(4503, "disconnected")) as fake, connect(fake.url) as client:
        waiting = [client.ping(), client.publish("t", 1), take(client, 1), client.raise_when_closed()]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Closed] * 4
        with pytest.raises(Closed):
            await client.publish("t", 2)


async def test_waiters_are_woken_when_the_client_closes() -> None:
    async with running(saying(WELCOME)) as fake:
        async with connect(fake.url) as client:
            waiting = asyncio.create_task(client.ping())
            await asyncio.sleep(0)
        with pytest.raises(Closed, match="this client has closed the connection"):
            await waiting
        with pytest.raises(Closed):
            await client.ping()


async def test_reading_stops_while_events_are_not_consumed() -> None:
    sent = 0
    stopped = asyncio.Event()
    payload = event("t", b'"' + b"x" * 16_000 + b'"')

    async def flood(fake: FakeBroker, connection: ServerConnection) -> None:
        nonlocal sent
        await connection.send(WELCOME, text=True)
        await connection.recv()
        while True:
            try:
                # TCP takes some more when the client reads no more; then this waits.
                async with asyncio.timeout(0.2):
                    await connection.send(payload, text=True)
            except TimeoutError:
                stopped.set()
                await connection.wait_closed()
                return
            sent += 1

    async with running(flood) as fake, connect(fake.url) as client:
        await client.send([b"{}"])
        await stopped.wait()
        held = sum(map(len, await anext(client.batches())))
        assert MAX_BATCH <= held < 2 * MAX_BATCH + len(payload)
