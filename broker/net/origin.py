"""Which web pages may connect.

A browser lets a page of any site open a WebSocket to any address, the user's own machine included, and sends the
page's origin along (RFC 6454; RFC 6455, section 10.2). Only the server can say no. Programs that are no browsers send
no origin, or whatever they like: this is no protection against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DEFAULT_PORTS = {"http": "80", "https": "443"}

# As a browser writes it: no path, no user, an IPv6 address in brackets.
WEB = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[^\[\]/?#@:\s]+)(?::([0-9]{1,5}))?")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]/?#@:\s]+)(?::([0-9]{1,5}))?")
LOOPBACK = re.compile(r"localhost|.+\.localhost|127(\.[0-9]{1,3}){3}|\[::1\]")


class Origins:
    """The rule of one broker.

    `listed` are the origins of the configuration: as browsers write them, or `null`, or `*`.
    """

    __slots__ = ("any", "listed")

    def __init__(self, listed: Iterable[str]) -> None:
        self.listed = frozenset(full(origin) for origin in listed)
        self.any = "*" in self.listed

    def allow(self, origin: str, host: str, *, loopback: bool) -> bool:
        """Whether a page of `origin` may connect with a request for `host` (the value of the header Host).

        `loopback` says that the listener is reached from this machine only; pages of this machine are welcome there,
        whatever their port.
        """
        origin = full(origin)
        if self.any or origin in self.listed:
            return True
        page = WEB.fullmatch(origin)
        if page is None:
            return False
        scheme, name, port = page.groups()
        here = HOST.fullmatch(host.lower())
        if here is not None and (name, port) == (here[1], here[2] or DEFAULT_PORTS[scheme]):
            return True
        return loopback and LOOPBACK.fullmatch(name) is not None


def full(origin: str) -> str:
    """Give the origin in lower case and with its port written out, so that two spellings of one origin are equal."""
    origin = origin.lower()
    page = WEB.fullmatch(origin)
    if page is None or page[3] is not None:
        return origin
    return f"{origin}:{DEFAULT_PORTS[page[1]]}"
