"""Which session has which identity: what it may do, how long, and how many connections it has.

Invariant: a session has an identity before it may do anything. When the identity expires, or may do less than before,
what is no longer allowed ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from broker._speedups import PermittedRoutes, RouteCache, TokenBucket
from broker.auth.authenticator import Authenticator
from broker.auth.deadlines import Deadlines
from broker.auth.permissions import Right, Rights
from broker.auth.tokens import TokenError
from broker.config import Limits
from broker.errors import CloseCode, CommandError
from broker.identity import Identity
from broker.messages import BadCommand
from broker.session import Session

log = structlog.get_logger(__name__)

REMEMBERED: Final = 4096
"""Sets of rights whose permits are shared by later clients."""


class Identities:
    """The identities of one node's sessions.

    `end_subscription(session, topic)` is called for each subscription that is no longer allowed.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        sessions: Mapping[str, Session],
        routes: RouteCache,
        loop: asyncio.AbstractEventLoop,
        end_subscription: Callable[[Session, str], None],
    ) -> None:
        self._authenticator = authenticator
        self._sessions = sessions
        self._routes = routes
        self._loop = loop
        self._end_subscription = end_subscription
        self._deadlines = Deadlines(loop, self._on_deadline)
        self._connections: Counter[str] = Counter()
        self._permitted: dict[Rights, PermittedRoutes] = {}

    # What the node asks for.

    def admit(self, session: Session, identity: Identity | None, limits: Limits) -> None:
        """Give a new session the identity that its handshake has shown. None: it has shown nothing.

        Raises CommandError where the identity has too many connections.
        """
        identity = identity or self._authenticator.anonymous
        if identity is None:
            self._deadlines.set(session.id, self._loop.time() + limits.auth_timeout)
        else:
            self._set_identity(session, identity)
        self.update_routes(session, limits)

    def authenticate(self, session: Session, token: str, limits: Limits) -> Identity:
        """Identify a session by a token, or renew its identity. Raises CommandError."""
        try:
            identity = self._authenticator.identify(token)
        except TokenError as error:
            # Counted as a bad command: ten of them in a row close the connection.
            raise BadCommand("unauthorized", str(error)) from None
        known = session.identity
        if known is not None and known.name is not None and known.name != identity.name:
            raise CommandError("forbidden", "a connection cannot change its identity")
        self._set_identity(session, identity)
        self.update_routes(session, limits)
        self._end_what_is_not_allowed(session)
        return identity

    def expires_in(self, identity: Identity) -> int | None:
        """Give the seconds until an identity expires; None: it never does."""
        return None if identity.expires is None else max(0, math.floor(identity.expires - time.time()))

    def reconfigure(self, authenticator: Authenticator | None, limits: Limits) -> None:
        """Apply other limits, and other keys and roles where they are given, to all sessions."""
        authenticator = self._authenticator = authenticator or self._authenticator
        for session in list(self._sessions.values()):
            if session.identity is not None:
                session.rights = authenticator.rights(session.identity)
            self.update_routes(session, limits)
            self._end_what_is_not_allowed(session)

    def remove(self, session: Session) -> None:
        """Forget a session that is closed."""
        self._deadlines.cancel(session.id)
        self._uncount(session)

    def stop(self) -> None:
        """Close nobody any more."""
        self._deadlines.stop()

    def update_routes(self, session: Session, limits: Limits) -> None:
        """Let a session publish by the fast path as its rights and limits allow."""
        connection, rights = session.connection, session.rights
        routes = None if session.identity is None else self._routes if rights is None else self._permitted_for(rights)
        rate = limits.publish_rate if rights is None or rights.publish_rate is None else rights.publish_rate
        burst = limits.publish_burst if rights is None or rights.publish_burst is None else rights.publish_burst
        if not rate:
            connection.token_bucket, connection.routes = None, routes
        elif connection.token_bucket is None:
            connection.token_bucket, connection.routes = TokenBucket(rate, burst, routes), None
        else:
            connection.token_bucket.change(rate, burst)
            connection.token_bucket.routes = routes

    # Details.

    def _set_identity(self, session: Session, identity: Identity) -> None:
        rights = self._authenticator.rights(identity)
        name = identity.name
        if session.identity is None or session.identity.name != name:
            limit = None if name is None or rights is None else rights.max_connections
            if name is not None and limit is not None and self._connections[name] >= limit:
                raise CommandError("limit", f"this identity may have {limit} connections")
            self._uncount(session)
            if name is not None:
                self._connections[name] += 1
        session.identity, session.rights = identity, rights
        if identity.expires is None:
            self._deadlines.cancel(session.id)
        else:
            self._deadlines.set(session.id, self._loop.time() + max(0.0, identity.expires - time.time()))

    def _uncount(self, session: Session) -> None:
        name = None if session.identity is None else session.identity.name
        if name is None:
            return
        self._connections[name] -= 1
        if not self._connections[name]:
            del self._connections[name]

    def _permitted_for(self, rights: Rights) -> PermittedRoutes:
        permitted = self._permitted.get(rights)
        if permitted is None:
            if len(self._permitted) >= REMEMBERED:
                self._permitted.clear()
            permitted = self._permitted[rights] = PermittedRoutes(self._routes)
        return permitted

    def _end_what_is_not_allowed(self, session: Session) -> None:
        for topic in list(session.subscriptions or ()):
            try:
                check_right(session.rights, "subscribe", topic)
            except CommandError as error:
                self._end_subscription(session, topic)
                session.end_subscription(topic, error)

    def _on_deadline(self, id: str) -> None:
        session = self._sessions.get(id)
        if session is None:
            return
        code = CloseCode.UNAUTHORIZED if session.identity is None else CloseCode.EXPIRED
        log.info("identity expired" if session.identity else "no identity in time", session=id, peer=session.peer)
        session.connection.close(code, code.reason)


def check_right(rights: Rights | None, right: Right, name: str) -> None:
    """Raise CommandError if a right to a topic or pattern is missing."""
    if rights is not None and not rights.allows(right, name):
        raise CommandError("forbidden", f"the right `{right}` is missing for `{name}`")
