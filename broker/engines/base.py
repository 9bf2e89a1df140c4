"""The engine ports. The promises are numbered; the conformance suite checks them one by one on every engine.

Every call returns at once and answers by callback, on the node's event loop, possibly before it returns. Errors are
values. What an adapter's library raises does not leave the adapter.

1. **Order.** Events of one topic are delivered on every node in one order: that of their offsets, where the topic keeps
   history. Events that one node publishes to a topic keep the order of their `publish` calls.
2. **Once.** A node gets each event of a topic that it has interest in once, whatever the number of its interests. A
   delivered event is equal to the published one, its token included; `offset` is set where the topic keeps history.
3. **Done means kept.** Numbering and keeping an event is one atomic step. `done` comes exactly once: with the event's
   position after that step, or with `Unavailable`, and then nothing was kept and nothing is delivered.
4. **Delivered before done.** On the node that published an event, `deliver` comes before `done`, if that node has
   interest in the topic. So a receipt can count the subscribers that got it.
5. **Never blocks.** Every call returns at once, whatever the server behind the engine does.
6. **Bounded.** The number of calls that wait for an answer is bounded; at the bound they get `Unavailable`.
7. **No silent loss.** Where the engine cannot tell whether a node got all events of a topic or pattern, it calls
   `lost(filter)`. Events delivered before this call precede the possible hole.
8. **Ends.** When `stop` has returned, every call has been answered, and nothing is called back any more.
9. **Interest is complete.** Events published anywhere after `done(None)` of an `interest(filter, True)` are delivered
   here. With `Unavailable` nothing has changed. Calls for one filter take effect in their order.
10. **History matches.** `history`, `locate` and `position` say what `publish` answered and `deliver` delivered. A page
    says which part of the history it is, so that its reader misses nothing without knowing it.
11. **Compacted.** On a compacted topic at most one event is kept for each key: the newest. An event does not count as
    missing if a newer event of its key replaced it. A dropped tombstone counts as missing.
12. **Idempotent.** A publish whose `dedup` is that of an earlier one of the topic, within its `dedup_age`, is answered
    with the position of that one, and `duplicate`; nothing is kept or delivered. (The number of those that are
    remembered is bounded.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from broker._speedups import Event as KeptEvent
from broker._speedups import Keeper, PendingBatch, TopicLog
from broker.config import Limits
from broker.rules import Retention


class Event(msgspec.Struct, frozen=True):
    """An event as it travels between nodes. `data` is one JSON value, as it was sent."""

    topic: str
    data: bytes | msgspec.Raw
    key: str | None = None
    offset: int | None = None
    """Its number, where the topic keeps history; set by the engine."""
    token: int | None = None
    """How the publishing node recognises the event at its delivery. Engines pass it on and do not read it. An event
    that is read from history need not have it."""
    dedup: str | None = None
    """What makes a publish recognisable that is repeated. It need not be delivered."""


class Position(msgspec.Struct, frozen=True):
    """Where in a topic's history an event is. Both are None where the topic keeps none."""

    epoch: str | None = None
    offset: int | None = None
    duplicate: bool = False
    """In the answer to a publish: this is where an earlier publish with the same `dedup` is."""


class HistoryPage(msgspec.Struct, frozen=True):
    """A part of a topic's history, the oldest event first."""

    events: Sequence[Event | KeptEvent]
    epoch: str
    first: int
    """The offset of the oldest event that is kept; `top` + 1 where none is."""
    top: int
    """The offset of the newest event that was published; 0 before the first one."""
    complete: bool
    """Whether no event after `since` is missing before the page: none expired, the epoch is the same (or `since` has
    none), and `since` is not behind the top. True without `since`. Events that a newer one of their key superseded are
    not missing. Where the epoch is another one the page begins with the oldest event that is kept."""
    more: bool
    """Whether kept events follow the page."""


class Unavailable(msgspec.Struct, frozen=True):
    """The engine cannot do this now; the same may succeed later. The message is for people."""

    message: str


class NoHistory(msgspec.Struct, frozen=True):
    """Nothing of the topic was ever kept."""

    topic: str


class EngineStats(msgspec.Struct, frozen=True):
    """What an engine keeps, for the metrics."""

    topics: int = 0
    """With history, those without an event left too."""
    bytes: int = 0
    """That the history takes up."""
    events_evicted: int = 0
    """Kept events that were dropped because of the totals in `limits`, before their time."""
    dedups: int = 0
    """Values of `dedup` that are remembered."""


PublishDone = Callable[[Position | Unavailable], None]
InterestDone = Callable[[Unavailable | None], None]
HistoryDone = Callable[[HistoryPage | NoHistory | Unavailable], None]
PositionDone = Callable[[Position | Unavailable], None]
LocateDone = Callable[[tuple[Position, Position] | Unavailable], None]
Deliver = Callable[[Event], None]
DeliverBatch = Callable[[PendingBatch], bool]
"""Delivers and answers kept events for a bounded time. Returns whether it was all; else it is called again."""
RefuseBatch = Callable[[PendingBatch, Unavailable | None], None]
"""Answers publishes with an error: all with this one; None: those whose topic the store has refused, with its reason.
"""
Lost = Callable[[str], None]


class Engine(ABC):
    """The calls of a node to its engine; see the promises at the head of this file."""

    @abstractmethod
    async def start(self, deliver: Deliver, lost: Lost) -> None:
        """Get ready. `deliver(event)` is called for each event, `lost(filter)` for each topic or pattern with a
        possible hole.

        Returns when events can be published, or when the engine has given up for now and goes on trying by itself.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Answer every call that is under way, and end."""

    @abstractmethod
    def is_local(self, topic: str, retention: Retention) -> bool:
        """Whether events of this topic, with this retention, are delivered and done within `publish`, on this node
        alone, and never refused. (With `dedup` they may be done later.)

        Only then may the fast path deliver one without asking the engine; it keeps it in what `log` gives.
        """

    @abstractmethod
    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        """Order, number and keep the event, have it delivered, and call `done` with its position."""

    @abstractmethod
    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        """Begin, or end, to get the events that match a topic or pattern. Calls for one filter alternate: on, off."""

    @abstractmethod
    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        """Read kept events, at most `limit`: the oldest after `since`, or the newest without it."""

    @abstractmethod
    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        """Find the position behind which the `last` newest kept events of a topic with history are, and its newest
        offset. Where fewer are kept it is the one before all of them."""

    @abstractmethod
    def position(self, topic: str, done: PositionDone) -> None:
        """Find the epoch and the newest offset of a topic. Before anything was kept the offset is 0, and the epoch that
        in which the numbering will begin. Where the engine keeps no history at all both are None."""

    def configure(self, limits: Limits) -> None:  # noqa: B027 -- most engines have nothing that these change
        """Go by these limits from now on: they were changed by a reload."""

    def log(self, topic: str) -> TopicLog | None:
        """Give the log in which the fast path keeps the events of a topic that is local; None: they are not kept."""
        return None

    def accept_batches(self, deliver: DeliverBatch, refuse: RefuseBatch) -> None:  # noqa: B027 -- most have no keeper
        """Be told, before the start, how the events that came by a keeper are delivered and answered."""

    def keeper(self, topic: str, retention: Retention) -> Keeper | None:
        """Give what the fast path hands publishes to a topic to that is not local; None: it leaves them to `publish`.

        Both ways keep their common order.
        """
        return None

    def stats(self) -> EngineStats:
        """Give what is kept, for the metrics."""
        return EngineStats()

    @abstractmethod
    def presence(self) -> Presence:
        """Make the presence of this node. It is asked for once."""


class Member(msgspec.Struct, frozen=True):
    """A session that is subscribed to a topic, as others see it."""

    session: str
    identity: str | None = None
    info: bytes | None = None
    """A JSON value that the subscriber gave."""


class MemberPage(msgspec.Struct, frozen=True):
    """Some members of a topic, in an order that does not change."""

    members: list[Member]
    count: int
    """How many members the topic has."""
    cursor: str | None
    """Where the next page begins; None after the last one."""


Changed = Callable[[str, Member, bool], None]
JoinDone = Callable[[Unavailable | None], None]
MembersDone = Callable[[MemberPage | Unavailable], None]


class Presence(ABC):
    """The subscribers of a topic, on all nodes. Calls answer as those of an engine do (3, 5, 6, 8). In addition:

    1. **Listed until left.** After `done(None)` of `join` the member is listed on every node, until `leave` or the end
       of the lease. Joining again replaces the member of this session.
    2. **Pages are complete.** A member that is there all the time is on exactly one page of a listing.
    3. **Lease.** The members of a node that has not called `renew` for `lease` seconds go away, and no others.
    4. **Changes are told.** `changed(topic, member, here)` is called on every node for each member that joined or was
       replaced (True) and for each that left, or whose lease ended (False), in order for each session; and before
       `done` on the node that asked for it.
    """

    lease: float | None = None
    """Seconds that a node's members stay after its last `renew`. None: they end with the node's process, and there is
    nothing to renew."""

    @abstractmethod
    def start(self, changed: Changed) -> None:
        """Tell of changes from now on. Called once, before any other call."""

    @abstractmethod
    def join(self, topic: str, member: Member, done: JoinDone) -> None:
        """List a member of this node."""

    @abstractmethod
    def leave(self, topic: str, session: str, done: JoinDone) -> None:
        """Stop to list the member of this session. It need not be there."""

    @abstractmethod
    def members(self, topic: str, cursor: str | None, limit: int, done: MembersDone) -> None:
        """Read the members of a topic, at most `limit` from `cursor` on; None: from the beginning."""

    @abstractmethod
    def renew(self) -> None:
        """Keep the members of this node for another `lease`. A node calls it three times in each."""
