"""Which web pages may connect.

A browser lets a page of any site open a WebSocket to any address, the user's own machine included, and sends the
page's origin along (RFC 6454; RFC 6455, section 10.2). Only the server can refuse it. Programs that are no browsers
send no origin, or any: this is no protection against them.

This module imports nothing of the broker, so that the configuration is checked with the same grammar.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

DEFAULT_PORTS: Final = {"http": "80", "https": "443"}

# As a browser writes it: no path, no user, an IPv6 address in brackets. Go's x/net adds a slash. Schemes of other
# programs may have no host (file://, qrc://).
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+(?:%[^\[\]/?#@:\s]+)?\]|[^\[\]/?#@:\s]*)(?::([0-9]{1,5}))?/?")
HOST = re.compile(r"(\[[0-9a-f:.]+(?:%[^\[\]/?#@:\s]+)?\]|[^\[\]/?#@:\s]+)(?::([0-9]{1,5}))?")
NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?")
LOOPBACK = re.compile(r"localhost|.+\.localhost|127(\.[0-9]{1,3}){3}|\[::1\]")

ANY: Final = "*"
OPAQUE: Final = "null"
"""What browsers send for pages without an origin: files, sandboxed frames."""

ORIGIN_REFUSED: Final = "pages of this origin may not connect; those that may are listed in server.origins"
HOST_REFUSED: Final = (
    "this address is for pages of this machine, and the request is for another host; "
    "if that is right, list the host's origin in server.origins"
)


class Origin(NamedTuple):
    """An origin in normal form: lower case, the host in punycode, the port written out if the scheme has a default."""

    scheme: str
    host: str
    port: str


class Origins:
    """The rule of one broker.

    `listed` are the origins of the configuration: as browsers write them, or `https://*.example.com` for any subdomain,
    or `null`, or `*`. Invalid ones are ignored; the configuration reports them.
    """

    __slots__ = ("any", "listed", "opaque", "suffixes")

    def __init__(self, listed: Iterable[str]) -> None:
        self.any = ANY in (listed := list(listed))
        self.opaque = OPAQUE in (origin.lower() for origin in listed)
        parsed = [origin for origin in map(parse_origin, listed) if origin is not None]
        self.listed = frozenset(origin for origin in parsed if not origin.host.startswith("*."))
        self.suffixes = [origin._replace(host=origin.host[1:]) for origin in parsed if origin.host.startswith("*.")]

    def refusal(self, origin: str, host: str, *, loopback: bool) -> str | None:
        """Say why a page of `origin` may not connect with a request for `host` (the header Host); None if it may.

        `loopback` says that the listener is reached from this machine only. Pages of this machine are welcome there,
        whatever their port. The host must then be this machine, too: otherwise a page could reach the broker by letting
        its own host name resolve to this machine (DNS rebinding), since browsers regard that as its own server.
        """
        if self.any:
            return None
        page = parse_origin(origin)
        here = parse_host(host)
        if page is None:
            known = self.opaque and origin.lower() == OPAQUE
        else:
            known = (
                self._lists(page)
                or _is_same_host(page, here)
                or (loopback and page.scheme in DEFAULT_PORTS and LOOPBACK.fullmatch(page.host) is not None)
            )
        if not known:
            return ORIGIN_REFUSED
        if loopback and not self._is_own_host(here):
            return HOST_REFUSED
        return None

    def _lists(self, page: Origin) -> bool:
        return page in self.listed or any(
            page.host.endswith(suffix.host) and (page.scheme, page.port) == (suffix.scheme, suffix.port)
            for suffix in self.suffixes
        )

    def _is_own_host(self, here: tuple[str, str] | None) -> bool:
        """Whether a host is this machine by its name, or the host of a listed origin."""
        if here is None:
            return False
        name, port = here
        if LOOPBACK.fullmatch(name):
            return True
        return any(self._lists(Origin(scheme, name, port or default)) for scheme, default in DEFAULT_PORTS.items())


def parse_origin(text: str) -> Origin | None:
    """Parse an origin; None if it is none, like `null`. The host may begin with `*.`, which only a rule may have."""
    found = ORIGIN.fullmatch(text.lower())
    if found is None:
        return None
    scheme, host, port = found.groups()
    name = normalize_host(host)
    if name is None or (scheme in DEFAULT_PORTS and not _is_name(name)):
        return None
    return Origin(scheme, name, normalize_port(port) or DEFAULT_PORTS.get(scheme, ""))


def parse_host(text: str) -> tuple[str, str] | None:
    """Parse the value of a header Host: the name in normal form, and the port, or "". None if it is invalid."""
    found = HOST.fullmatch(text.lower())
    name = None if found is None else normalize_host(found[1])
    return None if found is None or name is None else (name, normalize_port(found[2]))


def normalize_host(host: str) -> str | None:
    """Give a host as browsers send it: a name in punycode (RFC 5891 and UTS 46), an IPv6 address in its short form.

    None if it is no valid name or address.
    """
    if host.startswith("["):
        try:
            # In a URL, the zone of an address follows an encoded percent sign (RFC 6874).
            return f"[{ipaddress.IPv6Address(host[1:-1].replace('%25', '%', 1))}]"
        except ValueError:
            return None
    if host.isascii():
        return host
    import idna  # its tables take some milliseconds to load, and few need them

    wildcard = "*." if host.startswith("*.") else ""
    try:
        return wildcard + idna.encode(host.removeprefix(wildcard), uts46=True).decode()
    except idna.IDNAError:
        return None


def normalize_port(port: str | None) -> str:
    """Give a port without leading zeros; "" if there is none."""
    return str(int(port)) if port else ""


def _is_name(host: str) -> bool:
    return host.startswith("[") or NAME.fullmatch(host) is not None


def _is_same_host(page: Origin, here: tuple[str, str] | None) -> bool:
    if here is None or page.scheme not in DEFAULT_PORTS:
        return False
    name, port = here
    return (page.host, page.port) == (name, port or DEFAULT_PORTS[page.scheme])
