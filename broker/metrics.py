"""What is counted: plain numbers, which cost an addition where something happens and are read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from broker.errors import CloseCode

KNOWN_CODES = frozenset(CloseCode) | {1005, 1006}
"""Close codes that are counted each for itself. Clients may choose others: some 3,000, which count as one."""

TIMES = tuple(0.0001 * 2**i for i in range(18))
"""Bounds in seconds, from 0.1 ms to 13 s."""


class Histogram:
    """How often something took how long."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = TIMES) -> None:
        self.bounds = bounds
        """Upper bounds in ascending order; beyond the last one it is counted too."""
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """What one node has counted since its start."""

    __slots__ = ("closed", "commands", "connected", "engine", "errors", "handshakes")

    def __init__(self) -> None:
        self.connected = 0
        """Connections that were established."""
        self.closed: Counter[int] = Counter()
        """Those that took part no more, by close code; 0 stands for codes that are nobody's."""
        self.commands: Counter[str] = Counter()
        """Commands that the fast path did not take, by op; `""` stands for what could not be read."""
        self.errors: Counter[str] = Counter()
        """Commands that were not carried out, by error code."""
        self.handshakes = Histogram()
        """From accepting a socket to the answer that it is a WebSocket now."""
        self.engine = Histogram()
        """From a publish to its answer, where the engine is another process."""

    def close(self, code: int) -> None:
        """Count a connection that takes part no more."""
        self.closed[code if code in KNOWN_CODES else 0] += 1
