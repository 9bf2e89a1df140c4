"""Who may come in now: counts every connection of the process, and sends away who takes too long over the opening.

There is one limiter for all listeners. It keeps this law: at no moment are there more than `room.connections`
connections that are established or on their way to it, nor more than `room.extra` beside them that are being told why
they may not come in. So the process never runs out of descriptors, which uvloop would answer by closing connections
without a word.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from broker.config import Config
from broker.errors import ConfigError
from broker.metrics import Metrics
from broker.net.origin import Origins
from broker.net.proxy import Proxies, network_of

if TYPE_CHECKING:
    from broker.net.handshake import Handshake

REFUSED_TIMEOUT = 2.0
"""Seconds that a refused client has to read its answer and close. nginx gives 5 (lingering_timeout) and 30 in all;
here it is one answer of a few hundred bytes, and each second holds a descriptor."""

RESERVE = 160
"""Descriptors that are not for clients: some 18 of the process itself, the listening sockets with their further doors,
the admin listener's connections, the engine's files or connections."""

ADMIN = 64
"""Connections of the admin listener at one time. There are a few probes and a Prometheus or two."""

DOORS = 8
"""Descriptors by which one listening socket may be accepted on."""

WARN_EVERY = 10.0
"""Seconds between two warnings that the broker is full: a storm of connections is not to become a storm of log
lines."""

log = structlog.get_logger(__name__)


class Node(Protocol):
    """What is asked of `broker.node.Node` here."""

    @property
    def connections(self) -> int:
        """How many connections are established."""

    @property
    def draining(self) -> bool:
        """Whether the broker is shutting down."""

    @property
    def metrics(self) -> Metrics:
        """Where it is counted."""

    on_disconnect: Callable[[str], None] | None
    """Called with the address of each client that leaves."""

    def peers(self) -> Iterable[str]:
        """Give the addresses of all clients."""

    def connect(
        self, transport: asyncio.Transport, upgrade_response: bytes, rest: bytes, peer: str, window_bits: int = 0
    ) -> None:
        """Take over a socket whose request is a good one.

        Must give the transport another protocol and send `upgrade_response`, the answer with status 101. `rest` is what
        the client sent behind its request, `peer` its address. `window_bits` is 0 unless compression was agreed to,
        then the largest window that the client has for messages from the broker.
        """


class Capacity(msgspec.Struct, frozen=True):
    """How many connections there is room for."""

    connections: int
    """Established, or on their way to it."""
    extra: int
    """Beside them: surplus ones that are told to come back later, and refused ones that still read their answer."""
    admin: int = ADMIN
    """Of the admin listener, from what is not for clients."""
    doors: int = DOORS
    """Of each listening socket, from the same."""

    @classmethod
    def of(cls, files: int, max_connections: int | None) -> Capacity:
        """Divide up `files`, the limit of open descriptors (RLIMIT_NOFILE).

        `max_connections` is the configured bound, if there is one.
        Raises ConfigError when the bound is more than there are descriptors for, or when there are none left for
        clients.
        """
        extra = min(max(files // 16, 16), 1024)
        # With few there is less to be reserved for: 32 are enough for some clients.
        reserve = min(RESERVE, max(32, files * 3 // 8))
        most = files - reserve - extra
        wanted = most if max_connections is None else max_connections
        if most < 1:
            problem = f"limits.max_connections: a limit of {files} open files leaves none for clients"
            raise ConfigError([f"{problem}; allow more (ulimit -n, LimitNOFILE=)"])
        if wanted > most:
            problem = f"limits.max_connections: {wanted} do not fit into the limit of {files} open files"
            raise ConfigError([f"{problem}; allow more (ulimit -n, LimitNOFILE=) or set it to at most {most}"])
        few = reserve < RESERVE
        return cls(wanted, extra, admin=reserve // 6 if few else ADMIN, doors=2 if few else DOORS)


class ConnectionLimiter:
    """Counts, bounds and times the openings of all listeners, by one sweep for all of them."""

    def __init__(self, config: Config, node: Node, capacity: Capacity, loop: asyncio.AbstractEventLoop) -> None:
        self.node = node
        self.path = config.server.path
        self.compression = config.server.compression
        self.origins = Origins(config.server.origins)
        self.proxies = Proxies(config.server.trusted_proxies)
        self.capacity = capacity
        self.closing = False
        self.refused: dict[int, int] = {}
        """How many were refused, by HTTP status; 0 stands for those that were closed without an answer."""
        self.reasons: Counter[str] = Counter()
        """The same by reason, which tells full from draining."""
        self.memory_pressure = False
        """Whether the process takes up as much memory as it may: nobody new is let in then."""
        self._loop = loop
        self.open_timeout = config.limits.open_timeout
        self._spread = config.limits.reconnect_spread
        # Both are in the order of their deadlines, since each group has one time limit for all of its members.
        self.metrics = node.metrics
        self._opening: dict[Handshake, float] = {}
        self._refused: dict[Handshake, float] = {}
        self._admitted = 0
        self._tick = min(self.open_timeout, REFUSED_TIMEOUT) / 4
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._warned = -WARN_EVERY
        self._turned_away = 0
        self._addresses: Counter[str] | None = None
        """How many clients there are of each address; None where nobody asks."""
        self._limit_addresses(config.limits.max_connections_per_address)

    def reconfigure(self, config: Config, capacity: Capacity) -> None:
        """Go by these limits and origins from now on. Who is in already stays."""
        self.compression = config.server.compression
        self.origins = Origins(config.server.origins)
        self.proxies = Proxies(config.server.trusted_proxies)
        self.capacity = capacity
        self.open_timeout = config.limits.open_timeout
        self._spread = config.limits.reconnect_spread
        self._tick = min(self.open_timeout, REFUSED_TIMEOUT) / 4
        self._limit_addresses(config.limits.max_connections_per_address)

    @property
    def connections(self) -> int:
        """All connections of the process, whatever their state."""
        return self.node.connections + len(self._opening) + len(self._refused)

    @property
    def draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self.closing or self.node.draining

    def track(self, handshake: Handshake) -> bool:
        """Take note of a socket that was accepted, and set `handshake.admitted`.

        False: there is no descriptor to spare, not even for as long as an answer takes. It must be closed at once.
        """
        if not self.admit(handshake) and not self._has_extra():
            self.reject()
            self.count(0, self.unavailable_reason or "full")
            return False
        handshake.began = time.monotonic()  # the loop's own clock has milliseconds
        self._opening[handshake] = self._loop.time() + self.open_timeout
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._tick, self._sweep)
        return True

    @property
    def unavailable_reason(self) -> str | None:
        """What there is not enough of to let anybody in: `memory`, or room (`full`); None if there is."""
        if self.memory_pressure:
            return "memory"
        return "full" if self.node.connections + self._admitted >= self.capacity.connections else None

    def over_address_limit(self, peer: str) -> bool:
        """Whether there are as many clients of this address as there may be."""
        if self._addresses is None:
            return False
        network = network_of(peer)
        return network is not None and self._addresses[network] >= self._most_of_address

    def admit(self, handshake: Handshake) -> bool:
        """Whether there is room for this connection.

        Asked again when its request is complete, for a place may have become free.
        """
        if not handshake.admitted and self.unavailable_reason is None:
            handshake.admitted = True
            self._admitted += 1
        return handshake.admitted

    def leave(self, handshake: Handshake) -> None:
        """Take note that this handshake is over, in whatever way. Idempotent."""
        if self._opening.pop(handshake, None) is None:
            self._refused.pop(handshake, None)
        self._dismiss(handshake)
        self._tell()

    def establish(self, handshake: Handshake, peer: str) -> None:
        """Take note that this handshake has ended well: the node counts the connection from here on."""
        if self._addresses is not None and (network := network_of(peer)) is not None:
            self._addresses[network] += 1
        self.metrics.handshakes.observe(time.monotonic() - handshake.began)
        self.leave(handshake)

    def drain_refused(self, handshake: Handshake) -> bool:
        """Take note that this handshake was refused.

        False: too many others read their answer just now, it must be closed without waiting.
        """
        del self._opening[handshake]
        self._dismiss(handshake)
        stays = self._has_extra()
        if stays:
            self._refused[handshake] = self._loop.time() + REFUSED_TIMEOUT
        self._tell()
        return stays

    def retry_after(self) -> int:
        """Seconds for the header Retry-After: not the same for all, so that they do not all come back at once."""
        return 1 + int(random.random() * self._spread)

    def count(self, status: int, reason: str) -> None:
        """Count a refusal with this HTTP status."""
        self.reasons[reason] += 1
        self.refused[status] = self.refused.get(status, 0) + 1

    def close(self) -> None:
        """Let nobody in any more, and refuse those who are about to. Idempotent."""
        self.closing = True
        for handshake in list(self._opening):
            handshake.refuse_draining()

    async def wait_empty(self, timeout: float) -> None:
        """Wait until the last handshake is over, at most `timeout` seconds; who is left then is cut off."""
        if self._opening or self._refused:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout)
        for handshake in [*self._opening, *self._refused]:
            handshake.expire()

    async def wait_open(self, timeout: float) -> None:
        """Wait until nobody is on the way in any more, at most `timeout` seconds. Who was just accepted counts."""
        deadline = self._loop.time() + timeout
        # A listener that was closed in this turn of the loop may have accepted in it.
        await asyncio.sleep(0)
        while self._opening and (left := deadline - self._loop.time()) > 0:
            self._opened = self._loop.create_future()
            await asyncio.wait([self._opened], timeout=left)

    def _tell(self) -> None:
        """Wake up who waits for an end of the openings."""
        if self._opening:
            return
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)
        if self._empty is not None and not self._refused and not self._empty.done():
            self._empty.set_result(None)

    def _has_extra(self) -> bool:
        return len(self._refused) + len(self._opening) - self._admitted < self.capacity.extra

    def _dismiss(self, handshake: Handshake) -> None:
        if handshake.admitted:
            handshake.admitted = False
            self._admitted -= 1

    def _sweep(self) -> None:
        now = self._loop.time()
        for group in (self._opening, self._refused):
            late = []
            for handshake, deadline in group.items():
                if deadline > now:
                    break
                late.append(handshake)
            for handshake in late:
                handshake.expire()
        waiting = self._opening or self._refused
        self._sweeper = self._loop.call_later(self._tick, self._sweep) if waiting else None

    def _limit_addresses(self, most: int | None) -> None:
        """Begin to count the clients of each address, or cease to."""
        if most is None:
            self._addresses = self.node.on_disconnect = None
            return
        self._most_of_address = most
        if self._addresses is None:
            self._addresses = Counter(filter(None, map(network_of, self.node.peers())))
            self.node.on_disconnect = self._depart

    def _depart(self, peer: str) -> None:
        network = network_of(peer)
        if self._addresses is None or network is None:
            return
        self._addresses[network] -= 1
        if self._addresses[network] <= 0:  # only who is there takes up memory
            del self._addresses[network]

    def reject(self) -> None:
        """Take note that a surplus connection is not let in. That memory is short is told of elsewhere."""
        if self.memory_pressure:
            return
        self._turned_away += 1
        now = self._loop.time()
        if now - self._warned < WARN_EVERY:
            return
        log.warning(
            "connection limit reached",
            connections=self.node.connections,
            capacity=self.capacity.connections,
            rejected=self._turned_away,
        )
        self._warned = now
        self._turned_away = 0
