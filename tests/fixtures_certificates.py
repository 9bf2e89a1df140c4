"""Certificates for tests, made by the command `openssl`."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

from broker.config import Server
from broker.net.tls import load


class Pair(NamedTuple):
    """A certificate that vouches for itself, for localhost and 127.0.0.1, and its key."""

    certificate: Path
    key: Path

    @property
    def number(self) -> bytes:
        """The certificate as a client sees it (DER)."""
        return ssl.PEM_cert_to_DER_cert(self.certificate.read_text())


def make_pair(folder: Path, name: str = "broker", kind: str = "ec", days: int = 2) -> Pair:
    """Make `name`.pem and `name`.key."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    options = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "rsa": ["rsa:2048"]}[kind]
    command: list[str] = [
        *("openssl", "req", "-x509", "-nodes", "-days", str(days), "-newkey", *options),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-out", str(pair.certificate), "-keyout", str(pair.key)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return pair


def loaded(pair: Pair) -> ssl.SSLContext:
    """What the broker makes of it."""
    context = load(Server(certificate=str(pair.certificate), key=str(pair.key)))
    assert context is not None
    return context


def encrypt_key(pair: Pair) -> Pair:
    """Put a passphrase on a copy of the key."""
    encrypted = pair.key.with_suffix(".encrypted")
    command = ["openssl", "pkey", "-in", str(pair.key), "-aes256", "-passout", "pass:secret", "-out", str(encrypted)]
    subprocess.run(command, check=True, capture_output=True)
    return Pair(pair.certificate, encrypted)


def trusting(*pairs: Pair) -> ssl.SSLContext:
    """What a client uses that trusts these alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for pair in pairs:
        context.load_verify_locations(pair.certificate)
    return context
