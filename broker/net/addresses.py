"""Addresses of listeners and of clients, parsed once. Rights and limits are decided on these structures, never on text
of the log.

This module imports nothing of the broker, so that lower layers may use it too.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

import msgspec

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

CLIENT_PREFIX: Final = 64
"""Bits of an IPv6 address that count for limits: a host usually has a whole network of that size (RFC 6177)."""


class Address(msgspec.Struct, frozen=True):
    """What to listen on: a TCP address (`host` without brackets, `port` 0 for any free), a Unix socket's path, or the
    sockets that systemd passes."""

    host: str = ""
    port: int = 0
    path: str = ""
    systemd: bool = False

    @property
    def local(self) -> bool:
        """Whether only this machine can connect: a Unix socket, or a host that stands for loopback (RFC 6761, 6.3).

        Of `systemd` nobody knows before its sockets are there; it is looked at then.
        """
        if self.systemd or self.path or self.host.lower() == "localhost" or self.host.lower().endswith(".localhost"):
            return True
        ip = parse_ip(self.host)
        return ip is not None and ip.is_loopback

    def __str__(self) -> str:
        if self.systemd:
            return "systemd"
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Peer:
    """The client at the other end of a connection.

    No Struct, because the JSON of the log would show its fields: as text, and in the log, it is the address alone.
    """

    __slots__ = ("forwarded", "ip", "port", "unix")

    def __init__(
        self, ip: IP | None = None, port: int | None = None, *, unix: bool = False, forwarded: bool = False
    ) -> None:
        self.ip = ip
        """The IP address; None for a Unix socket, and for a client that disconnected before it was asked."""
        self.port = port
        """The port, where it is known."""
        self.unix = unix
        """Whether the client has connected to a Unix socket, and no proxy has named another address."""
        self.forwarded = forwarded
        """Whether the address comes from a trusted proxy, and not from the socket."""

    @property
    def local(self) -> bool:
        """Whether the client is a program on this machine. A proxy's clients are not, whatever their address."""
        return self.unix or (self.ip is not None and self.ip.is_loopback and not self.forwarded)

    @property
    def network(self) -> IP | Network | None:
        """What limits count by: the IPv4 address, or the IPv6 network of 64 bits. None if there is no address."""
        if isinstance(self.ip, ipaddress.IPv6Address):
            return ipaddress.IPv6Network((int(self.ip) >> CLIENT_PREFIX << CLIENT_PREFIX, CLIENT_PREFIX))
        return self.ip

    def __str__(self) -> str:
        if self.ip is None:
            return "unix:" if self.unix else "unknown"
        if self.port is None:
            return str(self.ip)
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Peer):
            return NotImplemented
        return (self.ip, self.port, self.unix, self.forwarded) == (other.ip, other.port, other.unix, other.forwarded)

    def __hash__(self) -> int:
        return hash((self.ip, self.port))


UNIX: Final = Peer(unix=True)
"""Each client of a Unix socket."""
UNKNOWN: Final = Peer()
"""A client that disconnected before its address was read."""


MAX_IP: Final = 64
"""Characters of the longest address: 45 (INET6_ADDRSTRLEN), and a zone of 16 (IFNAMSIZ)."""


def parse_ip(text: str) -> IP | None:
    """Parse an IP address. None if it is invalid.

    An IPv4 address that is mapped into IPv6 is given as IPv4. A zone (fe80::1%eth0) is left out: it has a meaning only
    on the machine that wrote it.
    """
    # Longer text would fill the cache: it may come from a header of a client.
    return None if len(text) > MAX_IP else _parse_short(text)


# Few addresses have many connections each (a proxy, a NAT); the cache lets these share one object.
@lru_cache(maxsize=4096)
def _parse_short(text: str) -> IP | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_node(text: str) -> IP | None:
    """Parse the IP address of `address`, `address:port`, `[v6]` or `[v6]:port`, as proxies write them."""
    if text.startswith("["):
        text, _, port = text[1:].partition("]")
        if port and not port.startswith(":"):
            return None
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return parse_ip(text)


def peer_of(name: tuple[str, int] | tuple[str, int, int, int] | None) -> Peer:
    """Give the peer for what `getpeername` of a TCP socket says; None where it said nothing."""
    return UNKNOWN if name is None else Peer(parse_ip(name[0]), name[1])
