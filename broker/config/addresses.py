"""Addresses to listen on, as the configuration writes them."""

from __future__ import annotations

import grp
import ipaddress
import os
import re
from typing import Final

from broker.errors import ConfigError
from broker.net.addresses import Address

__all__ = ["Address", "find_group", "parse_address", "printable"]


def parse_address(text: str) -> Address:
    """Read `host:port`, `[v6]:port`, `unix:/path` or `systemd`.

    Raises ConfigError, with `text` and what is allowed.
    """
    shown = printable(text)
    if text == "systemd":
        return Address(systemd=True)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise ConfigError([f"`{shown}`: a Unix socket has an absolute path of at most {_MAX_UNIX_PATH} bytes"])
        return Address(path=path)
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
        raise ConfigError(
            [f"`{shown}` is no address: it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535"]
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError([f"`{shown}`: between the brackets must be an IPv6 address"]) from None
    elif ":" in host:
        raise ConfigError([f"`{shown}`: an IPv6 address is put in brackets, [{host}]:{port}"])
    elif not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host) or not _has_valid_labels(host):
        hint = "; for every interface say 0.0.0.0 or [::]" if host in ("", "*") else ""
        raise ConfigError([f"`{shown}`: the host must be a name or an IP address{hint}"])
    return Address(host=host, port=int(port))


def find_group(group: str) -> int:
    """Give the number of a group, by its name or number. Raises KeyError."""
    if re.fullmatch(r"[0-9]{1,9}", group):
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except ValueError as error:  # a NUL, or text that is not UTF-8
        raise KeyError(group) from error


def _has_valid_labels(host: str) -> bool:
    """Whether each label of a name is 1 to 63 bytes long (RFC 1035, section 2.3.4). A dot may end the name."""
    return all(0 < len(label) < 64 for label in host.removesuffix(".").split("."))


def printable(text: str) -> str:
    """Give a text for a message, which is one line."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


_MAX_UNIX_PATH: Final = 107
"""Bytes: sun_path in unix(7) has 108, of which the last is NUL."""
