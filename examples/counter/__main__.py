"""Keeps a counter that all open pages share: `python -m examples.counter`.

This program alone knows the value and who is there. The pages ask it to count, and show what it says:

    counter.page.hello  page → program   {"page": …}                 a page is there, and does not know the state
    counter.page.here   page → program   {"page": …}                 the answer to a roll call
    counter.page.bye    page → program   {"page": …}                 a page is being closed
    counter.page.add    page → program   {"page": …, "by": 1}        count up; or down, with -1
    counter.state       program → pages  {"value": …, "online": …}   after every change and every hello
    counter.roll        program → pages  {}                          the roll call

A page that crashes says no bye. So the program calls the roll, and removes a page that missed it twice. The pages do
not send by themselves at intervals: a browser slows the timers of a page in the background down to one a minute, while
a message from the broker wakes it at any time.
"""

from __future__ import annotations

import asyncio

import orjson

from broker.client import Client
from broker.messages import EventMessage
from examples.counter.counting import Counting
from examples.link import stay_connected
from examples.pages import main

# Seconds from one roll call to the next.
ROLL_CALL_EVERY = 1.5


async def program(broker: str) -> None:
    """Counts, over as many connections as it takes."""
    counter = Counter()
    await stay_connected(broker, counter.serve)


class Counter:
    """Takes what the pages say, tells them the state, calls the roll: three tasks, so that none waits for another."""

    def __init__(self) -> None:
        self._counting = Counting(timeout=2.5 * ROLL_CALL_EVERY)
        self._changed = asyncio.Event()

    async def serve(self, client: Client) -> None:
        """Works with one connection until it is lost."""
        await client.subscribe("counter.page.*")
        self._counting.reset_timeouts(now())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(client))
            group.create_task(self._publish_state(client))
            group.create_task(self._call_roll(client))

    async def _listen(self, client: Client) -> None:
        async for message in client:
            if isinstance(message, EventMessage):
                op = message.topic.rpartition(".")[2]
                if self._counting.handle(op, orjson.loads(bytes(message.data)), now()):
                    self._changed.set()

    async def _publish_state(self, client: Client) -> None:
        # What changes while an answer is on its way is told together.
        while True:
            await self._changed.wait()
            self._changed.clear()
            await client.publish("counter.state", self._counting.state)

    async def _call_roll(self, client: Client) -> None:
        while True:
            await client.publish("counter.roll", {})
            await asyncio.sleep(ROLL_CALL_EVERY)
            if self._counting.remove_silent(now()):
                self._changed.set()


def now() -> float:
    """Seconds, from no time in particular."""
    return asyncio.get_running_loop().time()


if __name__ == "__main__":
    main("counter", 8002, program)
