"""What history in memory costs. Not among the tests of the native code: sanitizers need memory of their own."""

from __future__ import annotations

import subprocess
import sys

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
