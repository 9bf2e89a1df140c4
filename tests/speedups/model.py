"""What outbox and fan-out are to do, in plain Python, beside the native code that does it.

`World` is one node without its network: a context, a hub and clients. Each of its methods does one thing to the native
code and compares what comes of it with what the rules say. What a client is sent is checked as it reads: whatever was
published for a subscription must be there, in the order of its topic, each event once, or be counted in a gap at its
place.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from broker import messages
from broker._speedups import Connection, LoopContext, Subscription
from broker.hub import Hub
from broker.topics import matches, rank
from tests.speedups.transports import SlowPipe, Turning, frames_in
from tests.speedups.wire import CLOSE, TEXT

MAX_ANSWERS = 40_000
LANE = 65536 + 4096
"""The most bytes of answers that may wait: either so many that they are sent without waiting for the end of the turn
(MAX_WRITE in connection.pxi), or MAX_ANSWERS, and the one that is too much."""

FILLING = random.Random(7692).randbytes(60_000).hex().encode()
"""What events are filled up with: deflating it saves something, and not nearly everything."""

Receipt = tuple[int, int, int]
"""How many an event was for, how many of them it waits for, and for how many it cost this or an older one."""


@dataclass(eq=False)
class Interest:
    """One subscription, and what is known of the events published for it."""

    client: Client
    native: Subscription
    topic: str
    number: int
    """Tells it from other subscriptions of its client to the same topic, before and after it."""
    max_queue: int
    overflow: str
    echo: bool
    published: dict[str, list[int]] = field(default_factory=dict)
    """The events that the client is to get under this subscription: for each topic their numbers."""
    open: list[int] = field(default_factory=list)
    """Those of them, the newest ones, which are not known to be sent or lost. (Their order is not that of the queue
    once there is more than one topic: what waits in one turn waits in the batches of several audiences.)"""
    lost: set[int] = field(default_factory=set)
    """Those that the rules say are lost."""
    place: dict[str, int] = field(default_factory=dict)
    """How many of a topic's events the client has read, or found missing."""
    missed: set[int] = field(default_factory=set)
    """Those that the client found missing."""
    told: int = 0
    """What the gaps that it read count together."""
    dropped: int = 0
    """`native.dropped` when it was last looked at."""
    behind: bool = False
    blocked: bool = False
    queued: int = 0
    vague: bool = False
    """It may have lost more than the rules can tell: its connection is to be closed."""

    @property
    def plain(self) -> bool:
        """Whether all its events are of one topic, so that there is one order in which they can be sent."""
        return len(self.published) <= 1

    def publish(self, topic: str, number: int) -> None:
        """Remember that the client is to get an event."""
        self.published.setdefault(topic, []).append(number)
        self.open.append(number)
        self.client.owner[number] = self

    def read(self, topic: str, number: int) -> None:
        """The client has read an event: what was published before, and not read, must have been announced missing."""
        place = self.place.get(topic, 0)
        events = self.published[topic]
        assert number in events[place:], "twice, or out of order"
        self.place[topic] = found = events.index(number, place) + 1
        self.missed.update(events[place : found - 1])
        assert len(self.missed) <= self.told, "an event was neither sent nor counted in a gap"
        if self.plain:
            assert len(self.missed) == self.told, "a gap that is not in its place"

    def complete(self) -> None:
        """The client has read everything."""
        for topic, events in self.published.items():
            self.missed.update(events[self.place.get(topic, 0) :])
        assert len(self.missed) == self.told, "an event was neither sent nor counted in a gap"
        assert len(self.missed) == self.native.dropped
        if not self.vague and self.plain and self.client.world.exact:
            assert self.missed == self.lost

    def look(self) -> int:
        """Take note of the native state. Returns how many events were lost since the last look."""
        native = self.native
        lost = native.dropped - self.dropped
        self.dropped, self.behind, self.queued = native.dropped, native.behind, native.queued
        self.blocked = self.client.connection.blocked
        return lost


class Client:
    """One connection, and what its other end has read. To the connection it is the session."""

    def __init__(self, world: World, transport: SlowPipe) -> None:
        self.world = world
        self.transport = transport
        self.connection = Connection(world.context, self)
        self.interests: dict[str, Interest] = {}
        """Those that have not ended, by topic."""
        self.finishing = False
        self.vanished = False
        """Its end of the socket is gone, and the connection may not know yet."""
        self.gone = False
        """It takes part no more: what it has not read it may never read."""
        self.owner: dict[int, Interest] = {}
        """The subscription under which each event was published for this client."""
        self.receipts: list[Receipt | None] = []
        """What the answers to its publishes must say; None where the rules cannot tell."""
        self._last: list[Interest] = []
        self._announced: dict[str, Interest] = {}
        self._named: dict[int, Interest] = {}
        self._newest: dict[str, int] = {}
        self._parsed = 0
        self._closed: int | None = None

    # As the session.

    def message(self, payload: bytes, text: bool) -> None:
        """No message comes here: the routes are there before the publishes."""
        raise AssertionError(payload)

    def on_close(self, code: int, reason: str) -> None:
        """Give up all subscriptions, as the real session does."""
        self.gone = True
        self._last = list(self.interests.values())
        for interest in self._last:
            self.drop(interest)

    # As the model.

    @property
    def stream(self) -> list[Any]:
        """What it has read, for a test to look at: events as their numbers, gaps as texts; answers are left out."""
        frames, _ = frames_in(self.transport.received, self.connection.deflates)
        found = [json.loads(payload) for opcode, payload in frames if opcode == TEXT]
        events = [message for message in found if message["op"] in ("event", "gap")]
        return [event["data"][0] if event["op"] == "event" else f"gap {event['missed']}" for event in events]

    def add(self, interest: Interest) -> None:
        """Remember a new subscription, and announce it ahead of its events."""
        self.interests[interest.topic] = self._named[interest.number] = interest
        self.connection.answer(b'{"op":"ok","id":%d}' % interest.number)

    def drop(self, interest: Interest) -> None:
        """End a subscription; what it has not been sent is forgotten."""
        del self.interests[interest.topic]
        self.world.hub.unsubscribe(interest.native)

    def best(self, topic: str) -> Interest | None:
        """The subscription under which the client gets an event of this topic."""
        found = [interest for interest in self.interests.values() if matches(interest.topic, topic)]
        return min(found, key=lambda interest: rank(interest.topic), default=None)

    def read(self) -> None:
        """Check what came since the last time."""
        frames, size = frames_in(self.transport.received[self._parsed :], self.connection.deflates)
        self._parsed += size
        for opcode, payload in frames:
            assert self._closed is None, "nothing comes after the close frame"
            if opcode == CLOSE:
                self._closed = int.from_bytes(payload[:2], "big")
                if self.finishing and self._closed == 1001:
                    self._complete(self._last)
                continue
            assert opcode == TEXT
            self._message(json.loads(payload))

    def settled(self) -> None:
        """Check that all has come: the connection is not blocked, and the turn has ended."""
        self.read()
        assert self._parsed == len(self.transport.received), "half a frame"
        assert not self.receipts
        self._complete(self.interests.values())

    def _complete(self, interests: Iterable[Interest]) -> None:
        for interest in interests:
            interest.complete()

    def _message(self, message: dict[str, object]) -> None:
        if message["op"] == "event":
            number, topic = message["data"][0], message["topic"]  # type: ignore[index]
            assert isinstance(topic, str)
            self.owner[number].read(topic, number)
            assert self._newest.get(topic, -1) < number, "out of order across subscriptions"
            self._newest[topic] = number
        elif message["op"] == "gap":
            assert message["reason"] == "overflow"
            missed = message["missed"]
            assert isinstance(missed, int)
            assert missed > 0
            self._announced[message["topic"]].told += missed  # type: ignore[index]
        elif "receivers" in message:
            receipt = (message["receivers"], message["queued"], message["dropped"])
            assert self.receipts.pop(0) in (None, receipt)
        elif "id" in message:
            interest = self._named[message["id"]]  # type: ignore[index]
            self._announced[interest.topic] = interest


class World:
    """A context, a hub and their clients. `exact` says that the byte bound is never reached, so that the rules tell
    which events are lost; without it only what was read is compared with what was published.
    """

    def __init__(self, loop: Turning, *, max_outbox: int = 1 << 30, exact: bool = True) -> None:
        self.loop: Any = loop
        self.exact = exact
        self.context = LoopContext(
            loop.as_loop(),
            encode_gap=messages.encode_gap,
            max_outbox=max_outbox,
            max_answers=MAX_ANSWERS,
            ping_interval=0,
            buffer_size=4096,
        )
        self.hub = Hub(self.context)
        self.clients: list[Client] = []
        self.sizes: dict[int, int] = {}
        """The length of each event's frame."""
        self._numbers = 0
        self._dead: list[weakref.ref[Connection]] = []
        self._references = sys.getrefcount(self.context)

    # What is done.

    def connect(self, transport: SlowPipe, window_bits: int = 0) -> Client:
        """Let a client come. With 15 `window_bits` it has agreed to be sent compressed events."""
        client = Client(self, transport)
        transport.attach(client.connection, window_bits)
        self.clients.append(client)
        self._dead.append(weakref.ref(client.connection))
        return client

    def subscribe(
        self, client: Client, topic: str, max_queue: int = 100, overflow: str = "drop_oldest", echo: bool = True
    ) -> Interest:
        """Subscribe, or change the subscription that there is."""
        interest = client.interests.get(topic)
        if interest is not None:
            if overflow == "close" and interest.native.queued > max_queue:
                self._doom(client)
            interest.native.change(max_queue=max_queue, overflow=overflow, echo=echo)
            interest.max_queue, interest.overflow, interest.echo = max_queue, overflow, echo
            self.account()
            return interest
        self._numbers += 1
        native = self.hub.subscribe(client.connection, topic, max_queue=max_queue, overflow=overflow, echo=echo)
        interest = Interest(client, native, topic, self._numbers, max_queue, overflow, echo)
        client.add(interest)
        self.account()
        return interest

    def publish(self, topic: str, size: int = 0, origin: Client | None = None, fast: bool = False) -> int:
        """Publish an event of about `size` bytes, and check the receipt, or (by the fast path) note what it must say.

        Returns the event's number.
        """
        self._numbers += 1
        number = self._numbers
        data = b'[%d,"%s"]' % (number, FILLING[:size])
        payload = messages.encode_event(topic, data)
        self.sizes[number] = len(payload) + (2 if len(payload) < 126 else 4 if len(payload) < 65536 else 10)
        members: list[Interest] = []
        own: Interest | None = None
        for client in self.clients:
            if client.gone or (interest := client.best(topic)) is None:
                continue
            if client is origin and not interest.echo:
                own = interest
                continue
            members.append(interest)
            interest.publish(topic, number)
        for interest in self._interests():
            assert interest.look() == 0

        receipt: Receipt | None = None
        if (
            fast
            and origin is not None
            and not origin.gone
            and not origin.connection.close_pending
            and len(data) < 30_000
        ):
            if topic not in self.hub.routes:
                prefix = messages.encode_event(topic, b"0").removesuffix(b',"data":0}')
                self.hub.routes.install(topic, self.hub.audience(topic), prefix)
            origin.connection.routes = self.hub.routes
            origin.transport.send(TEXT, b'{"op":"publish","id":0,"topic":"%s","data":%s}' % (topic.encode(), data))
        else:
            connection = None if origin is None or origin.gone else origin.connection
            receipt = self.hub.audience(topic).publish(topic, payload, None, connection)

        expected = self._receipt(members)
        if receipt is not None:
            assert expected in (None, receipt)
        else:
            assert origin is not None
            origin.receipts.append(expected)
        if own is not None:
            assert own.native.behind, "who must not see its own event is set apart"
        self.account()
        return number

    def finish(self, client: Client) -> None:
        """Let the client's connection end once it has been sent all."""
        client.finishing = True
        client.connection.finish(1001, "going_away")

    def turn(self) -> None:
        """Let the turn of the loop end."""
        self.loop.turn()
        for interest in self._interests():
            client = interest.client
            assert interest.native.behind or not client.connection.blocked or client.vanished
            if not interest.native.behind:
                self._account(interest)
                interest.open.clear()
        self.account()

    def end(self) -> None:
        """Let all read what there is, then leave."""
        self._part()
        self.clients.clear()
        assert self.context.connections == self.context.subscriptions == self.context.queued == self.hub.filters == 0

    def forget(self) -> None:
        """Check, after `end`, that nothing is left of all that there was. The caller holds no client any more."""
        self.hub.routes.clear()
        gc.collect()
        assert all(ref() is None for ref in self._dead)
        assert sys.getrefcount(self.context) == self._references

    def _part(self) -> None:
        self.turn()
        for client in self.clients:
            client.transport.drain(None)
            while client.connection.blocked and not client.vanished and client.transport.protocol is not None:
                self.turn()
                client.transport.drain(None)
            client.read()
            if not client.gone and not client.vanished:
                assert client.connection.outbox == 0
                client.settled()
        for client in self.clients:
            client.transport.lose()
        self.turn()

    # What has come of it.

    def account(self) -> None:
        """Check the bounds, and follow what was queued, sent or lost since the last time."""
        queued = 0
        for client in self.clients:
            held = 0
            for interest in client.interests.values():
                self._account(interest)
                queued += interest.native.queued
                assert interest.native.queued <= interest.max_queue
                assert interest.native.behind or interest.native.queued == 0
                if self.exact and interest.native.queued:
                    held += sum(self.sizes[number] for number in interest.open[-interest.native.queued :])
            plain = all(interest.plain for interest in client.interests.values())
            if self.exact and plain and not client.connection.close_pending:
                assert 0 <= client.connection.outbox - held <= LANE
            assert client.connection.outbox <= self.context.max_outbox + LANE
        assert self.context.queued == queued
        assert self.context.subscriptions == sum(len(client.interests) for client in self.clients)

    def _interests(self) -> list[Interest]:
        return [interest for client in self.clients for interest in client.interests.values()]

    def _doom(self, client: Client) -> None:
        for interest in client.interests.values():
            interest.vague = True

    def _receipt(self, members: list[Interest]) -> Receipt | None:
        queued = dropped = 0
        for interest in members:
            full = interest.queued >= interest.max_queue
            losses = interest.native.dropped - interest.dropped
            blocked = interest.client.connection.blocked
            if interest.behind:
                lost = losses > 0
                if not interest.blocked and interest.client.connection.close_pending:
                    interest.vague = True  # it was written to make room; now it waits for its end
                if self.exact and (interest.blocked or not full):
                    assert losses == (full or interest.vague)
            elif interest.native.behind:
                # A full batch went out first, and this client could not take it; of what was lost this event is the
                # last. Its socket is full, so as soon as the queue is full each further event costs one.
                if not self.exact:
                    return None
                close_pending = interest.vague = interest.client.connection.close_pending
                lost = losses > 0 and (close_pending or interest.native.queued >= interest.max_queue)
            else:
                assert losses == 0
                continue
            gives_way = interest.overflow == "drop_oldest" and not interest.vague and interest.native.queued > 0
            kept = not lost or gives_way
            queued += kept and blocked
            dropped += lost
        return len(members), queued, dropped

    def _account(self, interest: Interest) -> None:
        if interest.client.connection.close_pending:
            interest.vague = True
        lost = interest.look()
        if interest.vague or not self.exact:
            return
        if not interest.behind:
            assert lost == 0
            return
        sent = len(interest.open) - lost - interest.queued
        assert sent >= 0
        del interest.open[:sent]
        if interest.overflow == "drop_newest":
            gone = interest.open[interest.queued :]
            del interest.open[interest.queued :]
        else:
            gone = interest.open[:lost]
            del interest.open[:lost]
        interest.lost.update(gone)
