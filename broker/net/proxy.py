"""The client's address behind a proxy, from the header `X-Forwarded-For` or `Forwarded` (RFC 7239).

A proxy appends the address of its client to this header. Any client can send the header, so it is trusted only from a
Unix socket, which only programs of this machine can reach, and from the networks in `server.trusted_proxies`. The last
of its addresses that is not a trusted proxy is the client.

Only one of the two headers is read, the one that the proxy sets: the other one a client could have sent.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from broker.net.addresses import IP, Network, Peer, parse_node

X_FORWARDED_FOR: Final = "X-Forwarded-For"
FORWARDED: Final = "Forwarded"

MAX_ELEMENT: Final = 512
"""Characters of one element of Forwarded. Proxies write less than a hundred."""

MAX_ELEMENTS: Final = 100
"""Elements of either header that are read, from the last one on; empty ones count."""

# RFC 7239, section 4. The quantifiers with a plus do not backtrack.
PAIR = r"""(?:([!#$%&'*+.^_`|~0-9A-Za-z-]++)=(?:"((?:[^"\\]|\\.)*+)"|([^",;\s]++)))"""
PARAMETER = re.compile(PAIR)
ELEMENT = re.compile(rf"[ \t]*+{PAIR}?+[ \t]*+(?:;[ \t]*+{PAIR}?+[ \t]*+)*+")


class Networks:
    """A set of IP networks; `networks` as in the configuration, like 10.0.0.0/8."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks: list[Network] = [ipaddress.ip_network(network) for network in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, ip: IP | None) -> bool:
        return ip is not None and any(ip in network for network in self._networks)


class Proxies:
    """The trusted proxies, and the header that they set."""

    __slots__ = ("_networks", "header")

    def __init__(self, networks: Iterable[str], header: str = X_FORWARDED_FOR) -> None:
        self.header = header
        """The name of the header: `X-Forwarded-For` or `Forwarded`."""
        self._networks = Networks(networks)

    def trusts(self, peer: Peer) -> bool:
        """Whether this peer is a proxy whose header says who the client is."""
        return peer.unix or peer.ip in self._networks

    def resolve_client(self, peer: Peer, values: Sequence[str]) -> Peer | None:
        """Give the client that a proxy speaks for, or None if the header is absent or not trusted.

        `values` are those of all headers of this name in the request, in order.
        """
        if not values or not self.trusts(peer):
            return None
        text = ",".join(values)
        found: IP | None = None
        for hop in forwarded_hops(text) if self.header == FORWARDED else reversed(text.rsplit(",", MAX_ELEMENTS - 1)):
            hop = hop.strip()
            if not hop and self.header == X_FORWARDED_FOR:
                continue  # empty elements are ignored (RFC 9110, section 5.6.1.2)
            ip = parse_node(hop)
            if ip is None:
                break  # entries before one that is no address cannot be trusted
            found = ip
            if ip not in self._networks:
                break
        # Of a client without an address it is known that it came through the proxy: it counts as the proxy, and has no
        # rights of a client on this machine.
        return Peer(found or peer.ip, forwarded=True)


def forwarded_hops(text: str) -> Iterator[str]:
    """Give `for` of each element of a Forwarded header, the last one first; "" where an element has none.

    The elements are read from the end: the last ones are of proxies, and a client could begin the header with a
    quotation mark that it does not close. Where no valid element is found, "" comes and nothing more.
    """
    end = len(text)
    for _ in range(MAX_ELEMENTS):
        start, floor = end, max(0, end - MAX_ELEMENT)
        while True:
            start = text.rfind(",", floor, start)
            if start < 0 and floor:
                yield ""
                return
            if ELEMENT.fullmatch(text, start + 1, end):
                break
            if start < 0:
                yield ""
                return
        if text[start + 1 : end].strip():  # empty elements are ignored (RFC 9110, section 5.6.1.2)
            yield _for_parameter(text[start + 1 : end])
        if start < 0:
            return
        end = start


def _for_parameter(element: str) -> str:
    for name, quoted, token in PARAMETER.findall(element):
        if name.lower() == "for":
            return token or re.sub(r"\\(.)", r"\1", quoted)
    return ""
