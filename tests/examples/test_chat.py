"""The chat: names from tokens, the last messages, who is here, and nothing missed over a lost connection."""

from __future__ import annotations

import asyncio
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import Page, expect
from websockets.sync.client import connect

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import PATIENCE, Window
from tests.fixtures_examples import Example, start_example, start_relay

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECRET = "only for this test, and long enough"
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")
"""The folder for pictures of the pages, for the docs. Empty: none are made."""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "secret").write_text(SECRET)
    return {"WSBROKER_AUTH__SECRET_FILE": str(tmp_path / "secret"), "WSBROKER_SERVER__ADMIN": ""}


@pytest.fixture
def broker(environ: dict[str, str]) -> Iterator[RunningBroker]:
    """A broker with the configuration of the example."""
    with start_broker("--config", "examples/chat/wsbroker.toml", environ=environ) as broker:
        yield broker


@pytest.fixture
def chat(broker: RunningBroker) -> Iterator[Example]:
    """The program, running."""
    with start_example("chat", broker.url, {"TOKEN_SECRET": SECRET}) as example:
        yield example


def ask_token(site: str, name: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(f"{site}/token?name={name}", method="POST")) as answer:
        return str(answer.read().decode())


async def enter(window: Window, chat: Example, name: str) -> Page:
    page = await window.open(chat.address)
    await page.fill("#name", name)
    await page.click("#enter button")
    await expect(page.locator("#link")).to_have_text("live")
    await expect(page.locator("#members")).to_contain_text(name)
    return page


async def say(page: Page, text: str) -> None:
    await page.fill("#text", text)
    await page.click("#say button")


async def test_members_talk_and_see_each_other(window: Window, chat: Example) -> None:
    ann = await enter(window, chat, "Ann")
    bob = await enter(window, chat, "Bob_2")
    for page in (ann, bob):
        await expect(page.locator("#members li")).to_have_count(2)
        await expect(page.locator("#count")).to_have_text("2")
    await say(ann, "Hello <b>all</b>")
    await expect(bob.locator("#messages .text")).to_have_text(["Hello <b>all</b>"])
    await say(bob, "Hello Ann")
    await expect(ann.locator("#messages .text")).to_have_text(["Hello <b>all</b>", "Hello Ann"])
    await expect(ann.locator("#messages .who")).to_contain_text(["Ann", "Bob_2"])
    carol = await enter(window, chat, "Carol")
    await expect(carol.locator("#messages .text")).to_have_text(["Hello <b>all</b>", "Hello Ann"])
    await expect(carol.locator("#members li")).to_have_count(3)
    if SCREENSHOTS:
        await say(carol, "I have read all of it: the last messages were here at once.")
        await expect(ann.locator("#messages .text")).to_have_count(3)
        await ann.set_viewport_size({"width": 1000, "height": 680})
        await ann.screenshot(path=f"{SCREENSHOTS}/chat.png")
    await bob.close()
    await expect(ann.locator("#members li")).to_have_count(2)
    await expect(ann.locator("#members")).not_to_contain_text("Bob_2")


async def test_name_is_the_one_of_the_token(chat: Example, broker: RunningBroker) -> None:
    address = chat.address.partition("/chat/")[0]
    token = await asyncio.to_thread(ask_token, address, "mallory")
    with connect(broker.url, additional_headers={"Authorization": f"Bearer {token}"}, proxy=None) as client:
        client.recv()
        for topic in ("chat.say.ann", "chat.lobby"):
            client.send(f'{{"op":"publish","id":1,"topic":"{topic}","data":{{"name":"ann","text":"x"}}}}')
            assert '"code":"forbidden"' in str(client.recv())
    for name in ("", "host", "a.b", "x" * 21, "*"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            await asyncio.to_thread(ask_token, address, name)


async def test_nothing_is_missed_over_a_lost_connection(window: Window, chat: Example, broker: RunningBroker) -> None:
    ann = await enter(window, chat, "Ann")
    async with start_relay(broker.port) as relay:
        through = Example(chat.program, chat.address.replace(f":{broker.port}/", f":{relay.port}/"))
        assert through.address != chat.address
        bob = await enter(window, through, "Bob")
        await say(ann, "first")
        await expect(bob.locator("#messages .text")).to_have_text(["first"])
        relay.cut()
        await expect(bob.locator("#link")).not_to_have_text("live")
        await expect(ann.locator("#members li")).to_have_count(1)
        for n in range(3):
            await say(ann, f"while you were away {n}")
            await expect(ann.locator("#messages .text")).to_have_count(n + 2)
        relay.mend()
        expected = ["first", *(f"while you were away {n}" for n in range(3))]
        await expect(bob.locator("#messages .text")).to_have_text(expected, timeout=PATIENCE)
        await expect(ann.locator("#members li")).to_have_count(2)
        await expect(bob.locator("#members li")).to_have_count(2)
