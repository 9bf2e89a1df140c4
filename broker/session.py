"""One client: what it asks for, the limits on it, and what it is answered.

A session is told of a message only when the fast path (`broker._speedups`) leaves it; for a publish both paths do the
same. Every command with an id is answered exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import structlog

from broker import messages
from broker._speedups import Connection, Subscription
from broker.config import Limits, parse_address
from broker.engines.base import Done, Event, Position, Unavailable
from broker.errors import BAD_COMMANDS_IN_A_ROW, CloseCode, CommandError, ConfigError
from broker.hub import UNLIMITED
from broker.messages import BadCommand, Command
from broker.metrics import Metrics
from broker.rules import Rules, SubscriptionPolicy
from broker.topics import check_pattern, check_topic

log = structlog.get_logger(__name__)

SLOW = 0.1
"""Seconds for which a publish holds its connection up while memory is used up."""
TOO_SLOW = (CloseCode.SLOW_CONSUMER, CloseCode.NOT_READING)
LATER_FIELDS = ("since", "last", "presence")


class Node(Protocol):
    """What a session asks of `broker.node.Node`."""

    limits: Limits
    rules: Rules
    block: str
    """Who may subscribe with the policy `block`: "local", "all" or "none"."""
    metrics: Metrics
    memory_pressure: bool

    def subscribe(
        self, connection: Connection, topic: str, *, max_queue: int, overflow: str, echo: bool, credit: int
    ) -> Subscription:
        """Subscribe a connection to a valid topic or pattern. `credit` -1: any number of events may come."""

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription."""

    def publish(self, event: Event, done: Done) -> None:
        """Give an event to the engine; `done` gets its position, or Unavailable."""

    def refuse_while_draining(self) -> None:
        """Raise CommandError once the broker shuts down."""

    def remove(self, session: Session) -> None:
        """Drop a session whose connection takes part no more."""


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
    """What the broker knows of one client. `id` stands for it in the log and in `welcome`."""

    __slots__ = ("connection", "id", "inflight", "node", "peer", "subscriptions")

    def __init__(self, node: Node, connection: Connection, id: str, peer: str) -> None:
        self.node = node
        self.connection = connection
        self.id = id
        self.peer = peer
        """The client's address, for the log."""
        self.subscriptions: dict[str, Subscription] | None = None
        """By topic or pattern. None for the many that have none yet: it saves 64 bytes on each."""
        self.inflight = 0
        """Publishes that the engine has not answered."""

    # What the connection tells.

    def message(self, payload: bytes, text: bool) -> None:
        """Carry out one command (broker._speedups.Session)."""
        connection = self.connection
        command: Command | None = None
        try:
            command = messages.decode(payload, self.node.limits.max_depth)
            self.node.metrics.commands[_op(command)] += 1
            handle = HANDLERS.get(type(command))
            if handle is None:
                what = f"`{_op(command)}` comes with a later version of the broker"
                raise BadCommand("bad_command", what, command.id)
            handle(self, command)
            connection.mistakes = 0
        except BadCommand as error:
            if command is None:
                self.node.metrics.commands[""] += 1
            self._refuse(error, error.id)
            connection.mistakes += 1
            if connection.mistakes >= BAD_COMMANDS_IN_A_ROW:
                connection.close(CloseCode.BAD_COMMANDS, CloseCode.BAD_COMMANDS.reason)
        except CommandError as error:
            connection.mistakes = 0
            self._refuse(error, None if command is None else command.id)
        except Exception:
            connection.mistakes = 0
            log.exception("command failed", session=self.id, peer=self.peer)
            failure = CommandError("internal", f"the broker failed; its log has more under session {self.id}")
            self._refuse(failure, None if command is None else command.id)

    def on_close(self, code: int, reason: str) -> None:
        """Forget the client: its connection takes part no more (broker._speedups.Session)."""
        subscriptions, self.subscriptions = self.subscriptions, None
        if code in TOO_SLOW:
            dropped = sum(subscription.dropped for subscription in (subscriptions or {}).values())
            log.warning("closed a slow client", session=self.id, peer=self.peer, reason=reason, dropped=dropped)
        elif code == CloseCode.PING_TIMEOUT:
            log.info("ping timeout", session=self.id, peer=self.peer)
        for subscription in (subscriptions or {}).values():
            self.node.unsubscribe(subscription)
        self.node.remove(self)
        self.node.metrics.close(code)
        log.debug("session closed", session=self.id, peer=self.peer, code=code, reason=reason)

    # What operators ask.

    def subscription_stats(self) -> list[SubscriptionStats]:
        """Say how the subscriptions stand."""
        return [
            SubscriptionStats(
                topic=topic,
                overflow=subscription.overflow,
                max_queue=subscription.max_queue,
                credit=None if subscription.credit == UNLIMITED else subscription.credit,
                queued=subscription.queued,
                oldest_queued_seconds=round(subscription.waiting, 3),
                dropped=subscription.dropped,
                dropped_by_reason=subscription.lost_by_reason,
            )
            for topic, subscription in (self.subscriptions or {}).items()
        ]

    # The commands.

    def _subscribe(self, command: messages.Subscribe) -> None:
        check_pattern(command.topic)
        for name in LATER_FIELDS:
            if getattr(command, name) is not None:
                raise BadCommand("bad_command", f"`{name}` comes with a later version of the broker", command.id)
        self.node.refuse_while_draining()
        policy = self.node.rules.policy(command.topic)
        self._check_policy(command, policy)
        subscription = (self.subscriptions or {}).get(command.topic)
        if subscription is not None:
            subscription.change(
                max_queue=subscription.max_queue if command.max_queue is None else command.max_queue,
                overflow=command.overflow or subscription.overflow,
                echo=subscription.echo if command.echo is None else command.echo,
                credit=command.credit,
            )
        else:
            self._subscribe_anew(command, policy)
        self._ok(command.id, topic=command.topic)

    def _check_policy(self, command: messages.Subscribe, policy: SubscriptionPolicy) -> None:
        """Raise CommandError if the command asks for more than it may here."""
        if command.max_queue is not None and command.max_queue > policy.max_queue_limit:
            raise CommandError("limit", f"`max_queue` may be at most {policy.max_queue_limit} here")
        if command.overflow is None:
            return
        if command.overflow not in policy.overflows:
            raise _not_allowed(policy)
        if command.overflow == "replay":
            raise CommandError("no_history", f"`{command.topic}` keeps no history")
        if command.overflow == "block" and policy.overflow != "block" and not self._may_block():
            raise CommandError("forbidden", "`overflow` block is not allowed to this client: publishers would wait")

    def _may_block(self) -> bool:
        return self.node.block == "all" or (self.node.block == "local" and is_local(self.peer))

    def _subscribe_anew(self, command: messages.Subscribe, policy: SubscriptionPolicy) -> None:
        if self.subscriptions is None:
            self.subscriptions = {}
        limits = self.node.limits
        if len(self.subscriptions) >= limits.max_subscriptions:
            raise CommandError("limit", f"a connection may have at most {limits.max_subscriptions} subscriptions here")
        overflow = command.overflow or policy.overflow
        if overflow is None:
            raise _not_allowed(policy)
        self.subscriptions[command.topic] = self.node.subscribe(
            self.connection,
            command.topic,
            max_queue=policy.max_queue if command.max_queue is None else command.max_queue,
            overflow=overflow,
            echo=command.echo is not False,
            credit=UNLIMITED if command.credit is None else command.credit,
        )

    def _unsubscribe(self, command: messages.Unsubscribe) -> None:
        check_pattern(command.topic)
        subscription = (self.subscriptions or {}).pop(command.topic, None)
        if subscription is None:
            raise CommandError("not_subscribed", f"there is no subscription to `{command.topic}`")
        self.node.unsubscribe(subscription)
        self._ok(command.id, topic=command.topic)

    def _credit(self, command: messages.Credit) -> None:
        check_pattern(command.topic)
        subscription = (self.subscriptions or {}).get(command.topic)
        if subscription is None:
            raise CommandError("not_subscribed", f"there is no subscription to `{command.topic}`")
        if subscription.credit == UNLIMITED:
            raise BadCommand("bad_command", f"`{command.topic}` was subscribed to without `credit`", command.id)
        subscription.add_credit(command.add)
        self._ok(command.id, topic=command.topic)

    def _publish(self, command: messages.Publish) -> None:
        check_topic(command.topic)
        self.node.refuse_while_draining()
        token_bucket = self.connection.token_bucket
        if token_bucket is not None and (wait := token_bucket.take()):
            after = math.ceil(1000 * wait)
            raise CommandError("rate_limited", f"more than {token_bucket.rate:g} events a second", retry_after_ms=after)
        event = Event(command.topic, command.data, command.key, origin=self.connection)
        under_way = True

        def done(result: Position | Unavailable) -> None:
            nonlocal under_way
            under_way = False
            self.inflight -= 1
            if isinstance(result, Unavailable):
                self._refuse(CommandError("unavailable", str(result)), command.id)
            else:
                self._published(command.id, event, result)
            # Half of them at once: to go on for one command and stop again costs more than the command. And less than
            # half, whatever a reload has made of the limit.
            if self.inflight <= self.node.limits.max_inflight // 2:
                self.connection.resume()

        self.inflight += 1
        try:
            self.node.publish(event, done)
        except Exception:
            if under_way:  # the fault is the answer, and no other is waited for
                self.inflight -= 1
            raise
        if self.inflight >= self.node.limits.max_inflight:
            self.connection.pause()
        elif self.node.memory_pressure:
            self.connection.pause_for(SLOW)

    def _published(self, id: int | str | None, event: Event, position: Position) -> None:
        receivers, queued, dropped = event.receipt
        if id is None:
            return
        found = {} if position.offset is None else {"offset": position.offset}
        answer = messages.encode_ok(id, receivers=receivers, queued=queued, dropped=dropped, **found)
        self.connection.answer_publish(answer)

    def _ping(self, command: messages.Ping) -> None:
        self.connection.answer(messages.encode_pong(command.id))

    # The answers.

    def _ok(self, id: int | str | None, **fields: object) -> None:
        if id is not None:
            self.connection.answer(messages.encode_ok(id, **fields))

    def _refuse(self, error: CommandError, id: int | str | None) -> None:
        self.node.metrics.errors[error.code] += 1
        self.connection.answer(messages.encode_error(id, error.code, error.message, error.retry_after_ms))


def _not_allowed(policy: SubscriptionPolicy) -> CommandError:
    if not policy.overflows:
        return CommandError("forbidden", "the rules for these topics have no `overflow` in common")
    return CommandError("forbidden", f"`overflow` must be one of {', '.join(policy.overflows)} here")


def is_local(peer: str) -> bool:
    """Whether a client, by its address in the log, is on this machine."""
    try:
        return peer.startswith("unix:") or parse_address(peer).local
    except ConfigError:  # "unknown": it was gone before it was asked
        return False


def _op(command: Command) -> str:
    return str(type(command).__struct_config__.tag)


HANDLERS: dict[type, Callable[[Session, Any], None]] = {
    messages.Subscribe: Session._subscribe,
    messages.Unsubscribe: Session._unsubscribe,
    messages.Publish: Session._publish,
    messages.Credit: Session._credit,
    messages.Ping: Session._ping,
}
