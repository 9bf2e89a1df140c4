"""Publishes the values of some gauges many times a second: `python -m examples.slow`."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

from examples.link import client_of, tell
from examples.pages import main

GAUGES = 8
RATE = 50
"""Rounds a second; in each round every gauge gets a new value."""


async def program(broker: str) -> None:
    """Publishes on `slow.gauges`, with the gauge as the key: `round`, `value` from 0 to 1, and `at`, when that was."""
    start = time.monotonic()
    async with client_of(broker) as client:
        for number in itertools.count():
            at = time.time()
            await asyncio.gather(
                *(
                    tell(client, "slow.gauges", {"round": number, "value": wave(at, gauge), "at": at}, f"g{gauge}")
                    for gauge in range(GAUGES)
                )
            )
            await asyncio.sleep(max(0.0, start + (number + 1) / RATE - time.monotonic()))


def wave(at: float, gauge: int) -> float:
    """The value of a gauge: a slow wave, each gauge with a beat of its own."""
    return round(0.5 + 0.5 * math.sin(at * (0.6 + 0.13 * gauge) + gauge), 4)


if __name__ == "__main__":
    main("slow", 8004, program)
