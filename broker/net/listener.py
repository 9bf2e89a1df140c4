"""Listening sockets: TCP over IPv4 and IPv6, with or without TLS, and Unix sockets."""

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

from broker.net.addresses import Address
from broker.net.handshake import Handshake, Handshakes, TlsHandshake
from broker.net.limiter import ACCEPTS_PER_TURN
from broker.net.tls import Tls

# During a burst, a listening socket accepts ACCEPTS_PER_TURN connections in one turn of the event loop.
#
# libuv (since 1.45) accepts one connection per turn for each descriptor that is ready. A turn may take 4 ms, when an
# event goes to a thousand subscribers; clients that reconnect after a restart would then be accepted at 250 a second.
# So during a burst the socket is duplicated, and the loop accepts on each duplicate. Not always, because each duplicate
# wakes up for each connection: a single connection would cost 190 µs instead of 160.

BURST_START = 4
"""After this many connections in a row with another one in the backlog, the socket is duplicated."""

BURST_END = 256
"""After this many connections in a row with an empty backlog, the duplicates are closed."""

BACKLOG = 65_535
"""Size of the accept backlog. The kernel uses the minimum of this and net.core.somaxconn (4096 by default)."""

ACCEPT_RETRY_DELAY = 1.0
"""Seconds without accepting after `accept` failed, as in asyncio."""

UNIX_MODE = 0o660
"""By default a Unix socket is for its owner and group: the broker, and a proxy in front of it."""

log = structlog.get_logger(__name__)


class CannotListenError(Exception):
    """An address cannot be listened on; the text names it and says why."""


class Acceptor(Protocol):
    """Accepts connections on one bound socket."""

    @property
    def address(self) -> Address:
        """The address of the socket."""

    async def open(self) -> None:
        """Start accepting. Raises OSError."""

    def close(self) -> None:
        """Stop accepting. Idempotent."""


class BaseListener(abc.ABC):
    """One configured address. A host name may need several sockets, one for each of its IP addresses."""

    def __init__(self, *, notsent_lowat: int = 0, unix_mode: int = UNIX_MODE, unix_group: int | None = None) -> None:
        """`notsent_lowat` (bytes, 0: the kernel's own) is set here because accepted TCP sockets inherit it, which
        saves a system call. `unix_mode` and `unix_group` are those of the file of a Unix socket."""
        self.addresses: list[str] = []
        """What is really listened on, as clients would write it: with the port that the system chose for port 0."""
        self._notsent_lowat = notsent_lowat
        self._unix_mode = unix_mode
        self._unix_group = unix_group
        self._acceptors: list[Acceptor] = []
        self._file: tuple[Path, int] | None = None

    @abc.abstractmethod
    def _make_acceptor(self, sock: socket.socket) -> Acceptor:
        """Create the acceptor of a bound socket."""

    async def open(self, address: Address) -> None:
        """Bind, and start accepting. Raises CannotListenError, with nothing left open."""
        try:
            sockets = [self._bind_unix(Path(address.path))] if address.path else await self._bind_tcp(address)
            self._acceptors = [self._make_acceptor(sock) for sock in sockets]
            for acceptor in self._acceptors:
                await acceptor.open()
                self.addresses.append(str(acceptor.address))
        except OSError as exc:
            self.close()
            raise CannotListenError(f"cannot listen on {address}: {describe_error(exc)}") from exc
        except CannotListenError:
            self.close()
            raise

    async def adopt(self, sock: socket.socket, name: str) -> None:
        """Accept on a socket that systemd has bound and named `name`. systemd keeps it open: a connection that arrives
        after `close` stays in the backlog for the next broker.

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
            self._acceptors = [self._make_acceptor(sock)]
            await self._acceptors[0].open()
        except OSError as exc:
            self.close()
            raise CannotListenError(f"cannot listen on the socket `{name}` of systemd: {describe_error(exc)}") from exc
        self.addresses.append(str(self._acceptors[0].address))

    def close(self) -> None:
        """Stop accepting, and remove the file of a Unix socket. Accepted connections stay open. Idempotent."""
        for acceptor in self._acceptors:
            acceptor.close()
        if self._file is not None:
            path, inode = self._file
            self._file = None
            try:
                # Another broker may have taken the path over.
                if path.exists() and path.stat().st_ino == inode:
                    path.unlink()
            except OSError as exc:
                # The rights of its directory have changed. The next broker replaces the file, and a shutdown goes on.
                log.warning("cannot remove Unix socket", address=f"unix:{path}", reason=describe_error(exc))

    async def _bind_tcp(self, address: Address) -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        port = address.port
        missing: OSError | None = None
        for family, *_, name in dict.fromkeys(found):
            sock = None
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
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
                if sock is not None:
                    sock.close()
                # Many a machine has the name of ::1 without having the address, or a kernel without IPv6.
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
        remove_stale_socket(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mode = self._unix_mode
        # The mode must be right from the first moment, not only after a chmod.
        umask = os.umask(0o777 & ~(mode if self._unix_group is None else mode & 0o700))
        try:
            sock.bind(str(path))
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(umask)
        self._file = path, path.stat().st_ino
        if self._unix_group is not None:
            try:
                os.chown(path, -1, self._unix_group)
                path.chmod(mode)
            except OSError as exc:
                sock.close()
                reason = f"its group cannot be {self._unix_group} (server.unix_group): {describe_error(exc)}"
                raise CannotListenError(f"cannot listen on unix:{path}: {reason}") from exc
        return sock


class Listener(BaseListener):
    """One address for clients. With `tls`, those on TCP have to speak TLS."""

    def __init__(
        self,
        handshakes: Handshakes,
        *,
        notsent_lowat: int = 0,
        unix_mode: int = UNIX_MODE,
        unix_group: int | None = None,
        tls: Tls | None = None,
    ) -> None:
        super().__init__(notsent_lowat=notsent_lowat, unix_mode=unix_mode, unix_group=unix_group)
        self._handshakes = handshakes
        self._tls = tls

    def _make_acceptor(self, sock: socket.socket) -> Acceptor:
        if self._tls is None or sock.family == socket.AF_UNIX:
            return ServerAcceptor(self._handshakes, sock)
        return TlsAcceptor(self._handshakes, sock, self._tls)


class ServerAcceptor:
    """Accepts by asyncio servers, creates a handshake for each connection, and duplicates the socket during a burst."""

    def __init__(self, handshakes: Handshakes, sock: socket.socket) -> None:
        self.address = bound_address(sock)
        self._handshakes = handshakes
        self._sock = sock
        self._unix = sock.family == socket.AF_UNIX
        self._loopback = not self._unix and ipaddress.ip_address(self.address.host).is_loopback
        self._servers: list[asyncio.Server] = []
        self._pending = select.poll()
        self._pending.register(sock, select.POLLIN)
        self._burst_length = 0
        self._quiet_length = 0
        self._adding: asyncio.Task[None] | None = None

    def __call__(self) -> Handshake:
        """Create the protocol of the next connection."""
        if self._pending.poll(0):
            self._quiet_length = 0
            self._burst_length += 1
            if self._burst_length == BURST_START and len(self._servers) == 1:
                self._adding = asyncio.get_running_loop().create_task(self._add_servers())
        else:
            self._burst_length = 0
            self._quiet_length += 1
            if self._quiet_length == BURST_END and len(self._servers) > 1:
                # Not now: uvloop is about to take the connection out of one of them.
                asyncio.get_running_loop().call_soon(self._remove_servers)
        return Handshake(self._handshakes, self._loopback, self._unix)

    async def open(self) -> None:
        """Start accepting. Raises OSError."""
        await self._add_server(self._sock)

    def close(self) -> None:
        """Stop accepting. Idempotent."""
        if self._adding is not None:
            self._adding.cancel()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._sock.close()

    async def _add_server(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(self, sock=sock, backlog=BACKLOG))

    async def _add_servers(self) -> None:
        try:
            while len(self._servers) < self._handshakes.limiter.capacity.accepts_per_turn:
                await self._add_server(self._sock.dup())
        except OSError as exc:
            log.warning("cannot duplicate listening socket", address=str(self.address), reason=describe_error(exc))

    def _remove_servers(self) -> None:
        for server in self._servers[1:]:
            server.close()
        del self._servers[1:]


class SocketAcceptor(abc.ABC):
    """Accepts on the socket itself, instead of by a uvloop server."""

    def __init__(self, sock: socket.socket) -> None:
        self.address = bound_address(sock)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None

    @abc.abstractmethod
    def handle(self, sock: socket.socket) -> None:
        """Handle an accepted connection, without blocking."""

    def release_spare_fd(self) -> bool:
        """Release a descriptor when the process has none left. False if there is no spare one."""
        return False

    async def open(self) -> None:
        """Start accepting. Raises OSError."""
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stop accepting. Idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE) and self.release_spare_fd():
                    continue
                # Pending connections stay in the backlog. Without a pause the loop would spin.
                log.warning("cannot accept", address=str(self.address), reason=describe_error(exc))
                self._loop.remove_reader(self._sock)
                self._retry = self._loop.call_later(ACCEPT_RETRY_DELAY, self._resume)
                return
            sock.setblocking(False)
            self.handle(sock)


class TlsAcceptor(SocketAcceptor):
    """Accepts on one bound socket with TLS. asyncio's server would not report a connection whose TLS handshake fails,
    and the limiter has to count all of them."""

    def __init__(self, handshakes: Handshakes, sock: socket.socket, tls: Tls) -> None:
        super().__init__(sock)
        self._handshakes = handshakes
        self._tls = tls
        self._loopback = ipaddress.ip_address(self.address.host).is_loopback

    def handle(self, sock: socket.socket) -> None:
        """Start the TLS handshake."""
        TlsHandshake(self._handshakes, self._loopback).start_tls(sock, self._tls.context, self._handshakes.open_timeout)


def remove_stale_socket(path: Path) -> None:
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
        # Connected; or EAGAIN, a busy process listens; or the state is unknown.
        reason = describe_error(OSError(errno.EADDRINUSE if error in (0, errno.EAGAIN) else error, os.strerror(error)))
        raise CannotListenError(f"cannot listen on unix:{path}: {reason}")
    path.unlink(missing_ok=True)


def bound_address(sock: socket.socket) -> Address:
    """Give the address of a bound socket. The name of an abstract Unix socket is written with an @, as in unix(7)."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address(path=f"@{name[1:].decode(errors='replace')}" if isinstance(name, bytes) else name)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return Address(host=name[0], port=name[1])
    return Address(host=str(getattr(sock.family, "name", sock.family)))


def describe_error(exc: OSError) -> str:
    """Give the reason in words for people."""
    if exc.errno == errno.EADDRINUSE:
        return "the address is in use"
    return (exc.strerror or str(exc)).lower()
