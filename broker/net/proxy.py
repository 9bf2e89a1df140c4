"""Who the client really is behind a proxy.

A proxy says in `X-Forwarded-For` from which address a request came, and appends to what was there before. Anybody can
send such a header; so it is believed from a Unix socket, behind which only programs of this machine can be, and from
networks that the configuration lists, and of the addresses in it only the last one that is no proxy itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxies:
    """The proxies of one broker; `networks` as in the configuration, like 10.0.0.0/8."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def client(self, host: str | None, forwarded: Sequence[str]) -> str | None:
        """Give the address of the client, or None where it is the one that is connected.

        `host` is the IP address of whoever is connected, None for a Unix socket; `forwarded` are the values of all
        headers X-Forwarded-For of the request, in order.
        """
        if not forwarded or not (host is None or self._trusts(parse(host))):
            return None
        found: Address | None = None
        for hop in reversed(",".join(forwarded).split(",")):
            address = parse(hop.strip())
            if address is None:
                break  # what stands before something that is no address was written by nobody knows whom
            found = address
            if not self._trusts(address):
                break
        return None if found is None else str(found)

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def network_of(peer: str) -> str | None:
    """Give the address by which a client is counted, or None where it has none. Of IPv6 that is the network of 64 bits:
    whoever has one address there has them all (RFC 6177).

    `peer` is an address, with or without a port, as in the log.
    """
    address = parse(peer)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return None if address is None else str(address)


def parse(text: str) -> Address | None:
    """Read an address, which some proxies write with a port. None if it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # A scope (fe80::1%eth0) says something to the machine that has it, and nothing here.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
