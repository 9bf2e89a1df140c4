"""One broker process: its sessions, hub and engine; the use cases; drain and shutdown."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import structlog

from broker import __version__, messages
from broker._speedups import (
    Audience,
    Connection,
    IntakeLimit,
    LoopContext,
    PendingBatch,
    PermittedRoutes,
    Subscription,
    TokenBucket,
    deliver_batch,
)
from broker.auth.authenticator import OPEN, Authenticator
from broker.auth.permissions import Rights
from broker.config import Config
from broker.cores import default_threads
from broker.engines.base import (
    Engine,
    Event,
    HistoryPage,
    InterestDone,
    MemberPage,
    NoHistory,
    Position,
    Unavailable,
)
from broker.errors import CLOSE_REASONS, CloseCode, CommandError
from broker.hub import UNLIMITED, Hub
from broker.identities import Identities, check_right
from broker.identity import Credentials, Identified, Identity
from broker.interests import Interests
from broker.messages import BadCommand
from broker.metrics import Metrics
from broker.net.addresses import Peer
from broker.presence import Members
from broker.recovery import NOTHING_TO_SAY, Recovery
from broker.rules import Rules, SubscriptionPolicy
from broker.session import Done, Published, Session, Subscribed, SubscriptionStats
from broker.topics import check_pattern, check_topic, is_pattern

log = structlog.get_logger(__name__)

SERVER = f"wsbroker/{__version__}"
BYES_PER_TURN = 500
"""Clients that get `bye` in one turn of the loop, so that a drain does not delay deliveries."""
BYE_SHARE = 0.8
"""Part of the time of a retirement over which `bye` is sent; the rest is for the clients to disconnect."""
MAX_PENDING = 1 << 20
"""So many publishes may wait for the engine, of all connections together. Engines have lower bounds of their own; this
one holds if an engine never answers and publishers come and go."""
BATCH_TIME = 0.004
"""Seconds of one turn of the loop in which kept events are delivered."""
POLL = 0.02
"""Seconds between two checks whether a drain is done."""


class PendingPublish(msgspec.Struct, eq=False):
    """A publish that the engine has not answered. It stays on this node."""

    token: int
    others: dict[int, PendingPublish]
    """All publishes that wait for an answer, by token."""
    metrics: Metrics
    origin: Connection | None
    """The connection that it came by."""
    done: Done[Published]
    is_local: bool
    began: float
    """When the engine was asked; 0 where its time is not measured."""
    receipt: tuple[int, int, int] = (0, 0, 0)
    """How many subscribers of this node it matched, is queued for, was dropped for; set at the delivery."""

    def answer(self, result: Position | Unavailable) -> None:
        """Give the engine's answer to the publisher. A second answer is ignored."""
        if self.others.pop(self.token, None) is None:
            return
        if self.began:
            self.metrics.engine.observe(time.perf_counter() - self.began)
        if isinstance(result, Unavailable):
            self.done(CommandError("unavailable", result.message))
            return
        receivers, queued, dropped = self.receipt
        self.done(Published(result, receivers, queued, dropped))


class Node:
    """Connects sessions, hub and engine. The listeners call `connect`; daemon and sessions call the rest."""

    def __init__(
        self, config: Config, engine: Engine, loop: asyncio.AbstractEventLoop, authenticator: Authenticator = OPEN
    ) -> None:
        limits = config.limits
        self.draining = False
        self.memory_pressure = False
        """Whether publishers are throttled, because the memory limit is reached."""
        self.engine = engine
        self._interests = Interests(engine)
        self._pending: dict[int, PendingPublish] = {}
        """The publishes that the engine has not answered, by token."""
        self._tokens = itertools.count(secrets.randbits(62))
        """Unlike those of other nodes: a node looks up only tokens that it has pending."""
        self.context = LoopContext(
            loop,
            limits,
            encode_gap=messages.encode_gap,
            close_reasons=CLOSE_REASONS,
            threads=config.server.threads or default_threads(),
        )
        self.sessions: dict[str, Session] = {}
        self.context.on_lagging = self._log_lagging
        self.hub = Hub(self.context)
        self.members = Members(engine.presence(), lambda: self.rules, loop)
        self.identities = Identities(
            authenticator,
            self.sessions,
            self.hub.routes,
            loop,
            self._check_rights,
            self._end_subscription_of,
            self._check_block_stays,
        )
        self.reconfigure(config)
        self.recovery = Recovery(engine, self.context, lambda: self.rules)
        self.on_disconnect: Callable[[Peer], None] | None = None
        """Called with the address of each client that disconnects."""
        self._bye_sent: set[str] = set()
        """Sessions that got `bye` and have not disconnected yet."""
        self.metrics = Metrics()

    def reconfigure(self, config: Config, authenticator: Authenticator | None = None) -> None:
        """Apply these limits, topic rules, and keys and roles where they are given, from now on.

        Connections keep the `max_size` of their `welcome`, and subscriptions their bounds.

        The timers of the keep-alive sweep and the socket options stay as they were at the start. Raises ConfigError for
        invalid rules.
        """
        limits = config.limits
        self.rules = Rules(config.topics, limits)
        self.limits = limits
        self.engine.configure(limits)
        self.hub.routes.clear()  # what they keep goes by the rules before
        self.identities.reconfigure(authenticator, limits)
        self.block: str = config.server.block
        self._spread = limits.reconnect_spread
        context = self.context
        context.configure(limits)
        context.max_age = self.rules.max_age if any(rule.max_age is not None for rule in config.topics) else None

    def set_memory_pressure(self, memory_pressure: bool) -> None:
        """Start or stop throttling publishers: each publish then pauses its connection for a moment."""
        self.memory_pressure = memory_pressure
        self.hub.routes.clear()  # the fast path does not throttle

    def peers(self) -> Iterator[Peer]:
        """Give the addresses of all clients."""
        return (session.peer for session in self.sessions.values())

    @property
    def connections(self) -> int:
        """The number of established connections, including those that are closing."""
        return self.context.connections

    async def start(self) -> None:
        """Start the engine and the keep-alive sweep."""
        self.engine.accept_batches(self._deliver_batch, self._refuse_batch)
        await self.engine.start(self.deliver, self.lost)
        self.context.start()
        self.members.start()
        self.identities.start()

    # For the listeners.

    def connect(
        self,
        transport: asyncio.Transport,
        upgrade_response: bytes,
        rest: bytes,
        peer: Peer,
        window_bits: int = 0,
        identity: Identity | None = None,
    ) -> None:
        """Take over a transport whose handshake is done.

        `upgrade_response` is the answer to the handshake, sent first; `rest` is what came behind the request; `peer`
        is the client's address; `window_bits` what was agreed on compression, see `Connection.start`; `identity` what
        the handshake has shown.
        """
        limits = self.limits
        connection = Connection(self.context)
        session = Session(self, connection, secrets.token_urlsafe(9), peer)
        connection.session = session
        self.identities.admit(session, identity, limits)
        name = None if session.identity is None else session.identity.name
        self.sessions[session.id] = session
        self.metrics.connected += 1
        connection.start(transport, upgrade_response, window_bits)
        connection.answer(
            messages.encode_welcome(
                session=session.id,
                server=SERVER,
                ping=limits.ping_interval,
                max_size=limits.max_size,
                max_queue=limits.max_queue,
                identity=name,
                expires_in=None if name is None or identity is None else self.identities.expires_in(identity),
            )
        )
        log.debug("session opened", session=session.id, peer=peer)
        connection.feed(rest)

    def identify(self, credentials: Credentials, done: Callable[[Identified], None]) -> None:
        """Find out who shows this in a handshake. `done` may be called before this returns."""
        self.identities.identify(credentials, done)

    def authenticate(self, session: Session, token: str, done: Done[Identity]) -> None:
        """Identify a session by a token, or renew its identity. `done` may be called before this returns."""

        def answer(result: Identity | CommandError) -> None:
            if session.memberships is not None:
                self.members.update(session)
            done(result)

        self.identities.authenticate(session, token, self.limits, answer)

    def expires_in(self, identity: Identity) -> int | None:
        """Give the seconds until an identity expires; None: it never does."""
        return self.identities.expires_in(identity)

    # The use cases. Each raises CommandError where it refuses a command; then `done` is never called.

    def subscribe(self, session: Session, command: messages.Subscribe, done: Done[Subscribed]) -> None:
        """Start a subscription of a session, or change it. `done` comes once the engine delivers its events here.

        `done` may get a CommandError instead; then the subscription has ended.
        """
        topic = command.topic
        check_pattern(topic)
        if self.draining:
            raise _draining()
        check_right(session.rights, "subscribe", topic)
        if command.since is not None or command.last is not None:
            self.recovery.check(command)
            check_right(session.rights, "history", topic)
        if command.presence is not None or command.info is not None:
            self.members.check(session, command)
        policy = self.rules.policy(topic)
        self._check_policy(session, command, policy)
        subscription = (session.subscriptions or {}).get(topic)
        if subscription is not None:
            subscription.change(
                max_queue=subscription.max_queue if command.max_queue is None else command.max_queue,
                overflow=command.overflow or subscription.overflow,
                echo=subscription.echo if command.echo is None else command.echo,
                credit=command.credit,
            )
            if command.since is not None or command.last is not None:
                self._hold(subscription)
            self._interests.confirm(topic, self._undo_unless_confirmed(session, subscription, command, done))
            return
        subscription = self._subscribe(session, command, policy)
        if command.since is not None or command.last is not None:
            self._hold(subscription)
        answer = self._undo_unless_confirmed(session, subscription, command, done)
        if subscription.filter.subscribers > 1:
            self._interests.confirm(topic, answer)
            return
        try:
            self._interests.begin(topic, answer)
        except Exception:
            _detach(session, subscription)
            self.hub.unsubscribe(subscription)
            raise

    def unsubscribe(self, session: Session, topic: str) -> None:
        """End a subscription of a session."""
        check_pattern(topic)
        self._end_subscription_of(session, topic)

    def credit(self, session: Session, topic: str, add: int) -> None:
        """Let `add` more events of a subscription come."""
        check_pattern(topic)
        subscription = _find_subscription(session, topic)
        if subscription.credit == UNLIMITED:
            raise BadCommand("bad_command", f"`{topic}` was subscribed to without `credit`")
        subscription.add_credit(add)

    def publish(
        self,
        topic: str,
        data: bytes | msgspec.Raw,
        key: str | None,
        done: Done[Published],
        origin: Connection | None = None,
        dedup: str | None = None,
        rights: Rights | None = None,
    ) -> None:
        """Publish an event. `origin` is the connection that it came by, if it came by one; `rights` None: any topic.

        While `memory_pressure` is set the caller slows its publisher down.
        """
        check_topic(topic)
        if self.draining:
            raise _draining()
        if rights is not None:
            check_right(rights, "publish", topic)
        if origin is not None and origin.token_bucket is not None:
            _check_rate(origin.token_bucket)
        if len(self._pending) >= MAX_PENDING:
            raise CommandError("unavailable", "too many publishes wait for the engine")
        token = next(self._tokens)
        retention = self.rules.retention(topic)
        is_local = self.engine.is_local(topic, retention)
        began = 0.0 if is_local else time.perf_counter()
        pending = PendingPublish(token, self._pending, self.metrics, origin, done, is_local, began)
        self._pending[token] = pending
        event = Event(topic, data, key, None, token, dedup)
        try:
            self.engine.publish(event, retention, pending.answer)
        except Exception:
            if self._pending.pop(token, None) is not None:
                raise
            log.exception("engine failed after its answer")
        if rights is not None and origin is not None:
            _permit(origin, topic)

    def history(
        self, topic: str, since: Position | None, limit: int, done: Done[HistoryPage], rights: Rights | None = None
    ) -> None:
        """Read kept events of a topic: the oldest after `since`, or the newest without it. `rights` None: of any."""
        check_topic(topic)
        check_right(rights, "history", topic)
        if not self.rules.retention(topic).events:
            raise CommandError("no_history", f"`{topic}` keeps no history")

        def empty(result: Position | Unavailable) -> None:
            if isinstance(result, Unavailable):
                done(CommandError("unavailable", result.message))
                return
            epoch, top = result.epoch or "", result.offset or 0
            complete = since is None or (since.epoch, since.offset) == (epoch, top)
            done(HistoryPage([], epoch, top + 1, top, complete=complete, more=False))

        def answer(result: HistoryPage | NoHistory | Unavailable) -> None:
            match result:
                case NoHistory():  # nothing was published yet
                    self.engine.position(topic, empty)
                case Unavailable(message):
                    done(CommandError("unavailable", message))
                case page:
                    done(page)

        self.engine.history(topic, since, limit, answer)

    def presence(self, session: Session, topic: str, after: str | None, limit: int, done: Done[MemberPage]) -> None:
        """Read the members of a topic, behind the cursor `after`; None: from the beginning."""
        self.members.read(session, topic, after, limit, done)

    def disconnect(self, id: str) -> bool:
        """Close the connection of a session for an operator. Returns False if there is no such session."""
        session = self.sessions.get(id)
        if session is None:
            return False
        session.connection.close(CloseCode.DISCONNECTED, CloseCode.DISCONNECTED.reason)
        return True

    def remove(self, session: Session) -> None:
        """Remove a session whose connection is closed, and end its subscriptions."""
        subscriptions, session.subscriptions = session.subscriptions, None
        for subscription in (subscriptions or {}).values():
            self._end_subscription(subscription)
        if session.memberships is not None:
            self.members.leave_all(session)
        self._bye_sent.discard(session.id)
        self.identities.remove(session)
        if self.sessions.pop(session.id, None) is not None and self.on_disconnect is not None:
            self.on_disconnect(session.peer)

    # Their details.

    def _check_policy(self, session: Session, command: messages.Subscribe, policy: SubscriptionPolicy) -> None:
        """Raise CommandError if the command asks for more than it may here."""
        if command.max_queue is not None and command.max_queue > policy.max_queue_limit:
            raise CommandError("limit", f"`max_queue` may be at most {policy.max_queue_limit} here")
        if command.overflow is None:
            return
        if command.overflow not in policy.overflows:
            raise _not_allowed(policy)
        if command.overflow == "replay" and (
            is_pattern(command.topic) or not self.rules.retention(command.topic).events
        ):
            raise CommandError("no_history", f"`{command.topic}` keeps no history")
        if command.overflow == "block" and policy.overflow != "block":
            self._check_block(session, command.topic)

    def _check_block(self, session: Session, topic: str) -> None:
        """Raise CommandError if this client may not subscribe with `block` here."""
        if session.rights is not None and self.block != "none":
            check_right(session.rights, "block", topic)
        elif not (self.block == "all" or (self.block == "local" and session.peer.local)):
            raise CommandError("forbidden", "`overflow` block is not allowed to this client: publishers would wait")

    def _check_block_stays(self, session: Session, topic: str) -> None:
        """Raise CommandError if a subscription with `block` is not allowed any more by the rights of its session.

        A change of `server.block` is for new subscriptions.
        """
        if self.rules.policy(topic).overflow != "block":
            check_right(session.rights, "block", topic)

    def _subscribe(self, session: Session, command: messages.Subscribe, policy: SubscriptionPolicy) -> Subscription:
        if session.subscriptions is None:
            session.subscriptions = {}
        rights = session.rights
        own = None if rights is None else rights.max_subscriptions
        limit = self.limits.max_subscriptions if own is None else own
        if len(session.subscriptions) >= limit:
            raise CommandError("limit", f"a connection may have at most {limit} subscriptions here")
        overflow = command.overflow or policy.overflow
        if overflow is None:
            raise _not_allowed(policy)
        try:
            subscription = self.hub.subscribe(
                session.connection,
                command.topic,
                max_queue=policy.max_queue if command.max_queue is None else command.max_queue,
                overflow=overflow,
                echo=command.echo is not False,
                credit=UNLIMITED if command.credit is None else command.credit,
            )
        except OverflowError as error:
            raise CommandError("limit", str(error)) from None
        session.subscriptions[command.topic] = subscription
        return subscription

    def _undo_unless_confirmed(
        self, session: Session, subscription: Subscription, command: messages.Subscribe, done: Done[Subscribed]
    ) -> InterestDone:
        """Give what takes the engine's answer about an interest. Where that is an error, the subscription ends."""

        def answer(result: Unavailable | None) -> None:
            if isinstance(result, Unavailable):
                if _detach(session, subscription):
                    self.hub.unsubscribe(subscription)
                done(CommandError("unavailable", result.message))
                return
            try:  # the rights may have changed meanwhile, and the subscription have ended with them
                check_right(session.rights, "subscribe", subscription.filter.topic)
            except CommandError as error:
                done(error)
                return
            if not self.rules.has_presence:
                self._listed(session, subscription, command, done, None)
                return
            if (session.subscriptions or {}).get(command.topic) is not subscription:
                done(NOTHING_TO_SAY)  # the client has ended it meanwhile
                return
            self.members.join(session, command, partial(self._listed, session, subscription, command, done))

        return answer

    def _hold(self, subscription: Subscription) -> None:
        """Leave the events of a subscription to history until `since` or `last` is carried out. A replay ends."""
        self.recovery.forget(subscription)
        subscription.hold()

    def _listed(
        self,
        session: Session,
        subscription: Subscription,
        command: messages.Subscribe,
        done: Done[Subscribed],
        result: Unavailable | None,
    ) -> None:
        """A subscriber is a member, where the topic has members: go on with its place in the history."""
        if result is not None:
            self._begun(session, subscription, done, CommandError("unavailable", result.message))
        elif self.rules.keeps_history:
            self.recovery.begin(subscription, command, partial(self._begun, session, subscription, done))
        else:
            done(NOTHING_TO_SAY)

    def _begun(
        self,
        session: Session,
        subscription: Subscription,
        done: Done[Subscribed],
        result: Subscribed | CommandError,
    ) -> None:
        """Answer a subscribe whose place in the history was found, or not: then the subscription ends."""
        if isinstance(result, CommandError) and _detach(session, subscription):
            self._end_subscription(subscription)
            self.members.leave(session, subscription.filter.topic)
        done(result)

    def _end_subscription_of(self, session: Session, topic: str) -> None:
        subscription = _find_subscription(session, topic)
        _detach(session, subscription)
        self._end_subscription(subscription)
        self.members.leave(session, topic)

    def _check_rights(self, session: Session, topic: str) -> None:
        """Raise CommandError if a subscription that a session has is not allowed to it any more."""
        check_right(session.rights, "subscribe", topic)
        if self.members.is_observer(session, topic):
            check_right(session.rights, "presence", topic)

    def _end_subscription(self, subscription: Subscription) -> None:
        if len(self.recovery):
            self.recovery.forget(subscription)
        self.hub.unsubscribe(subscription)
        if subscription.filter.subscribers == 0:
            self._interests.end(subscription.filter.topic)

    # Callbacks of the engine.

    def deliver(self, event: Event) -> None:
        """Send an event to this node's subscribers, and note in its receipt how that went, if it was published here."""
        audience = self.hub.audience(event.topic)
        payload = messages.encode_event(event.topic, event.data, event.key, event.offset)
        key = None if event.key is None else event.key.encode()
        pending = None if event.token is None else self._pending.get(event.token)
        if pending is None:
            audience.publish(event.topic, payload, key, None, event.offset or 0)
            is_local = self.engine.is_local(event.topic, self.rules.retention(event.topic))
        else:
            pending.receipt = audience.publish(event.topic, payload, key, pending.origin, event.offset or 0)
            is_local = pending.is_local
        if not self.draining and not self.memory_pressure and event.topic not in self.hub.routes:
            self._install_route(event, audience, is_local)

    def _install_route(self, event: Event, audience: Audience, is_local: bool) -> None:
        """Let the next publish to a topic take the fast path, if the engine takes part."""
        topic, routes = event.topic, self.hub.routes
        if is_local:
            log_of_topic = None if event.offset is None else self.engine.log(topic)
            routes.install(topic, audience, _event_prefix(topic), log_of_topic)
            return
        retention = self.rules.retention(topic)
        keeper = self.engine.keeper(topic, retention)
        if keeper is not None:
            routes.install(topic, audience, _event_prefix(topic), None, keeper, retention)

    def _deliver_batch(self, batch: PendingBatch) -> bool:
        """Deliver and answer publishes of the fast path that were kept, for a bounded time. Whether it was all."""
        return deliver_batch(batch, self.hub.routes, self.hub.audience, BATCH_TIME)

    def _refuse_batch(self, batch: PendingBatch, error: Unavailable | None) -> None:
        """Answer publishes of the fast path that were not kept."""
        for connection, number, why in batch.refused(error):
            if isinstance(connection.session, Session):
                known = None if number is None else msgspec.json.decode(number)
                connection.session.refuse_publish(known, CommandError("unavailable", why.message))

    def lost(self, filter: str) -> None:
        """Announce a possible hole in a topic, or in those of a pattern: to each subscriber a gap of unknown size."""
        self.context.flush_batches()
        for subscription in self.hub.subscriptions(filter):
            subscription.announce_loss()

    # For operators.

    def subscription_stats(self, most: int) -> Iterator[tuple[Session, list[SubscriptionStats]]]:
        """Yield the subscription stats of the `most` sessions with the most queued bytes, largest first.

        The stats of a session are computed when it is yielded, so that the caller may let the loop run in between.
        """
        for session in heapq.nlargest(most, self.sessions.values(), key=_outbox):
            yield session, session.subscription_stats()

    def _log_lagging(self, connection: Connection, behind: bool) -> None:
        """Log that a client has been lagging for a while, or has caught up."""
        session = connection.session
        if not isinstance(session, Session):
            return
        if not behind:
            log.info("subscriber caught up", session=session.id, peer=session.peer)
            return
        worst = max(session.subscription_stats(), key=lambda stats: stats.queued, default=None)
        what = msgspec.structs.asdict(worst) if worst is not None else {}
        log.warning("subscriber lagging", session=session.id, peer=session.peer, **what)

    # Drain and shutdown.

    async def drain(self, timeout: float) -> None:
        """Execute the received commands, deliver their events, and send `bye` to all clients, within `timeout` seconds.

        Returns when the last connection is closed; connections that are open after `timeout` are aborted.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        # One turn of the loop reads what is in the sockets, the next one sends the results. Slow commands no longer
        # yield to other connections, so that everything read is executed.
        self.context.command_time = math.inf
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.draining = True
        self.hub.routes.clear()
        for session in self.sessions.values():
            session.connection.routes = None
        await _wait_until(lambda: not any(map(_is_busy, self.sessions.values())), deadline)
        sessions = list(self.sessions.values())
        log.info("draining", connections=len(sessions))
        remaining = iter(sessions)
        while part := list(itertools.islice(remaining, BYES_PER_TURN)):
            for session in part:
                self._send_bye(session)
            await asyncio.sleep(0)
        await _wait_until(lambda: not self.connections, deadline)
        if self.connections:
            log.warning("drain timed out: remaining connections closed", connections=self.connections)
            for session in sessions:
                session.connection.abort()

    async def retire(self, timeout: float) -> None:
        """Send `bye` to all clients, spread over most of `timeout` seconds, and serve each one until its `bye`.

        Connections that are open after `timeout` are aborted.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        sessions = list(self.sessions.values())
        random.shuffle(sessions)
        sent = 0
        while sent < len(sessions):
            elapsed = loop.time() - began
            due = len(sessions) if timeout == 0 else int(len(sessions) * elapsed / (timeout * BYE_SHARE)) + 1
            for session in sessions[sent : min(due, sent + BYES_PER_TURN)]:
                self._send_bye(session)
                sent += 1
            await asyncio.sleep(POLL if sent >= due else 0)
        await _wait_until(lambda: not self.connections, began + timeout)
        if self.connections:
            log.warning("drain timed out: remaining connections closed", connections=self.connections)
        for session in sessions:
            session.connection.abort()
        await _wait_until(lambda: not self.connections, loop.time() + POLL)

    def _send_bye(self, session: Session) -> None:
        if session.id in self._bye_sent or session.id not in self.sessions:
            return
        self._bye_sent.add(session.id)
        delay = int(random.uniform(0, self._spread) * 1000)
        # A parked publisher gets the answer to its publish first (`block`).
        session.connection.answer_publish(messages.encode_bye("shutdown", delay))
        session.connection.finish(CloseCode.GOING_AWAY, CloseCode.GOING_AWAY.reason)

    async def stop(self) -> None:
        """Abort the remaining connections, and stop the engine."""
        for session in list(self.sessions.values()):
            session.connection.abort()
        await asyncio.sleep(0)
        await self.identities.stop()
        self.members.stop()
        self.context.stop()
        await self.engine.stop()


def _draining() -> CommandError:
    return CommandError("draining", "the broker is shutting down")


def _find_subscription(session: Session, topic: str) -> Subscription:
    subscription = (session.subscriptions or {}).get(topic)
    if subscription is None:
        raise CommandError("not_subscribed", f"there is no subscription to `{topic}`")
    return subscription


def _detach(session: Session, subscription: Subscription) -> bool:
    """Take a subscription from its session. False: it is not there any more."""
    topic = subscription.filter.topic
    if session.subscriptions is None or session.subscriptions.get(topic) is not subscription:
        return False
    del session.subscriptions[topic]
    return True


def _permit(origin: Connection, topic: str) -> None:
    """Let the next publish to this topic take the fast path, if there is a route by now."""
    path = origin.routes.path if isinstance(origin.routes, IntakeLimit) else origin.routes
    bucket = path if isinstance(path, TokenBucket) else origin.token_bucket
    routes = path if bucket is None else bucket.routes
    if isinstance(routes, PermittedRoutes):
        routes.permit(topic)


def _check_rate(token_bucket: TokenBucket) -> None:
    """Raise CommandError if a connection publishes more than it may."""
    if wait := token_bucket.take():
        after = math.ceil(1000 * wait)
        raise CommandError("rate_limited", f"more than {token_bucket.rate:g} events a second", retry_after_ms=after)


def _not_allowed(policy: SubscriptionPolicy) -> CommandError:
    if not policy.overflows:
        return CommandError("forbidden", "the rules for these topics have no `overflow` in common")
    return CommandError("forbidden", f"`overflow` must be one of {', '.join(policy.overflows)} here")


def _is_busy(session: Session) -> bool:
    """Whether a command of a session was not answered yet."""
    return session.inflight > 0 or session.connection.unanswered > 0


def _outbox(session: Session) -> int:
    return session.connection.queued_bytes


def _event_prefix(topic: str) -> bytes:
    """How the `event` messages of a topic begin, up to where `key` would stand."""
    return messages.encode_event(topic, b"0").removesuffix(b',"data":0}')


async def _wait_until(condition: Callable[[], bool], deadline: float) -> None:
    """Wait until the condition holds, at the longest until `deadline` in the loop's time.

    It looks again and again, for the few seconds of a drain: an event for this would be paid for by every close.
    """
    loop = asyncio.get_running_loop()
    while not condition() and (left := deadline - loop.time()) > 0:  # noqa: ASYNC110 -- see above
        await asyncio.sleep(min(POLL, left))
