"""The limit of connections: who may have one of the places, and how many were refused for which reason.

There is one limiter for all listeners. It counts and decides; it knows no sockets, no handshakes and no timers.
Invariant: at any time at most `capacity.connections` connections are established or hold a slot for it, and at most
`capacity.extra` more are waiting for one or being refused. So the process never runs out of descriptors; if it did,
uvloop would close connections without an answer.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from broker.config import Limits
from broker.errors import ConfigError, Problem
from broker.net.addresses import IP, Network, Peer
from broker.rates import Rates

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

    on_disconnect: Callable[[Peer], None] | None
    """Called with the address of each client that disconnects."""

    def peers(self) -> Iterable[Peer]:
        """Give the addresses of all clients."""


class Place(enum.Enum):
    """What a connection that is not established yet holds of the capacity."""

    NONE = "none"
    """Nothing: it must be closed at once, or has been established."""
    EXTRA = "extra"
    """One of `capacity.extra`: it waits for a slot to become free, or reads the answer that refuses it."""
    SLOT = "slot"
    """One of `capacity.connections`."""


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
    """Gives out places. Who holds a place keeps it in mind, and gives it back with `release`."""

    def __init__(self, limits: Limits, node: Node, capacity: Capacity) -> None:
        self.node = node
        self.capacity = capacity
        self.refused: dict[int, int] = {}
        """Refused connections by HTTP status; 0: closed without an answer."""
        self.reasons: Counter[str] = Counter()
        """Refused connections by reason, as in the metric."""
        self.memory_pressure = False
        """Whether memory is low, so that new connections are refused."""
        self._slots = 0
        self._extra = 0
        self._warned = -WARN_EVERY
        self._rejected = 0
        self._rates: Rates | None = None
        """Handshakes of each address; None without `handshake_rate`."""
        self._addresses: Counter[IP | Network] | None = None
        """Clients of each address; None without `max_connections_per_address`."""
        self._limit_addresses(limits.max_connections_per_address)
        self._limit_rate(limits)

    def reconfigure(self, limits: Limits, capacity: Capacity) -> None:
        """Apply these limits from now on. Established connections stay."""
        self.capacity = capacity
        self._limit_addresses(limits.max_connections_per_address)
        self._limit_rate(limits)

    @property
    def connections(self) -> int:
        """All connections of the process, whatever their state."""
        return self.node.connections + self._slots + self._extra

    @property
    def unavailable_reason(self) -> str | None:
        """Why new connections are refused: `memory` or `full`; None if they are not."""
        if self.memory_pressure:
            return "memory"
        return "full" if self.node.connections + self._slots >= self.capacity.connections else None

    def admit(self) -> Place:
        """Give a place to a connection that was just accepted: the best one that is free."""
        if self.unavailable_reason is None:
            self._slots += 1
            return Place.SLOT
        return self._take_extra()

    def take_slot(self, place: Place) -> Place:
        """Exchange a place for a slot, if one is free. Otherwise the place stays what it is.

        For the moment when a request is complete: a slot may have become free since the connection was accepted.
        """
        if place is Place.EXTRA and self.unavailable_reason is None:
            self._extra -= 1
            self._slots += 1
            return Place.SLOT
        return place

    def give_up_slot(self, place: Place) -> Place:
        """Exchange a place for one of the extra ones, for a client that is being refused.

        NONE: all of these are taken, and the caller must close the connection without waiting.
        """
        self.release(place)
        return self._take_extra()

    def release(self, place: Place) -> None:
        """Take back a place."""
        if place is Place.SLOT:
            self._slots -= 1
        elif place is Place.EXTRA:
            self._extra -= 1

    def over_address_limit(self, peer: Peer) -> bool:
        """Whether the limit of connections of this client's address is reached."""
        if self._addresses is None:
            return False
        network = peer.network
        return network is not None and self._addresses[network] >= self._max_per_address

    def over_rate(self, peer: Peer) -> bool:
        """Count a handshake of this client's address; whether it is one too many for the time."""
        if self._rates is None or (network := peer.network) is None:
            return False
        return self._rates.take(network, time.monotonic()) > 0

    def count_address(self, peer: Peer) -> None:
        """Count a client that is established from now on."""
        if self._addresses is not None and (network := peer.network) is not None:
            self._addresses[network] += 1

    def count_refusal(self, status: int, reason: str) -> None:
        """Count a refusal with this HTTP status."""
        self.reasons[reason] += 1
        self.refused[status] = self.refused.get(status, 0) + 1

    def reject(self) -> None:
        """Log connections over the limit, at most every WARN_EVERY seconds. The health monitor logs low memory."""
        if self.memory_pressure:
            return
        self._rejected += 1
        now = time.monotonic()
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

    def _take_extra(self) -> Place:
        if self._extra >= self.capacity.extra:
            return Place.NONE
        self._extra += 1
        return Place.EXTRA

    def _limit_rate(self, limits: Limits) -> None:
        """Start or stop limiting the handshakes of each address. A limit that stays remembers."""
        wanted = (limits.handshake_rate, limits.handshake_burst)
        if not limits.handshake_rate:
            self._rates = None
        elif self._rates is None or (self._rates.rate, self._rates.burst) != wanted:
            self._rates = Rates(*wanted)

    def _limit_addresses(self, limit: int | None) -> None:
        """Start or stop counting the clients of each address."""
        if limit is None:
            self._addresses = self.node.on_disconnect = None
            return
        self._max_per_address = limit
        if self._addresses is None:
            self._addresses = Counter(network for peer in self.node.peers() if (network := peer.network) is not None)
            self.node.on_disconnect = self._uncount_address

    def _uncount_address(self, peer: Peer) -> None:
        network = peer.network
        if self._addresses is None or network is None:
            return
        self._addresses[network] -= 1
        if self._addresses[network] <= 0:  # so that memory is bounded by the connected clients
            del self._addresses[network]
