"""History in memory: what it costs, and what grows too old.

Not among the tests of the native code, since sanitizers need memory of their own.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

from broker.config import Limits
from broker.engines.base import Event, HistoryPage, Position
from broker.engines.memory import MemoryEngine
from broker.retention import Retention

MANY = """
import itertools, sys
from broker import messages
from broker._speedups import HistoryStore, append_event

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

numbers = itertools.count()
kept = HistoryStore(max_bytes=32 << 20, max_topics=20_000, new_epoch=lambda: str(next(numbers)))
data = b'"' + b"x" * 126 + b'"'
def publish(n):
    topic = f"session.{n}.state"
    log = kept.log(topic, events=10)
    for _ in range(3):
        append_event(log, messages.encode_event(topic, data, None, log.top + 1), None, len(data))
before = rss()
for n in range(1_000_000):
    publish(n)
assert len(kept) <= 20_000, len(kept)
assert kept.memory <= 32 << 20
print(rss() - before, kept.memory)
"""


def test_a_million_short_lived_topics_leave_no_more_than_the_limits() -> None:
    found = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    grown, counted = map(int, found.stdout.split())
    assert grown < 1.5 * counted, (grown, counted)
    assert counted > 15 << 20


def test_page_whose_events_grow_too_old_while_it_is_read_is_not_complete() -> None:
    pages: list[object] = []

    async def main() -> None:
        engine = MemoryEngine(Limits())
        await engine.start(lambda _: None, lambda _: None)
        for _ in range(5):
            engine.publish(Event("t", b"1"), Retention(events=100, age=0.05), lambda _: None)
        time.sleep(0.1)  # noqa: ASYNC251 -- the sweep has no turn
        log = engine.store.find("t")
        assert log is not None
        engine.history("t", Position(log.epoch, 2), 10, pages.append)
        await engine.stop()

    asyncio.run(main())
    (page,) = pages
    assert isinstance(page, HistoryPage)
    assert (page.events, page.first, page.top, page.complete) == ([], 6, 5, False)
