"""Tokens: JSON Web Tokens (RFC 7519), verified by PyJWT with the keys and algorithms that are configured.

Nothing in a token chooses how it is verified: not the algorithm (RFC 8725, section 3.1), no URL, no key inside it.
`kid` only selects among the configured keys. Invariant: an error says what is wrong and cites nothing of the token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jwt
import msgspec

from broker.auth.verification_keys import Keys
from broker.identity import DEFAULT_ROLE, Identity

MAX_TOKEN: Final = 8192
"""Characters of a token. The head of an HTTP request has room for no more in most servers."""
MAX_NAME: Final = 255
"""Characters of an identity: as many as a topic has bytes."""
MAX_ROLES: Final = 64
"""Roles in one token."""
MAX_LEEWAY: Final = 300.0
"""Seconds by which clocks may differ (RFC 7519, section 4.1.4: "usually no more than a few minutes")."""
MAX_TRIES: Final = 8
"""Keys tried for a token that names none: each costs a verification."""


class TokenError(Exception):
    """A token that is not valid. The text is for its owner and for the log: it holds nothing of the token."""


class ExpiredTokenError(TokenError):
    """A token that was valid once."""


class UnknownKeyError(TokenError):
    """A token of a key that is not known. A key set that is fetched may have it by now."""


class KeysUnavailableError(TokenError):
    """Nobody can tell whether a token is valid: the keys were never fetched."""


class TokenPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a token must have."""

    algorithms: tuple[str, ...]
    issuer: str | None = None
    audience: str | None = None
    identity_claim: str = "sub"
    roles_claim: str = "roles"
    leeway: float = 10.0
    expiry_required: bool = True


class TokenVerifier:
    """Turns tokens into identities."""

    def __init__(self, policy: TokenPolicy, keys: Keys, now: Callable[[], float] = time.time) -> None:
        self._policy = policy
        self._keys = keys
        self._now = now
        self._decoder = jwt.PyJWT(
            options={
                "require": [],
                # What they check depends on the time, which is checked here: numbers alone, and the clock of `now`.
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "verify_iss": policy.issuer is not None,
                "verify_aud": policy.audience is not None,
                "verify_sub": False,
                "verify_jti": False,
            }
        )

    @property
    def leeway(self) -> float:
        """Seconds by which clocks may differ."""
        return self._policy.leeway

    def verify(self, token: str) -> Identity:
        """Verify a token. Raises TokenError; UnknownKeyError if its key may be found by fetching the keys again."""
        if len(token) > MAX_TOKEN:
            raise TokenError("the token is too long")
        header = _read_header(token)
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._policy.algorithms:
            raise TokenError("the token is signed with an algorithm that is not accepted")
        if "crit" in header:  # RFC 7515, section 4.1.11: extensions that must be understood
            raise TokenError("the token has critical extensions, which are not supported")
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise TokenError("the token is malformed: `kid` is not a string")
        keys = self._keys.find(algorithm, kid)
        if not keys:
            raise UnknownKeyError("the token is signed with an unknown key")
        return self._read_claims(self._decode(token, algorithm, keys[:MAX_TRIES]))

    def _decode(self, token: str, algorithm: str, keys: Sequence[Any]) -> Mapping[str, Any]:
        policy = self._policy
        for key in keys:
            try:
                return self._decoder.decode(
                    token, key, algorithms=[algorithm], audience=policy.audience, issuer=policy.issuer
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.InvalidAudienceError:
                raise TokenError("the token is for another audience") from None
            except jwt.InvalidIssuerError:
                raise TokenError("the token is from another issuer") from None
            except jwt.MissingRequiredClaimError as error:
                raise TokenError(f"the token lacks `{error.claim}`") from None
            except MALFORMED:
                raise TokenError("the token is malformed") from None
        raise TokenError("the signature of the token is wrong")

    def _read_claims(self, claims: Mapping[str, Any]) -> Identity:
        policy, now = self._policy, self._now()
        expires, begins = _read_time(claims, "exp"), _read_time(claims, "nbf")
        if expires is None and policy.expiry_required:
            raise TokenError("the token lacks `exp`")
        if expires is not None and expires <= now - policy.leeway:
            raise ExpiredTokenError("the token has expired")
        if begins is not None and begins > now + policy.leeway:
            raise TokenError("the token is not valid yet")
        name = read_name(_find_claim(claims, policy.identity_claim), policy.identity_claim)
        return Identity(name, read_role_list(_find_claim(claims, policy.roles_claim), policy.roles_claim), expires)


MALFORMED: Final = (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError)
"""What PyJWT and cryptography raise for what is no token."""


def _read_header(token: str) -> Mapping[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except MALFORMED:
        raise TokenError("the token is malformed") from None


def _read_time(claims: Mapping[str, Any], name: str) -> float | None:
    """Read a NumericDate (RFC 7519, section 2)."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenError(f"the token is malformed: `{name}` is not a number")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise TokenError(f"the token is malformed: `{name}` is no time")
    return seconds


def _find_claim(claims: Mapping[str, Any], name: str) -> Any:
    """Find a claim by its name, or by its path, like `realm_access.roles`."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def read_name(value: Any, claim: str) -> str:
    """Read the name of an identity, the value of a claim. Raises TokenError."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = str(value)
    if not isinstance(value, str) or not value:
        raise TokenError(f"the token names no identity: `{claim}` is missing or empty")
    if len(value) > MAX_NAME or not value.isprintable():
        raise TokenError(f"the token names an identity that is not allowed: `{claim}` is too long or not printable")
    return value


def read_role_list(value: Any, claim: str) -> tuple[str, ...]:
    """Read the roles: a list of strings, or one string with spaces between them, as `scope` has (RFC 8693).

    Raises TokenError.
    """
    if isinstance(value, str):
        value = value.split()
    if value is None or value == []:
        return (DEFAULT_ROLE,)
    if not isinstance(value, list) or not all(isinstance(role, str) for role in value):
        raise TokenError(f"the token is malformed: `{claim}` is not a list of strings")
    if len(value) > MAX_ROLES:
        raise TokenError(f"the token has more than {MAX_ROLES} roles")
    return tuple(dict.fromkeys(value))
