"""examples/wsbroker.js, the client that the pages share: when it comes back, and when not.

Some of it needs a broker that does as the test says: a few lines of `websockets`, in the test's own loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from broker.topics import matches
from examples.pages import Pages
from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import Window

pytestmark = pytest.mark.asyncio(loop_scope="session")

# A client in the page, with all that it has said.
CONNECT = """async (url) => {
    const { Broker } = await import("/wsbroker.js");
    window.states = [];
    window.errors = [];
    window.broker = new Broker({
        url,
        onstate: (state) => states.push(state),
        onerror: (error) => errors.push(`${error.name}: ${error.code}`),
    });
}"""

Script = Callable[[ServerConnection], Awaitable[None]]


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port on loopback where the examples' files are."""
    with Pages(0) as port:
        yield port


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    """One broker for the tests that do not stop it."""
    with start_broker() as broker:
        yield broker


@pytest_asyncio.fixture(loop_scope="session")
async def page(window: Window, site: int) -> Page:
    """A page that does nothing by itself; there is no such file."""
    return await window.open(f"http://127.0.0.1:{site}/empty")


async def test_client_subscribes_publishes_and_returns_the_receipt(page: Page, broker: RunningBroker) -> None:
    await page.evaluate(CONNECT, broker.url)
    found = await page.evaluate(
        """async () => {
            let come;
            const event = new Promise((resolve) => (come = resolve));
            await broker.subscribe("a.*", come);
            const receipt = await broker.publish("a.b", { n: 1 }, { key: "k" });
            await event;
            await broker.unsubscribe("a.*");
            const { receivers } = await broker.publish("a.b", 2);
            return { event: await event, receipt, receivers, states: states.map(({ name }) => name) };
        }"""
    )
    assert found["event"] == {"op": "event", "topic": "a.b", "key": "k", "data": {"n": 1}}
    assert found["receipt"]["receivers"] == 1
    assert found["receivers"] == 0
    assert found["states"] == ["connecting", "open"]


async def test_promise_is_rejected_when_the_broker_refuses(page: Page, broker: RunningBroker) -> None:
    await page.evaluate(CONNECT, broker.url)
    found = await page.evaluate(
        """async () => {
            const refused = [];
            const note = (error) => refused.push([error.name, error.code, error.retry]);
            await broker.subscribe("a b", () => {}).catch(note);
            await broker.publish("a.*", 1).catch(note);
            return refused;
        }"""
    )
    assert found == [["CommandError", "bad_topic", False]] * 2


async def test_client_matches_patterns_like_the_broker(page: Page) -> None:
    patterns = ["a", "a.b", "*", "*.b", "a.*", "a.*.c", ">", "a.>", "a.b.>", "$sys.>", "$sys.*", "*.*", "a.b.c"]
    topics = ["a", "b", "a.b", "a.c", "a.b.c", "a.x.c", "a.b.c.d", "$sys.a", "$sys.a.b", "$", "c.b"]
    pairs = [[pattern, topic] for pattern in patterns for topic in topics]
    found = await page.evaluate(
        "async (pairs) => pairs.map(((module) => (pair) => module.matches(...pair))(await import('/wsbroker.js')))",
        pairs,
    )
    assert found == [matches(pattern, topic) for pattern, topic in pairs]


async def test_client_reconnects_after_a_crash_and_resubscribes(page: Page) -> None:
    with start_broker() as first:
        await page.evaluate(CONNECT, first.url)
        await page.evaluate(
            """async () => {
                window.events = [];
                await broker.subscribe("news", ({ data }) => events.push(data), { max_queue: 8 });
            }"""
        )
        first.program.kill()
        await page.wait_for_function("() => states.at(-1).name === 'waiting'")
        assert await page.evaluate("() => broker.publish('news', 1).catch((error) => error.name)") == "NotConnected"
        first.program.wait()
        with start_broker(listen=f"127.0.0.1:{first.port}"):
            await page.wait_for_function("() => states.at(-1).name === 'open'")
            assert (await page.evaluate("() => broker.publish('news', 2)"))["receivers"] == 1
            assert await page.evaluate("() => events") == [2]


async def test_client_reconnects_after_the_delay_in_bye(page: Page) -> None:
    async def shut_down(client: ServerConnection) -> None:
        await say(client, op="bye", reason="shutdown", retry_after_ms=321)
        await client.close(1001, "going_away")

    async with fake_broker(shut_down, stay) as (url, _):
        await page.evaluate(CONNECT, url)
        await page.wait_for_function("() => states.filter(({ name }) => name === 'open').length === 2")
    waiting = await page.evaluate("() => states.find(({ name }) => name === 'waiting')")
    assert waiting == {"name": "waiting", "delay": 321, "code": 1001, "reason": "going_away"}


@pytest.mark.parametrize("code", [4500, 4502, 4503, 4999])
async def test_client_does_not_reconnect_after_a_permanent_close(page: Page, code: int) -> None:
    async def send_bye(client: ServerConnection) -> None:
        await client.close(code, "no")

    await page.clock.install()
    async with fake_broker(send_bye, stay) as (url, connections):
        await page.evaluate(CONNECT, url)
        await page.wait_for_function("() => states.at(-1).name === 'closed'")
        await page.clock.run_for(120_000)
        assert connections() == 1
    assert await page.evaluate("() => states.at(-1)") == {"name": "closed", "code": code, "reason": "no"}


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1013, 4000, 4003, 4499])
async def test_client_reconnects_after_a_temporary_close(page: Page, code: int) -> None:
    async def send_bye(client: ServerConnection) -> None:
        await client.close(code)

    async with fake_broker(send_bye, stay) as (url, _):
        await page.evaluate(CONNECT, url)
        await page.wait_for_function("() => states.filter(({ name }) => name === 'open').length === 2")


async def test_reconnect_delay_grows_up_to_a_bound(page: Page) -> None:
    await page.clock.install()
    with start_broker() as broker:
        pass  # whose port nobody listens on any more
    await page.evaluate(CONNECT, broker.url)
    waits = "() => states.filter(({ name }) => name === 'waiting').map(({ delay }) => delay)"
    for failures in range(10):
        # The page's clock also goes on by itself: on a slow machine the next attempt may have failed already.
        await page.wait_for_function(f"(failures) => ({waits})().length > failures", arg=failures)
        delay = (await page.evaluate(waits))[failures]
        longest = min(30_000, 250 * 2**failures)
        assert longest / 2 <= delay <= longest
        await page.clock.run_for(math.ceil(delay))


async def test_client_disconnects_from_a_silent_broker(page: Page) -> None:
    pinged = asyncio.Event()

    async def stop_answering(client: ServerConnection) -> None:
        async for message in client:
            if json.loads(message)["op"] == "ping":
                pinged.set()

    await page.clock.install()
    async with fake_broker(stop_answering, stay, ping=2) as (url, _):
        await page.evaluate(CONNECT, url)
        await page.wait_for_function("() => states.at(-1).name === 'open'")
        await page.clock.run_for(2_100)
        await pinged.wait()
        await page.clock.run_for(10_100)
        assert (await page.evaluate("() => states.find(({ name }) => name === 'waiting')"))["code"] == 1006
        await page.clock.run_for(1_000)
        await page.wait_for_function("() => states.filter(({ name }) => name === 'open').length === 2")


async def test_client_reports_gaps(page: Page) -> None:
    async def drop_events(client: ServerConnection) -> None:
        command = json.loads(await client.recv())
        await say(client, op="ok", id=command["id"], topic=command["topic"])
        await say(client, op="gap", topic=command["topic"], missed=7, reason="overflow")
        await stay(client)

    async with fake_broker(drop_events) as (url, _):
        await page.evaluate(CONNECT, url)
        gap = await page.evaluate("() => new Promise((ongap) => broker.subscribe('a.*', () => {}, { ongap }))")
    assert gap == {"op": "gap", "topic": "a.*", "missed": 7, "reason": "overflow"}


async def test_client_reports_errors_without_an_id(page: Page) -> None:
    async def send_error(client: ServerConnection) -> None:
        await say(client, op="error", code="internal", message="a fault", retry=True)
        await stay(client)

    async with fake_broker(send_error) as (url, _):
        await page.evaluate(CONNECT, url)
        await page.wait_for_function("() => errors.length === 1")
    assert await page.evaluate("() => errors") == ["CommandError: internal"]


async def test_client_does_not_reconnect_after_close(page: Page, broker: RunningBroker) -> None:
    await page.evaluate(CONNECT, broker.url)
    await page.wait_for_function("() => states.at(-1).name === 'open'")
    await page.evaluate("() => broker.close()")
    assert [state["name"] for state in await page.evaluate("() => states")] == ["connecting", "open", "closed"]


@contextlib.asynccontextmanager
async def fake_broker(*scripts: Script, ping: int = 25) -> AsyncIterator[tuple[str, Callable[[], int]]]:
    """A broker that follows a script for each connection. Gives its address and the count of connections."""
    count = 0

    async def follow(client: ServerConnection) -> None:
        nonlocal count
        script = scripts[min(count, len(scripts) - 1)]
        count += 1
        await say(client, op="welcome", version=1, session="s", server="fake", ping=ping, max_size=1000, max_queue=256)
        await script(client)

    async with serve(follow, "127.0.0.1", 0, subprotocols=[Subprotocol("wsbroker.v1")], ping_interval=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}/", lambda: count


async def say(client: ServerConnection, **message: Any) -> None:
    """Send one message."""
    await client.send(json.dumps(message))


async def stay(client: ServerConnection) -> None:
    """Say nothing more, until the connection is closed."""
    await client.wait_closed()
