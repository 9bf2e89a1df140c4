"""One broker process: the sessions, the hub and the engine, and how they come to an end."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import secrets
import time
from collections.abc import Callable, Iterator
from itertools import islice

import msgspec
import structlog

from broker import __version__, messages
from broker._speedups import Connection, LoopContext, Subscription, TokenBucket
from broker.config import Config
from broker.engines.base import Done, Engine, Event, Position, Unavailable
from broker.errors import CloseCode, CommandError
from broker.hub import Hub
from broker.metrics import Metrics
from broker.rules import Rules
from broker.session import Session, SubscriptionStats

log = structlog.get_logger(__name__)

SERVER = f"wsbroker/{__version__}"
BYES_PER_TURN = 500
"""Clients that get `bye` in one turn of the loop, so that a drain does not delay deliveries."""
BYE_SHARE = 0.8
"""Part of the time of a retirement over which `bye` is sent; the rest is for the clients to disconnect."""
POLL = 0.02
"""Seconds between two checks whether a drain is done."""


class Node:
    """Brings sessions, hub and engine together. The listeners call `connect`; daemon and sessions call the rest."""

    def __init__(self, config: Config, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        limits = config.limits
        self.draining = False
        self.memory_pressure = False
        """Whether publishers are slowed down, since there is no more memory."""
        self.engine = engine
        self.context = LoopContext(
            loop,
            encode_gap=messages.encode_gap,
            max_size=limits.max_size,
            max_fragments=limits.max_fragments,
            max_outbox=limits.max_outbox,
            max_answers=limits.max_answers,
            max_depth=limits.max_depth,
            ping_interval=limits.ping_interval,
            ping_timeout=limits.ping_timeout,
            close_timeout=limits.close_timeout,
            block_timeout=limits.block_timeout,
        )
        self.sessions: dict[str, Session] = {}
        self.reconfigure(config)
        self.context.on_lagging = self._log_lagging
        self.hub = Hub(self.context)
        self.on_disconnect: Callable[[str], None] | None = None
        """Called with the address of each client that leaves."""
        self._bye_sent: set[str] = set()
        """Sessions that got `bye` and have not disconnected yet."""
        self.metrics = Metrics()

    def reconfigure(self, config: Config) -> None:
        """Go by these limits and topic rules from now on. What there is already keeps its policy: connections the
        largest message, which they were told, and subscriptions their bounds.

        What the keep-alive sweep goes by, and what sockets were set to, stays as it was at the start. Raises
        ConfigError for rules that are wrong.
        """
        limits = config.limits
        self.rules = Rules(config.topics, limits)
        self.limits = limits
        for session in self.sessions.values():
            self._allow(session.connection)
        self.block: str = config.server.block
        self._spread = limits.reconnect_spread
        context = self.context
        context.max_size = limits.max_size
        context.max_fragments = limits.max_fragments
        context.max_outbox = limits.max_outbox
        context.max_answers = limits.max_answers
        context.max_depth = limits.max_depth
        context.max_age = self.rules.max_age if any(rule.max_age is not None for rule in config.topics) else None

    def set_memory_pressure(self, memory_pressure: bool) -> None:
        """Slow publishers down, or no longer: each publish then holds its connection up for a moment."""
        self.memory_pressure = memory_pressure
        self.hub.routes.clear()  # the fast path would not

    def peers(self) -> Iterator[str]:
        """Give the addresses of all clients."""
        return (session.peer for session in self.sessions.values())

    @property
    def connections(self) -> int:
        """How many connections are established, those that are closing included."""
        return self.context.connections

    async def start(self) -> None:
        """Start the engine and the keep-alive sweep."""
        await self.engine.start(self.deliver, self.lost)
        self.context.start()

    # What the listeners ask.

    def connect(
        self, transport: asyncio.Transport, upgrade_response: bytes, rest: bytes, peer: str, window_bits: int = 0
    ) -> None:
        """Take over a transport whose handshake is done.

        `upgrade_response` is the answer to the handshake, sent first; `rest` is what came behind the request; `peer`
        is the client's address for the log; `window_bits` what was agreed on compression, see
        `Connection.start`.
        """
        limits = self.limits
        connection = Connection(self.context)
        session = Session(self, connection, secrets.token_urlsafe(9), peer)
        connection.session = session
        connection.routes = self.hub.routes if self.engine.in_process else None
        self._allow(connection)
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
            )
        )
        log.debug("session opened", session=session.id, peer=peer)
        connection.feed(rest)

    def _allow(self, connection: Connection) -> None:
        """Let a connection publish as much as the limits say now."""
        rate, burst = self.limits.publish_rate, self.limits.publish_burst
        token_bucket = connection.token_bucket
        if token_bucket is not None and rate:
            token_bucket.change(rate, burst)
        elif token_bucket is not None:
            connection.token_bucket, connection.routes = None, token_bucket.routes
        elif rate:
            connection.token_bucket, connection.routes = TokenBucket(rate, burst, connection.routes), None

    # What the sessions ask.

    def subscribe(
        self, connection: Connection, topic: str, *, max_queue: int, overflow: str, echo: bool, credit: int
    ) -> Subscription:
        """Subscribe a connection to a valid topic or pattern. `credit` -1: any number of events may come."""
        subscription = self.hub.subscribe(
            connection, topic, max_queue=max_queue, overflow=overflow, echo=echo, credit=credit
        )
        if subscription.filter.subscribers == 1:
            self.engine.interest(topic, True)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription."""
        self.hub.unsubscribe(subscription)
        if subscription.filter.subscribers == 0:
            self.engine.interest(subscription.filter.topic, False)

    def publish(self, event: Event, done: Done) -> None:
        """Give an event to the engine; `done` gets its position, or Unavailable."""
        if not self.engine.in_process:
            done = self._timed(done)
        self.engine.publish(event, done)

    def _timed(self, done: Done) -> Done:
        began = time.perf_counter()

        def timed(result: Position | Unavailable) -> None:
            self.metrics.engine.observe(time.perf_counter() - began)
            done(result)

        return timed

    def refuse_while_draining(self) -> None:
        """Raise CommandError once the broker shuts down."""
        if self.draining:
            raise CommandError("draining", "the broker is shutting down")

    def remove(self, session: Session) -> None:
        """Drop a session whose connection takes part no more."""
        self._bye_sent.discard(session.id)
        if self.sessions.pop(session.id, None) is not None and self.on_disconnect is not None:
            self.on_disconnect(session.peer)

    # What the engine tells.

    def deliver(self, event: Event) -> None:
        """Send an event to this node's subscribers, and note in its receipt how that went."""
        audience = self.hub.audience(event.topic)
        payload = messages.encode_event(event.topic, event.data, event.key, event.offset)
        origin = event.origin if isinstance(event.origin, Connection) else None
        key = None if event.key is None else event.key.encode()
        event.receipt = audience.publish(event.topic, payload, key, origin)
        if self.engine.in_process and not self.draining and not self.memory_pressure:
            self.hub.routes.install(event.topic, audience, _prefix(event.topic))

    def lost(self, topic: str) -> None:
        """Announce a possible hole in a topic: to each of its subscribers a gap, of which nobody knows the size."""
        self.context.flush_batches()
        for subscription in self.hub.audience(topic).subscriptions():
            subscription.announce_loss()

    # What operators ask.

    def subscription_stats(self, most: int) -> Iterator[tuple[Session, list[SubscriptionStats]]]:
        """Say of so many sessions, those for which most bytes wait first, how their subscriptions stand.

        Each is looked at when it is asked for, so that the caller may let the loop turn between them.
        """
        for session in heapq.nlargest(most, self.sessions.values(), key=_outbox):
            yield session, session.subscription_stats()

    def _log_lagging(self, connection: Connection, behind: bool) -> None:
        """Log that a client has fallen behind for longer than a moment, or has caught up."""
        session = connection.session
        if not isinstance(session, Session):
            return
        if not behind:
            log.info("subscriber caught up", session=session.id, peer=session.peer)
            return
        worst = max(session.subscription_stats(), key=lambda stats: stats.queued, default=None)
        what = msgspec.structs.asdict(worst) if worst is not None else {}
        log.warning("subscriber lagging", session=session.id, peer=session.peer, **what)

    # The end.

    async def drain(self, timeout: float) -> None:
        """Carry out what was received, deliver it, and send all clients away, within `timeout` seconds.

        Returns when the last connection is closed; who has not gone by the end of the time is cut off.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        # One turn of the loop reads what lies in the sockets, the next one sends what came of it. Nobody gives way to
        # others any more: what was read is to be carried out.
        self.context.command_time = math.inf
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.draining = True
        self.hub.routes.clear()
        for session in self.sessions.values():
            session.connection.routes = None
        await _until(lambda: not any(session.inflight for session in self.sessions.values()), deadline)
        waiting = list(self.sessions.values())
        log.info("draining", connections=len(waiting))
        remaining = iter(waiting)
        while part := list(islice(remaining, BYES_PER_TURN)):
            for session in part:
                self._send_bye(session)
            await asyncio.sleep(0)
        await _until(lambda: not self.connections, deadline)
        if self.connections:
            log.warning("drain timed out: remaining connections closed", connections=self.connections)
            for session in waiting:
                session.connection.abort()

    async def retire(self, timeout: float) -> None:
        """Send all clients away, evenly over most of `timeout` seconds, and serve each until it goes.

        Who has not gone by the end of the time is cut off.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiting = list(self.sessions.values())
        random.shuffle(waiting)
        sent = 0
        while sent < len(waiting):
            elapsed = loop.time() - began
            due = len(waiting) if timeout == 0 else int(len(waiting) * elapsed / (timeout * BYE_SHARE)) + 1
            for session in waiting[sent : min(due, sent + BYES_PER_TURN)]:
                self._send_bye(session)
                sent += 1
            await asyncio.sleep(POLL if sent >= due else 0)
        await _until(lambda: not self.connections, began + timeout)
        if self.connections:
            log.warning("drain timed out: remaining connections closed", connections=self.connections)
        for session in waiting:
            session.connection.abort()
        await _until(lambda: not self.connections, loop.time() + POLL)

    def _send_bye(self, session: Session) -> None:
        if session.id in self._bye_sent or session.id not in self.sessions:
            return
        self._bye_sent.add(session.id)
        delay = int(random.uniform(0, self._spread) * 1000)
        # A publisher whose event waits for room is told first that it has found it (`block`).
        session.connection.answer_publish(messages.encode_bye("shutdown", delay))
        session.connection.finish(CloseCode.GOING_AWAY, CloseCode.GOING_AWAY.reason)

    async def stop(self) -> None:
        """Cut off who is left, and stop the engine."""
        for session in list(self.sessions.values()):
            session.connection.abort()
        await asyncio.sleep(0)
        self.context.stop()
        await self.engine.stop()


def _outbox(session: Session) -> int:
    return session.connection.outbox


def _prefix(topic: str) -> bytes:
    """How the `event` messages of a topic begin, up to where `key` would stand."""
    return messages.encode_event(topic, b"0").removesuffix(b',"data":0}')


async def _until(condition: Callable[[], bool], deadline: float) -> None:
    """Wait until the condition holds, at the longest until `deadline` in the loop's time.

    It looks again and again, for the few seconds of a drain: an event for this would be paid for by every close.
    """
    loop = asyncio.get_running_loop()
    while not condition() and (left := deadline - loop.time()) > 0:  # noqa: ASYNC110 -- see above
        await asyncio.sleep(min(POLL, left))
