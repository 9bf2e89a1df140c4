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
from broker.engines.base import HistoryPage, Member, MemberPage, Position
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
HISTORY_LIMIT = 100
"""Events in the answer to `history`, where the command does not say."""
MAX_HISTORY_LIMIT = 1000
PRESENCE_LIMIT = 100
"""Members in the answer to `presence`, where the command does not say."""
MAX_PRESENCE_LIMIT = 1000


class Published(msgspec.Struct, frozen=True):
    """How a publish went: its position, and how many subscribers of this node it matched, is queued for, was dropped
    for."""

    position: Position
    receivers: int
    queued: int
    dropped: int


class Subscribed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the answer to a subscribe says of the history of its topic."""

    epoch: str | None = None
    offset: int | None = None
    """Of the newest event."""
    recovered: bool | None = None
    """Whether nothing is missing since where the client was."""


T = TypeVar("T")
Done = Callable[[T | CommandError], None]
"""Takes the outcome of a use case, which may come later. It comes once."""


class Node(Protocol):
    """The part of `broker.node.Node` that a session uses. A use case that raises never calls `done`."""

    limits: Limits
    metrics: Metrics
    memory_pressure: bool

    def subscribe(self, session: Session, command: messages.Subscribe, done: Done[Subscribed]) -> None:
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
        dedup: str | None = None,
        rights: Rights | None = None,
    ) -> None:
        """Publish an event that came by the connection `origin`."""

    def history(
        self, topic: str, since: Position | None, limit: int, done: Done[HistoryPage], rights: Rights | None = None
    ) -> None:
        """Read kept events of a topic: the oldest after `since`, or the newest without it. `rights` None: of any."""

    def presence(self, session: Session, topic: str, after: str | None, limit: int, done: Done[MemberPage]) -> None:
        """Read the members of a topic, behind the cursor `after`."""

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
        "memberships",
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
        self.memberships: dict[str, Member] | None = None
        """What others see of it as a member of topics with presence. None: of no topic."""
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

    def refuse_publish(self, id: int | str | None, error: CommandError) -> None:
        """Answer a publish of the fast path that was not kept."""
        self._refuse(error, id)

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

    def _begin(self, use_case: Callable[..., None], *arguments: object) -> None:
        """Begin a use case of the node, which is under way until it calls its `done`. Raises what it raises."""
        self.inflight += 1
        try:
            use_case(*arguments)
        except Exception:
            self.inflight -= 1
            raise
        if self.inflight >= self.node.limits.max_inflight:
            self.connection.pause()

    def _subscribe(self, command: messages.Subscribe) -> None:
        self._begin(self.node.subscribe, self, command, partial(self._subscribed, command))

    def _subscribed(self, command: messages.Subscribe, result: Subscribed | CommandError) -> None:
        self.inflight -= 1
        if isinstance(result, CommandError):
            self._refuse(result, command.id)
        elif result.epoch is None:
            self._ok(command.id, topic=command.topic)
        else:
            self._ok(command.id, topic=command.topic, **msgspec.to_builtins(result))
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
            node.publish(command.topic, command.data, command.key, done, self.connection, command.dedup, self.rights)
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
            at = result.position
            if at.offset is None and not at.duplicate:
                receipt = messages.encode_receipt(id, receivers, queued, dropped)
            else:
                receipt = messages.encode_receipt(id, receivers, queued, dropped, at.epoch, at.offset, at.duplicate)
            self.connection.answer_publish(receipt)
        self._read_on()

    def _history(self, command: messages.History) -> None:
        limit = HISTORY_LIMIT if command.limit is None else command.limit
        if limit > MAX_HISTORY_LIMIT:
            raise CommandError("limit", f"`limit` may be at most {MAX_HISTORY_LIMIT}")
        if command.since is not None and command.last is not None:
            raise BadCommand("bad_command", "`since` and `last` exclude each other")
        since = None if command.since is None else Position(command.since.epoch, command.since.offset)
        if command.last is not None and command.last != "all":
            limit = min(limit, command.last)
        self._begin(self.node.history, command.topic, since, limit, partial(self._read, command), self.rights)

    def _read(self, command: messages.History, page: HistoryPage | CommandError) -> None:
        self.inflight -= 1
        if isinstance(page, CommandError):
            self._refuse(page, command.id)
        elif command.id is not None:
            events, more = fitting(page, command.since is not None, self.node.limits.max_size)
            recovered = None if command.since is None else page.complete
            answer = messages.encode_history(command.id, page.epoch, page.top, events, more, recovered)
            self.connection.answer(answer)
        self._read_on()

    def _presence(self, command: messages.Presence) -> None:
        limit = PRESENCE_LIMIT if command.limit is None else command.limit
        if limit > MAX_PRESENCE_LIMIT:
            raise CommandError("limit", f"`limit` may be at most {MAX_PRESENCE_LIMIT}")
        self._begin(self.node.presence, self, command.topic, command.after, limit, partial(self._listed, command))

    def _listed(self, command: messages.Presence, page: MemberPage | CommandError) -> None:
        self.inflight -= 1
        if isinstance(page, CommandError):
            self._refuse(page, command.id)
        elif command.id is not None:
            members = [messages.encode_member(each.session, each.identity, each.info) for each in page.members]
            self.connection.answer(messages.encode_members(command.id, command.topic, members, page.count, page.cursor))
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


def fitting(page: HistoryPage, oldest_first: bool, max_size: int) -> tuple[list[bytes], bool]:
    """Encode the events of a page, as many as have `max_size` bytes together, but one at least: the oldest, or the
    newest. Gives them, and whether kept events follow."""
    events: list[bytes] = []
    size = 0
    for event in page.events if oldest_first else reversed(page.events):
        encoded = messages.encode_kept(event.offset or 0, event.key, event.data)
        size += len(encoded) + 1
        if events and size > max_size:
            return (events, True) if oldest_first else (events[::-1], False)
        events.append(encoded)
    return (events if oldest_first else events[::-1]), page.more


OPS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(Command)}
WITHOUT_IDENTITY = (messages.Auth, messages.Ping)
"""The commands of a client that has no identity yet."""
HANDLERS: dict[type, Callable[[Session, Any], None]] = {
    messages.Auth: Session._auth,
    messages.Subscribe: Session._subscribe,
    messages.Unsubscribe: Session._unsubscribe,
    messages.Publish: Session._publish,
    messages.Credit: Session._credit,
    messages.History: Session._history,
    messages.Presence: Session._presence,
    messages.Ping: Session._ping,
}
