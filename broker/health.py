"""Health of the process: event loop lag, memory, file descriptors.

A periodic timer on the loop measures its delay. While the timer is late, a watchdog thread samples the stack of the
loop's thread. It can run during a blocking call and between two Python instructions, but not inside the native code,
which therefore measures its own write time. If the loop hangs, the watchdog thread logs it.
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
"""Seconds between two timer ticks."""

BLOCKED_AFTER: Final = 0.5
"""A tick that is later than this, in seconds, is logged."""

LOOK_EVERY: Final = 0.1
"""Seconds between two samples of the watchdog thread."""

HANGS_AFTER: Final = 5.0
"""If a tick is later than this, in seconds, the watchdog thread logs that the loop hangs."""

WARN_EVERY: Final = 10.0
"""Seconds between two warnings."""

LOW_MEMORY: Final = 0.9
"""From this part of `limits.max_memory` on, new connections are refused."""

HYSTERESIS: Final = 0.95
"""A level ends below this part of its bound. With one threshold for both directions it could change at every tick."""

TRIM_EVERY: Final = 1.0
"""Seconds between two trims while memory is low; longer if a trim takes more than a twentieth of it."""

PAGE: Final = os.sysconf("SC_PAGE_SIZE")

log = structlog.get_logger(__name__)


class HealthMonitor:
    """Monitors one event loop.

    `on_memory_pressure(level)` is called when the memory passes a bound: 0 normal, 1 refuse new connections, 2 throttle
    publishers.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: LoopContext, on_memory_pressure: Callable[[int], None]
    ) -> None:
        self.lag = Histogram()
        """Delay of the ticks, in seconds."""
        self.max_memory: int | None = None
        """Memory limit of the process in bytes; None: no limit."""
        self.level = 0
        """The current level of memory pressure."""
        self._loop = loop
        self._context = context
        self._on_memory_pressure = on_memory_pressure
        # Kept open, since the process may have no descriptor left when memory is low.
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._schedstat: int | None = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a kernel without CONFIG_SCHED_INFO
            self._schedstat = None
        self._due = 0.0
        self._cpu = 0.0
        self._runnable = 0.0
        self._delivered = 0
        self._where: str | None = None
        self._hang_logged = False
        self._trim_at = 0.0
        self._warned = -WARN_EVERY
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch_loop, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start monitoring the loop that runs in this thread."""
        self._arm()
        self._thread.start()

    def stop(self) -> None:
        """Stop monitoring."""
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

    def _arm(self) -> None:
        self._due = self._loop.time() + TICK
        self._cpu = time.process_time()
        self._runnable = self._runnable_time()
        self._delivered = self._context.delivered
        self._context.writing = 0.0
        self._where = None
        self._hang_logged = False
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late = now - self._due
        self.lag.observe(max(late, 0.0))
        if late > BLOCKED_AFTER and now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("event loop blocked", seconds=round(late, 3), **self._find_cause(late))
        self._check_memory()
        self._arm()

    def _find_cause(self, late: float) -> dict[str, Any]:
        """Find what blocked the loop, as far as is known."""
        if self._context.writing > late / 2:
            return {
                "cause": "fan-out",
                "deliveries": self._context.delivered - self._delivered,
                "write_seconds": round(self._context.writing, 3),
            }
        busy = time.process_time() - self._cpu
        if self._where is not None:
            is_busy = self._runnable_time() - self._runnable > late / 2
            return {"cause": "busy call" if is_busy else "blocking call", "where": self._where}
        if busy < late / 2:
            return {"cause": "process not scheduled", "cpu_seconds": round(busy, 3)}
        return {"cause": "unknown", "cpu_seconds": round(busy, 3)}

    def _runnable_time(self) -> float:
        """Seconds for which the loop's thread was running or runnable: on a busy machine it waits for a CPU (see
        schedstat in the kernel's documentation)."""
        if self._schedstat is None:
            return time.process_time()
        run, waited, *_ = os.pread(self._schedstat, 256, 0).split()
        return (int(run) + int(waited)) / 1e9

    def _check_memory(self) -> None:
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
        say(MEMORY_EVENTS[level], memory=memory, max_memory=self.max_memory)
        self.level = level
        self._on_memory_pressure(level)

    def _level_of(self, memory: int, max_memory: int) -> int:
        """Compute the level, with hysteresis for bounds that were reached before."""
        level = 0
        for number, bound in enumerate((max_memory * LOW_MEMORY, max_memory), 1):
            if memory >= bound * (HYSTERESIS if self.level >= number else 1):
                level = number
        return level

    def _trim(self, first: bool) -> None:
        """Return freed memory to the system; until then it counts as resident."""
        began = time.monotonic()
        if first:
            gc.collect()
        trim_memory()
        ended = time.monotonic()
        self._trim_at = ended + max(TRIM_EVERY, 20 * (ended - began))

    def _watch_loop(self) -> None:
        """Run in the watchdog thread: sample the stack of the loop while its tick is late."""
        last = time.monotonic()
        while not self._stop.wait(LOOK_EVERY):
            now = time.monotonic()
            # If this thread did not run either, the whole process was stopped, and the stack says nothing.
            ran = now - last < 2 * LOOK_EVERY
            last = now
            late = now - self._due
            if (
                not ran
                or late < BLOCKED_AFTER / 2
                or (self._hang_logged if late > HANGS_AFTER else self._where is not None)
            ):
                continue
            frame = sys._current_frames().get(self._main)
            # Between two callbacks the stack has only the runner of the loop.
            if frame is None or frame.f_code is asyncio.Runner.run.__code__:
                continue
            self._where = format_stack(frame)
            if late > HANGS_AFTER:
                self._hang_logged = True
                log.error("event loop hangs", seconds=round(late, 3), where=self._where)


MEMORY_EVENTS: Final = (
    "memory back to normal",
    "memory low: new connections refused",
    "memory limit reached: publishers throttled",
)


def format_stack(frame: FrameType) -> str:
    """Name the innermost functions of a stack, without their arguments."""
    names: list[str] = []
    found: FrameType | None = frame
    while found is not None and len(names) < 4:
        code = found.f_code
        names.append(f"{code.co_name} ({os.path.basename(code.co_filename)}:{found.f_lineno})")  # noqa: PTH119 -- a name
        found = found.f_back
    return " < ".join(names)


def open_descriptors() -> int | None:
    """Count the open files and sockets; None if unknown, as when no descriptor is left to look with."""
    try:
        # Linux 6.2 and later say it here; older ones say 0, and are counted.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))  # noqa: PTH116, PTH208 -- one line
    except OSError:
        return None


def max_descriptors() -> int:
    """Give the limit of open files and sockets."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
