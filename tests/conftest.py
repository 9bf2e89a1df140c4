"""What all tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import pytest
import uvloop
from hypothesis import settings

# Brokers that tests start have no admin listener, unless they are told to: they would all take the same port.
os.environ["WSBROKER_SERVER__ADMIN"] = ""

# How long an example takes says more about the machine and who else is on it than about the code.
settings.register_profile("wsbroker", deadline=None)
settings.load_profile("wsbroker")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the broker runs on: the native connection relies on how uvloop's transports write."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    """The marker of tests that need programs beside Python; tests/needs.py has their table."""
    config.addinivalue_line("markers", "needs(name, ...): programs that the test needs")
