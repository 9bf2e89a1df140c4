"""The limit of connections: counts every connection of the process and times out slow handshakes.

There is one limiter for all listeners. Invariant: at any time at most `capacity.connections` connections are
established or in their handshake, and at most `capacity.extra` more are being refused. So the process never runs out of
descriptors; if it did, uvloop would close connections without an answer.
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
from broker.errors import ConfigError, Problem
from broker.metrics import Metrics
from broker.net.origin import Origins
from broker.net.proxy import Proxies, address_key

if TYPE_CHECKING:
    from broker.net.handshake import Handshake

REFUSED_TIMEOUT = 2.0
"""Seconds that a refused client has to read its answer and close. nginx gives 5 (lingering_timeout) and 30 in all;
here it is one answer of a few hundred bytes, and each second holds a descriptor."""

RESERVED_FDS = 160
"""Descriptors that are not for clients: about 18 of the process itself, the listening sockets and their duplicates, the
admin listener's connections, the engine's files or connections."""

ADMIN_CONNECTIONS = 64
"""Limit of admin connections: enough for a few probes and scrapers."""

ACCEPTS_PER_TURN = 8
"""Connections that one listening socket accepts in a turn of the event loop (see listener.py)."""

WARN_EVERY = 10.0
"""Seconds between two warnings that the limit is reached, so that a burst of connections does not flood the log."""

log = structlog.get_logger(__name__)


class Node(Protocol):
    """What the limiter needs of `broker.node.Node`."""

    @property
    def connections(self) -> int:
        """How many connections are established."""

    @property
    def draining(self) -> bool:
        """Whether the broker is shutting down."""

    @property
    def metrics(self) -> Metrics:
        """The counters of the node."""

    on_disconnect: Callable[[str], None] | None
    """Called with the address of each client that disconnects."""

    def peers(self) -> Iterable[str]:
        """Give the addresses of all clients."""

    def connect(
        self, transport: asyncio.Transport, upgrade_response: bytes, rest: bytes, peer: str, window_bits: int = 0
    ) -> None:
        """Take over a socket after a valid request.

        Must give the transport another protocol and send `upgrade_response`, the answer with status 101. `rest` is what
        the client sent behind its request, `peer` its address. `window_bits` is 0 unless compression was agreed to,
        then the largest window that the client has for messages from the broker.
        """


class Capacity(msgspec.Struct, frozen=True):
    """How the descriptors of the process are divided."""

    connections: int
    """Limit of connections, established or in their handshake."""
    extra: int
    """Limit of further connections that are being refused."""
    admin: int = ADMIN_CONNECTIONS
    """Limit of admin connections; their descriptors are part of the reserve."""
    accepts_per_turn: int = ACCEPTS_PER_TURN
    """Connections that a listening socket accepts in a turn; its duplicates are part of the reserve."""

    @classmethod
    def of(cls, files: int, max_connections: int | None) -> Capacity:
        """Divide `files`, the limit of open descriptors (RLIMIT_NOFILE).

        `max_connections` is the configured bound, if there is one.
        Raises ConfigError when the bound is more than there are descriptors for, or when there are none left for
        clients.
        """
        extra = min(max(files // 16, 16), 1024)
        # A low limit has fewer sockets to reserve for: 32 are enough.
        reserve = min(RESERVED_FDS, max(32, files * 3 // 8))
        limit = files - reserve - extra
        wanted = limit if max_connections is None else max_connections
        if limit < 1:
            problem = f"a limit of {files} open files leaves none for clients; allow more (ulimit -n, LimitNOFILE=)"
            raise ConfigError([Problem(problem, "limits.max_connections")])
        if wanted > limit:
            problem = f"{wanted} do not fit into the limit of {files} open files"
            advice = f"allow more (ulimit -n, LimitNOFILE=) or set it to at most {limit}"
            raise ConfigError([Problem(f"{problem}; {advice}", "limits.max_connections")])
        few = reserve < RESERVED_FDS
        return cls(
            wanted,
            extra,
            admin=reserve // 6 if few else ADMIN_CONNECTIONS,
            accepts_per_turn=2 if few else ACCEPTS_PER_TURN,
        )


class ConnectionLimiter:
    """Counts, bounds and times out the handshakes of all listeners, with one sweep for all."""

    def __init__(self, config: Config, node: Node, capacity: Capacity, loop: asyncio.AbstractEventLoop) -> None:
        self.node = node
        self.path = config.server.path
        self.compression = config.server.compression
        self.origins = Origins(config.server.origins)
        self.proxies = Proxies(config.server.trusted_proxies)
        self.capacity = capacity
        self.closing = False
        self.refused: dict[int, int] = {}
        """Refused connections by HTTP status; 0: closed without an answer."""
        self.reasons: Counter[str] = Counter()
        """Refused connections by reason, as in the metric."""
        self.memory_pressure = False
        """Whether memory is low, so that new connections are refused."""
        self._loop = loop
        self.open_timeout = config.limits.open_timeout
        self._spread = config.limits.reconnect_spread
        # Both are in the order of their deadlines: each has one timeout for all its members.
        self.metrics = node.metrics
        self._opening: dict[Handshake, float] = {}
        self._refused: dict[Handshake, float] = {}
        self._slots = 0
        self._tick = min(self.open_timeout, REFUSED_TIMEOUT) / 4
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._warned = -WARN_EVERY
        self._rejected = 0
        self._addresses: Counter[str] | None = None
        """Clients of each address; None without `max_connections_per_address`."""
        self._limit_addresses(config.limits.max_connections_per_address)

    def reconfigure(self, config: Config, capacity: Capacity) -> None:
        """Apply these limits and origins from now on. Established connections stay."""
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
        """Whether all new connections are refused."""
        return self.closing or self.node.draining

    def track(self, handshake: Handshake) -> bool:
        """Track an accepted socket, and set `handshake.has_slot`.

        False: not even the extra capacity is free, and the caller must close the socket at once.
        """
        if not self.reserve_slot(handshake) and not self._has_extra_slot():
            self.reject()
            self.count_refusal(0, self.unavailable_reason or "full")
            return False
        handshake.began = time.monotonic()  # the loop's own clock has milliseconds
        self._opening[handshake] = self._loop.time() + self.open_timeout
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._tick, self._sweep)
        return True

    @property
    def unavailable_reason(self) -> str | None:
        """Why new connections are refused: `memory` or `full`; None if they are not."""
        if self.memory_pressure:
            return "memory"
        return "full" if self.node.connections + self._slots >= self.capacity.connections else None

    def over_address_limit(self, peer: str) -> bool:
        """Whether the limit of connections of this address is reached."""
        if self._addresses is None:
            return False
        network = address_key(peer)
        return network is not None and self._addresses[network] >= self._max_per_address

    def reserve_slot(self, handshake: Handshake) -> bool:
        """Reserve one of `capacity.connections` for a handshake; False if none is free.

        Tried again when the request is complete, since a slot may have become free. Idempotent.
        """
        if not handshake.has_slot and self.unavailable_reason is None:
            handshake.has_slot = True
            self._slots += 1
        return handshake.has_slot

    def untrack(self, handshake: Handshake) -> None:
        """Stop tracking a handshake that has ended, for any reason. Idempotent."""
        if self._opening.pop(handshake, None) is None:
            self._refused.pop(handshake, None)
        self._release_slot(handshake)
        self._wake_waiters()

    def establish(self, handshake: Handshake, peer: str) -> None:
        """End a successful handshake: the node counts the connection from now on."""
        if self._addresses is not None and (network := address_key(peer)) is not None:
            self._addresses[network] += 1
        self.metrics.handshakes.observe(time.monotonic() - handshake.began)
        self.untrack(handshake)

    def drain_refused(self, handshake: Handshake) -> bool:
        """Move a refused handshake to those that still read their answer.

        False: the extra capacity is used up, and the caller must close the connection without waiting.
        """
        del self._opening[handshake]
        self._release_slot(handshake)
        stays = self._has_extra_slot()
        if stays:
            self._refused[handshake] = self._loop.time() + REFUSED_TIMEOUT
        self._wake_waiters()
        return stays

    def retry_after(self) -> int:
        """Choose the seconds of a Retry-After header, at random so that clients do not all reconnect at once."""
        return 1 + int(random.random() * self._spread)

    def count_refusal(self, status: int, reason: str) -> None:
        """Count a refusal with this HTTP status."""
        self.reasons[reason] += 1
        self.refused[status] = self.refused.get(status, 0) + 1

    def close(self) -> None:
        """Refuse all new connections and all pending handshakes. Idempotent."""
        self.closing = True
        for handshake in list(self._opening):
            handshake.refuse_draining()

    async def wait_empty(self, timeout: float) -> None:
        """Wait until the last handshake has ended, at most `timeout` seconds; then abort the others."""
        if self._opening or self._refused:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout)
        for handshake in [*self._opening, *self._refused]:
            handshake.expire()

    async def wait_handshakes(self, timeout: float) -> None:
        """Wait until no handshake is pending, at most `timeout` seconds. A connection that was just accepted counts."""
        deadline = self._loop.time() + timeout
        # A listener that was closed in this turn of the loop may have accepted in it.
        await asyncio.sleep(0)
        while self._opening and (left := deadline - self._loop.time()) > 0:
            self._opened = self._loop.create_future()
            await asyncio.wait([self._opened], timeout=left)

    def _wake_waiters(self) -> None:
        """Wake `wait_handshakes` and `wait_empty` if their condition holds."""
        if self._opening:
            return
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)
        if self._empty is not None and not self._refused and not self._empty.done():
            self._empty.set_result(None)

    def _has_extra_slot(self) -> bool:
        return len(self._refused) + len(self._opening) - self._slots < self.capacity.extra

    def _release_slot(self, handshake: Handshake) -> None:
        if handshake.has_slot:
            handshake.has_slot = False
            self._slots -= 1

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

    def _limit_addresses(self, limit: int | None) -> None:
        """Start or stop counting the clients of each address."""
        if limit is None:
            self._addresses = self.node.on_disconnect = None
            return
        self._max_per_address = limit
        if self._addresses is None:
            self._addresses = Counter(filter(None, map(address_key, self.node.peers())))
            self.node.on_disconnect = self._uncount_address

    def _uncount_address(self, peer: str) -> None:
        network = address_key(peer)
        if self._addresses is None or network is None:
            return
        self._addresses[network] -= 1
        if self._addresses[network] <= 0:  # so that memory is bounded by the connected clients
            del self._addresses[network]

    def reject(self) -> None:
        """Log connections over the limit, at most every WARN_EVERY seconds. The health monitor logs low memory."""
        if self.memory_pressure:
            return
        self._rejected += 1
        now = self._loop.time()
        if now - self._warned < WARN_EVERY:
            return
        log.warning(
            "connection limit reached",
            connections=self.node.connections,
            capacity=self.capacity.connections,
            rejected=self._rejected,
        )
        self._warned = now
        self._rejected = 0
