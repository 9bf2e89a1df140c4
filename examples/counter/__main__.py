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

from examples.counter.counting import Counting
from examples.link import client_of, tell
from examples.pages import main
from wsbroker_client import Client, State

# Seconds from one roll call to the next.
ROLL_CALL_EVERY = 1.5


async def program(broker: str) -> None:
    """Counts, over as many connections as it takes."""
    async with client_of(broker) as client:
        await Counter(client).serve()


class Counter:
    """Takes what the pages say, tells them the state, calls the roll: three tasks, so that none waits for another."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._counting = Counting(timeout=2.5 * ROLL_CALL_EVERY)
        self._changed = asyncio.Event()

    async def serve(self) -> None:
        """Works until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._publish_state())
            group.create_task(self._call_roll())

    async def _listen(self) -> None:
        # After a time without a connection nobody was heard, and that is not the pages' fault.
        pages = self._client.subscribe("counter.page.*", on_gap=lambda _: self._counting.reset_timeouts(now()))
        async for event in pages:
            op = event.topic.rpartition(".")[2]
            if self._counting.handle(op, event.data, now()):
                self._changed.set()

    async def _publish_state(self) -> None:
        # What changes while an answer is on its way is told together.
        while True:
            await self._changed.wait()
            self._changed.clear()
            await tell(self._client, "counter.state", self._counting.state)

    async def _call_roll(self) -> None:
        while True:
            await tell(self._client, "counter.roll", {})
            await asyncio.sleep(ROLL_CALL_EVERY)
            if self._client.state is State.CONNECTED and self._counting.remove_silent(now()):
                self._changed.set()


def now() -> float:
    """Seconds, from no time in particular."""
    return asyncio.get_running_loop().time()


if __name__ == "__main__":
    main("counter", 8002, program)
