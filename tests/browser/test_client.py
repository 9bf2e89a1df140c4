"""clients/js in a real browser: what a page goes through, and what the client makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator

import pytest
from playwright.async_api import Browser, Page

from examples.pages import Pages
from tests.chaos.proxy import proxying
from tests.client import model
from tests.fixtures_broker import RunningBroker
from tests.fixtures_chromium import ARGUMENTS, Window, open_window

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONNECT = """async (url) => {
    const { Client } = await import("/wsbroker.js");
    window.states = [];
    window.events = [];
    window.client = new Client(url, { timeout: 2000 });
    client.addEventListener("state", ({ detail }) => states.push(detail));
    window.news = client.subscribe("news");
    news.on("event", ({ data }) => events.push(data));
    news.on("gap", ({ reason }) => events.push(reason));
    await news.ready;
}"""
CONNECTED = "(count) => states.filter(({ state }) => state === 'connected').length >= count"


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    with Pages(0) as port:
        yield port


@contextlib.asynccontextmanager
async def client_in(window: Window, site: int, url: str) -> AsyncIterator[Page]:
    """A page with a client that is connected and subscribed to `news`."""
    page = await window.open(f"http://127.0.0.1:{site}/look.css")
    await page.evaluate(CONNECT, url)
    yield page


async def test_client_works_from_a_module_script(window: Window, site: int, broker: RunningBroker) -> None:
    async with client_in(window, site, broker.url) as page:
        receipt = await page.evaluate("() => client.publish('news', 1)")
        assert receipt["receivers"] == 1
        await page.wait_for_function("() => events.length === 1")
        await page.evaluate("() => client.close()")
        assert await page.evaluate("() => states.map(({ state }) => state)") == ["connecting", "connected", "closed"]


async def test_client_comes_back_at_once_when_the_machine_is_online(window: Window, site: int) -> None:
    async with model.running() as broker, client_in(window, site, broker.url) as page:
        # The broker asks to stay away for long: only the event makes the client come sooner.
        await broker.close_peers(1001, retry_after_ms=3_600_000)
        await page.wait_for_function("() => client.state === 'waiting'")
        await window.context.set_offline(True)
        await page.wait_for_function("() => !navigator.onLine")
        assert await page.evaluate("() => client.state") == "waiting"
        await window.context.set_offline(False)
        await page.wait_for_function(CONNECTED, arg=2)
        await page.evaluate("() => client.publish('news', 2)")
        await page.wait_for_function("() => events.length === 2")
        assert await page.evaluate("() => events") == ["disconnected", 2]


async def test_client_comes_back_at_once_when_the_page_is_visible(window: Window, site: int) -> None:
    async with model.running() as broker, client_in(window, site, broker.url) as page:
        await broker.close_peers(1001, retry_after_ms=3_600_000)
        await page.wait_for_function("() => client.state === 'waiting'")
        # Headless pages are always visible: the event is the page's own, and what it says of itself.
        await page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        await page.wait_for_function(CONNECTED, arg=2)


async def test_dead_connection_is_found_when_the_network_changes(window: Window, site: int) -> None:
    """The sockets are open on both sides, and nothing goes through: only a question shows it."""
    async with (
        model.running() as broker,
        proxying(int(broker.url.rpartition(":")[2]), random.Random(1)) as proxy,
        client_in(window, site, f"ws://127.0.0.1:{proxy.port}") as page,
    ):
        proxy.freeze()
        await asyncio.sleep(1.1)  # what was just heard is not asked about
        await page.evaluate("() => window.dispatchEvent(new Event('online'))")
        await page.wait_for_function(CONNECTED, arg=2)
        reasons = await page.evaluate("() => states.map(({ reason }) => reason)")
        assert "the broker fell silent" in reasons


async def test_page_in_the_background_keeps_its_connection_and_its_events(
    window: Window, site: int, broker: RunningBroker
) -> None:
    async with client_in(window, site, broker.url) as page:
        front = await window.context.new_page()
        await front.bring_to_front()
        await page.evaluate("async () => { for (let n = 0; n < 50; n++) await client.publish('news', n); }")
        await page.wait_for_function("() => events.length === 50", polling=100)
        assert await page.evaluate("() => states.length") == 2


async def test_frozen_tab_goes_on_or_comes_back_when_it_is_resumed(window: Window, site: int) -> None:
    async with model.running() as broker, client_in(window, site, broker.url) as page:
        session = await window.context.new_cdp_session(page)
        await session.send("Page.setWebLifecycleState", {"state": "frozen"})
        broker.cut()
        await session.send("Page.setWebLifecycleState", {"state": "active"})
        await page.wait_for_function(CONNECTED, arg=2)
        await page.evaluate("() => client.publish('news', 'after')")
        await page.wait_for_function("() => events.includes('after')")
        assert (await page.evaluate("() => events"))[0] == "disconnected"


async def test_page_in_the_back_forward_cache_has_no_connection_and_a_new_one_after_it(site: int) -> None:
    """Playwright switches the cache off, so this browser is started without that switch."""
    from playwright.async_api import async_playwright

    async with model.running() as broker, async_playwright() as playwright:
        browser: Browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=ARGUMENTS,
            ignore_default_args=["--disable-back-forward-cache"],
        )
        async with open_window(browser) as window, client_in(window, site, broker.url) as page:
            await page.evaluate("() => { window.mark = 1; }")
            await page.goto(f"http://127.0.0.1:{site}/README.md")
            while broker.peers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await page.go_back(wait_until="commit")
            await page.wait_for_function("() => window.mark === 1")
            await page.wait_for_function(CONNECTED, arg=2)
            reasons = await page.evaluate("() => states.map(({ reason }) => reason)")
            assert "the page is in the back-forward cache" in reasons
        await browser.close()
