"""The browser's own WebSocket as a client of the broker."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.async_api import Page

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import FOREIGN_HOST, Window

# The browser lives as long as the session, and so must the loop that it is driven from.
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_welcome_comes_first_and_the_subprotocol_is_agreed(page: Page, broker: RunningBroker) -> None:
    found = await page.evaluate(
        """async (url) => {
            const { socket, welcome } = await connect(url);
            return { welcome, protocol: socket.protocol, extensions: socket.extensions };
        }""",
        broker.url,
    )
    assert found["protocol"] == "wsbroker.v1"
    assert found["extensions"] == ""
    assert found["welcome"]["version"] == 1
    assert found["welcome"]["max_size"] == 2**20


async def test_a_page_that_offers_no_subprotocol_is_served(page: Page, broker: RunningBroker) -> None:
    assert await page.evaluate("async (url) => (await connect(url, [])).socket.protocol", broker.url) == ""


async def test_a_token_among_the_subprotocols_identifies_and_is_not_echoed(page: Page, tmp_path: Path) -> None:
    secret = secrets.token_hex(32)
    config = tmp_path / "wsbroker.toml"
    config.write_text(f'[auth]\nalgorithms = ["HS256"]\nsecret = "{secret}"\n[[roles]]\nname = "default"\n')
    token = jwt.encode({"sub": "alice", "exp": int(time.time()) + 600}, secret, "HS256")
    with start_broker("--config", str(config), "--admin", "") as broker:
        found = await page.evaluate(
            """async ([url, token]) => {
                const { socket, welcome } = await connect(url, [`bearer.${token}`, "wsbroker.v1"]);
                return { protocol: socket.protocol, identity: welcome.identity };
            }""",
            [broker.url, token],
        )
    assert found == {"protocol": "wsbroker.v1", "identity": "alice"}


async def test_page_receives_events_of_its_subscriptions(page: Page, broker: RunningBroker) -> None:
    found = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            const subscribed = await client.ask({ op: "subscribe", topic: "prices.*" });
            const elsewhere = await client.ask({ op: "publish", topic: "weather.london", data: "rain" });
            const event = { topic: "prices.eurusd", key: "eurusd", data: { bid: 1.0843 } };
            const receipt = await client.ask({ op: "publish", ...event });
            return { subscribed, elsewhere, receipt, event: await client.next("event") };
        }""",
        broker.url,
    )
    assert found == {
        "subscribed": {"op": "ok", "id": 1, "topic": "prices.*"},
        "elsewhere": {"op": "ok", "id": 2, "receivers": 0, "queued": 0, "dropped": 0},
        "receipt": {"op": "ok", "id": 3, "receivers": 1, "queued": 0, "dropped": 0},
        "event": {"op": "event", "topic": "prices.eurusd", "key": "eurusd", "data": {"bid": 1.0843}},
    }


async def test_page_negotiates_compression_when_enabled(page: Page) -> None:
    with start_broker(environ={"WSBROKER_SERVER__COMPRESSION": "true"}) as broker:
        found = await page.evaluate(
            """async (url) => {
                const client = await connect(url);
                await client.ask({ op: "subscribe", topic: "compressed" });
                const texts = ["", "short", "much of the same, and a ☃ ".repeat(5_000), "much of the same".repeat(20)];
                let same = 0;
                for (const text of [...texts, ...texts]) {
                    client.send({ op: "publish", topic: "compressed", data: text });
                    same += (await client.next("event")).data === text;
                }
                return { extensions: client.socket.extensions, same };
            }""",
            broker.url,
        )
    assert found["extensions"].startswith("permessage-deflate; server_no_context_takeover; client_no_context_takeover")
    assert found["same"] == 8


async def test_no_event_arrives_after_unsubscribe(page: Page, broker: RunningBroker) -> None:
    receivers = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            await client.ask({ op: "subscribe", topic: "short" });
            await client.ask({ op: "unsubscribe", topic: "short" });
            const { receivers } = await client.ask({ op: "publish", topic: "short", data: null });
            await client.ask({ op: "ping" });
            return [receivers, client.messages.length];
        }""",
        broker.url,
    )
    assert receivers == [0, 0]


async def test_page_receives_events_of_another_page_in_order(window: Window, site: int, broker: RunningBroker) -> None:
    one = await window.open(f"http://127.0.0.1:{site}/one")
    other = await window.open(f"http://127.0.0.1:{site}/other")
    await one.evaluate(
        """async (url) => {
            window.client = await connect(url);
            await client.ask({ op: "subscribe", topic: "order.>" });
        }""",
        broker.url,
    )
    receivers = await other.evaluate(
        """async (url) => {
            const client = await connect(url);
            const receipts = [];
            for (let number = 0; number < 500; number++) {
                receipts.push(client.ask({ op: "publish", topic: `order.of.${number % 3}`, data: number }));
            }
            return (await Promise.all(receipts)).map(({ receivers }) => receivers);
        }""",
        broker.url,
    )
    numbers = await one.evaluate(
        """async () => {
            const numbers = [];
            while (numbers.length < 500) numbers.push((await client.next("event")).data);
            return numbers;
        }"""
    )
    assert receivers == [1] * 500
    assert numbers == list(range(500))


async def test_every_character_round_trips(page: Page, broker: RunningBroker) -> None:
    # Each length of UTF-8, and its limits; what JSON must escape; an emoji of many code points; an accent on
    # its own.
    limits = ["a\x7f", "\x80ß\u07ff", "\u0800€\uffff", "\U00010000𝒳\U0010ffff"]
    texts = [*limits, '"\\/\b\f\n\r\t\x00', "👩🏽‍🚀", "e\u0301"]
    found = await page.evaluate(
        """async ([url, texts]) => {
            const client = await connect(url);
            await client.ask({ op: "subscribe", topic: "räume.*.𝒳" });
            client.send({ op: "publish", topic: "räume.☃.𝒳", key: "schlüssel", data: texts });
            const { topic, key, data } = await client.next("event");
            return { topic, key, same: JSON.stringify(data) === JSON.stringify(texts) };
        }""",
        [broker.url, texts],
    )
    assert found == {"topic": "räume.☃.𝒳", "key": "schlüssel", "same": True}


async def test_a_command_may_be_a_binary_message(page: Page, broker: RunningBroker) -> None:
    answers = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            client.socket.send(new TextEncoder().encode('{"op":"ping","id":"buffer"}'));
            client.socket.send(new Blob(['{"op":"ping","id":"blob"}']));
            return [await client.next("pong"), await client.next("pong")];
        }""",
        broker.url,
    )
    assert answers == [{"op": "pong", "id": "buffer"}, {"op": "pong", "id": "blob"}]


async def test_invalid_command_is_answered_and_the_connection_stays_open(page: Page, broker: RunningBroker) -> None:
    found = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            const errors = [];
            for (const text of ["{", "[]", '{"op":"dance","id":1}', '{"op":"publish","topic":"a b","data":1,"id":"x"}',
                                '{"op":"unsubscribe","topic":"never","id":2}',
                                // What the browser makes of half of a surrogate pair: no text of Unicode.
                                JSON.stringify({ op: "publish", topic: "half", data: "\\ud83d" })]) {
                client.socket.send(text);
                errors.push(await client.next("error"));
            }
            return { errors, pong: await client.ask({ op: "ping" }) };
        }""",
        broker.url,
    )
    assert [(error["code"], error.get("id"), error["retry"]) for error in found["errors"]] == [
        ("bad_json", None, False),
        ("bad_json", None, False),
        ("bad_command", 1, False),
        ("bad_topic", "x", False),
        ("not_subscribed", 2, False),
        ("bad_json", None, False),
    ]
    assert all(error["message"] for error in found["errors"])
    assert found["pong"]["op"] == "pong"


async def test_page_that_sends_only_bad_commands_is_closed(page: Page, broker: RunningBroker) -> None:
    found = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            for (let time = 0; time < 10; time++) client.socket.send("nonsense");
            return { closed: await client.closed, errors: client.messages.length };
        }""",
        broker.url,
    )
    assert found == {"closed": {"code": 4502, "reason": "bad_commands", "wasClean": True}, "errors": 10}


async def test_large_event_passes_and_event_over_max_size_closes_the_connection(
    page: Page, broker: RunningBroker
) -> None:
    found = await page.evaluate(
        """async (url) => {
            const client = await connect(url);
            await client.ask({ op: "subscribe", topic: "large" });
            client.send({ op: "publish", topic: "large", data: "x".repeat(client.welcome.max_size - 100) });
            const { data } = await client.next("event");
            client.send({ op: "publish", topic: "large", data: "x".repeat(client.welcome.max_size) });
            return { length: data.length, closed: await client.closed };
        }""",
        broker.url,
    )
    assert found["length"] == 2**20 - 100
    assert found["closed"]["code"] == 1009


async def test_page_may_close_with_its_own_code_and_reason(page: Page, broker: RunningBroker) -> None:
    closes = await page.evaluate(
        """async (url) => {
            const closes = [];
            for (const how of [[], [1000], [1000, "done"], [3000, "für heute"], [4999, "x".repeat(123)]]) {
                const client = await connect(url);
                client.socket.close(...how);
                closes.push(await client.closed);
            }
            return closes;
        }""",
        broker.url,
    )
    # The broker answers with the code that it was sent, and Chromium shows what it was answered.
    assert [close["code"] for close in closes] == [1005, 1000, 1000, 3000, 4999]
    assert all(close["wasClean"] for close in closes)


async def test_commands_sent_before_the_close_are_executed(page: Page, broker: RunningBroker) -> None:
    numbers = await page.evaluate(
        """async (url) => {
            const [one, other] = [await connect(url), await connect(url)];
            await one.ask({ op: "subscribe", topic: "last.words" });
            for (let data = 0; data < 20; data++) other.send({ op: "publish", topic: "last.words", data });
            other.socket.close(1000);
            await other.closed;
            const numbers = [];
            while (numbers.length < 20) numbers.push((await one.next("event")).data);
            return numbers;
        }""",
        broker.url,
    )
    assert numbers == list(range(20))


@pytest.mark.parametrize("way", ["close", "leave", "crash"])
async def test_closed_page_is_no_subscriber(way: str, window: Window, site: int, broker: RunningBroker) -> None:
    watcher = await window.open(f"http://127.0.0.1:{site}/watcher")
    page = await window.open(f"http://127.0.0.1:{site}/page")
    await page.evaluate(
        """async ([url, topic]) => {
            window.client = await connect(url);
            await client.ask({ op: "subscribe", topic });
        }""",
        [broker.url, f"gone.{way}"],
    )
    await watcher.evaluate("async (url) => { window.client = await connect(url); }", broker.url)
    assert await receivers(watcher, f"gone.{way}") == 1
    if way == "close":
        await page.close()
    elif way == "leave":
        await page.goto("about:blank")
    else:
        async with page.expect_event("crash"):
            # Its answer never comes, because the page is not there any more.
            going = asyncio.ensure_future(page.goto("chrome://crash"))
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
    # The browser closes the connection when it is done with the page, which is not told to anybody.
    await watcher.wait_for_function(
        "async (topic) => (await client.ask({ op: 'publish', topic, data: 0 })).receivers === 0", arg=f"gone.{way}"
    )


async def test_the_browser_answers_the_pings(page: Page) -> None:
    with start_broker(
        environ={"WSBROKER_LIMITS__PING_INTERVAL": "0.2", "WSBROKER_LIMITS__PING_TIMEOUT": "0.4"}
    ) as broker:
        state = await page.evaluate(
            """async (url) => {
                const client = await connect(url);
                // Nothing is to be seen of a ping from a page, but that the connection outlives several.
                await new Promise((resolve) => setTimeout(resolve, 2_000));
                return [client.socket.readyState, (await client.ask({ op: "ping" })).op];
            }""",
            broker.url,
        )
    assert state == [1, "pong"]


async def test_shutdown_sends_bye_with_reason_and_retry_after(page: Page) -> None:
    with start_broker() as broker:
        await page.evaluate("async (url) => { window.client = await connect(url); }", broker.url)
        broker.program.terminate()
        bye = await page.evaluate("() => client.next('bye')")
        closed = await page.evaluate("() => client.closed")
        assert await asyncio.to_thread(broker.program.wait) == 0
    assert bye["reason"]
    assert bye["retry_after_ms"] >= 0
    assert closed["code"] == 1001
    assert closed["reason"]
    assert closed["wasClean"]


async def test_cross_origin_page_is_refused(window: Window, site: int, broker: RunningBroker) -> None:
    page = await window.open(f"http://{FOREIGN_HOST}:{site}/")
    closed, told = await try_to_connect(page, broker.url, "wsbroker.v1")
    assert closed == {"code": 1006, "reason": "", "wasClean": False}
    assert "403" in told


async def test_cross_origin_page_is_accepted_if_listed(window: Window, site: int) -> None:
    origin = f"http://{FOREIGN_HOST}:{site}"
    page = await window.open(origin)
    with start_broker(environ={"WSBROKER_SERVER__ORIGINS": origin}) as broker:
        assert await page.evaluate("async (url) => (await connect(url)).welcome.version", broker.url) == 1


async def test_page_with_unknown_subprotocols_is_refused(page: Page, broker: RunningBroker) -> None:
    closed, told = await try_to_connect(page, broker.url, "mqtt")
    assert closed["code"] == 1006
    assert "400" in told


async def receivers(page: Page, topic: str) -> int:
    """How many receive an event of this topic, as the receipt for one says."""
    found = await page.evaluate("(topic) => client.ask({ op: 'publish', topic, data: 0 })", topic)
    assert isinstance(found["receivers"], int)
    return found["receivers"]


async def try_to_connect(page: Page, url: str, protocol: str) -> tuple[dict[str, Any], str]:
    """What a page is told when it cannot connect, and what its developer reads in the console.

    The page is told nothing, so that it cannot look around in a network.
    """
    async with page.expect_console_message(lambda message: url in message.text) as console:
        closed = await page.evaluate(
            """([url, protocol]) => new Promise((resolve) => {
                const socket = new WebSocket(url, protocol);
                socket.onclose = ({ code, reason, wasClean }) => resolve({ code, reason, wasClean });
            })""",
            [url, protocol],
        )
    return closed, (await console.value).text
