"""The PROXY protocol, versions 1 and 2: the client's address in front of a TCP connection, from a load balancer that
does not speak HTTP (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).

No I/O: bytes in, a peer out. The header is read only from addresses that the configuration names, because anybody could
send one; from those it is required, because the specification forbids to guess.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from broker.net.addresses import Peer, parse_ip
from broker.net.proxy import Networks

UNIX_SOCKETS: Final = "unix"
"""Stands for Unix sockets in a list of networks."""

SIGNATURE_V1: Final = b"PROXY "
SIGNATURE_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"

MAX_V1: Final = 107
"""Bytes of the longest header of version 1, its CRLF included (section 2.1)."""

HEAD_V2: Final = 16
"""Bytes of version 2 before the addresses (section 2.2)."""

PORT = "(0|[1-9][0-9]{0,4})"
LINE = re.compile(rf"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) {PORT} {PORT}\r\n")
UNKNOWN_LINE = re.compile(r"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")

LOCAL, PROXY = 0x20, 0x21
"""Version 2 and its commands: the connection is the proxy's own (a health check), or a client's."""

UNSPECIFIED, TCP4, TCP6, UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
"""The families of addresses that a stream can have."""
ADDRESS_BYTES: Final = {UNSPECIFIED: 0, TCP4: 12, TCP6: 36, UNIX_STREAM: 216}

HIDDEN: Final = Peer(forwarded=True)
"""A client whose address the proxy does not tell. It has no rights of a local client."""


class ProxyProtocolError(Exception):
    """The bytes are no valid header. The text says why, without the bytes."""


class ProxyProtocol:
    """From whom a header is required; `networks` as in the configuration, with `unix` for Unix sockets."""

    __slots__ = ("_networks", "_unix")

    def __init__(self, networks: Iterable[str]) -> None:
        networks = list(networks)
        self._unix = UNIX_SOCKETS in networks
        self._networks = Networks(network for network in networks if network != UNIX_SOCKETS)

    @property
    def enabled(self) -> bool:
        """Whether a header is required from anybody."""
        return self._unix or bool(self._networks)

    def expects_header(self, peer: Peer) -> bool:
        """Whether a connection of this peer begins with a header."""
        return self._unix if peer.unix else peer.ip in self._networks


class HeaderReader:
    """Reads one header. It holds at most 232 bytes, and takes none that come after the header."""

    __slots__ = ("_data", "_left", "done", "peer")

    def __init__(self) -> None:
        self.done = False
        """Whether the header is complete."""
        self.peer: Peer | None = None
        """The client; None if the connection is the proxy's own. Valid once the header is complete."""
        self._data = b""
        self._left = 0
        """Bytes of version 2 that are yet to be skipped."""

    def feed(self, data: bytes) -> int:
        """Take bytes of a connection, and return how many of them belong to the header; the rest is what follows it.

        Raises ProxyProtocolError.
        """
        if self._left:
            return self._skip(len(data))
        known = self._data
        whole = known + data[:HEAD_V2]
        if SIGNATURE_V2.startswith(whole[: len(SIGNATURE_V2)]):
            return self._feed_v2(data)
        if SIGNATURE_V1.startswith(whole[: len(SIGNATURE_V1)]):
            return self._feed_v1(data)
        raise ProxyProtocolError("a header of the PROXY protocol is expected from this address")

    def _feed_v1(self, data: bytes) -> int:
        known = len(self._data)
        line = self._data + data[: MAX_V1 - known]
        end = line.find(b"\n") + 1
        if not end and len(line) == MAX_V1:
            raise ProxyProtocolError("the header of the PROXY protocol is longer than 107 bytes")
        if not end:
            self._data = line
            return len(line) - known
        self.peer = parse_line(line[:end])
        self.done = True
        return end - known

    def _feed_v2(self, data: bytes) -> int:
        known = len(self._data)
        taken = 0
        if known < HEAD_V2:
            self._data += data[: HEAD_V2 - known]
            taken = len(self._data) - known
            if len(self._data) < HEAD_V2:
                return taken
            check_v2(self._data)
        wanted = HEAD_V2 + address_bytes(self._data)
        more = data[taken : taken + wanted - len(self._data)]
        self._data += more
        taken += len(more)
        if len(self._data) < wanted:
            return taken
        self.peer = parse_v2(self._data)
        # What follows the addresses, TLVs, is skipped.
        self._left = HEAD_V2 + int.from_bytes(self._data[14:16], "big") - wanted
        return taken + self._skip(len(data) - taken)

    def _skip(self, available: int) -> int:
        skipped = min(self._left, available)
        self._left -= skipped
        self.done = not self._left
        return skipped


def parse_line(line: bytes) -> Peer:
    """Parse a complete header of version 1. Raises ProxyProtocolError."""
    text = line.decode("latin-1")
    if UNKNOWN_LINE.fullmatch(text):
        return HIDDEN
    found = LINE.fullmatch(text)
    if found is not None:
        family, source, target, source_port, target_port = found.groups()
        version = 4 if family == "TCP4" else 6
        if all(_is_of(version, address) for address in (source, target)) and (
            int(source_port) <= 65_535 and int(target_port) <= 65_535
        ):
            return Peer(parse_ip(source), int(source_port), forwarded=True)
    raise ProxyProtocolError("the header of the PROXY protocol, version 1, is malformed")


def check_v2(head: bytes) -> None:
    """Check the first 16 bytes of version 2. Raises ProxyProtocolError."""
    command, family, length = head[12], head[13], int.from_bytes(head[14:16], "big")
    if command == LOCAL:
        return
    if command != PROXY:
        raise ProxyProtocolError("the header of the PROXY protocol has an unknown version or command")
    if family not in ADDRESS_BYTES:
        raise ProxyProtocolError("the header of the PROXY protocol is for another kind of connection than a stream")
    if length < ADDRESS_BYTES[family]:
        raise ProxyProtocolError("the header of the PROXY protocol is shorter than its addresses")


def address_bytes(head: bytes) -> int:
    """Give the size of the addresses that follow the first 16 bytes of version 2."""
    # Those of the proxy's own connection are skipped (section 2.2), whatever their family.
    return 0 if head[12] == LOCAL else ADDRESS_BYTES[head[13]]


def parse_v2(header: bytes) -> Peer | None:
    """Give the client of a header of version 2, without its TLVs; None if the connection is the proxy's own."""
    if header[12] == LOCAL:
        return None
    if header[13] == TCP4:
        return Peer(ipaddress.IPv4Address(header[16:20]), int.from_bytes(header[24:26], "big"), forwarded=True)
    if header[13] == TCP6:
        ip = ipaddress.IPv6Address(header[16:32])
        return Peer(ip.ipv4_mapped or ip, int.from_bytes(header[48:50], "big"), forwarded=True)
    return HIDDEN


def is_header(data: bytes) -> bool:
    """Whether bytes begin with a header of either version, also with a part of one that is like nothing else."""
    return (len(data) > 4 and SIGNATURE_V2.startswith(data[:12])) or data[:6] == SIGNATURE_V1


def _is_of(version: int, address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == version
    except ValueError:
        return False
