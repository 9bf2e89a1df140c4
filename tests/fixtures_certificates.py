"""Certificates for tests: of brokers, made by the command `openssl`, and of clients, signed by an authority."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

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


def loaded(pair: Pair, client_ca: str | None = None) -> ssl.SSLContext:
    """What the broker makes of it."""
    context = load(Server(certificate=str(pair.certificate), key=str(pair.key), client_ca=client_ca))
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


class Authority:
    """An authority that signs client certificates. Its own certificate is the file `certificate`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self.certificate = folder / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self._name, self._key, timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.certificate.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self,
        common_names: Sequence[str] = (),
        others: Sequence[x509.GeneralName] = (),
        *,
        life: timedelta = timedelta(hours=1),
    ) -> Pair:
        """Sign a client certificate with these names; `others` are in subjectAltName."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])
        builder = self._builder(subject, key, life)
        if others:
            builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pair = Pair(self.folder / f"{certificate.serial_number}.pem", self.folder / f"{certificate.serial_number}.key")
        pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair

    def revoke(self, pair: Pair) -> None:
        """Add a list of revoked certificates to the file, with this one."""
        now = datetime.now(UTC)
        number = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).serial_number
        revoked = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
        made = x509.CertificateRevocationListBuilder().issuer_name(self._name).last_update(now - timedelta(hours=1))
        made = made.next_update(now + timedelta(days=1)).add_revoked_certificate(revoked)
        with self.certificate.open("ab") as file:
            file.write(made.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + life)
        )


def showing(client: Pair, *trusted: Pair) -> ssl.SSLContext:
    """What a client uses that shows a certificate."""
    context = trusting(*trusted)
    context.load_cert_chain(client.certificate, client.key)
    return context
