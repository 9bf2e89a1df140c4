"""Publishes the server's time every second: `python -m examples.clock`."""

from __future__ import annotations

import asyncio
import math
import time

from examples.link import client_of, tell
from examples.pages import main


async def program(broker: str) -> None:
    """Publishes at the beginning of each second: `time`, in seconds since 1970, and `offset` of local time from UTC."""
    async with client_of(broker) as client:
        while True:
            now = time.time()
            second = math.floor(now) + 1
            await asyncio.sleep(second - now)
            await tell(client, "clock.time", {"time": second, "offset": time.localtime(second).tm_gmtoff})


if __name__ == "__main__":
    main("clock", 8003, program)
