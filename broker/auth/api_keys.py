"""API keys for backends: long random strings, of which the configuration has only hashes.

A key has 256 random bits, so a plain hash is enough: nobody can guess one, as they can a password.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

from broker.config import ApiKey
from broker.identity import Identity

PREFIX: Final = "wsb_"
"""What an API key begins with, so that people and secret scanners know it."""
HASH_PREFIX: Final = "sha256:"


def make_key() -> str:
    """Make a key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Give the hash of a key, as the configuration has it."""
    return HASH_PREFIX + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_hash(text: str) -> bool:
    """Whether it is a hash that `hash_key` may have made."""
    digits = text.removeprefix(HASH_PREFIX)
    return text.startswith(HASH_PREFIX) and len(digits) == 64 and set(digits) <= set("0123456789abcdef")


class KeyRing:
    """The configured API keys."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(key.hash.encode(), Identity(key.name, key.roles, key=key.hash)) for key in keys]

    def __len__(self) -> int:
        return len(self._keys)

    def renew(self, identity: Identity) -> Identity | None:
        """Give what an identity that an API key has shown is by now; None: the key is not configured any more."""
        return next((new for _, new in self._keys if (new.key, new.name) == (identity.key, identity.name)), None)

    def find(self, key: str) -> Identity | None:
        """Find who has this key. It takes as long for a wrong key as for a right one."""
        digest = hash_key(key).encode()
        found = None
        for known, identity in self._keys:
            if hmac.compare_digest(known, digest):
                found = identity
        return found
