"""Who a client is."""

from __future__ import annotations

from typing import Literal

import msgspec

ANONYMOUS_ROLE = "anonymous"
"""The role of a client that showed no token."""
ADMIN_ROLE = "admin"
"""The role of an API key that may use the admin listener."""
DEFAULT_ROLE = "default"
"""The role of a client whose token names no roles."""


NameKind = Literal["cn", "dns", "email", "uri"]
"""The name in a certificate: the common name of the subject, or a subjectAltName (RFC 5280, section 4.2.1.6)."""


class Identity(msgspec.Struct, frozen=True):
    """A client as a token, an API key, a certificate or a webhook names it."""

    name: str | None
    """None: anonymous."""
    roles: tuple[str, ...]
    expires: float | None = None
    """Seconds since the epoch; None: never."""
    key: str | None = None
    """The hash of the API key that it was shown by; None: it was shown by something else."""
    certificate: NameKind | None = None
    """The kind of name that was read from a client certificate; None: it was shown by something else."""


class ClientCertificate(msgspec.Struct, frozen=True):
    """A certificate that a client has shown in the TLS handshake, and that a configured authority has signed."""

    names: tuple[tuple[NameKind, str], ...]
    """The names in it, each with its kind."""
    expires: float
    """When it ends, in seconds since the epoch."""


class Credentials(msgspec.Struct, frozen=True):
    """What the request of a client shows."""

    token: str | None = None
    """A token or an API key."""
    headers: tuple[tuple[str, str], ...] = ()
    """Name and value of the headers that are for `auth.url`."""
    address: str = ""
    """The client's address."""
    certificate: ClientCertificate | None = None
    """Its certificate, if it showed one by TLS."""

    def __repr__(self) -> str:
        return "Credentials(…)"  # a log must not hold them


class Denied(msgspec.Struct, frozen=True):
    """A client that is not let in."""

    status: int
    """The HTTP status: 401 for credentials that are not valid, 403 for a client that may not connect, 429 for too many
    connections, 503 if nobody can tell."""
    reason: str
    """For people. It holds nothing of what the client has shown."""


Identified = Identity | Denied | None
"""What a handshake has shown. None: nothing, and the client has to send `auth`."""

ANONYMOUS = Identity(None, (ANONYMOUS_ROLE,))
