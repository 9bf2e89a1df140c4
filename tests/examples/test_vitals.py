"""The vitals: this machine's figures, every second, drawn as they come."""

from __future__ import annotations

import asyncio
import json
import platform
import re
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import PATIENCE, Window
from tests.fixtures_examples import Example, start_example

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Keeps every text of a figure.
WATCH = """() => {
    window.shown = {};
    for (const element of document.querySelectorAll("[data-figure]")) {
        const texts = (shown[`${element.closest("section").id}.${element.dataset.figure}`] = []);
        new MutationObserver(() => texts.push(element.textContent)).observe(element, { childList: true });
    }
}"""


@pytest.fixture
def vitals(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("vitals", broker.url) as example:
        yield example


async def test_the_figures_change_every_second(window: Window, vitals: Example) -> None:
    page = await window.context.new_page()
    events: dict[str, list[dict[str, Any]]] = {}
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: keep(frame, events)))
    await page.goto(vitals.address)
    await page.evaluate(WATCH)
    await page.wait_for_function(
        "() => ['cpu.busy', 'memory.used', 'network.received'].every((figure) => shown[figure].length >= 4)"
    )
    shown = await page.evaluate("() => shown")
    for kind in ("cpu", "memory", "network"):
        # Not the values: those of a machine that has nothing to do, or only to do, are the same all the time.
        times = [event["at"] for event in events[kind]]
        assert len(times) >= 4
        assert times == sorted(set(times))
    assert all(re.fullmatch(r"\d+(\.\d)? %", text) for text in shown["cpu.busy"])
    # Each text is that of an event. The last event may not be shown yet, the first ones were before the watch.
    said = [percent(event["system"] + event["user"]) for event in events["cpu"]]
    assert " ".join(shown["cpu.busy"]) in " ".join(said)
    assert all(re.fullmatch(r"\d+(\.\d)? [KMGT]?i?B", text) for text in shown["memory.used"])
    assert all(re.fullmatch(r"\d+(\.\d)? [kMG]?B/s", text) for text in shown["network.received"])


async def test_figures_are_those_of_this_machine(window: Window, vitals: Example) -> None:
    page = await window.open(vitals.address)
    await expect(page.locator("#host")).to_have_text(platform.node(), timeout=PATIENCE)
    await expect(page.locator("#system")).to_contain_text(platform.release())
    name, kibi, _ = read("/proc/meminfo")[0].split()
    assert name == "MemTotal:"
    gibi = int(kibi) / 2**20
    total = page.locator("[data-figure=total]")
    await expect(total).to_contain_text("GiB", timeout=PATIENCE)  # each kind of figures is an event of its own
    shown = await total.inner_text()
    assert shown.endswith("GiB")
    assert float(shown.split()[0]) == pytest.approx(gibi, abs=0.06 if gibi < 100 else 0.6)
    cores = sum(line.startswith("cpu") for line in read("/proc/stat")) - 1
    await expect(page.locator(".core")).to_have_count(cores, timeout=PATIENCE)


async def test_the_charts_grow_and_are_drawn(window: Window, vitals: Example) -> None:
    page = await window.open(vitals.address)
    for chart in ("cpu", "memory", "network"):
        await points(page, chart, 4)
        assert await colours(page, chart) > 0
    before = await picture(page)
    await points(page, "cpu", 6)
    assert await picture(page) != before


async def test_new_page_gets_the_past_figures_at_once(window: Window, vitals: Example) -> None:
    early = await window.open(vitals.address)
    await points(early, "cpu", 5)
    late = await window.open(vitals.address)
    # The first points are those of the past: live ones come one by one.
    first = await late.evaluate(
        """() => new Promise((resolve) => {
            const canvas = document.querySelector("#cpu canvas");
            if (canvas.dataset.points > 1) resolve(Number(canvas.dataset.points));
            new MutationObserver(() => canvas.dataset.points > 1 && resolve(Number(canvas.dataset.points)))
                .observe(canvas, { attributes: true, attributeFilter: ["data-points"] });
        })"""
    )
    assert first >= 5


async def test_page_continues_after_a_broker_restart(window: Window) -> None:
    # The least spread of those who come back, so that the test does not wait.
    environ = {"WSBROKER_LIMITS__RECONNECT_SPREAD": "0.1"}
    with start_broker(environ=environ) as broker:
        port = broker.port
        with start_example("vitals", broker.url) as vitals:
            page = await window.open(vitals.address)
            await points(page, "cpu", 2)
            broker.program.terminate()
            await expect(page.locator("#link")).not_to_have_text("live", timeout=PATIENCE)
            await asyncio.to_thread(broker.program.wait)
            before = await page.evaluate("() => Number(document.querySelector('#cpu canvas').dataset.points)")
            with start_broker(listen=f"127.0.0.1:{port}", environ=environ):
                await expect(page.locator("#link")).to_have_text("live", timeout=PATIENCE)
                await points(page, "cpu", before + 2)
                vitals.program.terminate()
                vitals.program.wait()


def keep(frame: str | bytes, events: dict[str, list[dict[str, Any]]]) -> None:
    """Keep the figures that came, by their kind."""
    message = json.loads(frame)
    kind = message.get("topic", "").removeprefix("vitals.now.")
    if message["op"] == "event" and kind != message["topic"]:
        events.setdefault(kind, []).append(message["data"])


def percent(value: float) -> str:
    """What the page writes for a share."""
    # toFixed of JavaScript rounds what lies in the middle up; Python's format rounds it to the even one.
    return f"{Decimal(value).quantize(Decimal('0.1' if value < 9.95 else '1'), ROUND_HALF_UP)} %"


def read(path: str) -> list[str]:
    """The lines of a file."""
    return Path(path).read_text().splitlines()


async def points(page: Page, chart: str, count: int) -> None:
    """Wait until a chart has so many points."""
    await page.wait_for_function(
        "([chart, count]) => Number(document.querySelector(`#${chart} canvas`).dataset.points) >= count",
        arg=[chart, count],
    )


async def colours(page: Page, chart: str) -> int:
    """How many pixels of a chart are coloured: not of its grid, which is grey."""
    found = await page.evaluate(
        """(chart) => {
            const canvas = document.querySelector(`#${chart} canvas`);
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let count = 0;
            for (let at = 0; at < data.length; at += 4) {
                const [red, green, blue, alpha] = data.slice(at, at + 4);
                if (alpha > 200 && Math.max(red, green, blue) - Math.min(red, green, blue) > 80) count++;
            }
            return count;
        }""",
        chart,
    )
    assert isinstance(found, int)
    return found


async def picture(page: Page) -> str:
    """What the chart of the processors looks like."""
    return str(await page.evaluate("() => document.querySelector('#cpu canvas').toDataURL()"))
