"""Which session has which identity: what it may do, how long, and how many connections it has.

Invariant: a session has an identity before it may do anything. When the identity expires, or may do less than before,
what is no longer allowed ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import structlog

from broker._speedups import IntakeLimit, PermittedRoutes, RouteCache, TokenBucket
from broker.auth.authenticator import Authenticator
from broker.auth.deadlines import Deadlines
from broker.auth.permissions import Right, Rights
from broker.auth.tokens import KeysUnavailableError, TokenError, UnknownKeyError
from broker.auth.verifications import Verifications
from broker.config import Limits
from broker.errors import CloseCode, CommandError
from broker.identity import ADMIN_ROLE, ANONYMOUS, Credentials, Denied, Identified, Identity
from broker.messages import BadCommand
from broker.rates import Rates
from broker.session import Done, Session

log = structlog.get_logger(__name__)

REMEMBERED: Final = 4096
"""Sets of rights whose permits are shared by later clients, and token buckets of identities that are not connected."""
CONNECT_BURST: Final = 10
"""Seconds of its rate that an identity may connect at once."""
UNKNOWN_MAX_SIZE: Final = 16_384
"""Bytes of a message of a client that has shown no identity: room for `auth` with the longest token."""
WALK_SLICE: Final = 0.002
"""Seconds of one turn of the loop in which a reload looks through the sessions."""


class Identities:
    """The identities of one node's sessions.

    `check(session, topic)` raises CommandError for a subscription that is no longer allowed; `end_subscription` is then
    called with the same. `check_block` raises CommandError if a subscription to this topic may not have the policy
    `block`.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        sessions: Mapping[str, Session],
        routes: RouteCache,
        loop: asyncio.AbstractEventLoop,
        check: Callable[[Session, str], None],
        end_subscription: Callable[[Session, str], None],
        check_block: Callable[[Session, str], None],
    ) -> None:
        self._authenticator = authenticator
        self._sessions = sessions
        self._routes = routes
        self._loop = loop
        self._check = check
        self._end_subscription = end_subscription
        self._check_block = check_block
        self._deadlines = Deadlines(loop, self._on_deadline)
        self._verifications = Verifications(loop)
        self._connections: Counter[str] = Counter()
        self._permitted: dict[Rights, PermittedRoutes] = {}
        self._buckets: OrderedDict[tuple[str, Rights], TokenBucket] = OrderedDict()
        """The token buckets of identities with a rate of their own; those that were used least recently first."""
        self._ending: set[asyncio.Task[None]] = set()
        """The ends of webhooks that a reload has replaced."""
        self._promised: dict[str, int] = {}
        """The `max_size` that the `welcome` of sessions without an identity has promised."""
        self._rates: dict[float, Rates] = {}
        """How often identities connect, for each rate that roles have."""
        self._walk: Iterator[Session] | None = None
        """The sessions that a reload has not looked at yet."""

    def __len__(self) -> int:
        """The number of names that are connected now."""
        return len(self._connections)

    @property
    def verifying(self) -> int:
        """The number of tokens that wait to be verified."""
        return len(self._verifications)

    # What the node asks for.

    def identify(self, credentials: Credentials, done: Callable[[Identified], None]) -> None:
        """Find out who shows this in a handshake. `done` may be called before this returns."""

        def answer(result: Identity | Denied | TokenError) -> None:
            if isinstance(result, Denied):
                done(result)
            elif isinstance(result, TokenError):
                done(Denied(503 if isinstance(result, KeysUnavailableError) else 401, str(result)))
            elif (limit := self._limit_reached(result)) is not None:
                done(Denied(429, f"this identity may have {limit} connections"))
            elif self._over_rate(result):
                done(Denied(429, "this identity connects too often"))
            else:
                done(result)

        token, webhook = credentials.token, self._authenticator.webhook
        certificate, certificates = credentials.certificate, self._authenticator.certificates
        if token is None and certificate is not None and certificates is not None:
            try:
                identity = certificates.identify(certificate)
            except TokenError as error:
                answer(error)
            else:
                answer(identity)
        elif webhook is not None and credentials.headers and (token is None or not self._authenticator.takes_tokens):
            webhook.ask(credentials, answer)
        elif token is not None:
            self._identify(token, answer)
        else:
            done(None)

    def refuse_admin(self, key: str | None, *, remote: bool) -> Denied | None:
        """Say why the admin listener is not for who shows this API key, or none; None: it is.

        `remote`: other machines can reach it.
        """
        authenticator = self._authenticator
        if not authenticator.has_keys and not remote:
            return None
        identity = None if key is None else authenticator.find_key(key)
        if identity is None:
            return Denied(401, "this needs an API key: Authorization: Bearer wsb_…")
        return None if ADMIN_ROLE in identity.roles else Denied(403, "the API key has not the role admin")

    def admit(self, session: Session, identity: Identity | None, limits: Limits) -> None:
        """Give a new session the identity that its handshake has shown. None: it has shown nothing."""
        if identity is not None:
            self._set_identity(session, identity)
        elif (anonymous := self._authenticator.anonymous) is not None:
            session.identity, session.rights = anonymous, self._authenticator.anonymous_rights
            if session.rights is None and not (limits.publish_rate or limits.command_rate or limits.byte_rate):
                session.connection.routes = self._routes
                return
        else:
            self._promised[session.id] = session.connection.max_size
            session.connection.max_size = min(UNKNOWN_MAX_SIZE, session.connection.max_size)
            self._deadlines.set(session.id, self._loop.time() + limits.auth_timeout)
        self.update_routes(session, limits)

    def authenticate(self, session: Session, token: str, limits: Limits, done: Done[Identity]) -> None:
        """Identify a session by a token, or renew its identity. `done` may be called before this returns."""

        def answer(result: Identity | TokenError) -> None:
            if session.id not in self._sessions:
                return
            try:
                done(self._renew(session, result, limits))
            except CommandError as error:
                done(error)

        self._identify(token, answer)

    def expires_in(self, identity: Identity) -> int | None:
        """Give the seconds until an identity expires; None: it never does."""
        if identity.expires is None:
            return None
        return min(MOST_SECONDS, max(0, math.floor(identity.expires - time.time())))

    def reconfigure(self, authenticator: Authenticator | None, limits: Limits) -> None:
        """Apply other limits, and other keys and roles where they are given, to all sessions.

        New sessions have them at once, those that are connected within the next turns of the loop.
        """
        if authenticator is not None:
            before, self._authenticator = self._authenticator, authenticator
            self._replace(before)
            self.start()
        begun = self._walk is None
        self._walk = iter(list(self._sessions.values()))
        if begun:
            self._walk_on(limits)

    def remove(self, session: Session) -> None:
        """Forget a session that is closed."""
        if session.identity is not ANONYMOUS:
            self._promised.pop(session.id, None)
            self._deadlines.cancel(session.id)
            self._uncount(session)

    def start(self) -> None:
        """Fetch the keys that are behind a URL, if there are any."""
        if self._authenticator.key_set is not None:
            self._authenticator.key_set.start()

    async def stop(self) -> None:
        """Close nobody any more, and ask nobody."""
        if self._authenticator.key_set is not None:
            self._authenticator.key_set.stop()
        if self._authenticator.webhook is not None:
            await self._authenticator.webhook.stop()
        await asyncio.gather(*self._ending)
        self._deadlines.stop()
        self._verifications.stop()
        self._walk = None

    def update_routes(self, session: Session, limits: Limits) -> None:
        """Let a session publish by the fast path as its rights and limits allow."""
        self._update_buckets(session, limits)
        connection = session.connection
        if not (limits.command_rate or limits.byte_rate):
            session.intake = None
            return
        bounds = (limits.command_rate, limits.command_burst, limits.byte_rate, limits.byte_burst)
        if session.intake is None:
            session.intake = IntakeLimit(*bounds)
        else:
            session.intake.change(*bounds)
        # It stands before what carries out plain publishes, wherever that is.
        path = connection.routes if connection.routes is not None else connection.token_bucket
        assert not isinstance(path, IntakeLimit)
        session.intake.path = path
        connection.routes = session.intake

    # Details.

    def _update_buckets(self, session: Session, limits: Limits) -> None:
        """Give a connection the routes that its rights allow, or the token bucket that holds them."""
        connection, rights = session.connection, session.rights
        routes = None if session.identity is None else self._routes if rights is None else self._permitted_for(rights)
        if rights is not None and rights.publish_rate is not None:
            self._update_own_bucket(session, rights, routes, limits)
            return
        burst = limits.publish_burst if rights is None or rights.publish_burst is None else rights.publish_burst
        if not limits.publish_rate:
            connection.token_bucket, connection.routes = None, routes
        elif connection.token_bucket is None or session.shares_bucket:
            connection.token_bucket, connection.routes = TokenBucket(limits.publish_rate, burst, routes), None
        else:
            connection.token_bucket.change(limits.publish_rate, burst)
            connection.token_bucket.routes, connection.routes = routes, None
        session.shares_bucket = False

    def _replace(self, before: Authenticator) -> None:
        """Stop what another configuration asked."""
        if before.key_set is not None and before.key_set is not self._authenticator.key_set:
            before.key_set.stop()
        if before.webhook is not None and before.webhook is not self._authenticator.webhook:
            task = self._loop.create_task(before.webhook.finish())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _identify(self, token: str, done: Callable[[Identity | TokenError], None]) -> None:
        authenticator = self._authenticator
        if authenticator.is_cheap(token):
            try:
                done(authenticator.identify(token))
            except TokenError as error:
                done(error)
            return
        key_set = authenticator.key_set
        if key_set is None:
            self._verifications.submit(authenticator.identify, token, done)
            return

        def verify_again() -> None:
            self._verifications.submit(authenticator.identify, token, finish)

        def answer(result: Identity | TokenError) -> None:
            if not (isinstance(result, UnknownKeyError) and key_set.refresh(verify_again)):
                finish(result)

        def finish(result: Identity | TokenError) -> None:
            if isinstance(result, UnknownKeyError) and not key_set.is_fetched:
                result = KeysUnavailableError("the keys that tokens are verified with cannot be fetched")
            done(result)

        self._verifications.submit(authenticator.identify, token, answer)

    def _renew(self, session: Session, result: Identity | TokenError, limits: Limits) -> Identity:
        """Give a session the identity of a verified token. Raises CommandError."""
        if isinstance(result, KeysUnavailableError):
            raise CommandError("unavailable", str(result))
        if isinstance(result, TokenError):
            # Counted as a bad command: ten of them in a row close the connection.
            raise BadCommand("unauthorized", str(result))
        known = session.identity
        if known is not None and known.name is not None and known.name != result.name:
            raise CommandError("forbidden", "a connection cannot change its identity")
        if (known is None or known.name is None) and (limit := self._limit_reached(result)) is not None:
            raise CommandError("limit", f"this identity may have {limit} connections")
        self._set_identity(session, result)
        self.update_routes(session, limits)
        self._end_what_is_not_allowed(session)
        return result

    def _limit_reached(self, identity: Identity) -> int | None:
        """Give the limit of connections of an identity, if it is reached."""
        rights = self._authenticator.rights(identity)
        limit = None if identity.name is None or rights is None else rights.max_connections
        return limit if limit is not None and self._connections[identity.name or ""] >= limit else None

    def _over_rate(self, identity: Identity) -> bool:
        """Count a connection of an identity; whether it is one too many for the time."""
        rights = self._authenticator.rights(identity)
        rate = None if identity.name is None or rights is None else rights.connect_rate
        if rate is None:
            return False
        rates = self._rates.get(rate)
        if rates is None:
            rates = self._rates[rate] = Rates(rate, max(1, round(CONNECT_BURST * rate)))
        return rates.take(identity.name, self._loop.time()) > 0

    def _set_identity(self, session: Session, identity: Identity) -> None:
        if session.identity is None or session.identity.name != identity.name:
            self._uncount(session)
            if identity.name is not None:
                self._connections[identity.name] += 1
        if session.identity is None:
            session.connection.max_size = self._promised.pop(session.id, session.connection.max_size)
        session.identity, session.rights = identity, self._authenticator.rights(identity)
        if identity.expires is None:
            self._deadlines.cancel(session.id)
        else:
            remaining = identity.expires + self._authenticator.leeway - time.time()
            self._deadlines.set(session.id, self._loop.time() + max(0.0, remaining))

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

    def _update_own_bucket(
        self, session: Session, rights: Rights, routes: RouteCache | PermittedRoutes | None, limits: Limits
    ) -> None:
        """Apply the publish rate of a role: all connections of an identity share one bucket. Those without a name have
        one each."""
        connection, rate = session.connection, rights.publish_rate
        burst = limits.publish_burst if rights.publish_burst is None else rights.publish_burst
        session.shares_bucket = True
        if not rate:
            connection.token_bucket, connection.routes = None, routes
            return
        name = None if session.identity is None else session.identity.name
        if name is None:
            connection.token_bucket, connection.routes = TokenBucket(rate, burst, routes), None
            return
        key = (name, rights)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(rate, burst, routes)
            while len(self._buckets) > max(REMEMBERED, 2 * len(self._connections)):
                self._buckets.popitem(last=False)
        else:
            # The rights are the same, so the routes are, unless the permits were forgotten meanwhile.
            bucket.routes = routes
            bucket.change(rate, burst)
        self._buckets.move_to_end(key)
        connection.token_bucket, connection.routes = bucket, None

    def _walk_on(self, limits: Limits) -> None:
        """Apply what was reconfigured to more sessions, for a bounded time."""
        until = time.perf_counter() + WALK_SLICE
        while self._walk is not None:
            session = next(self._walk, None)
            if session is None:
                self._walk = None
                return
            if session.id in self._sessions:
                self._reconfigure_session(session, limits)
            if time.perf_counter() > until:
                self._loop.call_soon(self._walk_on, limits)
                return

    def _reconfigure_session(self, session: Session, limits: Limits) -> None:
        authenticator, known = self._authenticator, session.identity
        if known is None:
            return
        identity = authenticator.renew(known)
        if identity is None:
            log.info("identity withdrawn", session=session.id, peer=session.peer)
            session.connection.close(CloseCode.UNAUTHORIZED, CloseCode.UNAUTHORIZED.reason)
            return
        before = session.rights
        session.identity, session.rights = identity, authenticator.rights(identity)
        self.update_routes(session, limits)
        if before != session.rights:
            self._end_what_is_not_allowed(session)

    def _end_what_is_not_allowed(self, session: Session) -> None:
        for topic, subscription in list((session.subscriptions or {}).items()):
            try:
                self._check(session, topic)
                if subscription.overflow == "block":
                    self._check_block(session, topic)
            except CommandError as error:
                self._end_subscription(session, topic)
                session.end_subscription(topic, error)

    def _on_deadline(self, id: str) -> None:
        session = self._sessions.get(id)
        if session is None:
            return
        if session.identity is None:
            code = CloseCode.UNAUTHORIZED
            log.info("no identity in time", session=id, peer=session.peer)
        else:
            code = CloseCode.EXPIRED
            log.info("identity expired", session=id, peer=session.peer)
        session.connection.close(code, code.reason)


MOST_SECONDS: Final = 2**53 - 1
"""The largest integer of the protocol."""


def check_right(rights: Rights | None, right: Right, name: str) -> None:
    """Raise CommandError if a right to a topic or pattern is missing."""
    if rights is not None and not rights.allows(right, name):
        raise CommandError("forbidden", f"the right `{right}` is missing for `{name}`")
