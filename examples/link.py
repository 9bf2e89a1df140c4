"""How an example's program stays connected to the broker."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from broker.client import Client, ClientError, Closed, connect
from broker.errors import CommandError

# Seconds: the first wait after a lost connection, and the longest. It doubles in between.
FIRST_WAIT = 0.25
MAX_WAIT = 30.0

# Seconds that a connection has to last before the waits begin with the first again.
STABLE_AFTER = 5.0


async def stay_connected(
    url: str, work: Callable[[Client], Coroutine[Any, Any, None]], token: Callable[[], str] | None = None
) -> None:
    """Connects to the broker and does `work` with the connection, again and again, until it is cancelled.

    `token()` makes the token of a connection. After a loss it waits as long as the broker asked for in `bye`, or else
    longer each time. Where the broker says that to come back is of no use, it raises SystemExit.
    """
    losses = 0
    while True:
        started = time.monotonic()
        failure: Exception | None = None
        try:
            async with connect(url, token=None if token is None else token()) as client:
                print(f"connected to {url}", flush=True)
                await work(client)
        except* (ClientError, CommandError) as failures:
            failure = failures.exceptions[0]
        if is_permanent(failure):
            raise SystemExit(str(failure))
        losses = 1 if time.monotonic() - started >= STABLE_AFTER else losses + 1
        wait = requested_delay(failure) or back_off(losses)
        print(f"{failure}; next try in {wait:.1f} s", flush=True)
        await asyncio.sleep(wait)


def is_permanent(failure: Exception | None) -> bool:
    """Whether it would be the same again: a close code from 4500 to 4999, a command that the broker never takes."""
    if isinstance(failure, Closed):
        return 4500 <= failure.code <= 4999
    return isinstance(failure, CommandError) and not failure.retry


def requested_delay(failure: Exception | None) -> float:
    """Seconds to wait that the broker asked for; 0 where it did not."""
    return (failure.retry_after_ms or 0) / 1000 if isinstance(failure, Closed) else 0.0


def back_off(losses: int) -> float:
    """Seconds to wait after so many losses, up to half of it by chance, so that not all programs come at once."""
    return min(MAX_WAIT, FIRST_WAIT * 2.0 ** (losses - 1)) * random.uniform(0.5, 1)
