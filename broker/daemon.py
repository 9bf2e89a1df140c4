"""The composition root: builds engine, node and listeners from the configuration, runs them and ends them.

Alone in naming concrete engines, and in what belongs to a whole process: signals, the log, the limit of open files.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import select
import signal
import ssl
import stat
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import structlog
import uvloop
from structlog.typing import Processor

from broker import __version__
from broker.config import Config, Log, parse_address
from broker.engines.base import Engine
from broker.engines.memory import MemoryEngine
from broker.errors import ConfigError
from broker.net.gate import Gate, Room
from broker.net.listener import CannotListenError, Listener
from broker.net.tls import Tls
from broker.net.tls import load as load_tls
from broker.node import Node
from broker.rules import Rules

ENGINES: dict[str, Callable[[], Engine]] = {"memory": MemoryEngine}

CANNOT_START = 1
"""Exit status when an address cannot be listened on, say."""

MOST_FILES = 1 << 20
"""The soft limit of open files is raised to the hard one, but not beyond this: Linux's own ceiling (fs.nr_open)
unless set. Some systems have a billion for the hard limit, which says nothing about what they can carry."""

LATER = {
    signal.SIGHUP: "to read the configuration again",
    signal.SIGUSR2: "to drain without an exit",
}
"""Signals that will have a meaning, and would kill the process as long as they have none."""

log = structlog.get_logger(__name__)


def run(config: Config) -> int:
    """Run the broker until it is told to end, and return the exit status.

    0 after a drain, 1 if it could not start, 78 for a configuration that does not fit this machine.
    """
    keep_standard_streams()
    set_up_log(config.log)
    try:
        room, context = examine(config)
    except ConfigError as exc:
        for problem in exc.problems:
            complain(config.log, problem)
        return os.EX_CONFIG
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, room, context))


def examine(config: Config) -> tuple[Room, ssl.SSLContext | None]:
    """See whether the configuration fits this machine: how many connections the process can hold, and the certificate
    for TLS, if there is one.

    Raises ConfigError where there are fewer than configured, where the certificate cannot be used, and for topic rules
    that are wrong or can never apply.
    """
    problems: list[str] = []
    room = context = None
    try:
        Rules(config.topics, config.limits)
    except ConfigError as error:
        problems += error.problems
    try:
        room = Room.of(raise_limit_of_files(), config.limits.max_connections)
    except ConfigError as error:
        problems += error.problems
    try:
        context = load_tls(config.server)
    except ConfigError as error:
        problems += error.problems
    if problems or room is None:
        raise ConfigError(problems)
    return room, context


async def serve(config: Config, room: Room, context: ssl.SSLContext | None = None) -> int:
    """Do the same on the event loop that is running, which must be uvloop's, in the main thread."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_fault)
    ending = Ending(loop)
    for number, purpose in LATER.items():
        loop.add_signal_handler(number, put_off, number, purpose)
    node = Node(config, ENGINES[config.server.engine](), loop)
    gate = Gate(config, node, room, loop)
    tls = None if context is None else Tls(context)
    listeners: list[Listener] = []
    await node.start()
    try:
        for text in config.server.listen:
            listener = Listener(gate, notsent_lowat=config.limits.notsent_lowat, tls=tls)
            await listener.open(parse_address(text))
            listeners.append(listener)
    except CannotListenError as exc:
        for listener in listeners:
            listener.close()
        await node.stop()
        complain(config.log, str(exc))
        return CANNOT_START
    for listener in listeners:
        for address in listener.addresses:
            scheme = "ws" if tls is None else "wss"
            where = {} if address.startswith("unix:") else {"url": f"{scheme}://{address}{config.server.path}"}
            log.info(f"listening on {address}", **where)  # noqa: G004 -- once for an address
    log.info("ready", version=__version__, engine=config.server.engine, max_connections=room.connections)
    # What the start has made stays for good. Frozen, it is not walked through again by each full collection.
    gc.collect()
    gc.freeze()

    name = await ending.asked
    log.info("shutting down", signal=name, connections=node.connections)
    deadline = loop.time() + config.limits.drain_timeout
    for listener in listeners:
        listener.close()
    gate.close()
    await node.drain(config.limits.drain_timeout)
    await gate.wait_empty(max(0.0, deadline - loop.time()))
    await node.stop()
    log.info("stopped")
    return 0


class Ending:
    """TERM and INT: the first one asks for the end, the second one is the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked: asyncio.Future[str] = loop.create_future()
        """Done when the broker is to end, with the name of the signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)

    def _signal(self, number: signal.Signals) -> None:
        if self.asked.done():
            # As a shell reports a process that a signal has killed.
            os._exit(128 + number)
        self.asked.set_result(number.name)


def put_off(number: signal.Signals, purpose: str) -> None:
    """Go on after a signal that a later version will understand."""
    log.warning(f"{number.name} ignored: {purpose} is not supported yet")  # noqa: G004 -- once for a signal


def raise_limit_of_files() -> int:
    """Allow the process as many open files as it may have, and return how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def keep_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are taken: else sockets would take them, and the log would be written to a client."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)


# The log


def set_up_log(config: Log) -> None:
    """Send the log of the broker, and what libraries say through `logging`, to standard error.

    A message below the level is not even put together.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("iso", utc=True),
    ]
    if config.format == "json":
        processors += [structlog.processors.format_exc_info, to_json]
    else:
        colors = sys.stderr is not None and sys.stderr.isatty()
        # Plain: the pretty ones print the variables of each frame, payloads and tokens among them.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=colors, repr_native_str=True, exception_formatter=plain))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=StandardError,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[Forward()], force=True)


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
            log.error("lines of the log were dropped: nobody took them", lines=lost)
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
    log.error("fault", message=what.rstrip(), exc_info=context.get("exception"))


def complain(config: Log, text: str) -> None:
    """Say why the broker does not start: one line, of its own kind for people, of the log's for machines."""
    if config.format == "json":
        log.error(text)
    else:
        StandardError().msg(f"wsbroker: {text}")
