"""Who a client is."""

from __future__ import annotations

import msgspec

ANONYMOUS_ROLE = "anonymous"
"""The role of a client that showed no token."""
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


ANONYMOUS = Identity(None, (ANONYMOUS_ROLE,))
