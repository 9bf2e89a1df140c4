"""The Python client as the chaos test drives it: commands come on standard input, what happens goes to standard output.

Both are JSON, one object a line. `subject.mjs` is the same in JavaScript.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

from wsbroker_client import Client, ClientError, Event, Gap, Subscription, TimedOut

CREDIT = 16


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Round:
    """One client, from its first connection to its close."""

    def __init__(self, url: str, topics: list[str]) -> None:
        self.client = Client(url, timeout=2.0, on_error=lambda error: say(uncaught=repr(error)))
        self.tasks: list[asyncio.Task[None]] = []
        self.readers = [asyncio.ensure_future(self.read(self.subscribe(topic))) for topic in topics]

    def subscribe(self, topic: str) -> Subscription[Any]:
        if topic.startswith("n."):  # so few of its events wait at the broker that it must drop some
            return self.client.subscribe(topic, credit=4, max_queue=8)
        return self.client.subscribe(topic, credit=CREDIT)

    async def read(self, subscription: Subscription[Any]) -> None:
        await subscription.ready()
        say(ready=subscription.topic)
        async for message in subscription.messages():
            if isinstance(message, Event):
                say(sub=subscription.topic, topic=message.topic, data=message.data)
            elif isinstance(message, Gap):
                say(sub=subscription.topic, gap=message.topic, missed=message.missed, reason=message.reason)

    async def publish(self, topic: str, number: int, reliable: bool) -> None:
        outcome = "ok"
        try:
            await self.client.publish(topic, number, reliable=reliable, timeout=20.0 if reliable else None)
        except TimedOut as error:
            outcome = "unknown" if error.sent else "no"
        except ClientError as error:
            outcome = error.code
        say(published=number, outcome=outcome)

    async def end(self) -> None:
        """Close; nothing may be left hanging."""
        await self.client.close()
        pending = (await asyncio.wait([*self.tasks, *self.readers], timeout=5.0))[1]
        say(ended=True, pending=len(pending), errors=[repr(e) for e in (r.exception() for r in self.readers) if e])


async def main() -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: say(uncaught=str(context)))
    current: Round | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command["do"] == "round":
            current = Round(command["url"], command["topics"])
            await current.client.__aenter__()
        elif command["do"] == "publish":
            assert current is not None
            task = asyncio.ensure_future(current.publish(command["topic"], command["data"], command["reliable"]))
            current.tasks.append(task)
        elif command["do"] == "end":
            assert current is not None
            await current.end()
            current = None
        elif command["do"] == "memory":
            gc.collect()
            ours = [each for each in gc.get_objects() if type(each).__module__.startswith("wsbroker_client.")]
            alive = [
                type(each).__name__ for each in ours if type(each).__name__ in ("Client", "Machine", "Stream", "Event")
            ]
            say(objects=len(gc.get_objects()), alive=alive)


if __name__ == "__main__":
    asyncio.run(main())
