"""How often something may happen for each of many keys: a token bucket for each. No I/O.

Invariant: at most MOST keys are remembered; those that were used least recently are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

MOST: Final = 65_536


class Rates:
    """`rate` times a second on the average, `burst` times at once, for each key."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self._known: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        """What is left of each bucket, and when it was filled."""

    def __len__(self) -> int:
        return len(self._known)

    def take(self, key: Hashable, now: float) -> float:
        """Take one for a key, at a time in seconds. Returns 0 if there was one, else after how many seconds one is."""
        left, filled = self._known.pop(key, (float(self.burst), now))
        left = min(self.burst, left + (now - filled) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._known[key] = (left if wait else left - 1, now)
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        return wait
