"""Publishes the server's time every second: `python -m examples.clock`."""

from __future__ import annotations

import asyncio
import math
import time

from broker.client import Client
from examples.link import stay_connected
from examples.pages import main


async def program(broker: str) -> None:
    """Ticks, over as many connections as it takes."""
    await stay_connected(broker, tick)


async def tick(client: Client) -> None:
    """Publishes at the beginning of each second: `time`, in seconds since 1970, and `offset` of local time from UTC."""
    while True:
        now = time.time()
        second = math.floor(now) + 1
        await asyncio.sleep(second - now)
        await client.publish("clock.time", {"time": second, "offset": time.localtime(second).tm_gmtoff})


if __name__ == "__main__":
    main("clock", 8003, program)
