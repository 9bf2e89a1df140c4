"""The keys that tokens are verified with, and which algorithm each of them is for.

Invariant: a key is used with an algorithm of its own kind alone. So a public key is never taken for the secret of an
HMAC, whatever a token says (RFC 8725, section 2.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import jwt
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

MIN_RSA_BITS: Final = 2048
"""RFC 7518, section 3.3."""
MAX_RSA_BITS: Final = 8192
"""A verification with a longer key takes longer than a millisecond, and holds up the loop."""
MIN_SECRET: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""Bytes of a secret: as many as the hash has (RFC 7518, section 3.2)."""
CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}
RSA_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
ALGORITHMS: Final = (*MIN_SECRET, *RSA_ALGORITHMS, *CURVES, "EdDSA")
"""The algorithms that can be configured."""
MAX_KEYS: Final = 64
"""Keys in one set."""

PUBLIC_PEM: Final = b"-----BEGIN PUBLIC KEY-----"
CERTIFICATE_PEM: Final = b"-----BEGIN CERTIFICATE-----"


class UnusableKeyError(ValueError):
    """A key that cannot be used. The text says why, for the operator; it holds nothing of the key."""


class Keys(Protocol):
    """Where keys come from."""

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """Find the keys that a token of this algorithm and `kid` may be signed with."""


class Secret:
    """One secret, for HMAC."""

    def __init__(self, secret: bytes, algorithms: Sequence[str]) -> None:
        needed = max((MIN_SECRET[name] for name in algorithms if name in MIN_SECRET), default=0)
        if len(secret) < needed:
            raise UnusableKeyError(f"the secret has {len(secret)} bytes; {needed} are needed at least")
        if secret.lstrip().startswith(b"-----BEGIN "):
            raise UnusableKeyError("the secret is a key in PEM format; a public key must not be used as a secret")
        self._secret = secret

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """Find the secret. A `kid` is not looked at: there is one secret."""
        return [self._secret] if algorithm in MIN_SECRET else []


class PublicKeys:
    """Public keys, some with a `kid`."""

    def __init__(self, keys: Sequence[tuple[str | None, Any]]) -> None:
        self._keys = [(kid, key, algorithms_of(key)) for kid, key in keys]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that these keys are for."""
        return tuple(dict.fromkeys(name for _, _, algorithms in self._keys for name in algorithms))

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """Find the keys for this algorithm: those with this `kid`; all of them where the token or the key has none."""
        fitting = [(known, key) for known, key, algorithms in self._keys if algorithm in algorithms]
        named = [key for known, key in fitting if kid is not None and known == kid]
        return named or [key for known, key in fitting if kid is None or known is None]


class KeySources:
    """The keys of several sources together."""

    def __init__(self, sources: Sequence[Keys]) -> None:
        self._sources = sources

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """Find the keys in all sources."""
        return [key for source in self._sources for key in source.find(algorithm, kid)]


def algorithms_of(key: Any) -> tuple[str, ...]:
    """Give the algorithms that a public key is for. Raises UnusableKeyError for one that is none or too weak."""
    match key:
        case rsa.RSAPublicKey():
            if key.key_size < MIN_RSA_BITS:
                raise UnusableKeyError(f"the RSA key has {key.key_size} bits; {MIN_RSA_BITS} are needed at least")
            if key.key_size > MAX_RSA_BITS:
                raise UnusableKeyError(f"the RSA key has {key.key_size} bits; at most {MAX_RSA_BITS} are supported")
            return RSA_ALGORITHMS
        case ec.EllipticCurvePublicKey():
            algorithms = tuple(name for name, curve in CURVES.items() if curve == key.curve.name)
            if not algorithms:
                raise UnusableKeyError(f"keys on the curve {key.curve.name} are not supported")
            return algorithms
        case ed25519.Ed25519PublicKey():
            return ("EdDSA",)
    raise UnusableKeyError("keys of this kind are not supported")


def read_public_keys(content: bytes) -> PublicKeys:
    """Read a file with public keys: PEM (one or several, also certificates), or a JSON Web Key Set (RFC 7517).

    Raises UnusableKeyError.
    """
    if content.lstrip().startswith(b"{"):
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            raise UnusableKeyError("the file is neither PEM nor a JSON Web Key Set") from None
        return read_key_set(document)
    if b"PRIVATE KEY-----" in content:
        raise UnusableKeyError("the file has a private key; the broker needs the public one alone")
    keys: list[tuple[str | None, Any]] = []
    for block in _pem_blocks(content):
        try:
            if block.startswith(CERTIFICATE_PEM):
                keys.append((None, x509.load_pem_x509_certificate(block).public_key()))
            else:
                keys.append((None, serialization.load_pem_public_key(block)))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UnusableKeyError(f"the file has a key that cannot be read: {type(error).__name__}") from None
    if not keys:
        raise UnusableKeyError("the file has no public key in PEM format")
    return PublicKeys(keys)


def read_key_set(document: Any) -> PublicKeys:
    """Read a JSON Web Key Set (RFC 7517). Keys that are not for signatures, secret or too weak are left out.

    Raises UnusableKeyError if it is no key set, or has no key that can be used.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise UnusableKeyError("the document is no JSON Web Key Set: it has no list `keys`")
    if len(entries) > MAX_KEYS:
        raise UnusableKeyError(f"the JSON Web Key Set has more than {MAX_KEYS} keys")
    keys = [found for entry in entries if (found := _read_jwk(entry)) is not None]
    if not keys:
        raise UnusableKeyError("the JSON Web Key Set has no key for signatures that is supported")
    return PublicKeys(keys)


def _read_jwk(entry: Any) -> tuple[str | None, Any] | None:
    if not isinstance(entry, Mapping) or entry.get("use", "sig") != "sig" or entry.get("kty") == "oct":
        return None
    kid = entry.get("kid")
    try:
        key = jwt.PyJWK.from_dict(dict(entry)).key
        key = key.public_key() if hasattr(key, "public_key") else key
        algorithms_of(key)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return (kid if isinstance(kid, str) else None), key


def _pem_blocks(content: bytes) -> list[bytes]:
    blocks, block = [], b""
    for line in content.splitlines(keepends=True):
        if line.startswith(b"-----BEGIN "):
            block = line
        elif block:
            block += line
            if line.startswith(b"-----END "):
                blocks.append(block)
                block = b""
    return blocks
