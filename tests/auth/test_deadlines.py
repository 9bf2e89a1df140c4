"""Deadlines on uvloop, whose handle of a time that has come knows no time."""

from __future__ import annotations

import asyncio

import uvloop

from broker.auth.deadlines import Deadlines


def test_deadline_of_this_moment_can_be_followed_by_others() -> None:
    called: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop, called.append)
        now = loop.time()
        deadlines.set("now", now)
        deadlines.set("before", now - 1)
        deadlines.set("later", now + 0.01)
        deadlines.set("cancelled", now + 0.005)
        deadlines.cancel("cancelled")
        while len(called) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        deadlines.stop()

    uvloop.run(asyncio.wait_for(main(), 10))
    assert called == ["before", "now", "later"]
