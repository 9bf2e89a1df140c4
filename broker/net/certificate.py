"""From when to when a certificate is valid (RFC 5280, section 4.1.2.5), and whether its files were replaced."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Final, NamedTuple

import structlog

from broker.config import Server, read_file
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
    from cryptography import x509  # here: a broker without TLS does without its 17 MB

    try:
        found = x509.load_pem_x509_certificate(read_file(path))
    except (OSError, ValueError):
        return None
    return Validity(found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp())


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
        self._server = server
        self._loaded = self._seen = self._stat()
        self.use(server)

    def use(self, server: Server) -> None:
        """Take note that the files of `server` were loaded."""
        if (server.certificate, server.key) != (self._server.certificate, self._server.key):
            self._server = server
            self._loaded = self._seen = self._stat()
        # Of the same files `_loaded` stays: they may have been replaced once more while they were loaded.
        self.validity: Validity | None = None if server.certificate is None else read_validity(server.certificate)
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
