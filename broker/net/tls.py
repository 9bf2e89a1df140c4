"""TLS on the client listener, for deployments without a proxy: the certificate, and its reload."""

from __future__ import annotations

import ssl
from pathlib import Path

from broker.config import Server
from broker.errors import ConfigError


class Tls:
    """The TLS context of new connections, shared by all listeners."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        """Replaced by a reload. Established connections keep the old one."""


def load(server: Server) -> ssl.SSLContext | None:
    """Read the certificate and its key; None where none is configured. Raises ConfigError with every mistake."""
    if server.certificate is None or server.key is None:
        return None
    problems = []
    for name, path, block in (
        ("server.certificate", server.certificate, b"-----BEGIN CERTIFICATE-----"),
        ("server.key", server.key, b"PRIVATE KEY-----"),
    ):
        try:
            if block not in Path(path).read_bytes():
                what = "certificate" if path == server.certificate else "private key"
                problems.append(f"{name}: {path} holds no {what} in PEM format")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            problems.append(f"{name}: {path} cannot be read: {reason}")
    if problems:
        raise ConfigError(problems)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that also speaks HTTP/2 learns by this that there are no WebSockets over it here (RFC 7301).
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(server.certificate, server.key, password=_no_password)
    except _EncryptedError:
        raise ConfigError([f"server.key: {server.key} is encrypted; the broker has no passphrase for it"]) from None
    except ssl.SSLError as error:
        raise ConfigError([_why(server, error)]) from None
    except OSError as error:  # it was there a moment ago
        raise ConfigError([f"server.certificate: {server.certificate} cannot be read: {error.strerror}"]) from None
    return context


class _EncryptedError(Exception):
    pass


def _no_password() -> str:
    # Without it OpenSSL would ask on the terminal, and the broker would wait.
    raise _EncryptedError


def _why(server: Server, error: ssl.SSLError) -> str:
    # What OpenSSL says of a key of the same kind, and of others.
    if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return f"server.key: {server.key} does not fit the certificate in {server.certificate}"
    reason = (error.reason or str(error)).lower().replace("_", " ")
    return f"server.certificate: {server.certificate} and {server.key} cannot be used: {reason}"
