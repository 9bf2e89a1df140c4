"""The page that is too slow: with `latest` and credit it shows the present, without them the past."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures_broker import RunningBroker
from tests.fixtures_chromium import Window
from tests.fixtures_examples import Example, start_example

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def slow(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("slow", broker.url) as example:
        yield example


async def test_both_subscriptions_get_events(window: Window, slow: Example) -> None:
    page = await window.open(slow.address)
    for side in ("latest", "backlog"):
        await page.wait_for_function(f"() => Number(document.querySelector('#{side}').dataset.round) > 0")
        assert await page.locator(f"#{side} .gauges div").count() == 8
        assert "shown" in await page.locator(f"#{side} .counts").inner_text()


async def test_busy_page_shows_new_events_with_latest_and_old_events_without(window: Window, slow: Example) -> None:
    page = await window.open(slow.address)
    assert await page.locator("#busy-words").inner_text() == "5 ms"  # too slow from the start
    await page.wait_for_function("() => document.querySelector('#latest').dataset.round")
    await page.locator("#busy").fill("10")
    assert await page.locator("#busy-words").inner_text() == "10 ms"
    # Each second the right side falls behind by more than half of one, and the left one passes over the rest.
    await page.wait_for_function(
        """() => {
            const round = (side) => Number(document.querySelector(side).dataset.round);
            return round("#latest") - round("#backlog") > 50;
        }"""
    )
    assert " 0 passed over" not in await page.locator("#latest .counts").inner_text()
    assert " 0 passed over" in await page.locator("#backlog .counts").inner_text()
