"""The client's address behind a proxy, from `X-Forwarded-For`.

A proxy appends the address of its client to this header. Any client can send the header, so it is trusted only from a
Unix socket, which only programs of this machine can reach, and from the networks in `server.trusted_proxies`. The last
of its addresses that is not a trusted proxy is the client.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxies:
    """The trusted proxies; `networks` as in the configuration, like 10.0.0.0/8."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def resolve_client(self, host: str | None, forwarded: Sequence[str]) -> str | None:
        """Give the forwarded address of the client, or None if the header is absent or not trusted.

        `host` is the IP address of the peer, None for a Unix socket; `forwarded` are the values of all headers
        X-Forwarded-For of the request, in order.
        """
        if not forwarded or not (host is None or self._trusts(parse_address(host))):
            return None
        found: Address | None = None
        for hop in reversed(",".join(forwarded).split(",")):
            address = parse_address(hop.strip())
            if address is None:
                break  # entries before one that is no address cannot be trusted
            found = address
            if not self._trusts(address):
                break
        return None if found is None else str(found)

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def address_key(peer: str) -> str | None:
    """Give the address by which a client is counted, or None if it has none. For IPv6 that is the network of 64 bits,
    since a host usually has a whole network (RFC 6177).

    `peer` is an address, with or without a port, as in the log.
    """
    address = parse_address(peer)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return None if address is None else str(address)


def parse_address(text: str) -> Address | None:
    """Parse an address, which some proxies write with a port. None if it is invalid."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # A scope (fe80::1%eth0) has a meaning only on the machine that wrote it.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
