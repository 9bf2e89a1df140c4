"""From what a client shows, a token or an API key, to its identity and rights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker.auth.api_keys import PREFIX, KeyRing
from broker.auth.permissions import Permissions, Rights
from broker.auth.tokens import TokenError, TokenVerifier
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
        keys: Sequence[ApiKey] = (),
        roles: Sequence[Role] = (),
    ) -> None:
        self.required = required
        self._verifier = verifier
        self._keys = KeyRing(keys)
        self._permissions = Permissions(roles) if roles else None

    @property
    def anonymous(self) -> Identity | None:
        """The identity of a client that has shown nothing; None: it must show something first."""
        return None if self.required else ANONYMOUS

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
