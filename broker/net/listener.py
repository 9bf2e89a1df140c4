"""Listening sockets: TCP over IPv4 and IPv6, with TLS or without, and Unix sockets."""

from __future__ import annotations

import abc
import asyncio
import errno
import ipaddress
import os
import select
import socket
import stat
from pathlib import Path
from typing import Protocol

import structlog

from broker.config import Address
from broker.net.handshake import Handshake, SecureHandshake
from broker.net.limiter import DOORS, ConnectionLimiter
from broker.net.tls import Tls

# A listening socket gives DOORS connections in one turn of the event loop while others are waiting.
#
# libuv (since 1.45) accepts one for each descriptor that is ready. A turn may take 4 ms, when an event goes to a
# thousand subscribers; then all who come back after a restart would be let in at 250 a second. So a socket with a crowd
# before it is given to the loop under several descriptors. Not always, because each of them wakes up for each
# connection: a lone one would cost 190 µs in place of 160.

CROWD = 4
"""So many connections in a row had another one waiting behind them: there is a crowd."""

CALM = 256
"""So many in a row had none: it has gone."""

BACKLOG = 65_535
"""Connections that wait for being accepted. The kernel takes the least of this and net.core.somaxconn (4096 unless
set)."""

PAUSE = 1.0
"""Seconds without accepting after the system could not. As in asyncio (ACCEPT_RETRY_DELAY)."""

UNIX_MODE = 0o660
"""A Unix socket is for its owner and group: the broker, and a proxy in front of it."""

log = structlog.get_logger(__name__)


class CannotListenError(Exception):
    """An address cannot be listened on; the text names it and says why."""


class Accepting(Protocol):
    """A bound socket that connections come in by."""

    @property
    def address(self) -> Address:
        """What it is bound to."""

    async def open(self) -> None:
        """Accept from now on. Raises OSError."""

    def close(self) -> None:
        """Accept no more. Idempotent."""


class Port(abc.ABC):
    """One address of the configuration. A name may stand for several sockets, one for each IP address that it has."""

    def __init__(self, *, notsent_lowat: int = 0) -> None:
        """`notsent_lowat` (bytes, 0: the kernel's own) is set here because accepted TCP sockets inherit it, which
        saves a system call."""
        self.addresses: list[str] = []
        """What is really listened on, as clients would write it: with the port that the system chose for port 0."""
        self._notsent_lowat = notsent_lowat
        self._entrances: list[Accepting] = []
        self._file: tuple[Path, int] | None = None

    @abc.abstractmethod
    def _entrance(self, sock: socket.socket) -> Accepting:
        """Make what accepts on a bound socket."""

    async def open(self, address: Address) -> None:
        """Bind, and accept from now on. Raises CannotListenError; nothing is left open then."""
        try:
            sockets = [self._bind_unix(Path(address.path))] if address.path else await self._bind_tcp(address)
            self._entrances = [self._entrance(sock) for sock in sockets]
            for entrance in self._entrances:
                await entrance.open()
                self.addresses.append(str(entrance.address))
        except OSError as exc:
            self.close()
            raise CannotListenError(f"cannot listen on {address}: {why(exc)}") from exc
        except CannotListenError:
            self.close()
            raise

    async def adopt(self, sock: socket.socket, name: str) -> None:
        """Accept on a socket that somebody else has bound, and called `name`. It is listened on there too: who comes
        after `close` waits for the next broker.

        Raises CannotListenError.
        """
        try:
            if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
                kind = getattr(sock.family, "name", sock.family)
                raise CannotListenError(f"cannot listen on the socket `{name}` of systemd: {kind} is not served")
            if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise CannotListenError(f"cannot listen on the socket `{name}` of systemd: it is not one that listens")
            if self._notsent_lowat and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._notsent_lowat)
            self._entrances = [self._entrance(sock)]
            await self._entrances[0].open()
        except OSError as exc:
            self.close()
            raise CannotListenError(f"cannot listen on the socket `{name}` of systemd: {why(exc)}") from exc
        self.addresses.append(str(self._entrances[0].address))

    def close(self) -> None:
        """Accept no more, and remove the file of a Unix socket. What was accepted goes on. Idempotent."""
        for entrance in self._entrances:
            entrance.close()
        if self._file is not None:
            path, inode = self._file
            self._file = None
            # Another broker may have taken the path over.
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()

    async def _bind_tcp(self, address: Address) -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        port = address.port
        missing: OSError | None = None
        for family, *_, name in dict.fromkeys(found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # [::] and 0.0.0.0 are two addresses, on every system.
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if self._notsent_lowat:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._notsent_lowat)
                sock.bind((name[0], port, *name[2:]))
                # The kernel lets two sockets bind to one address as long as neither of them listens.
                sock.listen(BACKLOG)
            except OSError as exc:
                sock.close()
                # Many a machine has the name of ::1 without having the address.
                if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    missing = exc
                    continue
                for other in sockets:
                    other.close()
                raise
            port = sock.getsockname()[1]
            sockets.append(sock)
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return sockets

    def _bind_unix(self, path: Path) -> socket.socket:
        remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode must be right from the first moment, not only after a chmod.
        umask = os.umask(0o777 & ~UNIX_MODE)
        try:
            sock.bind(str(path))
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(umask)
        self._file = path, path.stat().st_ino
        return sock


class Listener(Port):
    """One address for clients. With `tls`, those on TCP have to speak TLS."""

    def __init__(self, limiter: ConnectionLimiter, *, notsent_lowat: int = 0, tls: Tls | None = None) -> None:
        super().__init__(notsent_lowat=notsent_lowat)
        self._limiter = limiter
        self._tls = tls

    def _entrance(self, sock: socket.socket) -> Accepting:
        if self._tls is None or sock.family == socket.AF_UNIX:
            return Entrance(self._limiter, sock)
        return SecureEntrance(self._limiter, sock, self._tls)


class Entrance:
    """One bound socket: makes a handshake for each connection, and opens further doors while there is a crowd."""

    def __init__(self, limiter: ConnectionLimiter, sock: socket.socket) -> None:
        self.address = named(sock)
        self._limiter = limiter
        self._sock = sock
        self._unix = sock.family == socket.AF_UNIX
        self._loopback = not self._unix and ipaddress.ip_address(self.address.host).is_loopback
        self._doors: list[asyncio.Server] = []
        self._waiting = select.poll()
        self._waiting.register(sock, select.POLLIN)
        self._crowded = 0
        self._calm = 0
        self._widening: asyncio.Task[None] | None = None

    def __call__(self) -> Handshake:
        """Make the protocol of the next connection."""
        if self._waiting.poll(0):
            self._calm = 0
            self._crowded += 1
            if self._crowded == CROWD and len(self._doors) == 1:
                self._widening = asyncio.get_running_loop().create_task(self._widen())
        else:
            self._crowded = 0
            self._calm += 1
            if self._calm == CALM and len(self._doors) > 1:
                # Not now: uvloop is about to take the connection out of one of them.
                asyncio.get_running_loop().call_soon(self._narrow)
        return Handshake(self._limiter, self._loopback, self._unix)

    async def open(self) -> None:
        """Accept from now on. Raises OSError."""
        await self._add(self._sock)

    def close(self) -> None:
        """Accept no more. Idempotent."""
        if self._widening is not None:
            self._widening.cancel()
        for door in self._doors:
            door.close()
        self._doors.clear()
        self._sock.close()

    async def _add(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._doors.append(await loop.create_server(self, sock=sock, backlog=BACKLOG))

    async def _widen(self) -> None:
        try:
            while len(self._doors) < self._limiter.capacity.doors:
                await self._add(self._sock.dup())
        except OSError as exc:
            log.warning("cannot open more acceptors", address=str(self.address), reason=why(exc))

    def _narrow(self) -> None:
        for door in self._doors[1:]:
            door.close()
        del self._doors[1:]


class Acceptor(abc.ABC):
    """A bound socket that is accepted on here and not by uvloop."""

    def __init__(self, sock: socket.socket) -> None:
        self.address = named(sock)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None

    @abc.abstractmethod
    def take(self, sock: socket.socket) -> None:
        """Do something with an accepted connection, which does not block."""

    def spare(self) -> bool:
        """Give a descriptor back to the system, where it has no others. False if there is none to spare."""
        return False

    async def open(self) -> None:
        """Accept from now on. Raises OSError."""
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        self._go_on()

    def close(self) -> None:
        """Accept no more. Idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(DOORS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE) and self.spare():
                    continue
                # Who waits stays in the backlog. Without a pause the loop would spin.
                log.warning("cannot accept", address=str(self.address), reason=why(exc))
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(PAUSE, self._go_on)
                return
            sock.setblocking(False)
            self.take(sock)


class SecureEntrance(Acceptor):
    """One bound socket for TLS. It accepts by itself: of a connection that does not get through the handshake of TLS,
    asyncio's server would tell nobody, and the limiter counts them all."""

    def __init__(self, limiter: ConnectionLimiter, sock: socket.socket, tls: Tls) -> None:
        super().__init__(sock)
        self._limiter = limiter
        self._tls = tls
        self._loopback = ipaddress.ip_address(self.address.host).is_loopback

    def take(self, sock: socket.socket) -> None:
        """Begin the handshake of TLS."""
        SecureHandshake(self._limiter, self._loopback).secure(sock, self._tls.context, self._limiter.open_timeout)


def remove_stale(path: Path) -> None:
    """Remove the file of a Unix socket that its process left behind.

    Raises CannotListenError when there is anything else in the way.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotListenError(f"cannot listen on unix:{path}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(str(path))
    if error == errno.ENOENT:
        return
    if error != errno.ECONNREFUSED:
        # Connected; or EAGAIN, somebody listens and is busy; or it cannot be told.
        reason = why(OSError(errno.EADDRINUSE if error in (0, errno.EAGAIN) else error, os.strerror(error)))
        raise CannotListenError(f"cannot listen on unix:{path}: {reason}")
    path.unlink(missing_ok=True)


def named(sock: socket.socket) -> Address:
    """Give what a socket is bound to. The name of an abstract Unix socket is written with an @, as in unix(7)."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address(path=f"@{name[1:].decode(errors='replace')}" if isinstance(name, bytes) else name)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return Address(host=name[0], port=name[1])
    return Address(host=str(getattr(sock.family, "name", sock.family)))


def why(exc: OSError) -> str:
    """Give the reason in words for people."""
    if exc.errno == errno.EADDRINUSE:
        return "the address is in use"
    return (exc.strerror or str(exc)).lower()
