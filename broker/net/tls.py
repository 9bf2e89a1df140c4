"""TLS on the client listener, for deployments without a proxy: the certificate, its reload, and those of clients."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, Final

from broker.config import Server, read_file
from broker.errors import ConfigError, Problem
from broker.identity import ClientCertificate, NameKind


class Tls:
    """The TLS context of new connections, shared by all listeners."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        """Replaced by a reload. Established connections keep the old one."""


def load(server: Server) -> ssl.SSLContext | None:
    """Read the certificate and its key, and the authorities of client certificates; None where none is configured.

    Raises ConfigError with every mistake.
    """
    if server.certificate is None or server.key is None:
        return None
    problems = [*_look(server.certificate, "server.certificate"), *_look(server.key, "server.key")]
    if server.client_ca is not None:
        problems += _look(server.client_ca, "server.client_ca")
    if problems:
        raise ConfigError(problems)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that also speaks HTTP/2 learns by this that there are no WebSockets over it here (RFC 7301).
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(server.certificate, server.key, password=_no_password)
    except _EncryptedError:
        message = f"{server.key} is encrypted; the broker has no passphrase for it"
        decrypt = f"openssl pkey -in {server.key} -out plain.pem"
        raise ConfigError([Problem(f"{message}; decrypt it: {decrypt}", "server.key")]) from None
    except ssl.SSLError as error:
        raise ConfigError([_why(server, error)]) from None
    except OSError as error:  # it was there a moment ago
        message = f"{server.certificate} cannot be read: {error.strerror}"
        raise ConfigError([Problem(message, "server.certificate")]) from None
    if server.client_ca is not None:
        _ask_for_certificates(context, server.client_ca)
    return context


def _ask_for_certificates(context: ssl.SSLContext, path: str) -> None:
    """Ask each client for a certificate, and verify it. A client may have none. Raises ConfigError."""
    try:
        has_revocations = REVOCATIONS in read_file(path)  # first: a pipe would stop the broker
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        reason = (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")
        raise ConfigError([Problem(f"{path} cannot be used: {reason}", "server.client_ca")]) from None
    context.verify_mode = ssl.CERT_OPTIONAL
    if has_revocations:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def read_client_certificate(shown: Mapping[str, Any]) -> ClientCertificate:
    """Read a verified certificate, as `ssl.SSLSocket.getpeercert` gives it."""
    subject = [pair for relative in shown.get("subject", ()) for pair in relative]
    names: list[tuple[NameKind, str]] = [("cn", value) for name, value in subject if name == "commonName"]
    names += [(NAME_KINDS[kind], value) for kind, value in shown.get("subjectAltName", ()) if kind in NAME_KINDS]
    return ClientCertificate(tuple(names), float(ssl.cert_time_to_seconds(shown["notAfter"])))


NAME_KINDS: Final[Mapping[str, NameKind]] = {"DNS": "dns", "email": "email", "URI": "uri"}
"""The kinds of subjectAltName, as the module ssl calls them."""
REVOCATIONS: Final = b"-----BEGIN X509 CRL-----"
"""How a list of revoked certificates begins (RFC 5280, section 5)."""


class _EncryptedError(Exception):
    pass


def _no_password() -> str:
    # Without it OpenSSL would ask on the terminal, and the broker would wait.
    raise _EncryptedError


def _why(server: Server, error: ssl.SSLError) -> Problem:
    # What OpenSSL says of a key of the same kind, and of others.
    if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        message = f"{server.key} is a private key, but of another certificate than {server.certificate}"
        return Problem(message, "server.key")
    if not error.reason:  # "PEM lib": OpenSSL does not say which file it could not decode
        name = "server.key" if _is_decodable(server.certificate or "") else "server.certificate"
        path, kind = (server.key, "private key") if name == "server.key" else (server.certificate, "certificate")
        return Problem(f"{path} holds a {kind} that cannot be decoded; is the file complete?", name)
    reason = error.reason.lower().replace("_", " ")
    return Problem(f"{server.certificate} and {server.key} cannot be used: {reason}", "server.certificate")


def _is_decodable(certificate: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        return False
    return True


WANTED: Final = {
    "server.certificate": (b"-----BEGIN CERTIFICATE-----", "a certificate"),
    "server.key": (b"PRIVATE KEY-----", "a private key"),
    "server.client_ca": (b"-----BEGIN CERTIFICATE-----", "a certificate"),
}

KINDS: Final = (
    (b"BEGIN OPENSSH PRIVATE KEY", "a key for SSH"),
    (b"PRIVATE KEY-----", "a private key"),
    (b"-----BEGIN CERTIFICATE-----", "a certificate"),
    (b"-----BEGIN CERTIFICATE REQUEST", "a certificate request"),
    (b"-----BEGIN NEW CERTIFICATE REQUEST", "a certificate request"),
    (b"-----BEGIN TRUSTED CERTIFICATE", "a certificate in a format of OpenSSL alone"),
    (b"-----BEGIN PUBLIC KEY", "a public key"),
    (b"-----BEGIN PKCS7", "PKCS #7"),
)
"""What a file is that holds this text."""


def _look(path: str, name: str) -> list[Problem]:
    """Say what a file is, if it does not hold what it should."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return [Problem(f"{path} cannot be read: {reason}", name)]
    block, wanted = WANTED[name]
    if block in data and b"BEGIN OPENSSH PRIVATE KEY" not in data:
        if data.startswith(b"\xef\xbb\xbf"):  # OpenSSL does not see the line behind it
            return [Problem(f"{path} begins with a byte order mark; save it without", name)]
        return []
    kind = next((kind for text, kind in KINDS if text in data), "")
    if kind:
        return [Problem(f"{path} is {kind}, not {wanted}", name)]
    if not data.strip():
        return [Problem(f"{path} is empty, not {wanted}", name)]
    if data[:1] == b"\x30":
        return [Problem(f"{path} is in the binary format DER or PKCS #12; convert it to PEM with openssl", name)]
    return [Problem(f"{path} holds no {wanted[2:]} in PEM format", name)]
