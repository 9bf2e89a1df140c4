"""A shared board: `python -m examples.board`.

`board.things` is a compacted topic. The key of an event is a thing, its data where the thing is and what it looks like;
null removes the thing. This program moves some boats; the pages add, drag and remove notes. A page that is opened late
subscribes with `last: "all"`, and shows the whole board at once.
"""

from __future__ import annotations

import asyncio
import math

from examples.link import client_of, tell
from examples.pages import main

BOATS = 6
EVERY = 0.1
"""Seconds between two moves."""
LAP = 24.0
"""Seconds that the fastest boat needs for a round."""


async def program(broker: str) -> None:
    """Sails, over as many connections as it takes."""
    async with client_of(broker) as client:
        while True:
            now = asyncio.get_running_loop().time()
            for number in range(BOATS):
                await tell(client, "board.things", boat(number, now), key=f"boat-{number}")
            await asyncio.sleep(EVERY)


def boat(number: int, seconds: float) -> dict[str, object]:
    """A boat at some time: its place from 0 to 1, and its heading in degrees."""
    angle = 2 * math.pi * (seconds / (LAP * (1 + 0.2 * number)) + number / BOATS)
    wide, high = 0.12 + 0.06 * number, 0.1 + 0.055 * number
    x, y = 0.5 + wide * math.cos(angle), 0.5 + high * math.sin(angle)
    heading = math.degrees(math.atan2(high * math.cos(angle), -wide * math.sin(angle)))
    return {"kind": "boat", "x": round(x, 4), "y": round(y, 4), "heading": round(heading, 1)}


if __name__ == "__main__":
    main("board", 8007, program)
