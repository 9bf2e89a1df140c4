"""What one client asks for and is answered, on real sockets: every command, every error, every limit of a session."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import unix_connect
from websockets.frames import Close

from broker.config import Config, Limits, Server, TopicRule
from broker.engines.base import Event, PublishDone, Unavailable
from broker.engines.memory import MemoryEngine
from broker.errors import ERRORS, CloseCode
from broker.rules import Retention
from tests.engines.late import LateServer
from tests.fixtures_node import Client, Harness, serving
from tests.net.harness import until


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with serving() as harness:
        yield harness


@pytest.fixture
async def client(harness: Harness) -> Client:
    return await harness.connect()


# The commands


async def test_the_first_message_is_welcome(harness: Harness) -> None:
    client = await harness.connect()
    limits = harness.node.limits
    assert list(client.welcome) == ["op", "version", "session", "server", "ping", "max_size", "max_queue"]
    assert client.welcome["version"] == 1
    assert client.welcome["server"].startswith("wsbroker/")
    assert client.welcome["ping"] == limits.ping_interval
    assert client.welcome["max_size"] == limits.max_size
    assert client.welcome["max_queue"] == limits.max_queue
    assert client.session in harness.node.sessions
    assert (await harness.connect()).session != client.session


@pytest.mark.parametrize("topic", ["a", "a.b", "a.*", ">", "*.b.>", "$sys.x", "$sys.>", "größe.日本", "x" * 255])
async def test_subscribe_and_unsubscribe_are_answered_with_the_topic(client: Client, topic: str) -> None:
    assert await client.ask("subscribe", topic=topic) == {"op": "ok", "topic": topic}
    assert await client.ask("unsubscribe", topic=topic) == {"op": "ok", "topic": topic}
    assert (await client.ask("unsubscribe", topic=topic))["code"] == "not_subscribed"


async def test_publish_is_answered_with_the_number_of_receivers(harness: Harness) -> None:
    one, other = await harness.subscriber("a.*"), await harness.subscriber("a.b")
    publisher = await harness.connect()
    assert await publisher.ask("publish", topic="a.b", data=1) == ok(2)
    assert await publisher.ask("publish", topic="a.c", data=2) == ok(1)
    assert await publisher.ask("publish", topic="b", data=3) == ok(0)
    assert await one.data(2) == [1, 2]
    assert await other.data(1) == [1]
    for client in (one, other, publisher):
        await client.nothing()


async def test_success_without_an_id_has_no_answer(harness: Harness, client: Client) -> None:
    await client.tell("subscribe", topic="a")
    for n in range(3):  # the slow path, and the fast one
        await client.tell("publish", topic="a", data=n)
    assert await client.data(3) == [0, 1, 2]
    await client.tell("unsubscribe", topic="a")
    await client.nothing()
    assert harness.node.context.fast_publishes == 2


async def test_ping_is_answered_with_or_without_an_id(client: Client) -> None:
    await client.send('{"op":"ping","id":5}')
    await client.send('{"op":"ping"}')
    assert await client.text() == '{"op":"pong","id":5}'
    assert await client.text() == '{"op":"pong"}'


@pytest.mark.parametrize("id", [0, 7, 2**53 - 1, "", "x", 'ü\n"', "x" * 64], ids=repr)
async def test_id_is_returned_unchanged(client: Client, id: int | str) -> None:
    for _ in range(2):  # the slow path, and the fast one; and an id may come twice
        await client.tell("publish", topic="a", data=1, id=id)
        assert await client.next() == {"op": "ok", "id": id, "receivers": 0, "queued": 0, "dropped": 0}
    await client.tell("subscribe", topic="a", id=id)
    assert await client.next() == {"op": "ok", "id": id, "topic": "a"}
    await client.tell("unsubscribe", topic="b", id=id)
    assert (await client.next())["id"] == id
    await client.tell("ping", id=id)
    assert await client.next() == {"op": "pong", "id": id}


@pytest.mark.parametrize("id", ["-1", "9007199254740992", "1.0", "true", "null", "[1]", f'"{"x" * 65}"'])
async def test_invalid_id_is_a_bad_command_without_an_id(client: Client, id: str) -> None:
    for command in ('"ping"', '"publish","topic":"a","data":1', '"subscribe","topic":"a"'):
        await client.send(f'{{"op":{command},"id":{id}}}')
        error = await client.next()
        assert error["code"] == "bad_command"
        assert "id" not in error
        assert error["message"].startswith("`id` must be an integer from 0 to 2^53-1 or a string")


async def test_commands_in_binary_messages_are_answered_in_text(harness: Harness, client: Client) -> None:
    await client.send(b'{"op":"subscribe","id":1,"topic":"a"}')
    assert await client.text() == '{"op":"ok","id":1,"topic":"a"}'
    for n in range(3):
        await client.send(f'{{"op":"publish","topic":"a","data":"ü{n}"}}'.encode())
        assert await client.text() == f'{{"op":"event","topic":"a","data":"ü{n}"}}'
    await client.send(b'{"op":"ping"}')
    assert await client.text() == '{"op":"pong"}'
    assert harness.node.context.fast_publishes == 2


async def test_commands_are_executed_in_order(client: Client) -> None:
    commands = [
        '{"op":"publish","id":1,"topic":"a","data":1}',
        '{"op":"subscribe","id":2,"topic":"a"}',
        '{"op":"publish","id":3,"topic":"a","data":3}',
        '{"op":"unsubscribe","id":4,"topic":"a"}',
        '{"op":"publish","id":5,"topic":"a","data":5}',
    ]
    for command in commands:
        await client.send(command)
    answers = [await client.next() for _ in range(6)]
    [event] = [answer for answer in answers if answer["op"] == "event"]
    answers.remove(event)  # no order is promised between answers and events
    assert event["data"] == 3
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4, 5]
    assert [answer.get("receivers") for answer in answers] == [0, None, 1, None, 0]


async def test_unknown_fields_are_ignored(client: Client) -> None:
    await client.ask("subscribe", topic="a", colour="red")
    for _ in range(2):
        assert await client.ask("publish", topic="a", data=1, colour={"r": 1}) == ok(1)
        assert await client.text() == '{"op":"event","topic":"a","data":1}'


# Events


DATA = [
    "null",
    "false",
    "0",
    "-1.50e+3",
    "12345678901234567890123",
    '""',
    '"ü\\u00fc\\/ "',
    '{ "b" : 1,\n\t"a":[ 1 ,2 ] , "b2":{} }',
    "[ ]",
    '"<&>\U0001f600"',
]


KEY_WITH_ESCAPES = '"\\u0041\\n"'


@pytest.mark.parametrize("key", [None, '"k"', '""', '"größe"', KEY_WITH_ESCAPES])
async def test_data_is_delivered_byte_for_byte_by_fast_path_and_slow_path(
    harness: Harness, client: Client, key: str | None
) -> None:
    await client.ask("subscribe", topic="t.>")
    for place, data in enumerate(DATA):
        given = "" if key is None else f'"key": {key} , '
        command = f' {{ "op" : "publish" , {given}"data" :  {data} ,"topic":"t.{place}"}} '
        events = []
        for _ in range(2):
            await client.send(command)
            events.append(await client.text())
        assert events[0] == events[1]
        assert events[0].startswith(f'{{"op":"event","topic":"t.{place}",')
        assert events[0].endswith(f'"data":{data}}}')
        message = json.loads(events[0])
        assert list(message) == ["op", "topic", *([] if key is None else ["key"]), "data"]
        assert message.get("key") == (None if key is None else json.loads(key))
    if key != KEY_WITH_ESCAPES:  # which the fast path leaves to the other
        assert harness.node.context.fast_publishes == len(DATA)


async def test_events_keep_the_order_of_publishing_during_subscription_changes(harness: Harness) -> None:
    subscriber = await harness.subscriber("a.*", "a.b", "x")
    publishers = [await harness.connect() for _ in range(3)]
    busybody = await harness.connect()
    for n in range(600):
        for place, publisher in enumerate(publishers):
            await publisher.tell("publish", topic="a.b", data=[place, n])
        if n % 7 == 0:
            # Each of these sends the next publish through the slow path.
            await busybody.tell("subscribe" if n % 2 else "unsubscribe", topic=f"a.{'>' if n % 3 else 'b'}")
    data = await subscriber.data(1800)
    for place in range(3):
        assert [n for by, n in data if by == place] == list(range(600))
    await subscriber.nothing()
    assert 0 < harness.node.context.fast_publishes < 1800


async def test_no_event_is_delivered_after_unsubscribe(harness: Harness) -> None:
    subscriber, publisher = await harness.subscriber("a", "b"), await harness.connect()
    await publisher.ask("publish", topic="a", data=1)
    await subscriber.ask("unsubscribe", topic="a")
    assert await publisher.ask("publish", topic="a", data=2) == ok(0)
    assert await publisher.ask("publish", topic="b", data=3) == ok(1)
    assert await subscriber.data(2) == [1, 3]
    await subscriber.nothing()


async def test_overlapping_subscriptions_deliver_once(harness: Harness) -> None:
    subscriber = await harness.subscriber("a.b", "a.*", "a.>", "*.b", ">")
    publisher = await harness.connect()
    for n in range(4):
        assert await publisher.ask("publish", topic="a.b", data=n) == ok(1)
    assert await subscriber.data(4) == [0, 1, 2, 3]
    # One after the other goes, and as long as there is one it is enough.
    for n, topic in enumerate(("a.b", "*.b", "a.>", ">", "a.*")):
        assert await publisher.ask("publish", topic="a.b", data=n) == ok(1)
        await subscriber.ask("unsubscribe", topic=topic)
    assert await publisher.ask("publish", topic="a.b", data="x") == ok(0)
    assert await subscriber.data(5) == [0, 1, 2, 3, 4]
    await subscriber.nothing()


async def test_the_most_specific_subscription_decides(client: Client) -> None:
    await client.ask("subscribe", topic="a.>", echo=True)
    await client.ask("subscribe", topic="a.*", echo=False)
    assert await client.ask("publish", topic="a.b", data=1) == ok(0)
    await client.ask("subscribe", topic="a.b", echo=True)
    assert await client.ask("publish", topic="a.b", data=2) == ok(1)
    assert await client.ask("publish", topic="a.c", data=3) == ok(0)
    assert await client.ask("publish", topic="a.c.d", data=4) == ok(1)
    assert await client.data(2) == [2, 4]
    await client.nothing()


@pytest.mark.parametrize("echo", [True, False, None])
async def test_publisher_gets_its_own_events_unless_echo_is_false(harness: Harness, echo: bool | None) -> None:
    asked = {} if echo is None else {"echo": echo}
    client, other = await harness.subscriber("a", **asked), await harness.subscriber("a")
    for n in range(3):
        assert await client.ask("publish", topic="a", data=n) == ok(1 if echo is False else 2)
    assert await other.ask("publish", topic="a", data=3) == ok(2)
    assert await other.data(4) == [0, 1, 2, 3]
    assert await client.data(1 if echo is False else 4) == ([3] if echo is False else [0, 1, 2, 3])
    await client.nothing()


async def test_events_skipped_by_echo_do_not_change_the_order_of_others(harness: Harness) -> None:
    client, other = await harness.subscriber("a", echo=False), await harness.subscriber("a")
    for n in range(300):
        await client.tell("publish", topic="a", data=["own", n])
        await other.tell("publish", topic="a", data=["other", n])
    assert await client.data(300) == [["other", n] for n in range(300)]
    both = await other.data(600)
    for who in ("own", "other"):
        assert [n for by, n in both if by == who] == list(range(300))


async def test_publisher_of_invalid_text_is_closed_without_effect_on_subscribers(harness: Harness) -> None:
    subscriber = await harness.subscriber("a")
    for _ in range(2):
        publisher = await harness.connect()
        assert await publisher.ask("publish", topic="a", data="fine") == ok(1)  # from here on there is a route
        await publisher.socket.send(b'{"op":"publish","topic":"a","data":"\xff"}', text=True)
        assert await publisher.closed() == Close(CloseCode.INVALID_DATA, "a text message is not UTF-8")
    # In a binary message it is just no JSON.
    publisher = await harness.connect()
    await publisher.send(b'{"op":"publish","id":1,"topic":"a","data":"\xff"}')
    assert (await publisher.next())["code"] == "bad_json"
    assert await subscriber.data(2) == ["fine", "fine"]
    await subscriber.nothing()


# Changing a subscription


async def test_second_subscribe_changes_only_the_given_options(harness: Harness, client: Client) -> None:
    def now() -> tuple[int, str, bool]:
        subscriptions = harness.session(client).subscriptions
        assert subscriptions is not None
        assert list(subscriptions) == ["a"]
        subscription = subscriptions["a"]
        return subscription.max_queue, subscription.overflow, subscription.echo

    await client.ask("subscribe", topic="a")
    assert now() == (harness.node.limits.max_queue, "drop_oldest", True)
    for change, result in (
        ({"max_queue": 7}, (7, "drop_oldest", True)),
        ({"overflow": "drop_newest"}, (7, "drop_newest", True)),
        ({"echo": False}, (7, "drop_newest", False)),
        ({}, (7, "drop_newest", False)),
        ({"overflow": "close", "max_queue": 65536}, (65536, "close", False)),
        ({"echo": True}, (65536, "close", True)),
    ):
        assert await client.ask("subscribe", topic="a", **change) == {"op": "ok", "topic": "a"}
        assert now() == result
    # What is refused changes nothing.
    for change in ({"max_queue": 65537, "echo": False}, {"max_queue": 0}, {"overflow": "replay", "max_queue": 1}):
        assert (await client.ask("subscribe", topic="a", **change))["op"] == "error"
        assert now() == (65536, "close", True)
    assert await client.ask("publish", topic="a", data=1) == ok(1)
    assert await client.data(1) == [1]
    assert (await client.ask("unsubscribe", topic="a"))["op"] == "ok"
    assert await client.ask("publish", topic="a", data=2) == ok(0)


async def test_echo_can_be_changed(client: Client) -> None:
    for n, echo in enumerate((True, False, False, True)):
        await client.ask("subscribe", topic="a", echo=echo)
        assert await client.ask("publish", topic="a", data=n) == ok(int(echo))
    assert await client.data(2) == [0, 3]


async def test_smaller_max_queue_drops_queued_events_with_a_gap(harness: Harness) -> None:
    subscriber, publisher = await harness.deaf(), await harness.connect()
    await subscriber.tell("subscribe", topic="a", id=1, max_queue=50)
    await subscriber.until(b'"op":"ok"')
    sent = await fill(publisher, "a")
    for n in range(9):
        assert await publisher.ask("publish", topic="a", data=[n]) == ok(1, queued=1)
    await subscriber.tell("subscribe", topic="a", id=2, max_queue=4)
    subscriptions = harness.session(subscriber).subscriptions
    assert subscriptions is not None
    await until(lambda: subscriptions["a"].queued == 4)
    received = await subscriber.until(b'"id":2', b'"data":[8]')
    # The first of those that wait were some of the filling.
    missed = int(received.partition(b'"missed":')[2].partition(b",")[0])
    assert received.count(b'"op":"event"') + missed == sent + 9
    assert received.count(b'"op":"gap"') == 1
    last = [b'{"op":"event","topic":"a","data":[%d]}' % n for n in range(5, 9)]
    assert received.endswith(b'"reason":"overflow"}' + b"".join(bytes((0x81, len(event))) + event for event in last))


# Errors


ERROR_CASES: list[tuple[str, str, str]] = [
    # what is sent, with ID for the id; code; part of the message
    ("{ID", "bad_json", ""),
    ("", "bad_json", ""),
    ("[1]", "bad_json", "a command is a JSON object"),
    ('"ping"', "bad_json", "a command is a JSON object"),
    ('{ID"op":"ping"}}', "bad_json", ""),
    ('{ID"op":"publish","topic":"a","data":NaN}', "bad_json", ""),
    ('{ID"op":"publish","topic":"a","data":' + "[" * 64 + "]" * 64 + "}", "bad_json", "nested"),
    ("{ID}", "bad_command", "`op` is missing"),
    ('{ID"op":"stop"}', "bad_command", "`op` must be one of"),
    ('{ID"op":7}', "bad_command", "`op` must be one of"),
    ('{ID"op":"subscribe"}', "bad_command", "`topic` is missing"),
    ('{ID"op":"subscribe","topic":7}', "bad_command", "`topic` must be a string"),
    ('{ID"op":"subscribe","topic":null}', "bad_command", "`topic` must be a string"),
    ('{ID"op":"subscribe","topic":"a","max_queue":0}', "bad_command", "`max_queue` must be an integer from 1"),
    ('{ID"op":"subscribe","topic":"a","overflow":"drop"}', "bad_command", "`overflow` must be one of"),
    ('{ID"op":"subscribe","topic":"a","echo":1}', "bad_command", "`echo` must be true or false"),
    ('{ID"op":"unsubscribe"}', "bad_command", "`topic` is missing"),
    ('{ID"op":"publish","topic":"a"}', "bad_command", "`data` is missing"),
    ('{ID"op":"publish","data":1}', "bad_command", "`topic` is missing"),
    ('{ID"op":"publish","topic":"a","data":1,"key":7}', "bad_command", "`key` must be a string"),
    ('{ID"op":"publish","topic":"a","data":1,"key":null}', "bad_command", "`key` must be a string"),
    ('{ID"op":"subscribe","topic":""}', "bad_topic", "empty"),
    ('{ID"op":"subscribe","topic":"a..b"}', "bad_topic", "empty"),
    ('{ID"op":"subscribe","topic":">.a"}', "bad_topic", "`>` must be the last token"),
    ('{ID"op":"subscribe","topic":"a*"}', "bad_topic", "tokens of their own"),
    ('{ID"op":"unsubscribe","topic":"a b"}', "bad_topic", "white space"),
    ('{ID"op":"publish","topic":"a.*","data":1}', "bad_topic", "for subscriptions"),
    ('{ID"op":"publish","topic":"$a","data":1}', "bad_topic", "belong to the broker"),
    ('{ID"op":"publish","topic":"' + "x" * 256 + '","data":1}', "bad_topic", "255"),
    ('{ID"op":"unsubscribe","topic":"a"}', "not_subscribed", "`a`"),
    ('{ID"op":"subscribe","topic":"a","max_queue":65537}', "limit", "at most 65536"),
    ('{ID"op":"subscribe","topic":"a","overflow":"replay"}', "no_history", "`a` keeps no history"),
    ('{ID"op":"credit","topic":"a","add":1}', "not_subscribed", "`a`"),
    ('{ID"op":"credit","topic":"a..b","add":1}', "bad_topic", "a token is empty"),
    ('{ID"op":"credit","topic":"a","add":0}', "bad_command", "`add` must be an integer from 1"),
    ('{ID"op":"history","topic":"a","last":1}', "no_history", "`a` keeps no history"),
    ('{ID"op":"history","topic":"a","limit":1001}', "limit", "`limit` may be at most 1000"),
    ('{ID"op":"history","topic":"a","last":1,"since":{"epoch":"e","offset":0}}', "bad_command", "exclude each other"),
    ('{ID"op":"subscribe","topic":"a","last":1,"since":{"epoch":"e","offset":0}}', "bad_command", "exclude each other"),
    ('{ID"op":"subscribe","topic":"a","since":{"epoch":"e","offset":0}}', "no_history", "`a` keeps no history"),
    ('{ID"op":"subscribe","topic":"a","last":1}', "no_history", "`a` keeps no history"),
    ('{ID"op":"subscribe","topic":"a.*","last":"all"}', "bad_command", "`last` needs a topic"),
    ('{ID"op":"presence","topic":"a"}', "no_presence", "`a` has no presence"),
    ('{ID"op":"subscribe","topic":"a","presence":true}', "no_presence", "`a` has no presence"),
    ('{ID"op":"subscribe","topic":"a","info":{}}', "no_presence", "`a` has no presence"),
    ('{ID"op":"subscribe","topic":"a.*","presence":true}', "bad_command", "`presence` needs a topic"),
]
LATER: list[tuple[str, str, str]] = [
    ('{ID"op":"auth","token":"t"}', "unauthorized", "this broker accepts no tokens"),
]


@pytest.mark.parametrize(("command", "code", "message"), [*ERROR_CASES, *LATER])
async def test_failed_command_is_answered_with_an_error(
    harness: Harness, client: Client, command: str, code: str, message: str
) -> None:
    for own in (None, 7, "x"):
        given = "" if own is None else f'"id":{json.dumps(own)}' + ("" if command == "{ID}" else ",")
        await client.send(command.replace("ID", given))
        error = await client.next()
        # Where there is no JSON there is no id.
        wanted = {} if own is None or code == "bad_json" else {"id": own}
        assert error == {
            "op": "error",
            **wanted,
            "code": code,
            "message": error["message"],
            "retry": ERRORS[code].retry,
        }
        assert message in error["message"]
        assert "$." not in error["message"]
    await client.nothing()
    assert not harness.session(client).subscriptions


class Faulty(MemoryEngine):
    """Has a fault where a topic begins with `fault`, and cannot do it where it begins with `busy`."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if event.topic.startswith("fault"):
            raise RuntimeError("a fault of the engine")
        if event.topic.startswith("busy"):
            done(Unavailable("the engine is busy"))
        else:
            super().publish(event, retention, done)


async def test_unavailable_has_the_message_of_the_engine() -> None:
    async with serving(Faulty()) as harness:
        client = await harness.connect()
        error = {"op": "error", "code": "unavailable", "message": "the engine is busy", "retry": True}
        assert await client.ask("publish", topic="busy", data=1) == error
        await client.tell("publish", topic="busy", data=1)
        assert await client.next() == error
        assert await client.ask("publish", topic="a", data=1) == ok(0)


async def test_internal_error_is_answered_and_logged_and_the_connection_survives() -> None:
    async with serving(Faulty(), max_inflight=2) as harness:
        client = await harness.connect()
        with capture_logs() as logs:
            # More than may be under way: those that failed are not.
            for n in range(5):
                await client.tell("publish", topic="fault", data="secret", id=n)
                error = await client.next()
                assert error["id"] == n
                assert (error["code"], error["retry"]) == ("internal", True)
                assert client.session in error["message"]
                assert "secret" not in error["message"]
            await client.tell("publish", topic="fault", data="secret")
            assert "id" not in await client.next()
        assert [entry["session"] for entry in logs if entry["log_level"] == "error"] == [client.session] * 6
        assert "secret" not in str([entry for entry in logs if entry["log_level"] == "error"])
        assert await client.ask("publish", topic="a", data=1) == ok(0)
        assert harness.session(client).inflight == 0


def test_every_error_code_is_tested() -> None:
    later = {"unauthorized"}
    elsewhere = {"unavailable", "internal", "draining", "forbidden", "rate_limited"}  # above, below, in test_drain.py
    assert {code for _, code, _ in ERROR_CASES} | later | elsewhere == set(ERRORS)


# Ten in a row


BAD = ("{", '{"op":"stop"}', '{"op":"auth","token":"t"}', '{"op":"subscribe","topic":"*","last":1}', "[]")


@pytest.mark.parametrize("binary", [False, True])
async def test_the_tenth_bad_command_in_a_row_closes_the_connection(client: Client, binary: bool) -> None:
    for n in range(10):
        await client.send(BAD[n % len(BAD)].encode() if binary else BAD[n % len(BAD)])
    assert await client.closed() == Close(CloseCode.BAD_COMMANDS, "bad_commands")
    errors = await client.remaining_messages()
    codes = ["bad_json", "bad_command", "unauthorized", "bad_command", "bad_json"]
    assert [error["code"] for error in errors] == codes * 2


@pytest.mark.parametrize(
    "good",
    [
        '{"op":"ping"}',
        '{"op":"publish","topic":"a","data":1}',
        '{"op":"subscribe","topic":"b"}',
        # Understood, though not carried out.
        '{"op":"publish","topic":"a b","data":1}',
        '{"op":"unsubscribe","topic":"z"}',
        '{"op":"subscribe","topic":"z","max_queue":65537}',
    ],
)
async def test_valid_command_resets_the_count_of_bad_commands(harness: Harness, client: Client, good: str) -> None:
    await client.ask("publish", topic="a", data=0)  # `good` takes the fast path if it can
    for _ in range(3):
        for n in range(9):
            await client.send(BAD[n % len(BAD)])
        await client.send(good)
    await client.ask("ping")
    for _ in range(10):
        await client.send(BAD[0])
    closed = await client.closed()
    assert closed is not None
    assert closed.code == CloseCode.BAD_COMMANDS


async def test_close_for_bad_commands_ends_the_subscriptions(harness: Harness) -> None:
    client, publisher = await harness.subscriber("a", ">"), await harness.connect()
    for _ in range(10):
        await client.send("?")
    # Nothing counts that is sent behind the tenth.
    await client.tell("publish", topic="b", data=1, id=1)
    await client.closed()
    assert not any("id" in message for message in await client.remaining_messages())
    assert await publisher.ask("publish", topic="a", data=1) == ok(0)
    assert client.session not in harness.node.sessions


# Limits


async def test_subscriptions_of_a_connection_are_bounded() -> None:
    async with serving(max_subscriptions=3) as harness:
        client = await harness.subscriber("a", "b.*", "c")
        error = await client.ask("subscribe", topic="d")
        assert (error["code"], error["retry"]) == ("limit", False)
        assert "at most 3 subscriptions" in error["message"]
        assert harness.node.hub.filters == 3
        # Those that there are can be changed, and when one goes another may come.
        assert (await client.ask("subscribe", topic="a", max_queue=5))["op"] == "ok"
        assert (await client.ask("unsubscribe", topic="c"))["op"] == "ok"
        assert (await client.ask("subscribe", topic="d"))["op"] == "ok"
        assert (await client.ask("subscribe", topic="e"))["code"] == "limit"
        # It is for each connection.
        assert (await (await harness.connect()).ask("subscribe", topic="e"))["op"] == "ok"


async def test_max_queue_has_a_default_and_a_ceiling() -> None:
    async with serving(max_queue=10, max_queue_limit=20) as harness:
        client = await harness.subscriber("a")
        subscriptions = harness.session(client).subscriptions
        assert subscriptions is not None
        assert subscriptions["a"].max_queue == 10
        assert (await client.ask("subscribe", topic="b", max_queue=20))["op"] == "ok"
        error = await client.ask("subscribe", topic="c", max_queue=21)
        assert (error["code"], error["message"]) == ("limit", "`max_queue` may be at most 20 here")
        assert list(subscriptions) == ["a", "b"]


async def test_json_depth_is_bounded_by_max_depth() -> None:
    async with serving(max_depth=3) as harness:
        client = await harness.subscriber("a")
        for _ in range(2):
            await client.send('{"op":"publish","topic":"a","data":[[1]]}')
            assert await client.data(1) == [[[1]]]
            await client.send('{"op":"publish","topic":"a","data":[[[1]]]}')
            assert (await client.next())["code"] == "bad_json"


# Slow subscribers


async def test_publish_answer_counts_queued_and_dropped(harness: Harness) -> None:
    slow, publisher = await harness.deaf(), await harness.connect()
    fine = await harness.subscriber("a")
    await slow.tell("subscribe", topic="a", id=1, max_queue=2)
    await slow.until(b'"op":"ok"')
    sent = await fill(publisher, "a", receivers=2)
    assert await publisher.ask("publish", topic="a", data=1) == ok(2, queued=1)
    assert await publisher.ask("publish", topic="a", data=2) == ok(2, queued=1, dropped=1)
    assert await publisher.ask("publish", topic="a", data=3) == ok(2, queued=1, dropped=1)
    received = await slow.until(b'"data":3}')
    assert received.count(b'{"op":"event"') + 2 == sent + 3
    gap = b'{"op":"gap","topic":"a","missed":2,"reason":"overflow"}'
    event = b'{"op":"event","topic":"a","data":%d}'
    assert received.endswith(b"".join(bytes((0x81, len(message))) + message for message in (gap, event % 2, event % 3)))
    assert (await fine.data(sent + 3))[-3:] == [1, 2, 3]


async def test_close_policy_closes_a_slow_client(harness: Harness) -> None:
    slow, publisher = await harness.deaf(), await harness.connect()
    await slow.tell("subscribe", topic="a", id=1, max_queue=2, overflow="close")
    await slow.until(b'"op":"ok"')
    await fill(publisher, "a")
    await publisher.ask("publish", topic="a", data=1)
    with capture_logs() as logs:
        assert await publisher.ask("publish", topic="a", data=2) == ok(1, dropped=1)
        assert await publisher.ask("publish", topic="a", data=3) == ok(0)
    [told] = [entry for entry in logs if entry["event"] == "closed a slow client"]
    assert (told["session"], told["reason"], told["log_level"]) == (slow.session, "slow_consumer", "warning")
    assert told["dropped"] > 0
    assert slow.session not in harness.node.sessions
    assert (await slow.until(b"slow_consumer")).endswith(bytes((0x88, 15, 4000 >> 8, 4000 & 255)) + b"slow_consumer")


async def test_client_that_does_not_read_answers_is_closed() -> None:
    async with serving(max_answers=1024) as harness:
        client = await harness.deaf()
        while client.session in harness.node.sessions:
            await client.tell("ping", id="x" * 64)
        received = await client.until(b"not_reading")
        assert received.endswith(bytes((0x88, 13, 4003 >> 8, 4003 & 255)) + b"not_reading")


async def test_ping_timeout_is_logged() -> None:
    async with serving(ping_interval=0.05, ping_timeout=0.05, close_timeout=0.05) as harness:
        deaf = await harness.deaf()
        with capture_logs() as logs:
            await until(lambda: deaf.session not in harness.node.sessions)
        [told] = [entry for entry in logs if entry["event"] == "ping timeout"]
        assert (told["session"], told["log_level"]) == (deaf.session, "info")


# Flow control


async def test_latest_sends_a_slow_client_the_newest_event_of_each_key(harness: Harness) -> None:
    slow, publisher = await harness.deaf(), await harness.connect()
    await slow.tell("subscribe", topic="a", id=1, overflow="latest")
    await slow.until(b'"op":"ok"')
    await fill(publisher, "a")
    for n in range(100):  # the slow path writes keys in its own way
        key = "ü" if n % 2 else "k"
        escaped = json.dumps(key) if n % 3 else json.dumps(key, ensure_ascii=False)
        await publisher.send(f'{{"op":"publish","topic":"a","key":{escaped},"data":{n}}}')
    received = await slow.until(b'"data":99}')
    events = [json.loads(part) for part in re.findall(rb'\{"op":"(?:gap|event)"[^}]*\}', received)]
    last, gaps = events[-4:], sum(each["missed"] for each in events if each["op"] == "gap")
    assert [each.get("data") for each in last if each["op"] == "event"][-2:] == [98, 99]
    # The one that filled the socket, without a key, waits or has begun to go out.
    assert gaps == 98
    assert {each["reason"] for each in events if each["op"] == "gap"} == {"conflated"}


@pytest.mark.parametrize("lowat", [16_384, 0])
async def test_slow_client_has_few_old_events_in_its_socket_buffer(lowat: int) -> None:
    async with serving(notsent_lowat=lowat) as harness:
        slow, publisher = await harness.deaf(), await harness.connect()
        await slow.tell("subscribe", topic="a", id=1, overflow="latest")
        await slow.until(b'"op":"ok"')
        for n in range(1000):
            await publisher.ask("publish", topic="a", key="k", data=[n, "x" * 10_000])
        received = await slow.until(b"[999, ")
        stale = received.index(b'{"op":"gap"')
        # Without it the kernel takes as much as fits into its buffer; on some machines that is little.
        assert stale < 200_000 if lowat else stale > 0


async def test_credit_bounds_the_events_sent(harness: Harness) -> None:
    client, publisher = await harness.connect(), await harness.connect()
    assert await client.ask("subscribe", topic="a", credit=2, max_queue=3) == {"op": "ok", "topic": "a"}
    answers = [await publisher.ask("publish", topic="a", data=n) for n in range(6)]
    assert answers == [*[ok(1)] * 2, *[ok(1, queued=1)] * 3, ok(1, queued=1, dropped=1)]
    assert await client.data(2) == [0, 1]
    await client.nothing()
    (stats,) = harness.session(client).subscription_stats()
    assert (stats.topic, stats.credit, stats.queued, stats.dropped) == ("a", 0, 3, 1)
    assert stats.oldest_queued_seconds >= 0
    assert await client.ask("credit", topic="a", add=1) == {"op": "ok", "topic": "a"}
    assert await client.next() == {"op": "gap", "topic": "a", "missed": 1, "reason": "overflow"}
    assert await client.data(1) == [3]
    # To subscribe again sets what remains.
    assert (await client.ask("subscribe", topic="a", credit=3))["op"] == "ok"
    assert await client.data(2) == [4, 5]
    await publisher.ask("publish", topic="a", data=6)
    await publisher.ask("publish", topic="a", data=7)
    assert await client.data(1) == [6]
    await client.nothing()


async def test_credit_command_without_a_credit_subscription_is_an_error(client: Client) -> None:
    await client.ask("subscribe", topic="a")
    error = await client.ask("credit", topic="a", add=1)
    assert (error["code"], error["message"]) == ("bad_command", "`a` was subscribed to without `credit`")


@pytest.mark.parametrize("publish_path", ["fast", "slow", "late"])
async def test_block_parks_publishers_and_no_other_client(publish_path: str) -> None:
    server = LateServer()
    async with serving(server.engine() if publish_path == "late" else None, max_inflight=1) as harness:
        slow, other = await harness.connect(), await harness.connect()
        fine = await harness.subscriber("a")
        publisher = await harness.connect()
        assert (await slow.ask("subscribe", topic="a", overflow="block", max_queue=2, credit=1))["op"] == "ok"
        for n in range(6):
            # What is written with an escape is not for the fast path.
            op = r"publi\u0073h" if publish_path == "slow" else "publish"
            await publisher.send(f'{{"op":"{op}","id":{n},"topic":"a","data":{n}}}')
        await publisher.tell("ping", id="last")
        # One was sent, two wait, and the fourth is parked; it is delivered to all others.
        assert [(await publisher.next())["id"] for _ in range(3)] == [0, 1, 2]
        assert await fine.data(4) == [0, 1, 2, 3]
        for n in range(20):
            assert await other.ask("publish", topic="b", data=n) == ok(0)
        assert harness.session(publisher).connection.parked_publishes == 1
        assert await slow.data(1) == [0]
        await slow.tell("credit", topic="a", add=1)
        assert await slow.data(1) == [1]
        assert await publisher.next() == {"id": 3, **ok(2, queued=1)}
        await slow.tell("credit", topic="a", add=10)
        assert await slow.data(4) == [2, 3, 4, 5]
        answers = [await publisher.next() for _ in range(3)]
        assert [answer["id"] for answer in answers] == [4, 5, "last"]
        assert await fine.data(2) == [4, 5]


async def test_block_timeout_closes_the_subscriber() -> None:
    async with serving(block_timeout=0.1) as harness:
        slow, publisher = await harness.connect(), await harness.connect()
        await slow.ask("subscribe", topic="a", overflow="block", max_queue=1, credit=0)
        assert await publisher.ask("publish", topic="a", data=1) == ok(1, queued=1)
        assert await publisher.ask("publish", topic="a", data=2) == ok(1, queued=1)
        assert await slow.closed() == Close(CloseCode.SLOW_CONSUMER, "slow_consumer")
        assert await publisher.ask("publish", topic="a", data=3) == ok(0)


async def test_publishers_parked_on_each_other_end_by_the_timeout() -> None:
    async with serving(block_timeout=0.1) as harness:
        one, two = await harness.connect(), await harness.connect()
        for client, mine, theirs in ((one, "a", "b"), (two, "b", "a")):
            await client.ask("subscribe", topic=mine, overflow="block", max_queue=1, credit=0)
            await client.tell("publish", topic=theirs, data=0)
        for client, theirs in ((one, "b"), (two, "a")):
            for n in range(3):
                await client.tell("publish", topic=theirs, data=n)
            await client.tell("credit", topic="a", add=5)  # it is not read any more

        def all_go_on() -> bool:
            left = [harness.node.sessions.get(client.session) for client in (one, two)]
            return None in left and all(session is None or session.connection.parked_publishes == 0 for session in left)

        # Who is closed first lets the other one's publish go on; that one may be closed in the same sweep.
        await until(all_go_on)
        for client in (one, two):
            if client.session not in harness.node.sessions:
                assert await client.closed() == Close(CloseCode.SLOW_CONSUMER, "slow_consumer")


@pytest.mark.parametrize(
    ("block", "rule", "allowed"), [("local", None, True), ("none", None, False), ("none", "block", True)]
)
async def test_permission_for_block_is_configured(block: str, rule: Any, allowed: bool) -> None:
    topics = [TopicRule("a", overflow=rule)]
    async with serving(block=block, topics=topics) as harness:
        client = await harness.connect()
        answer = await client.ask("subscribe", topic="a", overflow="block")
        assert answer.get("code") == (None if allowed else "forbidden")


@pytest.mark.parametrize(
    ("header", "fields", "allowed"),
    [
        ("X-Forwarded-For", {}, True),
        ("X-Forwarded-For", {"X-Forwarded-For": "203.0.113.7"}, False),
        ("X-Forwarded-For", {"X-Forwarded-For": "unknown"}, False),
        ("X-Forwarded-For", {"X-Forwarded-For": ""}, False),
        ("X-Forwarded-For", {"X-Forwarded-For": "127.0.0.1"}, False),
        ("Forwarded", {"Forwarded": "for=_hidden"}, False),
        ("Forwarded", {"Forwarded": 'for="'}, False),
    ],
)
async def test_block_is_not_for_clients_that_a_proxy_speaks_for(
    tmp_path: Path, header: Any, fields: dict[str, str], allowed: bool
) -> None:
    path = f"{tmp_path}/ws.sock"
    server = Server(listen=[f"unix:{path}"], forwarded_header=header)
    async with serving(server=server) as harness, unix_connect(path, additional_headers=fields) as client:
        assert json.loads(await client.recv())["op"] == "welcome"
        await client.send('{"op":"subscribe","id":1,"topic":"a","overflow":"block"}')
        answer = json.loads(await client.recv())
        assert answer.get("code") == (None if allowed else "forbidden")
        assert harness.node.connections == 1


async def test_message_beyond_16_mib_passes_in_fragments_of_4_kb() -> None:
    async with serving(max_size=18 * 2**20, max_outbox=2**26, ping_interval=0) as harness:
        subscriber, publisher = await harness.subscriber("a"), await harness.connect()
        command = '{"op":"publish","id":1,"topic":"a","data":"%s"}' % ("x" * 17 * 2**20)
        fragments = [command[at : at + 4096] for at in range(0, len(command), 4096)]
        assert len(fragments) > 4096
        await publisher.socket.send(fragments)
        assert (await publisher.answer(1))["op"] == "ok"
        [data] = await subscriber.data(1)
        assert len(data) == 17 * 2**20


async def test_rules_give_defaults_and_ceilings() -> None:
    rule = TopicRule("a.*", max_queue=7, max_queue_limit=9, overflows=["latest", "close"])
    async with serving(topics=[rule]) as harness:
        client = await harness.subscriber("a.b", "b")
        subscription_stats = {stats.topic: stats for stats in harness.session(client).subscription_stats()}
        assert (subscription_stats["a.b"].max_queue, subscription_stats["a.b"].overflow) == (7, "latest")
        assert (subscription_stats["b"].max_queue, subscription_stats["b"].overflow) == (256, "drop_oldest")
        assert (await client.ask("subscribe", topic="a.b", max_queue=9))["op"] == "ok"
        assert (await client.ask("subscribe", topic="a.b", max_queue=10))["code"] == "limit"
        error = await client.ask("subscribe", topic="a.b", overflow="drop_oldest")
        assert (error["code"], error["message"]) == ("forbidden", "`overflow` must be one of latest, close here")


async def test_rules_apply_to_wider_patterns() -> None:
    topics = [TopicRule("a.*", max_queue_limit=9, overflows=["latest"]), TopicRule("b", overflows=["close"])]
    async with serving(topics=topics) as harness:
        client = await harness.subscriber("a.>")
        (stats,) = harness.session(client).subscription_stats()
        assert (stats.max_queue, stats.overflow) == (9, "latest")
        assert (await client.ask("subscribe", topic="*.*", max_queue=10))["code"] == "limit"
        assert (await client.ask("subscribe", topic="*.*", overflow="close"))["code"] == "forbidden"
        error = await client.ask("subscribe", topic=">")
        assert (error["code"], error["message"]) == (
            "forbidden",
            "the rules for these topics have no `overflow` in common",
        )
        assert [stats.topic for stats in harness.session(client).subscription_stats()] == ["a.>"]


async def test_reload_changes_the_publish_rate() -> None:
    async with serving() as harness:
        client = await harness.connect()
        assert await client.ask("publish", topic="a", data=1) == ok(0)

        def reload(**limits: Any) -> None:
            harness.node.reconfigure(Config(server=Server(listen=["127.0.0.1:0"]), limits=Limits(**limits)))

        reload(publish_rate=0.001, publish_burst=2)
        answers = [await client.ask("publish", topic="a", data=1) for _ in range(3)]
        assert answers[:2] == [ok(0)] * 2
        assert answers[2]["message"] == "more than 0.001 events a second"
        reload(publish_rate=1e6, publish_burst=1000)
        assert await client.ask("publish", topic="a", data=1) == ok(0)
        reload()
        before = harness.node.context.fast_publishes
        for _ in range(50):
            assert await client.ask("publish", topic="a", data=1) == ok(0)
        assert harness.node.context.fast_publishes - before >= 49


async def test_events_over_max_age_are_not_sent() -> None:
    async with serving(topics=[TopicRule("young.*", max_age=0.05)]) as harness:
        client, publisher = await harness.subscriber(">", credit=0), await harness.connect()
        await publisher.ask("publish", topic="young.a", data=1)
        await publisher.ask("publish", topic="old", data=2)
        session = harness.session(client)
        await until(lambda: session.subscription_stats()[0].oldest_queued_seconds > 0.06)
        await client.ask("credit", topic=">", add=5)
        assert await client.next() == {"op": "gap", "topic": ">", "missed": 1, "reason": "age"}
        assert await client.data(1) == [2]


async def test_publishes_over_the_rate_are_refused_for_a_while() -> None:
    async with serving(publish_rate=20.0, publish_burst=3) as harness:
        client, other = await harness.connect(), await harness.connect()
        answers = [await client.ask("publish", topic="a", data=n) for n in range(3)]
        assert answers == [ok(0)] * 3
        while (refused := await client.ask("publish", topic="a", data=3)) == ok(0):
            pass
        assert (refused["code"], refused["retry"]) == ("rate_limited", True)
        assert 1 <= refused["retry_after_ms"] <= 50
        assert await client.ask("ping") == {"op": "pong"}
        assert await other.ask("publish", topic="a", data=1) == ok(0)
        await asyncio.sleep(refused["retry_after_ms"] / 1000)  # as it was told
        assert await client.ask("publish", topic="a", data=4) == ok(0)
        assert harness.node.context.fast_publishes > 0


async def test_lagging_subscriber_is_logged_and_again_when_caught_up(harness: Harness) -> None:
    client, publisher = await harness.subscriber("a", credit=0), await harness.connect()
    with capture_logs() as logs:
        await publisher.ask("publish", topic="a", data=1)
        await until(lambda: len(logs) == 1)
        await client.ask("credit", topic="a", add=1)
        await until(lambda: len(logs) == 2)
    behind, caught_up = logs
    assert behind["event"] == "subscriber lagging"
    assert (behind["session"], behind["topic"], behind["queued"]) == (client.session, "a", 1)
    assert (caught_up["event"], caught_up["session"]) == ("subscriber caught up", client.session)


# The end of a session


async def test_closed_client_leaves_nothing_behind(harness: Harness) -> None:
    publisher = await harness.connect()
    client = await harness.subscriber("a", "a.*", ">")
    assert len(harness.node.sessions) == 2
    await client.close()
    await until(lambda: len(harness.node.sessions) == 1)
    assert harness.node.hub.filters == 0
    assert await publisher.ask("publish", topic="a", data=1) == ok(0)


async def test_lost_connection_leaves_nothing_behind(harness: Harness) -> None:
    publisher = await harness.connect()
    client = await harness.subscriber("a", "a.*", ">")
    client.socket.transport.abort()
    await until(lambda: len(harness.node.sessions) == 1)
    assert harness.node.hub.filters == 0
    assert await publisher.ask("publish", topic="a", data=1) == ok(0)


def ok(receivers: int, queued: int = 0, dropped: int = 0) -> dict[str, Any]:
    """The answer to a publish."""
    return {"op": "ok", "receivers": receivers, "queued": queued, "dropped": dropped}


async def fill(publisher: Client, topic: str, receivers: int = 1) -> int:
    """Publish until the first event has to wait because a subscriber's socket is full; how many that took.

    That one has begun to go out, or is the first in the queue, but for the part of it that the kernel took.
    """
    for n in range(1, 10_000):
        answer = await publisher.ask("publish", topic=topic, data="x" * 10_000)
        assert answer["receivers"] == receivers
        assert answer["dropped"] == 0
        if answer["queued"]:
            return n
    raise AssertionError("the socket takes everything")
