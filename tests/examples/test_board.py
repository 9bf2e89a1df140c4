"""The board: a compacted topic as a table of moving things, complete at once for a page that is opened late."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from playwright.async_api import Page, expect

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import PATIENCE, Window
from tests.fixtures_examples import Example, start_example, start_relay

pytestmark = pytest.mark.asyncio(loop_scope="session")

BOATS = 6
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    """A broker with the configuration of the example."""
    environ = {"WSBROKER_SERVER__ADMIN": ""}
    with start_broker("--config", "examples/board/wsbroker.toml", environ=environ) as broker:
        yield broker


@pytest.fixture
def board(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("board", broker.url) as example:
        yield example


async def open_board(window: Window, board: Example) -> Page:
    page = await window.open(board.address)
    await expect(page.locator("#board[data-live]")).to_be_visible()
    return page


async def put(page: Page, text: str) -> None:
    await page.fill("#text", text)
    await page.click("#put button")
    await expect(page.locator(".note", has_text=text)).to_be_visible()


async def places(page: Page, selector: str) -> list[str]:
    """Each thing with its place, without those that the program moves all the time."""
    found: list[str] = await page.eval_on_selector_all(
        selector, "(all) => all.map((each) => `${each.dataset.key} ${each.style.left} ${each.style.top}`).sort()"
    )
    return found


async def test_late_page_has_the_whole_board_at_once_and_stays_equal(window: Window, board: Example) -> None:
    early = await open_board(window, board)
    await expect(early.locator(".boat")).to_have_count(BOATS)
    for text in ("Bring the tea", "Who has the map?", "Gone soon"):
        await put(early, text)
    await early.locator(".note", has_text="Gone soon").get_by_role("button").click()
    await expect(early.locator(".note")).to_have_count(2)
    late = await open_board(window, board)
    assert await late.locator(".note").count() == 2  # at the very moment of `live`
    assert await late.locator(".boat").count() == BOATS
    assert await places(late, ".note") == await places(early, ".note")
    before = await places(late, ".note")
    note = late.locator(".note", has_text="tea")
    box = await note.bounding_box()
    assert box is not None
    await late.mouse.move(box["x"] + 10, box["y"] + 10)
    await late.mouse.down()
    await late.mouse.move(400, 300, steps=5)
    await late.mouse.move(500, 330, steps=5)
    await late.mouse.up()
    after = await places(late, ".note")
    assert after != before
    await early.wait_for_function(
        "(wanted) => JSON.stringify([...document.querySelectorAll('.note')]"
        ".map((each) => `${each.dataset.key} ${each.style.left} ${each.style.top}`).sort()) === wanted",
        arg=json.dumps(after, separators=(",", ":")),
    )
    if SCREENSHOTS:
        await early.set_viewport_size({"width": 1000, "height": 780})
        await early.screenshot(path=f"{SCREENSHOTS}/board.png")


async def test_boats_move(window: Window, board: Example) -> None:
    page = await open_board(window, board)
    before = await places(page, ".boat")
    await page.wait_for_function(
        "(before) => !before.includes([...document.querySelectorAll('.boat')]"
        ".map((each) => `${each.dataset.key} ${each.style.left} ${each.style.top}`)[0])",
        arg=before,
    )


async def test_removals_reach_a_page_that_was_away(window: Window, board: Example, broker: RunningBroker) -> None:
    one = await open_board(window, board)
    async with start_relay(broker.port) as relay:
        through = Example(board.program, board.address.replace(f":{broker.port}/", f":{relay.port}/"))
        other = await open_board(window, through)
        await put(one, "stays")
        await put(one, "goes")
        await expect(other.locator(".note")).to_have_count(2)
        relay.cut()
        await expect(other.locator("#link")).not_to_have_text("live")
        await one.locator(".note", has_text="goes").get_by_role("button").click()
        await expect(one.locator(".note")).to_have_count(1)
        relay.mend()
        await expect(other.locator(".note")).to_have_count(1, timeout=PATIENCE)
        await expect(other.locator(".note")).to_contain_text("stays")
