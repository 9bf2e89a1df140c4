"""The log: what the broker says of itself, on standard error.

Text for people, JSON for machines. A log that nobody takes never holds the broker up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import structlog
from structlog.typing import Processor

from broker.config import Log

log = structlog.get_logger(__name__)


def set_up_log(config: Log) -> None:
    """Send the log of the broker, and what libraries say through `logging`, to standard error.

    A message below the level is not even put together.
    """
    set_level(config)
    journal = goes_to_journal(os.environ.get("JOURNAL_STREAM", ""))
    processors: list[Processor] = [LogRateLimiter(), structlog.processors.add_log_level]
    if config.format == "json" or not journal:  # the journal has the time itself
        processors.append(structlog.processors.TimeStamper("iso", utc=True))
    if config.format == "json":
        processors += [structlog.processors.format_exc_info, to_json]
    else:
        colors = sys.stderr is not None and sys.stderr.isatty()
        # Plain: the pretty ones print the variables of each frame, payloads and tokens among them.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=colors, repr_native_str=True, exception_formatter=plain))
    if journal:
        processors.append(with_priority)
    structlog.configure(
        processors=processors,
        wrapper_class=Logger,
        logger_factory=StandardError,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[Forward()], force=True)


class Logger(structlog.make_filtering_bound_logger(logging.NOTSET)):  # type: ignore[misc]  # made at run time
    """What `structlog.get_logger` gives. Its methods are exchanged when the level changes."""


LEVELS = ("debug", "info", "warning", "error", "critical", "exception")


def set_level(config: Log) -> None:
    """Write what is as important as `config.level`, and nothing below it, from now on.

    structlog chooses the methods of a logger when it is made, and loggers live as long as the process.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    made = structlog.make_filtering_bound_logger(level)
    for name in (*LEVELS, "log"):
        setattr(Logger, name, getattr(made, name))
    logging.getLogger().setLevel(max(level, logging.WARNING))


PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}
"""sd-daemon(3), from syslog(3)."""


def goes_to_journal(stream: str) -> bool:
    """Whether standard error is what systemd has connected to its journal.

    `stream` is JOURNAL_STREAM, the device and inode of that (systemd.exec(5)). It also comes to those whose output goes
    elsewhere.
    """
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def with_priority(logger: object, method: str, rendered: Any) -> Any:
    """Put the priority before each line, by which journalctl sorts and colours."""
    prefix = f"<{PRIORITIES.get(method, 6)}>"
    if isinstance(rendered, bytes):
        return prefix.encode() + rendered
    return "\n".join(prefix + line for line in str(rendered).splitlines())


class LogRateLimiter:
    """Lets through so many entries of one kind in a while, and counts the others: what goes wrong a thousand times a
    second is not to fill a disk. `debug` is for those who want it all."""

    MOST = 20
    WHILE = 10.0
    KINDS = 1000
    """Kinds that are remembered. The broker's own are some thirty; libraries have more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, list[float]] = {}

    def __call__(self, logger: object, method: str, entry: Any) -> Any:
        """Pass an entry on, or raise DropEvent. The first that is passed on again says how many were not."""
        if method == "debug":
            return entry
        now = self._clock()
        kind = str(entry.get("logger", entry["event"]))
        if len(self._seen) >= self.KINDS:
            self._seen.clear()
        seen = self._seen.setdefault(kind, [now, 0])
        if now - seen[0] >= self.WHILE:
            suppressed = int(seen[1]) - self.MOST
            seen[:] = now, 0
            if suppressed > 0:
                entry["suppressed"] = suppressed
        seen[1] += 1
        if seen[1] > self.MOST:
            raise structlog.DropEvent
        return entry


def to_json(logger: object, method: str, event: Any) -> bytes:
    """Render a log entry as one JSON object; the last processor of structlog's chain."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return msgspec.json.encode(first | event, enc_hook=str)


class StandardError:
    """Where log lines go. A log that nobody takes (a pipe that is closed or not read, a full disk) must not stop the
    broker: a line that cannot be written at once is dropped, and counted. The first one that can be written again is
    preceded by the count.
    """

    # Of the descriptor, and so common to all loggers.
    dropped: ClassVar[int] = 0
    torn: ClassVar[bool] = False
    """Whether the last line that was written has no end."""

    def __init__(self, *names: object) -> None:
        """`names` is what `get_logger` was called with."""

    def msg(self, line: str | bytes) -> None:
        """Write one line, at once: lines of several processes do not mix, as long as they fit into PIPE_BUF."""
        lost = StandardError.dropped
        if lost and takes_more():
            StandardError.dropped = 0
            # An error, so that it is below no level. It comes back here, with nothing to tell.
            log.error("log lines dropped: standard error blocked", lines=lost)
            if StandardError.dropped:
                StandardError.dropped = lost
        data = line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line
        left = memoryview(b"\n" * StandardError.torn + data + b"\n")
        whole = len(left)
        try:
            while left and takes_more():
                # Of a pipe that has room, only so much is sure not to block (pipe(7)).
                left = left[os.write(2, left[: select.PIPE_BUF]) :]
        except OSError:
            pass  # it is counted below
        if left:
            StandardError.dropped += 1
        if len(left) < whole:
            StandardError.torn = len(left) > 0

    debug = info = warning = error = critical = exception = msg


def takes_more() -> bool:
    """Whether standard error can be written to without waiting for who reads it.

    That is asked, and the descriptor not set to O_NONBLOCK, because other processes share it. Files are always ready,
    and a terminal is waited for: who stops it with Ctrl-S means it.
    """
    try:
        kind = os.fstat(2).st_mode
    except OSError:
        return False
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return True
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return bool(poll.poll(0))


class Forward(logging.Handler):
    """Pass on what asyncio and others log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)


def report_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what went wrong where nobody could catch it.

    Not in the loop's own way, which prints the arguments of callbacks, payloads among them.
    """
    what, _, _ = str(context.get("message")).partition("(")
    log.error("unhandled exception", message=what.rstrip(), exc_info=context.get("exception"))


def complain(config: Log, text: str) -> None:
    """Say why the broker does not start: one line, of its own kind for people, of the log's for machines."""
    if config.format == "json":
        log.error("cannot start", problem=text)
        return
    # Some of it may come from elsewhere, and must not command the terminal.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in f"wsbroker: {text}")
    if goes_to_journal(os.environ.get("JOURNAL_STREAM", "")):
        line = with_priority(None, "error", line)
    StandardError().msg(line)
