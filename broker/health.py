"""How the broker is: whether its event loop turns, how much memory it takes up, how many descriptors it has left.

A tick on the loop measures how late it comes. While it does not come, a thread looks where the loop is stuck: it can
run during a call that waits, and between two steps of Python, but not in the middle of the native code, which therefore
measures the time that it writes. Of a loop that never turns again the thread tells itself.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import structlog

from broker._speedups import LoopContext, trim_memory
from broker.metrics import Histogram

TICK: Final = 0.25
"""Seconds between two looks."""

LATE: Final = 0.5
"""So late a tick is worth a warning, in seconds."""

LOOK: Final = 0.1
"""Seconds between two looks of the thread."""

HANGS: Final = 5.0
"""So late a tick may never come, in seconds: the thread tells of it then."""

WARN_EVERY: Final = 10.0
"""Seconds between two warnings."""

TIGHT: Final = 0.9
"""From this part of the memory that it may take up on, the broker lets nobody in."""

RELAX: Final = 0.95
"""Below this part of a bound it is kept no more. With one threshold for both ways the broker would open and close four
times a second."""

TRIM_EVERY: Final = 1.0
"""Seconds between two trims while memory is short; more where one takes more than a twentieth of that."""

PAGE: Final = os.sysconf("SC_PAGE_SIZE")

log = structlog.get_logger(__name__)


class HealthMonitor:
    """The watch over one event loop.

    `memory_pressure(level)` is called when the memory passes a bound: 0 normal, 1 no new connections, 2 publishers are
    slowed down.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: LoopContext, memory_pressure: Callable[[int], None]
    ) -> None:
        self.lag = Histogram()
        """How late the ticks came, in seconds."""
        self.max_memory: int | None = None
        """Bytes of memory that the process may take up."""
        self.level = 0
        """How short of memory the broker is, as told to `memory_pressure`."""
        self._loop = loop
        self._context = context
        self._tight = memory_pressure
        # Kept open: when it matters most there may be no descriptor for it.
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._schedstat: int | None = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a kernel without CONFIG_SCHED_INFO
            self._schedstat = None
        self._due = 0.0
        self._cpu = 0.0
        self._wanted = 0.0
        self._delivered = 0
        self._where: str | None = None
        self._told = False
        self._trim_at = 0.0
        self._warned = -WARN_EVERY
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch the loop that runs in this thread."""
        self._set()
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        self._thread.join()
        os.close(self._statm)
        if self._schedstat is not None:
            os.close(self._schedstat)

    @property
    def memory(self) -> int:
        """Resident memory of the process, in bytes (proc(5), statm)."""
        return int(os.pread(self._statm, 256, 0).split()[1]) * PAGE

    def _set(self) -> None:
        self._due = self._loop.time() + TICK
        self._cpu = time.process_time()
        self._wanted = self._wanted_cpu()
        self._delivered = self._context.delivered
        self._context.writing = 0.0
        self._where = None
        self._told = False
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late = now - self._due
        self.lag.observe(max(late, 0.0))
        if late > LATE and now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("event loop blocked", seconds=round(late, 3), **self._culprit(late))
        self._weigh()
        self._set()

    def _culprit(self, late: float) -> dict[str, Any]:
        """Say what held the loop up, as far as can be told."""
        if self._context.writing > late / 2:
            return {
                "cause": "fan-out",
                "deliveries": self._context.delivered - self._delivered,
                "write_seconds": round(self._context.writing, 3),
            }
        busy = time.process_time() - self._cpu
        if self._where is not None:
            works = self._wanted_cpu() - self._wanted > late / 2
            return {"cause": "busy call" if works else "blocking call", "where": self._where}
        if busy < late / 2:
            return {"cause": "process not scheduled", "cpu_seconds": round(busy, 3)}
        return {"cause": "unknown", "cpu_seconds": round(busy, 3)}

    def _wanted_cpu(self) -> float:
        """For how long the main thread, which is the loop's, has run or would have, in seconds: on a busy machine it
        waits for its turn (the kernel's documentation of schedstats)."""
        if self._schedstat is None:
            return time.process_time()
        run, waited, *_ = os.pread(self._schedstat, 256, 0).split()
        return (int(run) + int(waited)) / 1e9

    def _weigh(self) -> None:
        if self.max_memory is None:
            level, memory = 0, 0
        else:
            memory = self.memory
            level = self._level_of(memory, self.max_memory)
        if level and (level > self.level or time.monotonic() >= self._trim_at):
            self._trim(level > self.level)
        if level == self.level:
            return
        say = log.warning if level > self.level else log.info
        say(MEMORY[level], memory=memory, max_memory=self.max_memory)
        self.level = level
        self._tight(level)

    def _level_of(self, memory: int, max_memory: int) -> int:
        """Say which bounds are kept: those that are reached, and those that were and have not been left for good."""
        level = 0
        for number, bound in enumerate((max_memory * TIGHT, max_memory), 1):
            if memory >= bound * (RELAX if self.level >= number else 1):
                level = number
        return level

    def _trim(self, first: bool) -> None:
        """Give back what is not in use: what was freed is still counted as memory that the process takes up."""
        began = time.monotonic()
        if first:
            gc.collect()
        trim_memory()
        ended = time.monotonic()
        self._trim_at = ended + max(TRIM_EVERY, 20 * (ended - began))

    def _look(self) -> None:
        """In the thread: see where the loop is while its tick is late."""
        last = time.monotonic()
        while not self._stop.wait(LOOK):
            now = time.monotonic()
            # Where this thread did not run either, the whole process stood still, and where it stood says nothing.
            ran = now - last < 2 * LOOK
            last = now
            late = now - self._due
            if not ran or late < LATE / 2 or (self._told if late > HANGS else self._where is not None):
                continue
            frame = sys._current_frames().get(self._main)
            # Between two callbacks there is nothing but what runs the loop, and that says nothing.
            if frame is None or frame.f_code is asyncio.Runner.run.__code__:
                continue
            self._where = place(frame)
            if late > HANGS:
                self._told = True
                log.error("event loop hangs", seconds=round(late, 3), where=self._where)


MEMORY: Final = (
    "memory back to normal",
    "memory low: new connections refused",
    "memory limit reached: publishers throttled",
)


def place(frame: FrameType) -> str:
    """Name the innermost functions of a stack, without what they were called with."""
    names: list[str] = []
    found: FrameType | None = frame
    while found is not None and len(names) < 4:
        code = found.f_code
        names.append(f"{code.co_name} ({os.path.basename(code.co_filename)}:{found.f_lineno})")  # noqa: PTH119 -- a name
        found = found.f_back
    return " < ".join(names)


def open_descriptors() -> int | None:
    """How many files and sockets are open; None if it cannot be told, as when there are none left to look."""
    try:
        # Linux 6.2 and later say it here; older ones say 0, and are counted.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))  # noqa: PTH116, PTH208 -- one line
    except OSError:
        return None


def max_descriptors() -> int:
    """How many there may be."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
