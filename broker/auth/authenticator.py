"""From what a client shows, a token, an API key or a certificate, to its identity and rights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker.auth.api_keys import PREFIX, KeyRing
from broker.auth.certificates import ClientCertificates
from broker.auth.key_set import KeySet
from broker.auth.permissions import Permissions, Rights
from broker.auth.tokens import TokenError, TokenVerifier
from broker.auth.webhook import Webhook
from broker.config import ApiKey, Role
from broker.identity import ANONYMOUS, Identity


class Authenticator:
    """Who may connect, and what they may do.

    `required`: clients must show a valid token. Without roles everybody may do everything.
    """

    def __init__(
        self,
        *,
        required: bool = False,
        verifier: TokenVerifier | None = None,
        key_set: KeySet | None = None,
        webhook: Webhook | None = None,
        certificates: ClientCertificates | None = None,
        keys: Sequence[ApiKey] = (),
        roles: Sequence[Role] = (),
    ) -> None:
        self.anonymous = None if required else ANONYMOUS
        """The identity of a client that has shown nothing; None: it must show something first."""
        self._verifier = verifier
        self.webhook = webhook
        """Who is asked about clients that show no token."""
        self.certificates = certificates
        """Who reads identities from client certificates; None: certificates identify nobody."""
        self.key_set = key_set
        """The keys of the verifier that are fetched, if there are any."""
        self._keys = KeyRing(keys)
        self._permissions = Permissions(roles) if roles else None
        self.anonymous_rights = self.rights(ANONYMOUS)
        """What it may do."""

    def require(self, required: bool) -> None:
        """Say whether clients must show a valid token."""
        self.anonymous = None if required else ANONYMOUS

    @property
    def takes_tokens(self) -> bool:
        """Whether there is anything that a token or API key is checked with."""
        return self._verifier is not None or len(self._keys) > 0

    @property
    def has_keys(self) -> bool:
        """Whether any API key is configured."""
        return len(self._keys) > 0

    def find_key(self, key: str) -> Identity | None:
        """Find who has this API key."""
        return self._keys.find(key)

    @property
    def leeway(self) -> float:
        """Seconds after its expiry for which an identity still holds, because clocks differ."""
        return 0.0 if self._verifier is None else self._verifier.leeway

    def is_cheap(self, token: str) -> bool:
        """Whether `identify` takes no longer than a few microseconds: no signature is verified."""
        return self._verifier is None or token.startswith(PREFIX)

    def renew(self, identity: Identity) -> Identity | None:
        """Give what an identity is that another configuration has let in; None: this one would not."""
        if identity.name is None:
            return self.anonymous
        if identity.certificate is not None:
            return None if self.certificates is None else self.certificates.renew(identity)
        return identity if identity.key is None else self._keys.renew(identity)

    def identify(self, token: str) -> Identity:
        """Find whose token or API key this is. Raises TokenError."""
        if token.startswith(PREFIX):
            identity = self._keys.find(token)
            if identity is None:
                raise TokenError("the API key is not known")
            return identity
        if self._verifier is None:
            raise TokenError("this broker accepts no tokens")
        return self._verifier.verify(token)

    def rights(self, identity: Identity) -> Rights | None:
        """Find what an identity may do. None: everything."""
        return None if self._permissions is None else self._permissions.rights(identity)


OPEN: Final = Authenticator()
"""Everybody is let in and may do everything."""
