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
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.hub import Hub
from broker.topics import is_pattern, matches, overlap, rank
from tests.speedups.states import StateCheck
from tests.speedups.transports import SlowPipe, Turning, check_tail, frames_in
from tests.speedups.wire import CLOSE, TEXT, THREADS

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
    barrier: list[Interest] = field(default_factory=list)
    """The broader subscriptions with queued events when this one began, whose events are sent first."""

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
        client = self.client
        lost = native.dropped - self.dropped
        if not self.blocked and not client.connection.blocked and client.takes_part:
            assert lost == 0, "an event was lost while the socket took data"
        self.dropped, self.behind, self.queued = native.dropped, native.behind, native.queued
        self.blocked = client.connection.blocked
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
        self.ending = False
        """It has ended its direction of the connection, or the broker has aborted it: it may miss what comes now."""
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
    def takes_part(self) -> bool:
        """Whether it must be sent everything, or be told what it misses."""
        return not (self.gone or self.vanished or self.ending or self.connection.close_pending)

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
        check_tail(self.transport.received[self._parsed :])

    def settled(self) -> None:
        """Check that all has come: the connection is not blocked, and the turn has ended."""
        self.read()
        assert self._parsed == len(self.transport.received), "half a frame"
        assert not self.receipts
        self._complete(self.interests.values())

    def check_end(self) -> None:
        """Check what the client can still read of a stream that has ended."""
        self.read()

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


class Crowd:
    """A client that reads, with a subscription to each of many topics. To the connection it is the session."""

    def __init__(self, world: World) -> None:
        self.topics: list[str] = []
        self.subscriptions: list[Subscription] = []
        self._world = world
        self._transport = SlowPipe(world.loop)
        self._connection = Connection(world.context, self)
        self._transport.attach(self._connection)

    @property
    def queued(self) -> int:
        """How many events wait for it, which they do until the turn ends."""
        return sum(subscription.queued for subscription in self.subscriptions)

    def grow(self, count: int) -> None:
        """Subscribe to more topics until there are `count`."""
        for number in range(len(self.topics), count):
            topic = f"a.w.{number}"
            self.topics.append(topic)
            self.subscriptions.append(
                self._world.hub.subscribe(self._connection, topic, max_queue=3, overflow="drop_oldest", echo=True)
            )

    def leave(self) -> None:
        """Check that it has lost nothing, and end."""
        assert not any(subscription.dropped for subscription in self.subscriptions)
        self._transport.lose()

    def message(self, payload: bytes, text: bool) -> None:
        raise AssertionError(payload)

    def on_close(self, code: int, reason: str) -> None:
        for subscription in self.subscriptions:
            self._world.hub.unsubscribe(subscription)
        self.subscriptions.clear()


class World:
    """A context, a hub and their clients. `exact` says that the byte bound is never reached, so that the rules tell
    which events are lost; without it only what was read is compared with what was published. `threads` send.
    """

    def __init__(self, loop: Turning, *, max_outbox: int = 1 << 30, exact: bool = True, threads: int = THREADS) -> None:
        self.loop: Any = loop
        self.exact = exact
        self.max_outbox = max_outbox
        self.context = LoopContext(
            loop.as_loop(),
            Limits(max_outbox=max_outbox, max_answers=MAX_ANSWERS, ping_interval=0),
            encode_gap=messages.encode_gap,
            close_reasons=CLOSE_REASONS,
            buffer_size=4096,
            threads=threads,
        )
        self.context.shared_work = 0
        self.context.command_time = 3600.0  # what takes its time here is the machine
        self.hub = Hub(self.context)
        self.clients: list[Client] = []
        self.crowd: Crowd | None = None
        self.states = StateCheck()
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
        interest.barrier = [
            other
            for other in client.interests.values()
            if other.native.queued and is_pattern(other.topic) and overlap(other.topic, topic)
        ]
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
            and not origin.ending
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

    def publish_widely(self, count: int) -> None:
        """Publish one event on each of `count` topics. Each of them has a subscriber of its own, so that no two share
        an audience: a client with a wide pattern gets each event in a batch of its own.
        """
        if self.crowd is None:
            self.crowd = Crowd(self)
        self.crowd.grow(count)
        for interest in self._interests():
            assert interest.look() == 0
        topics = self.crowd.topics[:count]
        # All these topics match the same patterns.
        found = [client.best(topics[0]) for client in self.clients if not client.gone]
        interests = [interest for interest in found if interest is not None]
        for topic in topics:
            self._numbers += 1
            number = self._numbers
            payload = messages.encode_event(topic, b"[%d]" % number)
            self.sizes[number] = len(payload) + 2
            for interest in interests:
                interest.publish(topic, number)
            receivers, _, _ = self.hub.audience(topic).publish(topic, payload)
            assert receivers == 1 + len(interests)
        self.account()

    def end_writing(self, client: Client) -> None:
        """Let the client end its direction of the connection (FIN)."""
        if not client.vanished:
            self._end(client)
            client.transport.end_writing()

    def abort(self, client: Client) -> None:
        """End the client's connection at once."""
        self._end(client)
        client.connection.abort()

    def finish(self, client: Client) -> None:
        """Let the client's connection end once it has been sent all."""
        client.finishing = True
        client.connection.finish(1001, "going_away")

    def turn(self) -> None:
        """Let the turn of the loop end."""
        self.loop.turn()
        for interest in self._interests():
            client = interest.client
            assert interest.native.behind or not client.connection.blocked or not client.takes_part
            if not interest.native.behind:
                self._account(interest)
                interest.open.clear()
        self.account()

    def end(self) -> None:
        """Let all read what there is, then leave."""
        self._part()
        self.clients.clear()
        self.crowd = None
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
            for _ in range(10_000):
                if not client.connection.blocked or client.vanished or client.transport.protocol is None or client.gone:
                    break
                self.turn()
                client.transport.drain(None)
            else:
                raise AssertionError("a client that reads all there is stays blocked")
            client.read()
            if not client.gone and not client.vanished and not client.ending:
                assert client.connection.queued_bytes == 0
                client.settled()
        if self.crowd is not None:
            self.crowd.leave()
        for client in self.clients:
            client.transport.lose()
            client.check_end()
        self.turn()

    # What has come of it.

    def account(self) -> None:
        """Check the bounds, and follow what was queued, sent or lost since the last time."""
        queued = self.crowd.queued if self.crowd is not None else 0
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
            if self.exact and plain and client.takes_part:
                assert 0 <= client.connection.queued_bytes - held <= LANE
            # What waits behind an order barrier is not counted against what waits for the socket alone.
            assert client.connection.queued_bytes <= 2 * self.max_outbox + LANE
        self.check_states()
        assert self.context.queued == queued
        count = sum(len(client.interests) for client in self.clients)
        assert self.context.subscriptions == count + (len(self.crowd.subscriptions) if self.crowd is not None else 0)

    def check_states(self) -> None:
        """Check the states of connections and subscriptions, where the native code names them."""
        for client in self.clients:
            self.states.check_connection(client.connection)
        for interest in self._interests():
            native, client = interest.native, interest.client
            interest.barrier = [other for other in interest.barrier if other.native.queued and other.native.connection]
            self.states.check_subscription(native, may_have_barrier=bool(interest.barrier))

    def _interests(self) -> list[Interest]:
        return [interest for client in self.clients for interest in client.interests.values()]

    def _end(self, client: Client) -> None:
        client.ending = True
        self._doom(client)

    def _doom(self, client: Client) -> None:
        for interest in client.interests.values():
            interest.vague = True

    def _receipt(self, members: list[Interest]) -> Receipt | None:
        queued = dropped = 0
        if any(interest.client.ending or interest.client.vanished for interest in members):
            return None  # what comes of an event for a connection that ends is not laid down
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
