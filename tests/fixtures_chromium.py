"""A real browser: Debian's Chromium, driven by Playwright, which must not download one of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

# Milliseconds. Far more than any page needs, also on a busy machine.
PATIENCE = 30_000

# A name that is not loopback's, for the page of another site. The page itself comes from loopback all the same.
FOREIGN_HOST = "foreign.example"

ARGUMENTS = [
    "--no-sandbox",  # tests may run as root, where Chromium's sandbox does not work
    "--disable-gpu",
    "--no-first-run",
    # Nothing that goes out to the network by itself.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    f"--host-resolver-rules=MAP {FOREIGN_HOST} 127.0.0.1",
]


@contextlib.asynccontextmanager
async def start_chromium() -> AsyncIterator[Browser]:
    """Run Chromium without a window. Where there is none, the tests are skipped; but in CI it must be there."""
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def open_window(browser: Browser, *, errors_expected: bool = False) -> AsyncIterator[Window]:
    """A window of its own, with cookies and connections of its own. At its end no page may have raised an error."""
    context = await browser.new_context()
    context.set_default_timeout(PATIENCE)
    window = Window(context)
    context.on("weberror", lambda error: window.errors.append(str(error.error)))
    try:
        yield window
        assert errors_expected or not window.errors
    finally:
        await context.close()


class Window:
    """A browser window, and the errors that its pages did not catch."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.errors: list[str] = []

    async def open(self, address: str) -> Page:
        """A new page that shows this address."""
        page = await self.context.new_page()
        await page.goto(address)
        return page
