"""A browser and a broker for the pages of the examples."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_chromium import Window, open_window, start_chromium


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests."""
    async with start_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def window(browser: Browser) -> AsyncIterator[Window]:
    """A browser window."""
    async with open_window(browser) as window:
        yield window


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    """A broker."""
    with start_broker() as broker:
        yield broker
