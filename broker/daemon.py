"""The composition root: builds engine, node and listeners from the configuration, runs them, and ends them.

Alone in naming concrete engines, and in what belongs to a whole process: signals, systemd, the limit of open files.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import resource
import signal
import ssl
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import structlog
import uvloop

from broker import __version__
from broker.config import RESTART_KEYS, Config, parse_address, too_open
from broker.engines.base import Engine
from broker.engines.memory import MemoryEngine
from broker.errors import ConfigError
from broker.health import HealthMonitor
from broker.log import complain, report_fault, set_level, set_up_log
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.net.listener import CannotListenError, Listener, bound_address
from broker.net.tls import Tls
from broker.net.tls import load as load_tls
from broker.node import Node
from broker.rules import Rules
from broker.systemd import Systemd, extend, reloading, status

if TYPE_CHECKING:
    from broker.admin.server import Admin, AdminListener

ENGINES: dict[str, Callable[[], Engine]] = {"memory": MemoryEngine}

ADMIN = "admin"
"""The name of the socket that systemd passes for the admin listener."""

CANNOT_START = 1
"""Exit status when an address cannot be listened on, say."""

MOST_FILES = 1 << 20
"""The soft limit of open files is raised to the hard one, but not beyond this: Linux's own ceiling (fs.nr_open)
unless set. Some systems have a billion for the hard limit, which says nothing about what they can carry."""

STATUS_EVERY = 5.0
"""Seconds between two lines for `systemctl status`."""
PROGRESS_EVERY = 1.0
"""The same while the broker drains. Each of them asks for `MORE_TIME` seconds."""
MORE_TIME = 10.0
PROGRESS_LINES = 60
"""Most lines of that kind while the broker is retired."""

GRACE = 1.0
"""Seconds within which those who were accepted before the end began may still be let in. A request that is under way
takes milliseconds; who has sent nothing by then will not be missed."""

FAULT = "a fault of the broker's own, which its log tells of"

log = structlog.get_logger(__name__)


def run(config: Config, reread: Callable[[], Config]) -> int:
    """Run the broker until it is told to end, and return the exit status.

    `reread` gives the configuration as it is then, for a reload; it raises ConfigError. The status is 0 after a drain,
    1 if it could not start, 78 for a configuration that does not fit this machine.
    """
    keep_standard_streams()
    # The watchdog of systemd kills with SIGABRT: the log then has the stack of what did not return.
    faulthandler.enable(file=2)
    systemd = Systemd(os.environ)
    set_up_log(config.log)
    try:
        capacity, tls_context = examine(config)
        check_sockets(config, systemd)
    except ConfigError as exc:
        for problem in exc.problems:
            complain(config.log, problem)
        systemd.close()
        return os.EX_CONFIG
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(config, capacity, tls_context, reread, systemd).serve())


def examine(config: Config) -> tuple[Capacity, ssl.SSLContext | None]:
    """See whether the configuration fits this machine: how many connections the process can hold, and the certificate
    for TLS, if there is one.

    Raises ConfigError where there are fewer than configured, where the certificate cannot be used, and for topic rules
    that are wrong or can never apply.
    """
    problems: list[str] = []
    capacity = context = None
    try:
        Rules(config.topics, config.limits)
    except ConfigError as error:
        problems += error.problems
    try:
        capacity = Capacity.of(raise_limit_of_files(), config.limits.max_connections)
    except ConfigError as error:
        problems += error.problems
    try:
        context = load_tls(config.server)
    except ConfigError as error:
        problems += error.problems
    if problems or capacity is None:
        raise ConfigError(problems)
    return capacity, context


def check_sockets(config: Config, systemd: Systemd) -> None:
    """See whether the broker may listen on the sockets that systemd has passed. Raises ConfigError."""
    if systemd.problems:
        raise ConfigError(systemd.problems)
    if config.server.anonymous is not None or "systemd" not in config.server.listen:
        return
    remote = [
        str(address) for name, sock in systemd.sockets if name != ADMIN and not (address := bound_address(sock)).local
    ]
    if remote:
        raise ConfigError([too_open("server.listen", [f"systemd: {address}" for address in remote])])


class Daemon:
    """One run of the broker."""

    def __init__(
        self,
        config: Config,
        capacity: Capacity,
        context: ssl.SSLContext | None,
        reread: Callable[[], Config],
        systemd: Systemd,
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.tls = None if context is None else Tls(context)
        self.listeners: list[Listener] = []
        self.state = "starting"
        """`starting`, `serving`, `retiring` (all clients are sent away), `retired` (they have gone, and nobody is let
        in), or `draining` (it ends)."""
        self._reread = reread
        self._systemd = systemd
        self.started = 0.0
        """When the broker was ready, in seconds since 1970."""
        self._admin: Admin | None = None
        self._admin_listener: AdminListener | None = None
        self._trouble = ""
        """What `systemctl status` shows behind the counts."""
        self._retiring: asyncio.Task[None] | None = None
        self._later: dict[Callable[[], None], None] = {}
        """What signals asked for before the start was over, in order."""

    async def serve(self) -> int:
        """Run on the event loop that is running, which must be uvloop's, in the main thread."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(report_fault)
        ending = ShutdownSignal(loop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        loop.add_signal_handler(signal.SIGUSR2, self.retire)
        # What asks others to open their logs again would end this process without a word.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.node = Node(self.config, ENGINES[self.config.server.engine](), loop)
        self.limiter = ConnectionLimiter(self.config, self.node, self.capacity, loop)
        self.health = HealthMonitor(loop, self.node.context, self._set_memory_pressure)
        self.health.max_memory = self.config.limits.max_memory
        await self.node.start()
        try:
            for text in self.config.server.listen:
                await self._listen(text)
            await self._administer()
        except CannotListenError as exc:
            self._close_listeners()
            await self._close_admin()
            await self.node.stop()
            self._systemd.close()
            complain(self.config.log, str(exc))
            return CANNOT_START
        self.health.start()
        self.started = time.time()
        self._say_where()
        tasks = [loop.create_task(self._report())]
        if self._systemd.watchdog:
            tasks.append(loop.create_task(self._live()))
        # What the start has made stays for good. Frozen, it is not walked through again by each full collection.
        gc.collect()
        gc.freeze()
        self.state = "serving"
        self._systemd.notify("READY=1", self._status())
        for asked in self._later:
            asked()
        try:
            await self._end(await ending.asked)
        finally:
            for task in tasks:
                task.cancel()
            await self._close_admin()
            self.health.stop()
            self._systemd.close()
        return 0

    def reload(self) -> None:
        """Read the configuration again, and go by it. Whatever is wrong with it leaves everything as it was.

        During the start it waits until that is over, and during the end it is not done any more: either way systemd
        would be told that the broker is ready.
        """
        if self.state == "starting":
            self._later[self.reload] = None
            return
        if self.state == "draining":
            log.warning("reload failed", problem="the broker is shutting down")
            return
        self._systemd.notify(reloading())
        try:
            self._trouble = self._reload()
        except ConfigError as error:
            for problem in error.problems:
                log.error("reload failed", problem=problem)
            self._trouble = f"; the configuration was not read again: {error.problems[0]}"
        except Exception:
            log.exception("reload failed", problem=FAULT)
            self._trouble = f"; the configuration was not read again: {FAULT}"
        finally:
            self._systemd.notify("READY=1", self._status())

    def _reload(self) -> str:
        """Do it, and return what is to be seen in the status. Raises ConfigError."""
        wanted = self._reread()
        capacity, tls_context = examine(wanted)
        fixed = set(RESTART_KEYS)
        if (tls_context is None) != (self.tls is None):
            fixed |= {"server.certificate", "server.key"}
        changed = set(differences(self.config, wanted))
        self.config = with_settings(wanted, self.config, changed & fixed)
        self.capacity = capacity
        if self.tls is not None and tls_context is not None:
            self.tls.context = tls_context
        set_level(self.config.log)
        self.node.reconfigure(self.config)
        self.limiter.reconfigure(self.config, capacity)
        self.health.max_memory = self.config.limits.max_memory
        log.info("reloaded", changed=sorted(changed - fixed))
        later = sorted(changed & fixed)
        if not later:
            return ""
        log.warning("settings need a restart", settings=later)
        return f"; changed since the start, which needs a restart: {', '.join(later)}"

    def retire(self) -> None:
        """Let nobody in any more and send all clients away, but do not end. Idempotent."""
        if self.state == "starting":
            self._later[self.retire] = None
        if self.state != "serving":
            return
        self.state = "retiring"
        self.limiter.close()
        timeout = self.config.limits.drain_timeout
        log.info("retiring", connections=self.node.connections, seconds=timeout)
        self._systemd.notify(self._status())
        self._retiring = asyncio.get_running_loop().create_task(self._retire(timeout))

    async def _retire(self, timeout: float) -> None:
        # With an hour for it there is no need of a line for each second.
        every = max(PROGRESS_EVERY, timeout / PROGRESS_LINES)
        progress = asyncio.get_running_loop().create_task(self._progress("retiring", every))
        try:
            await self.node.retire(timeout)
        finally:
            progress.cancel()
        self.state = "retired"
        log.info("retired")
        self._systemd.notify(self._status())

    async def _end(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        timeout = self.config.limits.drain_timeout
        log.info("shutting down", signal=name, connections=self.node.connections)
        self.state = "draining"
        self._systemd.notify("STOPPING=1", self._status(), extend(MORE_TIME))
        if self._retiring is not None:
            self._retiring.cancel()
        progress = loop.create_task(self._progress("draining", PROGRESS_EVERY, extend(MORE_TIME)))
        deadline = loop.time() + timeout
        self._close_listeners()
        # Who was accepted already is let in, and then told when to come back like everybody else.
        await self.limiter.wait_handshakes(min(GRACE, timeout / 4))
        self.limiter.close()
        await self.node.drain(max(0.0, deadline - loop.time()))
        await self.limiter.wait_empty(max(0.0, deadline - loop.time()))
        await self.node.stop()
        progress.cancel()
        log.info("stopped")
        self._systemd.notify(status("stopped"))

    async def _listen(self, text: str) -> None:
        """Listen on one address of the configuration. Raises CannotListenError."""
        address = parse_address(text)
        if not address.systemd:
            await self._listener().open(address)
            return
        passed = [(name, sock) for name, sock in self._systemd.sockets if name != ADMIN]
        if not passed:
            raise CannotListenError("cannot listen on systemd: it has passed no sockets")
        for name, sock in passed:
            await self._listener().adopt(sock, name)

    async def _administer(self) -> None:
        """Open the admin listener, if one is configured. Raises CannotListenError."""
        if not self.config.server.admin:
            return
        # aiohttp takes a quarter of a second to import.
        from prometheus_client import CollectorRegistry

        from broker.admin.prometheus import MetricsCollector
        from broker.admin.server import Admin, AdminListener

        registry = CollectorRegistry()
        registry.register(MetricsCollector(self))
        self._admin = Admin(registry, self.unready, self.node, self.capacity.admin)
        await self._admin.start()
        address = parse_address(self.config.server.admin)
        port = AdminListener(self._admin)
        try:
            if not address.systemd:
                await port.open(address)
            for name, sock in self._systemd.sockets:
                if address.systemd and name == ADMIN:
                    await port.adopt(sock, name)
        except CannotListenError as exc:
            raise CannotListenError(f"{exc} (server.admin)") from exc
        if not port.addresses:
            raise CannotListenError(f"cannot listen on systemd: it has passed no socket named {ADMIN} (server.admin)")
        self._admin_listener = port

    async def _close_admin(self) -> None:
        if self._admin_listener is not None:
            self._admin_listener.close()
        if self._admin is not None:
            await self._admin.stop()

    def _listener(self) -> Listener:
        listener = Listener(self.limiter, notsent_lowat=self.config.limits.notsent_lowat, tls=self.tls)
        self.listeners.append(listener)
        return listener

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _say_where(self) -> None:
        scheme = "ws" if self.tls is None else "wss"
        for listener in self.listeners:
            for address in listener.addresses:
                url = f"{scheme}://{address}{self.config.server.path}"
                where = {} if address.startswith("unix:") else {"url": url}
                log.info("listening", address=address, **where)
        if self._admin_listener is not None:
            for address in self._admin_listener.addresses:
                log.info("admin listener", address=address)
        if any(name != ADMIN for name, _ in self._systemd.sockets) and "systemd" not in self.config.server.listen:
            log.warning("sockets passed by systemd are not used: server.listen does not name systemd")
        if any(name == ADMIN for name, _ in self._systemd.sockets) and self.config.server.admin != "systemd":
            log.warning("admin socket passed by systemd is not used: server.admin is not systemd")
        log.info(
            "ready", version=__version__, engine=self.config.server.engine, max_connections=self.capacity.connections
        )

    # What systemd is told

    def unready(self) -> str | None:
        """Give the reason for not being ready; None if ready."""
        if self.state != "serving":
            return self.state
        if self.health.level:
            return "out of memory"
        return self.limiter.unavailable_reason

    @property
    def draining(self) -> bool:
        """Whether clients are sent away."""
        return self.state in ("retiring", "draining")

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.config.server.engine

    def _set_memory_pressure(self, level: int) -> None:
        self.limiter.memory_pressure = level > 0
        self.node.set_memory_pressure(level > 1)

    def _status(self) -> str:
        context = self.node.context
        counts = f"{context.connections:,} connections, {context.subscriptions:,} subscriptions"
        return status(f"{self.state}: {counts}, {context.queued:,} events waiting{self._trouble}")

    async def _report(self) -> None:
        while self._systemd.listens:
            await asyncio.sleep(STATUS_EVERY)
            self._systemd.notify(self._status())

    async def _progress(self, event: str, every: float, *more: str) -> None:
        """Say how many clients are still there, and `more` to systemd."""
        while True:
            await asyncio.sleep(every)
            log.info(event, connections=self.node.connections)
            self._systemd.notify(self._status(), *more)

    async def _live(self) -> None:
        """Say in good time, from the event loop, that it turns: half of what is asked for, as sd_watchdog_enabled(3)
        advises."""
        while True:
            self._systemd.notify("WATCHDOG=1")
            await asyncio.sleep(self._systemd.watchdog / 2)


class ShutdownSignal:
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


def differences(old: Config, new: Config) -> Iterable[str]:
    """Name the settings that differ."""
    if old.topics != new.topics:
        yield "topics"
    for section in old.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        if section == "topics":
            continue
        for name in before.__struct_fields__:
            if getattr(before, name) != getattr(after, name):
                yield f"{section}.{name}"


def with_settings(config: Config, other: Config, settings: Iterable[str]) -> Config:
    """Give `config` with these settings as they are in `other`."""
    for setting in settings:
        section, _, name = setting.partition(".")
        changed = msgspec.structs.replace(getattr(config, section), **{name: getattr(getattr(other, section), name)})
        config = msgspec.structs.replace(config, **{section: changed})
    return config


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
