"""When identities expire, and when a client must have shown one: one timer for all of them.

Invariant: at most one timer is set, for the earliest deadline. A deadline that was moved or cancelled stays in the heap
until its time has come, and is ignored then.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable


class Deadlines:
    """Calls `on_deadline(id)` once for each id whose time has come. Times are those of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_deadline: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_deadline = on_deadline
        self._heap: list[tuple[float, str]] = []
        self._times: dict[str, float] = {}
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        """When the timer fires. The loop's handle of a time that has come knows no time (uvloop)."""

    def set(self, id: str, when: float) -> None:
        """Set, or move, the deadline of an id."""
        self._times[id] = when
        heapq.heappush(self._heap, (when, id))
        if len(self._heap) > 2 * len(self._times) + 64:  # clients that renew often
            self._heap = [(when, key) for key, when in self._times.items()]
            heapq.heapify(self._heap)
        self._schedule()

    def cancel(self, id: str) -> None:
        """Forget the deadline of an id, if it has one."""
        self._times.pop(id, None)

    def stop(self) -> None:
        """Call nothing any more."""
        self._times.clear()
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        if not self._heap or (self._timer is not None and self._timer_at <= self._heap[0][0]):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._heap[0][0]
        self._timer = self._loop.call_at(self._timer_at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._heap and self._heap[0][0] <= now:
            when, key = heapq.heappop(self._heap)
            if self._times.get(key) == when:
                del self._times[key]
                self._on_deadline(key)
        self._schedule()
