"""From when to when a certificate is valid (RFC 5280, 4.1.2.5): the standard library does not say it of one's own."""

from __future__ import annotations

import base64
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from broker.config import Server
from broker.errors import Problem

DAY: Final = 86_400
WARN_BEFORE: Final = 14 * DAY
"""Seconds before the end of a certificate from which on the log warns; a third of its life where that is less."""
WARN_EVERY: Final = DAY
"""Seconds between two warnings."""

log = structlog.get_logger(__name__)


class Validity(NamedTuple):
    """The time in which a certificate is valid, in seconds since 1970."""

    begin: float
    end: float

    @property
    def warn_from(self) -> float:
        return self.end - min(WARN_BEFORE, (self.end - self.begin) / 3)


def read_validity(path: str) -> Validity | None:
    """Read the validity of the first certificate in a PEM file; None if it cannot be found out."""
    try:
        found = re.search(rb"-----BEGIN CERTIFICATE-----(.*?)-----END", Path(path).read_bytes(), re.DOTALL)
        return None if found is None else parse_validity(base64.b64decode(found[1]))
    except (OSError, ValueError, IndexError):
        return None


def parse_validity(der: bytes) -> Validity:
    """Find the validity in a certificate. Raises ValueError or IndexError if it is none."""
    _, body = _element(der, 0)
    at = _element(der, body[0])[1][0]
    if der[at] == 0xA0:  # the version
        at = _element(der, at)[1][1]
    for _ in range(3):  # serial number, algorithm, issuer
        at = _element(der, at)[1][1]
    at = _element(der, at)[1][0]
    times = []
    for _ in range(2):
        tag, (start, end) = _element(der, at)
        text = der[start:end].decode("ascii")
        if tag == 0x17:  # UTCTime: years from 1950 to 2049
            text = ("19" if text[:2] >= "50" else "20") + text
        times.append(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
        at = end
    return Validity(*times)


def _element(der: bytes, at: int) -> tuple[int, tuple[int, int]]:
    """Give the tag of an element of DER, and where its content begins and ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(der[start : start + size]), start + size
    return der[at], (start, start + length)


def check_validity(server: Server, now: float) -> list[Problem]:
    """Say if the certificate has expired, or is not valid yet."""
    if server.certificate is None or (found := read_validity(server.certificate)) is None:
        return []
    if now >= found.end:
        message = f"{server.certificate} expired on {show_time(found.end)}; renew it"
    elif now < found.begin:
        message = f"{server.certificate} is not valid before {show_time(found.begin)}; is the clock right?"
    else:
        return []
    return [Problem(message, "server.certificate")]


def show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


class CertificateMonitor:
    """Watches the certificate in use: its end, and whether its files were replaced."""

    def __init__(self, server: Server) -> None:
        self.validity: Validity | None = None
        self._warned = float("-inf")
        self._loaded: object = None
        self._seen: object = None
        self.use(server)

    def use(self, server: Server) -> None:
        """Take note that the files of `server` were loaded."""
        self._server = server
        self._loaded = self._seen = self._stat()
        self.validity = None if server.certificate is None else read_validity(server.certificate)
        self._warned = float("-inf")

    def is_replaced(self) -> bool:
        """Whether the files have changed, and not since the last call: certificate and key are written one by one."""
        seen, self._seen = self._seen, self._stat()
        if self._seen in (self._loaded, None) or self._seen != seen:
            return False
        self._loaded = self._seen  # a mistake is reported once
        return True

    def warn(self, now: float) -> None:
        """Log if the certificate is not valid, or not for much longer."""
        found = self.validity
        if found is None or found.begin <= now < found.warn_from or now - self._warned < WARN_EVERY:
            return
        self._warned = now
        certificate = self._server.certificate
        if now >= found.end:
            log.error("certificate expired", certificate=certificate, expired=show_time(found.end))
        elif now < found.begin:
            log.error("certificate not valid yet", certificate=certificate, begins=show_time(found.begin))
        else:
            days = int((found.end - now) // DAY)
            log.warning("certificate expires soon", certificate=certificate, expires=show_time(found.end), days=days)

    def _stat(self) -> object:
        try:
            found = [os.stat(path) for path in (self._server.certificate, self._server.key) if path]  # noqa: PTH116
        except OSError:
            return None
        return [(each.st_mtime_ns, each.st_ino, each.st_size) for each in found]
