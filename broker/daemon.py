"""The composition root: builds engine, node and listeners from the configuration, runs them, and shuts them down.

Only this module names concrete engines and handles process state: signals, systemd, the limit of open files.
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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import msgspec
import structlog
import uvloop

from broker import __version__
from broker.auth.authenticator import Authenticator
from broker.auth.configured import check_access, identifies, load_authenticator, requires_identity
from broker.config import RESTART_KEYS, SQLITE, Config, Reading, Server, find_group, parse_address, too_open
from broker.engines.base import Engine
from broker.engines.memory import MemoryEngine
from broker.engines.sqlite import SqliteEngine
from broker.engines.store import StoreError
from broker.errors import ConfigError
from broker.health import HealthMonitor
from broker.log import log_unhandled, report_start_failure, set_level, set_up_log
from broker.net.certificate import CertificateMonitor
from broker.net.handshake import Handshakes
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.net.listener import CannotListenError, Listener, bound_address
from broker.net.tls import Tls
from broker.net.tls import load as load_tls
from broker.node import Node
from broker.rules import check_rules
from broker.systemd import Systemd, extend_timeout, reloading, status

if TYPE_CHECKING:
    from broker.admin.server import Admin, AdminListener


def make_engine(config: Config) -> Engine:
    """Make the engine of the configuration. Raises StoreError where its file cannot be used."""
    name, limits = config.server.engine, config.limits
    if name.startswith(SQLITE):
        return SqliteEngine(Path(name.removeprefix(SQLITE)), limits, config.server.durability)
    return MemoryEngine(limits)


ADMIN = "admin"
"""The name of the socket that systemd passes for the admin listener."""

CANNOT_START = 1
"""Exit status when the start fails, for example because an address is in use."""

MAX_FILES = 1 << 20
"""The soft limit of open files is raised to the hard one, but not over this, the default ceiling of Linux (fs.nr_open).
Some systems have a hard limit of a billion, which says nothing about their capacity."""

STATUS_EVERY = 5.0
"""Seconds between two updates of `systemctl status`."""
PROGRESS_EVERY = 1.0
"""The same while the broker drains. Each update extends the timeout of systemd by `EXTEND_BY` seconds."""
EXTEND_BY = 10.0
PROGRESS_LINES = 60
"""Maximum number of progress entries while the broker retires."""

WATCH_EVERY = 2.0
"""Seconds between two looks at the files of the certificate."""
CHECK_EXPIRY_EVERY = 3600.0
"""Seconds between two looks at when the certificate expires."""

HANDSHAKE_GRACE = 1.0
"""Seconds that a shutdown gives connections that were accepted before it to finish their handshake. A request takes
milliseconds."""

T = TypeVar("T")

INTERNAL_ERROR = "internal error, see the log"

log = structlog.get_logger(__name__)


def run(read: Callable[..., Reading]) -> int:
    """Run the broker until it shuts down, and return the exit status.

    `read` reads the configuration, for the start and, with `wait=False`, for each reload. The status is 0 after a
    drain, 1 if it could not start, 78 for a configuration with mistakes or one that does not fit this machine.
    """
    reading = read()
    config = reading.config
    reserve_standard_fds()
    # The watchdog of systemd sends SIGABRT: the log then has the stack of each thread.
    faulthandler.enable(file=2)
    systemd = Systemd(os.environ)
    set_up_log(config.log)
    try:
        resources = check_resources(reading)
        remote = check_sockets(config, systemd)
    except ConfigError as exc:
        for problem in exc.problems:
            report_start_failure(config.log, str(problem))
        systemd.close()
        return os.EX_CONFIG
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(config, resources, read, systemd, remote=remote).serve())


class Resources(NamedTuple):
    """What the configuration comes to on this machine."""

    capacity: Capacity
    tls: ssl.SSLContext | None
    authenticator: Authenticator


def check_resources(reading: Reading, before: Authenticator | None = None) -> Resources:
    """Check the configuration against this machine: the capacity of connections, the certificate for TLS, the keys.

    Raises ConfigError with every mistake: those of the reading, too few descriptors, a certificate or a key that cannot
    be used, roles that are wrong, and topic rules that are wrong or can never apply. A key set that `before` has
    fetched is kept.
    """
    config = reading.config
    problems = [
        *check_rules(reading.rules, config.limits, reading.other_patterns),
        *check_access(reading.keys, reading.roles),
    ]

    def attempt(load: Callable[[], T]) -> T | None:
        try:
            return load()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    capacity = attempt(lambda: Capacity.of(raise_file_limit(), config.limits.max_connections))
    context = attempt(lambda: load_tls(config.server))
    authenticator = attempt(lambda: load_authenticator(config, before=before))
    reading.raise_problems(problems)
    assert capacity is not None
    assert authenticator is not None
    return Resources(capacity, context, authenticator)


def check_sockets(config: Config, systemd: Systemd) -> bool:
    """Check that the broker may listen on the sockets passed by systemd. Raises ConfigError.

    Returns whether other machines can connect to any address.
    """
    if systemd.problems:
        raise ConfigError(systemd.problems)
    listen = config.server.listen
    remote = any(not parse_address(text).local for text in listen)
    if "systemd" not in listen:
        return remote
    passed = [
        str(address) for name, sock in systemd.sockets if name != ADMIN and not (address := bound_address(sock)).local
    ]
    required = requires_identity(config, remote=True) and (identifies(config) or bool(config.keys))
    if passed and config.server.anonymous is None and not required:
        raise ConfigError([too_open("server.listen", [f"the socket {address} of systemd" for address in passed])])
    return remote or bool(passed)


class Daemon:
    """One run of the broker."""

    def __init__(
        self,
        config: Config,
        resources: Resources,
        read: Callable[..., Reading],
        systemd: Systemd,
        *,
        remote: bool,
    ) -> None:
        self.config = config
        self.capacity = resources.capacity
        self.tls = None if resources.tls is None else Tls(resources.tls)
        self._remote = remote
        """Whether other machines can connect."""
        self.authenticator = resources.authenticator
        self.authenticator.require(requires_identity(config, remote))
        self.listeners: list[Listener] = []
        self.state = "starting"
        """`starting`, `serving`, `retiring` (clients get `bye` over time), `retired` (all have disconnected, new
        connections are refused), or `draining` (the broker shuts down)."""
        self._read = read
        self._systemd = systemd
        self.certificate = CertificateMonitor(config.server)
        self.started = 0.0
        """When the broker was ready, in seconds since 1970."""
        self._admin: Admin | None = None
        self._admin_listener: AdminListener | None = None
        self._status_note = ""
        """Text after the counts in `systemctl status`."""
        self._retiring: asyncio.Task[None] | None = None
        self._deferred: dict[Callable[[], None], None] = {}
        """Handlers of signals that arrived during the start, in order."""

    async def serve(self) -> int:
        """Run on the running event loop, which must be uvloop's, in the main thread."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_unhandled)
        ending = ShutdownSignal(loop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        loop.add_signal_handler(signal.SIGUSR2, self.retire)
        # Other services reopen their logs on SIGUSR1. The default action would end the process.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            engine = make_engine(self.config)
        except StoreError as exc:
            self._systemd.close()
            report_start_failure(self.config.log, str(exc))
            return CANNOT_START
        self.node = Node(self.config, engine, loop, self.authenticator)
        self.limiter = ConnectionLimiter(self.config.limits, self.node, self.capacity)
        self.handshakes = Handshakes(self.config, self.node, self.limiter, loop)
        self.health = HealthMonitor(loop, self.node.context, self._set_memory_pressure)
        self.health.max_memory = self.config.limits.max_memory
        await self.node.start()
        try:
            for text in self.config.server.listen:
                await self._listen(text)
            await self._open_admin()
        except CannotListenError as exc:
            self._close_listeners()
            await self._close_admin()
            await self.node.stop()
            self._systemd.close()
            report_start_failure(self.config.log, str(exc))
            return CANNOT_START
        self.health.start()
        self.started = time.time()
        self._log_addresses()
        tasks = [loop.create_task(self._report_status())]
        if self.tls is not None:
            tasks.append(loop.create_task(self._watch_certificate()))
        if self._systemd.watchdog:
            tasks.append(loop.create_task(self._feed_watchdog()))
        # Objects of the start live for ever. Frozen, they are not traversed by each full collection.
        gc.collect()
        gc.freeze()
        self.state = "serving"
        self._systemd.notify("READY=1", self._status())
        for requested in self._deferred:
            requested()
        try:
            await self._shut_down(await ending.requested)
        finally:
            for task in tasks:
                task.cancel()
            await self._close_admin()
            self.health.stop()
            self._systemd.close()
        return 0

    def reload(self) -> None:
        """Read the configuration again and apply it. A mistake in it leaves everything unchanged.

        During the start the reload is deferred, and during the shutdown it is refused: in both states the READY=1 of a
        reload would be wrong.
        """
        if self.state == "starting":
            self._deferred[self.reload] = None
            return
        if self.state == "draining":
            log.warning("reload failed", problem="the broker is shutting down")
            return
        self._systemd.notify(reloading())
        try:
            self._status_note = self._reload()
        except ConfigError as error:
            for problem in error.problems:
                log.error("reload failed", problem=str(problem))
            self._status_note = f"; reload failed: {error.problems[0]}"
        except Exception:
            log.exception("reload failed", problem=INTERNAL_ERROR)
            self._status_note = f"; reload failed: {INTERNAL_ERROR}"
        finally:
            self._systemd.notify("READY=1", self._status())

    def _reload(self) -> str:
        """Apply the new configuration, and return a note for the status. Raises ConfigError."""
        reading = self._read(wait=False)
        resources = check_resources(reading, self.authenticator)
        wanted = reading.config
        fixed = set(RESTART_KEYS)
        if (resources.tls is None) != (self.tls is None):
            fixed |= {"server.certificate", "server.key"}
        changed = set(changed_settings(self.config, wanted))
        self.config = copy_settings(wanted, self.config, changed & fixed)
        self.capacity = resources.capacity
        if self.tls is not None and resources.tls is not None:
            self.tls.context = resources.tls
            self.certificate.use(self.config.server)
        set_level(self.config.log)
        self.authenticator = resources.authenticator
        self.authenticator.require(requires_identity(self.config, self._remote))
        self.node.reconfigure(self.config, self.authenticator)
        self.limiter.reconfigure(self.config.limits, self.capacity)
        self.handshakes.reconfigure(self.config)
        self.health.max_memory = self.config.limits.max_memory
        log.info("reloaded", changed=sorted(changed - fixed))
        later = sorted(changed & fixed)
        if not later:
            return ""
        log.warning("settings need a restart", settings=later)
        return f"; changed since the start, which needs a restart: {', '.join(later)}"

    async def _watch_certificate(self) -> None:
        """Warn before the certificate expires, and load it again when its files were replaced."""
        checked = float("-inf")
        while True:
            if time.time() - checked >= CHECK_EXPIRY_EVERY:
                checked = time.time()
                self.certificate.warn(checked)
            await asyncio.sleep(WATCH_EVERY)
            if self.tls is None or not self.certificate.is_replaced():
                continue
            server = self.config.server
            try:
                context = load_tls(server)
            except ConfigError as error:
                for problem in error.problems:
                    log.error("certificate not reloaded", problem=str(problem))
                continue
            if context is not None:
                self.tls.context = context
                self.certificate.use(server)
                log.info("certificate reloaded", certificate=server.certificate)
                checked = float("-inf")

    def retire(self) -> None:
        """Refuse new connections and send `bye` to all clients, but do not shut down. Idempotent."""
        if self.state == "starting":
            self._deferred[self.retire] = None
        if self.state != "serving":
            return
        self.state = "retiring"
        self.handshakes.close()
        timeout = self.config.limits.drain_timeout
        log.info("retiring", connections=self.node.connections, seconds=timeout)
        self._systemd.notify(self._status())
        self._retiring = asyncio.get_running_loop().create_task(self._retire(timeout))

    async def _retire(self, timeout: float) -> None:
        # Over an hour, one entry per second would be too many.
        every = max(PROGRESS_EVERY, timeout / PROGRESS_LINES)
        progress = asyncio.get_running_loop().create_task(self._report_progress("retiring", every))
        try:
            await self.node.retire(timeout)
        finally:
            progress.cancel()
        self.state = "retired"
        log.info("retired")
        self._systemd.notify(self._status())

    async def _shut_down(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        timeout = self.config.limits.drain_timeout
        log.info("shutting down", signal=name, connections=self.node.connections)
        self.state = "draining"
        self._systemd.notify("STOPPING=1", self._status(), extend_timeout(EXTEND_BY))
        if self._retiring is not None:
            self._retiring.cancel()
        progress = loop.create_task(self._report_progress("draining", PROGRESS_EVERY, extend_timeout(EXTEND_BY)))
        deadline = loop.time() + timeout
        self._close_listeners()
        # Accepted connections finish their handshake, and then get `bye` like the others.
        await self.handshakes.wait_handshakes(min(HANDSHAKE_GRACE, timeout / 4))
        self.handshakes.close()
        await self.node.drain(max(0.0, deadline - loop.time()))
        await self.handshakes.wait_empty(max(0.0, deadline - loop.time()))
        await self.node.stop()
        progress.cancel()
        log.info("stopped")
        self._systemd.notify(status("stopped"))

    async def _listen(self, text: str) -> None:
        """Listen on one address of the configuration. Raises CannotListenError."""
        address = parse_address(text)
        if not address.systemd:
            await self._add_listener().open(address)
            return
        passed = [(name, sock) for name, sock in self._systemd.sockets if name != ADMIN]
        if not passed:
            raise CannotListenError("cannot listen on systemd: it has passed no sockets")
        for name, sock in passed:
            await self._add_listener().adopt(sock, name)

    async def _open_admin(self) -> None:
        """Open the admin listener, if one is configured. Raises CannotListenError."""
        if not self.config.server.admin:
            return
        # aiohttp takes a quarter of a second to import.
        from prometheus_client import CollectorRegistry

        from broker.admin.prometheus import MetricsCollector
        from broker.admin.server import Admin, AdminListener

        registry = CollectorRegistry()
        registry.register(MetricsCollector(self))
        self._admin = Admin(registry, self.unready_reason, self.node, self.capacity.admin)
        await self._admin.start()
        address = parse_address(self.config.server.admin)
        port = AdminListener(self._admin, **unix_file(self.config.server))
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
        self._admin.is_remote = not all(parse_address(text).local for text in port.addresses)
        self._admin_listener = port

    async def _close_admin(self) -> None:
        if self._admin_listener is not None:
            self._admin_listener.close()
        if self._admin is not None:
            await self._admin.stop()

    def _add_listener(self) -> Listener:
        config = self.config
        listener = Listener(
            self.handshakes,
            notsent_lowat=config.limits.notsent_lowat,
            tls=self.tls,
            **unix_file(config.server),
        )
        self.listeners.append(listener)
        return listener

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _log_addresses(self) -> None:
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
        log.info("ready", version=__version__, engine=self.engine, max_connections=self.capacity.connections)

    # Notifications of systemd

    def unready_reason(self) -> str | None:
        """Give the reason for not being ready; None if ready."""
        if self.state != "serving":
            return self.state
        if self.health.level:
            return "out of memory"
        return self.limiter.unavailable_reason

    @property
    def certificate_end(self) -> float | None:
        """When the certificate expires, in seconds since 1970; None without TLS."""
        found = self.certificate.validity
        return None if self.tls is None or found is None else found.end

    @property
    def draining(self) -> bool:
        """Whether the broker drains or retires."""
        return self.state in ("retiring", "draining")

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.config.server.engine.partition(":")[0]

    def _set_memory_pressure(self, level: int) -> None:
        self.limiter.memory_pressure = level > 0
        self.node.set_memory_pressure(level > 1)

    def _status(self) -> str:
        context = self.node.context
        counts = f"{context.connections:,} connections, {context.subscriptions:,} subscriptions"
        return status(f"{self.state}: {counts}, {context.queued:,} events queued{self._status_note}")

    async def _report_status(self) -> None:
        while self._systemd.is_notified:
            await asyncio.sleep(STATUS_EVERY)
            self._systemd.notify(self._status())

    async def _report_progress(self, event: str, every: float, *more: str) -> None:
        """Log the number of remaining connections, and send `more` to systemd."""
        while True:
            await asyncio.sleep(every)
            log.info(event, connections=self.node.connections)
            self._systemd.notify(self._status(), *more)

    async def _feed_watchdog(self) -> None:
        """Notify the watchdog from the event loop, at half of its interval, as sd_watchdog_enabled(3) advises."""
        while True:
            self._systemd.notify("WATCHDOG=1")
            await asyncio.sleep(self._systemd.watchdog / 2)


class UnixFile(TypedDict):
    """What the files of Unix sockets get."""

    unix_mode: int
    unix_group: int | None


def unix_file(server: Server) -> UnixFile:
    """Give the mode and the group of Unix sockets in numbers."""
    group = None if server.unix_group is None else find_group(server.unix_group)
    return UnixFile(unix_mode=int(server.unix_mode, 8), unix_group=group)


class ShutdownSignal:
    """TERM and INT: the first signal requests a drain, the second one exits at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.requested: asyncio.Future[str] = loop.create_future()
        """Done with the name of the signal when a shutdown is requested."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)

    def _signal(self, number: signal.Signals) -> None:
        if self.requested.done():
            log.warning("second signal: exiting at once", signal=number.name)
            # The exit status of a shell for a process killed by a signal.
            os._exit(128 + number)
        self.requested.set_result(number.name)


def changed_settings(old: Config, new: Config) -> Iterable[str]:
    """Name the settings that differ between two configurations."""
    for section in old.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        if isinstance(before, list):
            if before != after:
                yield section
            continue
        for name in before.__struct_fields__:
            if getattr(before, name) != getattr(after, name):
                yield f"{section}.{name}"


def copy_settings(config: Config, other: Config, settings: Iterable[str]) -> Config:
    """Give `config` with these settings taken from `other`."""
    for setting in settings:
        section, _, name = setting.partition(".")
        changed = msgspec.structs.replace(getattr(config, section), **{name: getattr(getattr(other, section), name)})
        config = msgspec.structs.replace(config, **{section: changed})
    return config


def raise_file_limit() -> int:
    """Raise the limit of open files as far as allowed, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return MAX_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def reserve_standard_fds() -> None:
    """Make sure that descriptors 0, 1 and 2 are open. Else sockets would get them, and the log would go to a client."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)
