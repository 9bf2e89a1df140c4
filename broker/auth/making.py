"""Tokens made with the configured keys, for tests and for programs without a login service of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from broker.auth.configured import read_secret
from broker.auth.verification_keys import MIN_SECRET, UnusableKeyError, algorithms_of
from broker.config import Auth


def make_token(
    auth: Auth,
    identity: str,
    roles: Sequence[str],
    ttl: float,
    *,
    private_key: Path | None = None,
    kid: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Make a token that a broker with this configuration accepts for `ttl` seconds.

    It is signed with the private key in the file, or with the configured secret. Raises UnusableKeyError, OSError.
    """
    key: Any
    if private_key is None:
        secret = read_secret(auth, environ)
        if secret is None:
            raise UnusableKeyError("the configuration has no secret; give the private key with --key")
        key, possible = secret, tuple(MIN_SECRET)
    else:
        try:
            key = serialization.load_pem_private_key(private_key.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise UnusableKeyError(f"{private_key} is no private key in PEM format without a passphrase") from None
        possible = algorithms_of(key.public_key())
    algorithm = next((name for name in auth.algorithms if name in possible), None)
    if algorithm is None:
        raise UnusableKeyError(f"the key is for {', '.join(possible)}, and auth.algorithms has none of these")
    now = int(time.time())
    claims: dict[str, Any] = {"iat": now, "exp": now + int(ttl)}
    if auth.issuer is not None:
        claims["iss"] = auth.issuer
    if auth.audience is not None:
        claims["aud"] = auth.audience
    _put(claims, auth.identity_claim, identity)
    if roles:
        _put(claims, auth.roles_claim, list(roles))
    return jwt.encode(claims, key, algorithm, None if kid is None else {"kid": kid})


def _put(claims: dict[str, Any], path: str, value: object) -> None:
    """Put a claim where its path, like `realm_access.roles`, leads to."""
    *outer, last = path.split(".")
    for name in outer:
        claims = claims.setdefault(name, {})
    claims[last] = value
