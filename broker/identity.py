"""Who a client is."""

from __future__ import annotations

import msgspec

ANONYMOUS_ROLE = "anonymous"
"""The role of a client that showed no token."""
ADMIN_ROLE = "admin"
"""The role of an API key that may use the admin listener."""
DEFAULT_ROLE = "default"
"""The role of a client whose token names no roles."""


class Identity(msgspec.Struct, frozen=True):
    """A client as a token, an API key, a certificate or a webhook names it."""

    name: str | None
    """None: anonymous."""
    roles: tuple[str, ...]
    expires: float | None = None
    """Seconds since the epoch; None: never."""
    key: str | None = None
    """The hash of the API key that it was shown by; None: it was shown by something else."""


class Credentials(msgspec.Struct, frozen=True):
    """What the request of a client shows."""

    token: str | None = None
    """A token or an API key."""
    headers: tuple[tuple[str, str], ...] = ()
    """Name and value of the headers that are for `auth.url`."""
    address: str = ""
    """The client's address."""

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
