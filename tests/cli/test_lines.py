"""`wsbroker pub` and `wsbroker sub` in a shell pipe: what they read and write, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection

from tests.client.fake import FakeBroker, answer, closing, running
from tests.fixtures_command import DEVNULL, Process, Result, finish, start, wsbroker
from tests.net.harness import until

# The commands bring their own loop.
pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])


def published(fake: FakeBroker) -> list[Any]:
    """The data of the events, in their order."""
    return [command["data"] for command in fake.received if command["op"] == "publish"]


async def next_line(process: Process) -> Any:
    """Read one line that `sub` prints, as JSON."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line.endswith(b"\n")
    return json.loads(line)


async def refusing_even(fake: FakeBroker, connection: ServerConnection) -> None:
    """Behave as a broker that refuses even numbers."""
    async for command in fake.commands(connection):
        reply: dict[str, Any] = {"op": "ok", "id": command["id"]}
        if command["data"] % 2 == 0:
            reply = {"op": "error", "id": command["id"], "code": "forbidden", "message": "not even", "retry": False}
        await connection.send(msgspec.json.encode(reply), text=True)


# pub with DATA


async def test_pub_publishes_one_event_silently() -> None:
    async with running() as fake:
        result = await wsbroker("pub", "a.b", '{"x": [1, "ü"]}', "--key", "k", "--url", fake.url)
        assert result == Result(0, "", "")
        assert fake.received == [{"op": "publish", "id": 1, "topic": "a.b", "key": "k", "data": {"x": [1, "ü"]}}]
        assert await fake.closed.get() == (1000, "")


async def test_pub_text_is_published_as_a_string() -> None:
    async with running() as fake:
        assert await wsbroker("pub", "t", "--text", 'say "hi"\n', "--url", fake.url) == Result(0, "", "")
        assert published(fake) == ['say "hi"\n']


async def test_negative_number_is_data_after_two_dashes() -> None:
    async with running() as fake:
        assert await wsbroker("pub", "--url", fake.url, "--", "t", "-5") == Result(0, "", "")
        assert published(fake) == [-5]


async def test_url_and_token_are_read_from_the_environment(tmp_path: Path) -> None:
    async with running(unix=str(tmp_path / "s")) as fake:
        environ = {"WSBROKER_URL": fake.url, "WSBROKER_TOKEN": "secret"}
        assert await wsbroker("pub", "t", "1", environ=environ) == Result(0, "", "")
        assert fake.requests[0].headers["Authorization"] == "Bearer secret"


async def test_refused_publish_is_reported() -> None:
    async with running(refusing_even) as fake:
        result = await wsbroker("pub", "t", "2", "--url", fake.url)
        assert result == Result(77, "", "wsbroker: forbidden: not even\n")


# pub without DATA


async def test_lines_are_published_in_order() -> None:
    lines = b'1\n{"a":\t2}\r\n\n   \n"three"\n[4]'
    async with running() as fake:
        assert await wsbroker("pub", "t", "--key", "k", "--url", fake.url, stdin=lines) == Result(0, "", "")
        assert published(fake) == [1, {"a": 2}, "three", [4]]
        assert {command["key"] for command in fake.received} == {"k"}
        assert await fake.closed.get() == (1000, "")


async def test_text_lines_are_published_including_blank_lines() -> None:
    lines = 'a "b"\n\n  ü\r\n\\'.encode()
    async with running() as fake:
        assert await wsbroker("pub", "t", "--text", "--url", fake.url, stdin=lines) == Result(0, "", "")
        assert published(fake) == ['a "b"', "", "  ü", "\\"]


async def test_empty_input_publishes_nothing() -> None:
    async with running() as fake:
        assert await wsbroker("pub", "t", "--url", fake.url) == Result(0, "", "")
        assert fake.received == []


async def test_pub_reads_a_file_as_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"".join(b"%d\n" % number for number in range(3000)))
    async with running() as fake:
        with file.open("rb") as lines:
            async with start("pub", "t", "--url", fake.url, stdin=lines) as process:
                assert await finish(process) == Result(0, "", "")
        assert published(fake) == list(range(3000))


async def test_line_is_published_as_soon_as_it_is_complete() -> None:
    got = asyncio.Event()

    async def tell(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            got.set()
            await connection.send(msgspec.json.encode({"op": "ok", "id": command["id"]}), text=True)

    async with running(tell) as fake, start("pub", "t", "--url", fake.url) as process:
        assert process.stdin is not None
        for number in range(3):
            process.stdin.write(b"%d\n" % number)
            await got.wait()
            got.clear()
        assert published(fake) == [0, 1, 2]
        assert await finish(process) == Result(0, "", "")


async def test_invalid_line_is_reported_and_the_rest_is_published() -> None:
    lines = b'1\nnonsense\n2\n"\xff"\n3,"topic":"other"\n' + b'"' + b"x" * 5000 + b'"\n5\n"' + b"x" * 4090 + b'"\n7\n'
    async with running(refusing_even) as fake:
        result = await wsbroker("pub", "t", "--url", fake.url, stdin=lines)
        assert result.status == 1
        assert sorted(result.err.splitlines()) == [
            "wsbroker: line 2: bad_json: not valid JSON at character 2: invalid character",
            "wsbroker: line 3: forbidden: not even",
            "wsbroker: line 4: bad_json: not valid UTF-8",
            "wsbroker: line 5: bad_json: not valid JSON at character 2: trailing characters",
            "wsbroker: line 6: limit: the line is longer than any message that the broker takes",
            "wsbroker: line 8: limit: the command has 4,135 bytes, the broker takes at most 4,096",
        ]
        assert published(fake) == [1, 2, 5, 7]


async def test_lines_of_text_that_are_not_utf8_are_reported() -> None:
    async with running() as fake:
        result = await wsbroker("pub", "t", "--text", "--url", fake.url, stdin=b"a\n\xff\nb")
        assert result == Result(1, "", "wsbroker: line 2: bad_json: the text is not UTF-8: invalid start byte\n")
        assert published(fake) == ["a", "b"]


async def test_errors_can_be_printed_as_json() -> None:
    async with running(refusing_even) as fake:
        result = await wsbroker("pub", "t", "--json", "--url", fake.url, stdin=b"x\n2\n")
        assert [json.loads(line) for line in result.err.splitlines()] == [
            {
                "error": "bad_json",
                "message": "not valid JSON at character 1: invalid character",
                "retry": False,
                "line": 1,
            },
            {"error": "forbidden", "message": "not even", "retry": False, "line": 2},
        ]


async def test_connection_loss_reports_the_outcome_of_the_lines() -> None:
    async def until_four(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            if command["data"] == 6:
                await connection.close(1011, "internal")
            elif command["data"] <= 3:
                await connection.send(msgspec.json.encode({"op": "ok", "id": command["id"]}), text=True)

    async with running(until_four) as fake:
        result = await wsbroker("pub", "t", "--url", fake.url, stdin=b"1\n2\n3\n4\n5\n6\n")
        closed = "the broker closed the connection: 1011 internal (an error in the broker)"
        said = "3 lines were published, of lines 4 to 6 it is not known"
        assert result == Result(75, "", f"wsbroker: {closed}; {said}\n")


async def test_connection_loss_is_noticed_without_input() -> None:
    async with running(closing(4503, "disconnected")) as fake, start("pub", "t", "--url", fake.url) as process:
        assert process.stdin is not None
        process.stdin.write(b"1\n")
        assert await process.wait() == 77


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signal_ends_pub_with_a_close_frame(number: int, status: int) -> None:
    async with running() as fake, start("pub", "t", "--url", fake.url) as process:
        assert process.stdin is not None
        process.stdin.write(b"1\n")
        while not fake.received:  # noqa: ASYNC110 -- the fake has no event for it
            await asyncio.sleep(0.01)
        process.send_signal(number)
        assert await fake.closed.get() == (1000, "")
        assert await finish(process) == Result(status, "", "")


async def test_unreadable_input_is_reported() -> None:
    async with running() as fake:
        only_written = os.open(os.devnull, os.O_WRONLY)
        try:
            async with start("pub", "t", "--url", fake.url, stdin=only_written) as process:
                result = await finish(process)
        finally:
            os.close(only_written)
        assert result == Result(66, "", "wsbroker: cannot read standard input: Bad file descriptor\n")
        assert await fake.closed.get() == (1000, "")


# sub


async def test_sub_prints_events_as_they_arrive() -> None:
    async with running() as fake, start("sub", "a", "b", "--url", fake.url) as process:
        await fake.subscribed.wait()
        await wsbroker("pub", "a", '{"x" : 1}', "--key", "k", "--url", fake.url)
        assert await next_line(process) == {"op": "event", "topic": "a", "key": "k", "data": {"x": 1}}
        gap = {"op": "gap", "topic": "a", "missed": 2, "reason": "overflow"}
        await fake.emit("a", msgspec.json.encode(gap))
        assert await next_line(process) == gap
        assert [command["topic"] for command in fake.received if command["op"] == "subscribe"] == ["a", "b"]
        process.send_signal(signal.SIGINT)
        await finish(process)


async def test_sub_adds_credit_for_printed_events() -> None:
    """To the subscription under which an event comes: the most specific one."""
    options = ("--credit", "4", "--max-queue", "9")
    async with running() as fake, start("sub", "a.*", "a.b", *options, "--url", fake.url) as process:
        await until(lambda: len(fake.received) == 2)
        assert all((each["max_queue"], each["credit"]) == (9, 4) for each in fake.received)
        for topic in ("a.b", "a.c", "a.b", "a.c"):
            await fake.emit("a.b", msgspec.json.encode({"op": "event", "topic": topic, "data": 1}))
            await next_line(process)
        await until(lambda: len(fake.received) == 4)
        given = sorted((each["op"], each["topic"], each["add"]) for each in fake.received[2:])
        assert given == [("credit", "a.*", 2), ("credit", "a.b", 2)]
        process.terminate()
        assert (await finish(process)).status == 143


async def test_sub_requests_the_overflow_policy() -> None:
    async with running() as fake, start("sub", "t", "--overflow", "drop_newest", "--url", fake.url) as process:
        await fake.subscribed.wait()
        assert fake.received == [{"op": "subscribe", "id": 1, "topic": "t", "overflow": "drop_newest"}]
        process.terminate()
        assert (await finish(process)).status == 143


async def test_sub_prints_each_event_on_one_line() -> None:
    async with running() as fake, start("sub", "t", "--url", fake.url) as process:
        await fake.subscribed.wait()
        for data in (b'{\n  "a": "x\\ny",\r\n  "b": 2\r}', b"[\r1]", b"3"):
            await fake.emit("t", b'{"op":"event","topic":"t","data":%b}' % data)
        assert [(await next_line(process))["data"] for _ in range(3)] == [{"a": "x\ny", "b": 2}, [1], 3]


async def test_sub_keeps_the_order_of_many_events() -> None:
    async with running() as fake, start("sub", "t", "--url", fake.url) as process:
        await fake.subscribed.wait()
        for number in range(5000):
            await fake.emit("t", b'{"op":"event","topic":"t","data":%d}' % number)
        assert [(await next_line(process))["data"] for _ in range(5000)] == list(range(5000))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signal_ends_sub_with_a_close_frame(number: int, status: int) -> None:
    async with running() as fake, start("sub", "t", "--url", fake.url) as process:
        await fake.subscribed.wait()
        process.send_signal(number)
        assert await fake.closed.get() == (1000, "")
        assert await finish(process) == Result(status, "", "")


async def test_second_signal_ends_sub_at_once() -> None:
    going = asyncio.Event()

    async def deaf(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.send(
            b'{"op":"welcome","version":1,"session":"s","server":"f","ping":0,"max_size":99,"max_queue":1}', text=True
        )
        await connection.recv()
        connection.transport.pause_reading()
        fake.subscribed.set()
        await going.wait()
        connection.transport.abort()

    async with running(deaf) as fake, start("sub", "t", "--url", fake.url) as process:
        await fake.subscribed.wait()
        while process.returncode is None:
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.1)
        going.set()
        assert process.returncode == 130


async def test_closed_output_ends_sub_before_the_next_event() -> None:
    source, sink = os.pipe()
    async with running() as fake, start("sub", "t", "--url", fake.url, stdin=DEVNULL, stdout=sink) as process:
        os.close(sink)
        await fake.subscribed.wait()
        await fake.emit("t", b'{"op":"event","topic":"t","data":1}')
        assert json.loads(os.read(source, 1000))["data"] == 1
        os.close(source)
        assert await fake.closed.get() == (1000, "")
        assert await finish(process) == Result(141, "", "")


async def test_blocked_output_stops_reading_but_not_signals() -> None:
    stuck = asyncio.Event()
    payload = b'{"op":"event","topic":"t","data":"%b"}' % (b"x" * 50_000)

    async def flood(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            await connection.send(msgspec.json.encode({"op": "ok", "id": command["id"]}), text=True)
            try:
                while True:
                    async with asyncio.timeout(0.5):
                        await connection.send(payload, text=True)
            except TimeoutError:
                stuck.set()

    async with running(flood) as fake, start("sub", "t", "--url", fake.url) as process:
        assert process.stdout is not None
        await stuck.wait()
        process.send_signal(signal.SIGINT)
        assert await fake.closed.get() == (1000, "")
        assert (await finish(process)).status == 130


async def test_unwritable_output_is_reported() -> None:
    async with running() as fake:
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            async with start("sub", "t", "--url", fake.url, stdout=full) as process:
                await fake.subscribed.wait()
                await fake.emit("t", b'{"op":"event","topic":"t","data":1}')
                result = await finish(process)
        finally:
            os.close(full)
        assert result == Result(74, "", "wsbroker: cannot write the events: No space left on device\n")


async def test_refused_subscription_ends_sub() -> None:
    async def refuse(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            reply = {"op": "error", "id": command["id"], "code": "limit", "message": "too many", "retry": False}
            await connection.send(msgspec.json.encode(reply), text=True)

    async with running(refuse) as fake:
        result = await wsbroker("sub", "a", "b", "--url", fake.url)
        assert result == Result(65, "", "wsbroker: limit: too many\n")


async def test_connection_close_ends_sub_after_the_last_event() -> None:
    async def one_and_bye(fake: FakeBroker, connection: ServerConnection) -> None:
        async for command in fake.commands(connection):
            await connection.send(msgspec.json.encode({"op": "ok", "id": command["id"]}), text=True)
            await connection.send(b'{"op":"event","topic":"t","data":1}', text=True)
            await connection.send(b'{"op":"bye","reason":"shutdown","retry_after_ms":2500}', text=True)
            await connection.close(1001, "going_away")

    async with running(one_and_bye) as fake:
        result = await wsbroker("sub", "t", "--url", fake.url, "--json")
        assert (result.status, result.out) == (75, '{"op":"event","topic":"t","data":1}\n')
        error = json.loads(result.err)
        message = error.pop("message")
        assert error == {"error": "closed", "retry": True, "code": 1001, "retry_after_ms": 2500}
        assert message.endswith("; it may be tried again after 2.5 seconds")


async def test_connection_loss_ends_sub() -> None:
    async def cut(fake: FakeBroker, connection: ServerConnection) -> None:
        asyncio.get_running_loop().call_later(0.1, connection.transport.abort)
        await answer(fake, connection)

    async with running(cut) as fake:
        result = await wsbroker("sub", "t", "--url", fake.url)
        assert result.status == 75
        assert result.err.startswith("wsbroker: the connection to the broker was lost")
