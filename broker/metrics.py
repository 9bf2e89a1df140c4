"""Counters and histograms of the node: plain numbers, read at each scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from broker.errors import CloseCode

KNOWN_CODES = frozenset(CloseCode) | {1005, 1006}
"""Close codes with a count of their own. Clients may send about 3,000 others, which share one count."""

TIMES = tuple(0.0001 * 2**i for i in range(18))
"""Bounds in seconds, from 0.1 ms to 13 s."""


class Histogram:
    """A histogram of durations."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = TIMES) -> None:
        self.bounds = bounds
        """Upper bounds in ascending order; values over the last one have a count too."""
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """The counters of one node since its start."""

    __slots__ = ("closed", "commands", "connected", "engine", "errors", "handshakes")

    def __init__(self) -> None:
        self.connected = 0
        """Established connections."""
        self.closed: Counter[int] = Counter()
        """Closed connections, by close code; 0 stands for unknown codes."""
        self.commands: Counter[str] = Counter()
        """Commands of the slow path, by op; `""` stands for those that could not be parsed."""
        self.errors: Counter[str] = Counter()
        """Failed commands, by error code."""
        self.handshakes = Histogram()
        """Seconds from accepting a socket to the response with status 101."""
        self.engine = Histogram()
        """Seconds from a publish to the answer of an engine in another process."""

    def close(self, code: int) -> None:
        """Count a closed connection."""
        self.closed[code if code in KNOWN_CODES else 0] += 1
