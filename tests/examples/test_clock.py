"""The clock: the server's time, pushed to every page."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.fixtures_broker import RunningBroker
from tests.fixtures_chromium import Window
from tests.fixtures_examples import Example, start_example

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Keeps every time that the page shows, with the angles of the hands at that moment.
WATCH = """() => {
    window.shown = [];
    const angle = (id) => Number.parseFloat(document.getElementById(id).style.transform.slice("rotate(".length)) % 360;
    new MutationObserver(() => shown.push({
        time: document.getElementById("time").textContent,
        angles: ["hours", "minutes", "seconds"].map(angle),
    })).observe(document.getElementById("time"), { childList: true });
}"""


@pytest.fixture
def clock(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("clock", broker.url) as example:
        yield example


async def test_clock_ticks_every_second(window: Window, clock: Example) -> None:
    page = await window.open(clock.address)
    await page.evaluate(WATCH)
    await page.wait_for_function("() => shown.length >= 4")
    seconds = [seconds_of(each["time"]) for each in await page.evaluate("() => shown.slice(0, 4)")]
    assert [(later - seconds[0]) % 86_400 for later in seconds] == [0, 1, 2, 3]


async def test_clock_shows_the_time_of_the_server(window: Window, clock: Example) -> None:
    page = await window.open(clock.address)
    await page.evaluate(WATCH)
    before = time.time()
    await page.wait_for_function("() => shown.length >= 1")
    after = time.time()
    shown = seconds_of(await page.evaluate("() => shown[0].time"))
    assert shown in {
        seconds_of(time.strftime("%H:%M:%S", time.localtime(s))) for s in range(int(before), int(after) + 1)
    }
    assert str(time.localtime(after).tm_year) in await page.locator("#date").inner_text()


async def test_hands_agree_with_the_digits(window: Window, clock: Example) -> None:
    page = await window.open(clock.address)
    await page.evaluate(WATCH)
    await page.wait_for_function("() => shown.length >= 2")
    for each in await page.evaluate("() => shown"):
        seconds = seconds_of(each["time"])
        assert each["angles"] == pytest.approx([seconds / 120 % 360, seconds / 10 % 360, seconds * 6 % 360], abs=0.001)


async def test_all_pages_show_the_same_time(window: Window, clock: Example) -> None:
    pages = [await window.open(clock.address) for _ in range(3)]
    for page in pages:
        await page.evaluate(WATCH)
    histories = []
    for page in pages:
        await page.wait_for_function("() => shown.length >= 3")
        histories.append({each["time"] for each in await page.evaluate("() => shown")})
    assert len(set.intersection(*histories)) >= 2


def seconds_of(shown: str) -> int:
    """Seconds since midnight."""
    hours, minutes, seconds = map(int, shown.split(":"))
    return 3600 * hours + 60 * minutes + seconds
