"""The port of the engines. Its promises are numbered; the conformance suite checks them one by one on every engine.

1. **Order.** Events of one topic are delivered on every node in one order: that of their offsets, where the topic
   keeps history.
2. **Once.** A node gets each event of a topic that it has interest in once.
3. **Delivered, then done.** On the node that published an event, `done` comes after `deliver`, if that node has
   interest in the topic. So a receipt can count who got it.
4. **Done means kept.** Numbering and keeping an event is one atomic step, and `done` comes after it with the event's
   position; or with an error, and then nothing was kept and nothing is delivered. It comes exactly once.
5. **Never blocks.** `publish` and `interest` return at once, whatever the server behind them does. What waits is
   bounded; at the bound publishers get `Unavailable`.
6. **No silent loss.** Where the engine cannot tell whether a node got all events of a topic, it calls `lost(topic)`.
7. **Ends.** After `stop` has returned nothing is called back any more; each publish before it was answered.

All calls and calls back happen on the node's event loop. An engine may call back before the call returns.
What an adapter's library raises does not leave the adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec


class Event(msgspec.Struct, eq=False):
    """An event on its way. `data` is one JSON value, as it was sent."""

    topic: str
    data: bytes | msgspec.Raw
    key: str | None = None
    offset: int | None = None
    """Its number, where the topic keeps history; set by the engine."""
    origin: object = None
    """The publisher, for the node that it published on. It does not leave that node."""
    receipt: tuple[int, int, int] = (0, 0, 0)
    """How many subscribers of this node it matched, is queued for, was lost for; set by the node as it delivers."""


class Position(msgspec.Struct, frozen=True):
    """Where in a topic's history an event is. Both are None where the topic keeps none."""

    epoch: str | None = None
    offset: int | None = None


class Unavailable(Exception):  # noqa: N818 -- the word of the protocol
    """The engine cannot do this now; the same may succeed later. The message is for people."""


class NoHistory(Exception):  # noqa: N818 -- the word of the protocol
    """The topic keeps no history."""


Done = Callable[[Position | Unavailable], None]
Deliver = Callable[[Event], None]
Lost = Callable[[str], None]
HistoryDone = Callable[[list[Event] | Unavailable | NoHistory], None]


class Engine(ABC):
    """What a node asks of its engine; see the promises at the head of this file."""

    in_process: bool = False
    """Whether an event is delivered, done and forgotten within `publish`, on this node alone and never refused. Only
    then may the data path deliver it without asking the engine."""

    @abstractmethod
    async def start(self, deliver: Deliver, lost: Lost) -> None:
        """Get ready. `deliver(event)` is called for each event, `lost(topic)` for each topic with a possible hole.

        Returns when events can be published, or when the engine has given up for now and goes on trying by itself.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Answer what is under way, and end."""

    @abstractmethod
    def publish(self, event: Event, done: Done) -> None:
        """Order, number and keep the event, have it delivered, and call `done`."""

    @abstractmethod
    def interest(self, topic: str, on: bool) -> None:
        """Begin, or end, to get the events that match this topic or pattern."""

    @abstractmethod
    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        """Read kept events: those after `since`, the oldest first, or the newest `limit` if it is None."""
