"""What all tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the broker runs on: the native connection relies on how uvloop's transports write."""
    return {"uvloop": uvloop.new_event_loop}
