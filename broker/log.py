"""The log, on standard error: text for people, JSON for programs. Writing the log never blocks the broker."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

import orjson
import structlog
from structlog.typing import Processor

from broker.config import Log

log = structlog.get_logger(__name__)


def set_up_log(config: Log) -> None:
    """Send the log of the broker, and that of libraries through `logging`, to standard error.

    A message below the level is not formatted.
    """
    set_level(config)
    journal = is_journal(os.environ.get("JOURNAL_STREAM", ""))
    processors: list[Processor] = [LogRateLimiter(), structlog.processors.add_log_level]
    if config.format == "json" or not journal:  # the journal has the time itself
        processors.append(structlog.processors.TimeStamper("iso", utc=True))
    if config.format == "json":
        processors += [structlog.processors.format_exc_info, render_json]
    else:
        colors = sys.stderr is not None and sys.stderr.isatty()
        # Plain: the pretty ones print the variables of each frame, payloads and tokens among them.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=colors, repr_native_str=True, exception_formatter=plain))
    if journal:
        processors.append(add_priority)
    structlog.configure(
        processors=processors,
        wrapper_class=Logger,
        logger_factory=StandardError,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[LoggingHandler()], force=True)


class Logger(structlog.make_filtering_bound_logger(logging.NOTSET)):  # type: ignore[misc]  # made at run time
    """The type of `structlog.get_logger()`. `set_level` replaces its methods."""


LEVELS = ("debug", "info", "warning", "error", "critical", "exception")


def set_level(config: Log) -> None:
    """Write entries of `config.level` and above from now on.

    structlog chooses the methods of a logger when it is created, and loggers live as long as the process.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    made = structlog.make_filtering_bound_logger(level)
    for name in (*LEVELS, "log"):
        setattr(Logger, name, getattr(made, name))
    logging.getLogger().setLevel(max(level, logging.WARNING))


PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}
"""sd-daemon(3), from syslog(3)."""


def is_journal(stream: str) -> bool:
    """Whether standard error is connected to the journal of systemd.

    `stream` is JOURNAL_STREAM, its device and inode (systemd.exec(5)). Processes with redirected output inherit the
    variable as well.
    """
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def add_priority(logger: object, method: str, rendered: Any) -> Any:
    """Put the priority before each line, for journalctl."""
    prefix = f"<{PRIORITIES.get(method, 6)}>"
    if isinstance(rendered, bytes):
        return prefix.encode() + rendered
    return "\n".join(prefix + line for line in str(rendered).splitlines())


class LogRateLimiter:
    """Passes at most LIMIT entries of one kind in PERIOD seconds and counts the others, so that an error that repeats a
    thousand times a second does not fill the disk. `debug` is not limited."""

    LIMIT = 20
    PERIOD = 10.0
    MAX_KINDS = 1000
    """Kinds that are remembered. The broker has about forty; libraries have more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, list[float]] = {}

    def __call__(self, logger: object, method: str, entry: Any) -> Any:
        """Pass an entry on, or raise DropEvent. The first one of the next period has the number of suppressed ones."""
        if method == "debug":
            return entry
        now = self._clock()
        kind = str(entry.get("logger", entry["event"]))
        if len(self._seen) >= self.MAX_KINDS:
            self._seen.clear()
        seen = self._seen.setdefault(kind, [now, 0])
        if now - seen[0] >= self.PERIOD:
            suppressed = int(seen[1]) - self.LIMIT
            seen[:] = now, 0
            if suppressed > 0:
                entry["suppressed"] = suppressed
        seen[1] += 1
        if seen[1] > self.LIMIT:
            raise structlog.DropEvent
        return entry


def render_json(logger: object, method: str, event: Any) -> bytes:
    """Render a log entry as one JSON object; the last processor of structlog's chain."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    entry = first | event
    try:
        return orjson.dumps(entry, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # text that is not UTF-8, an integer of more than 64 bits: rare, and no reason to lose the entry
        return json.dumps(entry, default=str).encode()


class StandardError:
    """Writes log lines. A blocked log (a pipe that is closed or not read, a full disk) must not stop the broker: a line
    that cannot be written at once is dropped and counted. The count precedes the next line that can be written.
    """

    # State of the descriptor, shared by all loggers.
    dropped: ClassVar[int] = 0
    partial_line: ClassVar[bool] = False
    """Whether the last line was written only in part."""

    def __init__(self, *names: object) -> None:
        """`names` is what `get_logger` was called with."""

    def msg(self, line: str | bytes) -> None:
        """Write one line, at once: lines of several processes do not mix, as long as they fit into PIPE_BUF."""
        lost = StandardError.dropped
        if lost and is_writable():
            StandardError.dropped = 0
            # An error, so that no level hides it. It calls this method again, with a count of 0.
            log.error("log lines dropped: standard error blocked", lines=lost)
            if StandardError.dropped:
                StandardError.dropped = lost
        data = line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line
        left = memoryview(b"\n" * StandardError.partial_line + data + b"\n")
        whole = len(left)
        try:
            while left and is_writable():
                # On a pipe with room, only PIPE_BUF bytes are sure not to block (pipe(7)).
                left = left[os.write(2, left[: select.PIPE_BUF]) :]
        except OSError:
            pass  # it is counted below
        if left:
            StandardError.dropped += 1
        if len(left) < whole:
            StandardError.partial_line = len(left) > 0

    debug = info = warning = error = critical = exception = msg


START_FAILURE_TIMEOUT: Final = 5.0
"""Seconds that a line about a failed start waits for room in a pipe."""


def is_writable(timeout: float = 0.0) -> bool:
    """Whether a write to standard error does not block, now or within `timeout` seconds.

    The descriptor is not set to O_NONBLOCK, because other processes share it. Files are always ready. A terminal may
    block: Ctrl-S is meant to.
    """
    try:
        kind = os.fstat(2).st_mode
    except OSError:
        return False
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return True
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


class LoggingHandler(logging.Handler):
    """Passes on the log of asyncio and other libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        exc = None if record.exc_info is None else record.exc_info[1]
        if is_client_error(exc):
            log.debug("client error", logger=record.name, kind=type(exc).__name__)
        else:
            log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)


CLIENT_ERRORS = frozenset(
    {
        "aiohttp.http_exceptions.HttpProcessingError",
        "aiohttp.web_protocol.RequestPayloadError",
        "ssl.SSLError",
        "websockets.exceptions.InvalidHandshake",
    }
)
"""Exceptions of libraries for what a client sent. By name: this module does not import the libraries."""


def is_client_error(exc: BaseException | None) -> bool:
    """Whether an exception says that a client sent something wrong.

    Libraries log it as an error, with a traceback and the text that the client sent, which may be a token.
    """
    return any(f"{kind.__module__}.{kind.__qualname__}" in CLIENT_ERRORS for kind in type(exc).__mro__)


def log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an unhandled exception of the event loop.

    The default handler would print the arguments of callbacks, with payloads among them.
    """
    exc = context.get("exception")
    if is_client_error(exc):
        log.debug("client error", logger="asyncio", kind=type(exc).__name__)
        return
    what, _, _ = str(context.get("message")).partition("(")
    log.error("unhandled exception", message=what.rstrip(), exc_info=exc)


def report_start_failure(config: Log, text: str) -> None:
    """Report why the broker does not start: as one plain line, or as a log entry if the format is JSON."""
    # Unlike a running broker, one that ends can wait for a slow reader. No mistake is dropped.
    is_writable(START_FAILURE_TIMEOUT)
    if config.format == "json":
        # Every mistake is reported, however many there are.
        processors = [each for each in structlog.get_config()["processors"] if not isinstance(each, LogRateLimiter)]
        log = structlog.wrap_logger(StandardError(), processors, Logger)
        log.error("cannot start", problem=text)
        return
    # The text may have foreign parts, which must not send control characters to the terminal.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in f"wsbroker: {text}")
    if is_journal(os.environ.get("JOURNAL_STREAM", "")):
        line = add_priority(None, "error", line)
    StandardError().msg(line)
