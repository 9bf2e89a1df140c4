"""Identities of clients by their TLS certificates. OpenSSL has verified the certificate before it comes here.

Invariant: an identity from a certificate ends when the certificate ends, also where TLS resumed an older session and
OpenSSL did not verify the certificate again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from broker.auth.tokens import ExpiredTokenError, TokenError, read_name
from broker.identity import ClientCertificate, Identity, NameKind

KINDS: Final[dict[NameKind, str]] = {
    "cn": "common name (CN) in its subject",
    "dns": "DNS name in subjectAltName",
    "email": "email address in subjectAltName",
    "uri": "URI in subjectAltName",
}
"""How an error calls each kind of name."""


class ClientCertificates:
    """Reads identities from certificates: the name of one `kind`, with these roles."""

    def __init__(self, kind: NameKind, roles: Sequence[str], now: Callable[[], float] = time.time) -> None:
        self._kind: NameKind = kind
        self._roles = tuple(roles)
        self._now = now

    def identify(self, shown: ClientCertificate) -> Identity:
        """Find whose certificate this is. Raises TokenError if it has not exactly one name of the configured kind."""
        if shown.expires <= self._now():
            raise ExpiredTokenError("the client certificate has expired")
        names = [name for kind, name in shown.names if kind == self._kind]
        if len(names) != 1:
            count = "more than one" if names else "no"
            raise TokenError(f"the client certificate has {count} {KINDS[self._kind]}")
        try:
            name = read_name(names[0], self._kind)
        except TokenError:
            raise TokenError("the name in the client certificate is empty, too long or not printable") from None
        return Identity(name, self._roles, shown.expires, certificate=self._kind)

    def renew(self, identity: Identity) -> Identity | None:
        """Give what an identity from a certificate is now; None: another kind of name is configured by now."""
        if identity.certificate != self._kind:
            return None
        return Identity(identity.name, self._roles, identity.expires, certificate=self._kind)
