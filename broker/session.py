"""One client: its commands and their answers.

A session gets only the messages that the fast path (`broker._speedups`) does not handle; for a publish both paths do
the same. Invariant: every command with an id is answered exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, get_args

import msgspec
import structlog

from broker import messages
from broker._speedups import Connection, IntakeLimit, Subscription
from broker.auth.permissions import Rights
from broker.config import Limits
from broker.engines.base import Position
from broker.errors import BAD_COMMANDS_IN_A_ROW, CloseCode, CommandError
from broker.hub import UNLIMITED
from broker.identity import Identity
from broker.messages import BadCommand, Command
from broker.metrics import Metrics
from broker.net.addresses import Peer

log = structlog.get_logger(__name__)

MOST_REFUSED = 20
"""Commands in a row that may be refused as too many before the connection is closed; the burst, where that is more."""
THROTTLE_SECONDS = 0.1
"""Seconds for which a publish pauses its connection while publishers are throttled."""
SLOW_CLIENT_CODES = (CloseCode.SLOW_CONSUMER, CloseCode.NOT_READING)
UNSUPPORTED_FIELDS = ("since", "last", "presence")


class Published(msgspec.Struct, frozen=True):
    """How a publish went: its position, and how many subscribers of this node it matched, is queued for, was dropped
    for."""

    position: Position
    receivers: int
    queued: int
    dropped: int


T = TypeVar("T")
Done = Callable[[T | CommandError], None]
"""Takes the outcome of a use case, which may come later. It comes once."""


class Node(Protocol):
    """The part of `broker.node.Node` that a session uses. A use case that raises never calls `done`."""

    limits: Limits
    metrics: Metrics
    memory_pressure: bool

    def subscribe(self, session: Session, command: messages.Subscribe, done: Done[None]) -> None:
        """Start a subscription of a session, or change it."""

    def unsubscribe(self, session: Session, topic: str) -> None:
        """End a subscription of a session."""

    def credit(self, session: Session, topic: str, add: int) -> None:
        """Let `add` more events of a subscription come."""

    def publish(
        self,
        topic: str,
        data: bytes | msgspec.Raw,
        key: str | None,
        done: Done[Published],
        origin: Connection | None = None,
        rights: Rights | None = None,
    ) -> None:
        """Publish an event that came by the connection `origin`."""

    def authenticate(self, session: Session, token: str, done: Done[Identity]) -> None:
        """Identify a session, or renew its identity."""

    def expires_in(self, identity: Identity) -> int | None:
        """Give the seconds until an identity expires; None: it never does."""

    def remove(self, session: Session) -> None:
        """Remove a session whose connection is closed, and end its subscriptions."""


class SubscriptionStats(msgspec.Struct, frozen=True):
    """The state of one subscription, for operators."""

    topic: str
    """The topic or pattern, as it was subscribed to."""
    overflow: str
    max_queue: int
    credit: int | None
    """Events that may still be sent; None: without a bound."""
    queued: int
    """Events in the queue."""
    oldest_queued_seconds: float
    """For how long the oldest of them has been queued."""
    dropped: int
    """Events dropped since the subscription began, for any reason."""
    dropped_by_reason: dict[str, int]
    """The same by reason, as in a `gap`."""


class Session:
    """One client, as the broker knows it. `id` is its name in the log and in `welcome`."""

    __slots__ = (
        "connection",
        "id",
        "identifying",
        "identity",
        "inflight",
        "intake",
        "node",
        "peer",
        "rights",
        "shares_bucket",
        "subscriptions",
    )

    def __init__(self, node: Node, connection: Connection, id: str, peer: Peer) -> None:
        self.node = node
        self.connection = connection
        self.id = id
        self.peer = peer
        """The client's address."""
        self.subscriptions: dict[str, Subscription] | None = None
        """By topic or pattern. None for the many that have none yet: it saves 64 bytes on each."""
        self.inflight = 0
        """Commands that the engine has not answered."""
        self.identity: Identity | None = None
        """None: the client must show one before it may do anything."""
        self.rights: Rights | None = None
        """What it may do; None: everything. Set with the identity."""
        self.identifying = False
        """Whether a token is being verified. Until then nothing more is read."""
        self.intake: IntakeLimit | None = None
        """How much it may send, where that is limited."""
        self.shares_bucket = False
        """Whether its token bucket is not its own, but that of its role."""

    # Callbacks of the connection.

    def message(self, payload: bytes, text: bool) -> None:
        """Execute one command (broker._speedups.Session)."""
        connection = self.connection
        if self.intake is not None and (wait := self.intake.take(len(payload))):
            self._refuse_too_many(self.intake, payload, wait)
            return
        command: Command | None = None
        try:
            command = messages.decode(payload, self.node.limits.max_depth)
            kind = type(command)
            self.node.metrics.commands[OPS[kind]] += 1
            handle = HANDLERS.get(kind)
            if self.identity is None and kind not in WITHOUT_IDENTITY:
                raise CommandError("unauthorized", "there is no identity yet: send `auth` with a token first")
            if handle is None:
                what = f"`{OPS[kind]}` comes with a later version of the broker"
                raise BadCommand("bad_command", what)
            if self.intake is not None:
                self.intake.refused = 0
            handle(self, command)
            if kind is not messages.Auth:  # whose outcome may come later
                connection.mistakes = 0
        except BadCommand as error:
            if command is None:
                self.node.metrics.commands[""] += 1
            self._refuse_bad(error, error.id if command is None else command.id)
        except CommandError as error:
            connection.mistakes = 0
            self._refuse(error, None if command is None else command.id)
        except Exception:
            connection.mistakes = 0
            log.exception("command failed", session=self.id, peer=self.peer)
            failure = CommandError("internal", f"the broker failed; its log has more under session {self.id}")
            self._refuse(failure, None if command is None else command.id)

    def on_close(self, code: int, reason: str) -> None:
        """Remove the session: its connection is closed (broker._speedups.Session)."""
        if code in SLOW_CLIENT_CODES:
            dropped = sum(subscription.dropped for subscription in (self.subscriptions or {}).values())
            log.warning("closed a slow client", session=self.id, peer=self.peer, reason=reason, dropped=dropped)
        elif code == CloseCode.PING_TIMEOUT:
            log.info("ping timeout", session=self.id, peer=self.peer)
        self.node.remove(self)
        self.node.metrics.close(code)
        log.debug("session closed", session=self.id, peer=self.peer, code=code, reason=reason)

    # For operators.

    def subscription_stats(self) -> list[SubscriptionStats]:
        """Give the state of each subscription."""
        return [
            SubscriptionStats(
                topic=topic,
                overflow=subscription.overflow,
                max_queue=subscription.max_queue,
                credit=None if subscription.credit == UNLIMITED else subscription.credit,
                queued=subscription.queued,
                oldest_queued_seconds=round(subscription.waiting, 3),
                dropped=subscription.dropped,
                dropped_by_reason=subscription.dropped_by_reason,
            )
            for topic, subscription in (self.subscriptions or {}).items()
        ]

    # The commands.

    def _subscribe(self, command: messages.Subscribe) -> None:
        if command.since is not None or command.last is not None or command.presence is not None:
            name = next(name for name in UNSUPPORTED_FIELDS if getattr(command, name) is not None)
            raise BadCommand("bad_command", f"`{name}` comes with a later version of the broker")
        self.inflight += 1
        try:
            self.node.subscribe(self, command, partial(self._subscribed, command))
        except Exception:
            self.inflight -= 1
            raise
        if self.inflight >= self.node.limits.max_inflight:
            self.connection.pause()

    def _subscribed(self, command: messages.Subscribe, error: CommandError | None) -> None:
        self.inflight -= 1
        if error is None:
            self._ok(command.id, topic=command.topic)
        else:
            self._refuse(error, command.id)
        self._read_on()

    def _unsubscribe(self, command: messages.Unsubscribe) -> None:
        self.node.unsubscribe(self, command.topic)
        self._ok(command.id, topic=command.topic)

    def _credit(self, command: messages.Credit) -> None:
        self.node.credit(self, command.topic, command.add)
        self._ok(command.id, topic=command.topic)

    def _auth(self, command: messages.Auth) -> None:
        self.inflight += 1
        self.identifying = True
        self.connection.pause()  # what follows may need the identity
        self.node.authenticate(self, command.token, partial(self._authenticated, command.id))

    def _authenticated(self, id: int | str | None, result: Identity | CommandError) -> None:
        self.inflight -= 1
        self.identifying = False
        if isinstance(result, BadCommand):
            self._refuse_bad(result, id)
        elif isinstance(result, CommandError):
            self.connection.mistakes = 0
            self._refuse(result, id)
        else:
            self.connection.mistakes = 0
            expires_in = self.node.expires_in(result)
            extra: dict[str, object] = {} if expires_in is None else {"expires_in": expires_in}
            self._ok(id, identity=result.name, **extra)
        self._read_on()

    def _publish(self, command: messages.Publish) -> None:
        node = self.node
        done = partial(self._published, command.id)
        self.inflight += 1
        try:
            node.publish(command.topic, command.data, command.key, done, self.connection, self.rights)
        except Exception:
            self.inflight -= 1
            raise
        if self.inflight >= node.limits.max_inflight:
            self.connection.pause()
        elif node.memory_pressure:
            self.connection.pause_for(THROTTLE_SECONDS)

    def _published(self, id: int | str | None, result: Published | CommandError) -> None:
        self.inflight -= 1
        if isinstance(result, CommandError):
            self._refuse(result, id)
        elif id is not None:
            receivers, queued, dropped = result.receivers, result.queued, result.dropped
            offset = result.position.offset
            self.connection.answer_publish(messages.encode_receipt(id, receivers, queued, dropped, offset))
        self._read_on()

    def _read_on(self) -> None:
        """Read more commands, if few enough are under way."""
        # Half of them at once: to go on for one command and stop again costs more than the command. And less than half,
        # whatever a reload has made of the limit.
        if self.inflight <= self.node.limits.max_inflight // 2 and not self.identifying:
            self.connection.resume()

    def _ping(self, command: messages.Ping) -> None:
        self.connection.answer(messages.encode_pong(command.id))

    # The answers.

    def end_subscription(self, topic: str, error: CommandError) -> None:
        """Tell the client that the broker has ended a subscription."""
        self.node.metrics.errors[error.code] += 1
        self.connection.answer(messages.encode_error(None, error.code, error.message, topic=topic))

    def _ok(self, id: int | str | None, **fields: object) -> None:
        if id is not None:
            self.connection.answer(messages.encode_ok(id, **fields))

    def _refuse_too_many(self, intake: IntakeLimit, payload: bytes, wait: float) -> None:
        """Refuse a command without decoding more of it than its id; close a connection that goes on."""
        after = math.ceil(1000 * wait)
        error = CommandError("rate_limited", "too many commands, or too many bytes", retry_after_ms=after)
        self._refuse(error, messages.id_of(payload))
        intake.refused += 1
        if intake.refused > max(MOST_REFUSED, intake.command_burst):  # those that were under way are forgiven
            self.connection.close(CloseCode.RATE_LIMITED, CloseCode.RATE_LIMITED.reason)

    def _refuse_bad(self, error: BadCommand, id: int | str | None) -> None:
        """Answer a command that could not be understood, and close the connection after too many of them."""
        self._refuse(error, id)
        self.connection.mistakes += 1
        if self.connection.mistakes >= BAD_COMMANDS_IN_A_ROW:
            self.connection.close(CloseCode.BAD_COMMANDS, CloseCode.BAD_COMMANDS.reason)

    def _refuse(self, error: CommandError, id: int | str | None) -> None:
        self.node.metrics.errors[error.code] += 1
        self.connection.answer(messages.encode_error(id, error.code, error.message, error.retry_after_ms))


OPS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(Command)}
WITHOUT_IDENTITY = (messages.Auth, messages.Ping)
"""The commands of a client that has no identity yet."""
HANDLERS: dict[type, Callable[[Session, Any], None]] = {
    messages.Auth: Session._auth,
    messages.Subscribe: Session._subscribe,
    messages.Unsubscribe: Session._unsubscribe,
    messages.Publish: Session._publish,
    messages.Credit: Session._credit,
    messages.Ping: Session._ping,
}
