"""The counter: one number that all open pages share and change, and how many of them there are."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from playwright.async_api import Page, expect

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import PATIENCE, Window
from tests.fixtures_examples import Example, start_example

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def counter(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("counter", broker.url) as example:
        yield example


async def test_pages_share_the_counter(window: Window, counter: Example) -> None:
    one = await window.open(counter.address)
    await shows(one, "0", "1 page online")
    other = await window.open(counter.address)
    await shows(one, "0", "2 pages online")
    await shows(other, "0", "2 pages online")
    await one.click("#up")
    await one.click("#up")
    await shows(one, "2")
    await shows(other, "2")
    for _ in range(3):
        await other.click("#down")
    await shows(one, "−1")
    await shows(other, "−1")


async def test_new_page_shows_the_current_count(window: Window, counter: Example) -> None:
    early = await window.open(counter.address)
    await early.click("#up")
    await shows(early, "1")
    late = await window.open(counter.address)
    await shows(late, "1", "2 pages online")


async def test_concurrent_clicks_are_all_counted(window: Window, counter: Example) -> None:
    pages = [await window.open(counter.address) for _ in range(3)]
    for page in pages:
        await shows(page, "0", "3 pages online")
    click = "() => { for (let time = 0; time < 50; time++) document.querySelector('#up').click(); }"
    await asyncio.gather(*(page.evaluate(click) for page in pages))
    for page in pages:
        await shows(page, "150")


@pytest.mark.parametrize("way", ["close", "leave", "crash"])
async def test_closed_page_is_not_online(way: str, window: Window, counter: Example) -> None:
    page = await window.open(counter.address)
    other = await window.open(counter.address)
    await shows(page, "0", "2 pages online")
    if way == "close":
        await other.close()
    elif way == "leave":
        await other.goto("about:blank")
    else:
        await crash(other)
    await shows(page, "0", "1 page online")


async def test_reopened_page_is_online_again(window: Window, counter: Example) -> None:
    page = await window.open(counter.address)
    other = await window.open(counter.address)
    await shows(page, "0", "2 pages online")
    await other.goto("about:blank")
    await shows(page, "0", "1 page online")
    await other.go_back()
    await shows(other, "0", "2 pages online")
    await shows(page, "0", "2 pages online")
    await other.reload()
    await shows(other, "0", "2 pages online")


async def test_page_reports_a_missing_program_and_recovers(window: Window, broker: RunningBroker) -> None:
    with start_example("counter", broker.url) as counter:
        page = await window.open(counter.address)
        await page.click("#up")
        await shows(page, "1", "1 page online")
        counter.program.kill()
        counter.program.wait()
        await page.click("#up")
        await expect(page.locator("#trouble")).to_contain_text("python -m examples.counter", timeout=PATIENCE)
    with start_example("counter", broker.url):
        # The page is counted when it answers the first roll call.
        await shows(page, "0", "1 page online")
        await expect(page.locator("#trouble")).to_be_empty(timeout=PATIENCE)


async def test_count_survives_a_broker_restart(window: Window) -> None:
    # The least spread of those who come back, so that the test does not wait.
    environ = {"WSBROKER_LIMITS__RECONNECT_SPREAD": "0.1"}
    with start_broker(environ=environ) as broker:
        port = broker.port
        with start_example("counter", broker.url) as counter:
            page = await window.open(counter.address)
            await page.click("#up")
            await shows(page, "1", "1 page online")
            broker.program.terminate()
            await expect(page.locator("#up")).to_be_disabled(timeout=PATIENCE)
            await asyncio.to_thread(broker.program.wait)
            # The program comes back later than the page, which nobody hears until then.
            os.kill(counter.program.pid, signal.SIGSTOP)
            with start_broker(listen=f"127.0.0.1:{port}", environ=environ):
                await expect(page.locator("#link")).to_have_text("live", timeout=PATIENCE)
                await expect(page.locator("#trouble")).to_contain_text("Nobody counts", timeout=PATIENCE)
                await expect(page.locator("#up")).to_be_disabled(timeout=PATIENCE)
                os.kill(counter.program.pid, signal.SIGCONT)
                # Waits until the button can be clicked.
                await page.click("#up")
                await shows(page, "2", "1 page online")
                counter.program.terminate()
                counter.program.wait()


async def shows(page: Page, value: str, online: str | None = None) -> None:
    """Wait until a page shows this."""
    await expect(page.locator("#value")).to_have_text(value, timeout=PATIENCE)
    if online is not None:
        await expect(page.locator("#online")).to_have_text(online, timeout=PATIENCE)


async def crash(page: Page) -> None:
    """End the process of a page, which gets no chance to say anything."""
    async with page.expect_event("crash"):
        # Its answer never comes, because the page is not there any more.
        going = asyncio.ensure_future(page.goto("chrome://crash"))
    going.cancel()
    await asyncio.gather(going, return_exceptions=True)
