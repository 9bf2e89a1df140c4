"""Pages to try the browser's WebSocket in, and a broker for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import Window, open_window, start_chromium

CLIENT = Path(__file__).with_name("client.js")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests."""
    async with start_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def window(browser: Browser) -> AsyncIterator[Window]:
    """A window whose pages know `connect` of client.js."""
    async with open_window(browser) as window:
        await window.context.add_init_script(path=CLIENT)
        yield window


@pytest_asyncio.fixture(loop_scope="session")
async def page(window: Window, site: int) -> Page:
    """An empty page from loopback."""
    return await window.open(f"http://127.0.0.1:{site}/")


@pytest.fixture(scope="session")
def site() -> Iterator[int]:
    """The port on loopback from which empty pages come."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server, contextlib.ExitStack() as end:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        end.callback(thread.join)
        end.callback(server.shutdown)
        yield server.server_port


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    """One broker for the tests of a file. Each takes topics of its own."""
    with start_broker() as broker:
        yield broker


class EmptyPage(BaseHTTPRequestHandler):
    """The same page at every path."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>empty</title><link rel=icon href=data:,>")

    def log_message(self, format: str, *args: object) -> None:
        pass
