"""All policies together, with credit, age and changes of mind, against what the protocol promises.

The model of test_outbox.py knows of three policies which event each of them loses. This one knows of all of them what a
subscriber may count on: what it reads and its gaps account for every event exactly once, in order, within the bounds.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker import messages
from broker._speedups import Connection, HistoryStore, LoopContext, Subscription, append_event
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.hub import UNLIMITED, Hub
from broker.overflow import OVERFLOWS
from broker.topics import is_pattern, matches, overlap, rank
from tests.speedups.states import StateCheck
from tests.speedups.transports import SlowPipe, SlowSocket, check_tail, frames_in
from tests.speedups.turns import Loop
from tests.speedups.wire import CLOSE, TEXT, THREADS, TIMES

TOPICS = ["a", "a.b", "a.c", "b"]
NAMES = [*TOPICS, "a.*", "a.>", ">", "*", "*.b"]
KEYS = [None, "k", "l", "ü"]
SIZES = [0, 40, 500, 2300, 9000]
BOUNDS = [1, 2, 3, 8]
CHANGES = ["cancel", "end", "echo", "overflow", "max_queue", "credit"]
TIGHT = 6000
"""A bound in bytes that is often reached."""
STRAYS = 64
"""As MAX_STRAYS in policies.pxi."""

indexes = st.integers(0, 7)
policies = st.sampled_from(OVERFLOWS)


@dataclass
class Published:
    """An event, as one subscription is to get it."""

    number: int
    topic: str
    key: str | None
    payload: bytes
    origin: Client | None


@dataclass(eq=False)
class Account:
    """One subscription, and everything that was published for it. `native` is the subscription itself."""

    client: Client
    name: str
    native: Subscription
    policies: set[str]
    """Those that it has had."""
    granted: int | None
    """How many events it has been given credit for; None for any number."""
    echo: bool
    most: int
    """The largest `max_queue` that it has had."""
    log: list[Published] = field(default_factory=list)
    read: list[Published] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)
    """What the gaps count, by reason."""
    before_credit: int = 0
    """How many events it was sent, at most, before its credit was counted."""
    place: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    """How many events of a topic it has not read that are older than the newest one that it has."""
    barrier: list[Account] = field(default_factory=list)
    """The broader subscriptions with queued events when this one began: those events are sent first."""
    since: int = 0
    """The number of the newest event when it began."""
    narrowed: bool = False
    """Whether its bound was set below what was queued, so that something had to go though it is under `replay`."""
    ready: bool = False
    """Whether an event could be sent at once when it was last looked at."""
    lost: int = 0
    """How many events it had lost by then, but for those that were too old."""

    @property
    def missed(self) -> int:
        return sum(self.told.values())

    def take(self, number: int) -> None:
        """The client reads an event."""
        at = next(place for place, event in enumerate(self.log) if event.number == number)
        event = self.log[at]
        assert self.place.get(event.topic, -1) < at, "twice, or out of order"
        before = self.place.get(event.topic, -1)
        self.place[event.topic] = at
        self.skipped[event.topic] = self.skipped.get(event.topic, 0) + sum(
            each.topic == event.topic for each in self.log[before + 1 : at]
        )
        self.read.append(event)
        assert sum(self.skipped.values()) <= self.missed, "a gap that comes behind its place"
        if self.granted is not None:
            assert len(self.read) <= self.before_credit + self.granted, "more than there was credit for"
        if len({each.topic for each in self.log}) == 1:
            assert len(self.read) + self.missed == at + 1, "a gap that is not in its place"

    @property
    def may_have_barrier(self) -> bool:
        """Whether it may wait for events under a broader subscription that were queued when it began."""
        self.barrier = [other for other in self.barrier if other.holds_barrier(self.since)]
        return bool(self.barrier)

    def holds_barrier(self, since: int) -> bool:
        """Whether an event up to this number may be queued."""
        queued = self.native.queued
        if self.native.connection is None or not queued:
            return False
        if self.policies == {"drop_oldest"} and self.client.world.max_outbox > TIGHT:
            return self.log[-queued].number <= since  # nothing but the newest events is queued
        return True

    @property
    def stands_aside(self) -> bool:
        """Whether it may wait for what waits under an older subscription, or for credit."""
        return self.native.credit == 0 or self.may_have_barrier

    @property
    def can_send(self) -> bool:
        """Whether an event that comes now must be sent: the client reads, it has credit, and no order barrier."""
        return self.client.takes_part and not self.client.connection.blocked and not self.stands_aside

    def count_lost(self) -> int:
        """How many events were lost for want of room."""
        reasons = self.native.dropped_by_reason
        return reasons["overflow"] + reasons["conflated"]

    def least_bytes(self) -> int:
        """How many bytes its queued events have at least."""
        if not self.native.queued:
            return 0
        read = {event.number for event in self.read}
        sizes = sorted(len(event.payload) + 2 for event in self.log if event.number not in read)
        return sum(sizes[: self.native.queued])

    @property
    def beyond(self) -> int:
        """How many of the queued events may be beyond the bound, under `block` alone."""
        queued = self.log[-self.native.queued :]
        return sum(
            event.origin is None or event.origin.gone or event.origin.connection.parked_publishes > 0
            for event in queued
        )

    def complete(self) -> None:
        """The client has read all there is."""
        assert len(self.read) + self.missed == len(self.log), "neither sent nor counted in a gap"
        assert self.missed - self.told.get("expired", 0) == self.native.dropped
        if self.policies in ({"block"}, {"replay"}):
            allowed = {"age", "expired", "overflow"} if self.narrowed else {"age", "expired"}
            assert set(self.told) <= allowed, f"every event: {self.policies} {self.told}"
        if "latest" not in self.policies:
            assert "conflated" not in self.told
        if self.policies == {"latest"} and set(self.told) <= {"conflated"}:
            newest = {(event.topic, event.key): event.number for event in self.log}
            assert set(newest.values()) <= {event.number for event in self.read}, "the newest state"


class Client:
    """One connection, and its other end."""

    def __init__(self, world: Flow, transport: SlowPipe) -> None:
        self.world = world
        self.transport = transport
        self.connection = Connection(world.context, self)
        self.accounts: dict[str, Account] = {}
        """All that it ever had, by topic or pattern: none is made a second time."""
        self.live: dict[str, Account] = {}
        self.owner: dict[int, Account] = {}
        self.gone = False
        self.finished = False
        self.ending = False
        """It has ended its direction of the connection, or was aborted: it may miss what comes now."""
        self.sent: list[Account] = []
        """When it left: the subscriptions that nothing but the socket could hold up."""
        self.unanswered = 0
        self.ready = False
        """Whether nothing could make an event wait when it was last looked at."""
        self._newest: dict[str, int] = {}
        self._parsed = 0
        transport.attach(self.connection)

    @property
    def takes_part(self) -> bool:
        """Whether it must be sent everything, or be told what it misses."""
        return not (self.gone or self.ending or self.connection.close_pending)

    def message(self, payload: bytes, text: bool) -> None:
        raise AssertionError(payload)

    def on_close(self, code: int, reason: str) -> None:
        self.gone = True
        self.sent = [account for account in self.live.values() if not account.stands_aside]
        if self.finished and code == 1001:
            assert all(account.native.queued == 0 for account in self.sent)
        for account in self.live.values():
            self.world.hub.unsubscribe(account.native)

    def best(self, topic: str) -> Account | None:
        found = [account for account in self.live.values() if matches(account.name, topic)]
        return min(found, key=lambda account: rank(account.name), default=None)

    def look(self) -> None:
        """Check what has come."""
        frames, size = frames_in(self.transport.received[self._parsed :])
        self._parsed += size
        for opcode, payload in frames:
            if opcode == CLOSE:
                if self.finished and payload[:2] == (1001).to_bytes(2, "big"):
                    assert self.unanswered == 0
                    for account in self.sent:
                        account.complete()
                continue
            message = json.loads(payload)
            if message["op"] == "event":
                number, topic = message["data"][0], message["topic"]
                assert self._newest.get(topic, -1) < number, "out of order across subscriptions"
                self._newest[topic] = number
                self.owner[number].take(number)
            elif message["op"] == "gap":
                told = self.accounts[message["topic"]].told
                assert message["missed"] > 0
                told[message["reason"]] = told.get(message["reason"], 0) + message["missed"]
            elif message["op"] == "ok":
                self.unanswered -= 1
                assert self.unanswered >= 0
        check_tail(self.transport.received[self._parsed :])


class Waiting:
    """What is known of a subscription right before an event is queued for it, or is lost."""

    def __init__(self, account: Account) -> None:
        self.account = account
        native, connection = account.native, account.client.connection
        self.queued, self.lost = native.queued, native.dropped_by_reason["overflow"]
        self.outbox = connection.queued_bytes
        self.for_socket = connection.blocked and not account.stands_aside
        self.others = [each for each in account.client.live.values() if each.native.credit == 0]
        self.others_bytes = sum(each.least_bytes() for each in self.others) if self.for_socket and self.others else 0

    def check(self, size: int, max_outbox: int) -> None:
        """Check the bound in bytes, now that an event of `size` bytes was published."""
        account, native = self.account, self.account.native
        if not account.client.takes_part or native.connection is None or native.overflow in ("block", "replay"):
            return
        if self.for_socket:
            # Of what waits for credit nothing counts.
            if native.dropped_by_reason["overflow"] > self.lost and self.queued < native.max_queue:
                assert self.outbox - self.others_bytes + size > max_outbox, "lost for want of room that others fill"
        elif native.credit == 0 and native.queued > self.queued:
            assert sum(each.least_bytes() for each in account.client.live.values()) <= max_outbox


class Flow(RuleBasedStateMachine):
    """Clients that publish, subscribe, stop reading, give credit, and change their mind."""

    max_outbox = 1 << 30
    threads = THREADS

    @initialize(
        first=st.lists(st.tuples(indexes, st.sampled_from(NAMES), policies, st.sampled_from(BOUNDS)), min_size=1),
        count=st.integers(1, 4),
    )
    def begin(self, first: list[tuple[int, str, str, int]], count: int) -> None:
        self.loop = Loop()
        self.context = LoopContext(
            self.loop.as_loop(),
            Limits(max_outbox=self.max_outbox, ping_interval=0, block_timeout=0.0001),
            encode_gap=messages.encode_gap,
            close_reasons=CLOSE_REASONS,
            buffer_size=4096,
            threads=self.threads,
        )
        self.context.shared_work = 0
        self.context.command_time = 3600.0  # what takes its time here is the machine
        self.context.max_age = {"a.c": 0.004, "b": 3600.0}.get
        self.context.catch_up = self.catch_up
        self.hub = Hub(self.context)
        self.store = HistoryStore(max_bytes=1 << 40, max_topics=100, new_epoch=lambda: "epoch")
        self.logs = {topic: self.store.log(topic, events=10_000) for topic in TOPICS}
        self.states = StateCheck()
        self.clients: list[Client] = []
        self.numbers = 0
        self.forgotten = 0
        for number in range(count):
            self.connect(number)
        for who, name, overflow, max_queue in first:
            self.subscribe(who, name, overflow, max_queue, None, True)

    # Who is there, and on which policy.

    @rule(kind=st.integers(0, 1))
    def connect(self, kind: int) -> None:
        if len(self.clients) < 5:
            self.clients.append(Client(self, (SlowPipe, SlowSocket)[kind % 2](self.loop)))

    @rule(
        who=indexes,
        name=st.sampled_from(NAMES),
        overflow=policies,
        max_queue=st.sampled_from(BOUNDS),
        credit=st.none() | st.sampled_from([0, 1, 5]),
        echo=st.sampled_from([True, True, False]),
    )
    def subscribe(self, who: int, name: str, overflow: str, max_queue: int, credit: int | None, echo: bool) -> None:
        client = self.present(who)
        if client is None or (name in client.accounts and name not in client.live):
            return
        if overflow == "replay" and is_pattern(name):
            overflow = "latest"
        echo = echo or overflow == "replay"  # what comes from history comes whoever published it
        if name in client.live:
            account = client.live[name]
            if credit is not None:
                # What was sent before its credit is counted may still be on its way.
                account.before_credit, account.granted = len(account.log), credit
            account.narrowed |= overflow == "replay" and account.native.queued > max_queue
            account.native.change(max_queue=max_queue, overflow=overflow, echo=echo, credit=credit)
            account.policies.add(overflow)
            account.echo, account.most = echo, max(account.most, max_queue)
        else:
            native = self.hub.subscribe(
                client.connection,
                name,
                max_queue=max_queue,
                overflow=overflow,
                echo=echo,
                credit=UNLIMITED if credit is None else credit,
            )
            account = Account(client, name, native, {overflow}, credit, echo, max_queue)
            account.since = self.numbers
            account.barrier = [
                other
                for other in client.live.values()
                if other.native.queued and is_pattern(other.name) and overlap(other.name, name)
            ]
            client.accounts[name] = client.live[name] = account

    @rule(who=indexes, which=indexes, add=st.sampled_from([1, 2, 7]))
    def add_credit(self, who: int, which: int, add: int) -> None:
        if (account := self.some(who, which)) is not None and account.granted is not None:
            account.granted += add
            account.native.add_credit(add)

    @rule(who=indexes, which=indexes)
    def unsubscribe(self, who: int, which: int) -> None:
        if (account := self.some(who, which)) is not None:
            del account.client.live[account.name]
            self.hub.unsubscribe(account.native)

    @rule(who=indexes, how=st.integers(0, 19))
    def leave(self, who: int, how: int) -> None:
        """Seldom, or there would be nobody left to look at."""
        if (client := self.present(who)) is not None:
            self.end_client(client, how)

    def end_client(self, client: Client, how: int) -> None:
        if how == 0:
            client.finished = True
            client.connection.finish(1001, "going_away")
        elif how == 1:
            client.transport.lose()
        elif how == 2:
            client.ending = True
            client.transport.end_writing()
        elif how == 3:
            client.ending = True
            client.connection.abort()

    @rule(
        who=indexes,
        which=indexes,
        size=st.sampled_from(SIZES),
        count=st.integers(1, 10),
        change=st.sampled_from(CHANGES),
        overflow=policies,
        turns=st.booleans(),
    )
    def interrupt(self, who: int, which: int, size: int, count: int, change: str, overflow: str, turns: bool) -> None:
        """Events are under way as a subscription or its connection changes or ends, and others follow in the turn."""
        account = self.some(who, which)
        if account is None:
            return
        client = account.client
        topics = [topic for topic in TOPICS if matches(account.name, topic)]
        for number in range(count):
            self.publish_one(topics[number % len(topics)], KEYS[number % len(KEYS)], size, None, False)
        self.check()
        native = account.native
        if change == "cancel":
            del client.live[account.name]
            self.hub.unsubscribe(native)
        elif change == "end":
            self.end_client(client, 1 + count % 3)
        elif native.connection is not None:
            self.subscribe(
                who,
                account.name,
                overflow if change == "overflow" else native.overflow,
                1 if change == "max_queue" else native.max_queue,
                count % 3 if change == "credit" else None,
                account.echo != (change == "echo"),
            )
        self.check()
        if turns:
            self.context.flush()
            client.transport.drain(None)
            self.check()
        for number in range(count):
            self.publish_one(topics[number % len(topics)], KEYS[number % len(KEYS)], size, None, False)

    @rule(who=indexes, which=indexes, size=st.sampled_from(SIZES), count=st.integers(1, 8))
    def withhold_credit(self, who: int, which: int, size: int, count: int) -> None:
        """One subscription has no credit and a long queue, while its connection's others go on."""
        account = self.some(who, which)
        if account is None or account.native.connection is None:
            return
        self.subscribe(who, account.name, "drop_oldest", 20, 0, account.echo)
        self.check()
        self.publish_for(account, size, count)
        for other in list(account.client.live.values()):
            if other is not account:
                self.subscribe(who, other.name, other.native.overflow, other.native.max_queue, 1000, other.echo)
                self.check()
                self.publish_for(other, size, 2)
                self.check()

    @rule(
        who=indexes,
        topic=st.sampled_from(TOPICS),
        overflow=policies,
        size=st.sampled_from([0, 9000, 9000]),
        count=st.integers(1, 4),
    )
    def subscribe_behind(self, who: int, topic: str, overflow: str, size: int, count: int) -> None:
        """A subscription begins behind an event that has no credit, which then gives way to newer ones."""
        client = self.present(who)
        broad = client.best(topic) if client is not None else None
        if client is None or broad is None or topic in client.accounts:
            return
        self.subscribe(who, broad.name, "drop_oldest", 2, 0, broad.echo)
        self.check()
        self.publish_one(topic, None, 0, None, False)
        self.subscribe(who, topic, overflow, 8, None, True)
        self.check()
        self.publish_one(topic, None, 0, None, False)
        self.turn()
        self.publish_for(broad, size, count)
        self.check()
        self.turn()

    def publish_for(self, account: Account, size: int, count: int) -> None:
        """Publish events that one subscription gets."""
        topics = [topic for topic in TOPICS if account.client.best(topic) is account]
        for number in range(count if topics else 0):
            self.publish_one(topics[number % len(topics)], None, size, None, False)

    # What is published.

    @rule(
        topic=st.sampled_from(TOPICS),
        key=st.sampled_from(KEYS),
        size=st.sampled_from(SIZES),
        who=st.none() | indexes,
        fast=st.booleans(),
        count=st.sampled_from([1, 1, 2, 30]),
    )
    def publish(self, topic: str, key: str | None, size: int, who: int | None, fast: bool, count: int) -> None:
        for _ in range(count):
            origin = None if who is None else self.present(who)
            if origin is not None and (origin.connection.parked_publishes or not origin.transport.reading):
                return  # it is not read
            self.publish_one(topic, key, size, origin, fast and origin is not None)

    def publish_one(self, topic: str, key: str | None, size: int, origin: Client | None, fast: bool) -> None:
        self.numbers += 1
        number = self.numbers
        data = b'[%d,"%s"]' % (number, b"x" * size)
        log = self.logs[topic]
        payload = messages.encode_event(topic, data, key, log.top + 1)
        receivers = 0
        waiting: list[Waiting] = []
        for client in self.clients:
            if client.gone or (account := client.best(topic)) is None:
                continue
            if client is origin and not account.echo:
                continue
            receivers += 1
            if client.connection.blocked or account.native.credit == 0:
                waiting.append(Waiting(account))
            account.log.append(Published(number, topic, key, payload, origin))
            client.owner[number] = account
        if fast and origin is not None and origin.takes_part:
            prefix = messages.encode_event(topic, b"0").removesuffix(b',"data":0}')
            self.hub.routes.install(topic, self.hub.audience(topic), prefix, log)
            origin.connection.routes = self.hub.routes
            origin.unanswered += 1
            name = b"" if key is None else b',"key":"%s"' % key.encode()
            origin.transport.send(
                TEXT, b'{"op":"publish","id":0,"topic":"%s"%s,"data":%s}' % (topic.encode(), name, data)
            )
        else:
            connection = None if origin is None else origin.connection
            encoded = None if key is None else key.encode()
            offset = append_event(log, payload, encoded, len(data))
            receipt = self.hub.audience(topic).publish(topic, payload, encoded, connection, offset)
            assert receipt[0] == receivers
        for each in waiting:
            each.check(len(payload) + 2, self.max_outbox)

    def catch_up(self, native: Subscription) -> None:
        """Feed from the history, as a node does; now and then some of it is not kept any more."""
        assert native.connection is not None
        (account,) = [
            account for client in self.clients for account in client.live.values() if account.native is native
        ]
        if native.lag == 0:
            native.end_replay()
            return
        events, _ = self.logs[account.name].after(native.cursor, 1000)
        self.forgotten += 1
        if self.forgotten % 5 == 0:
            gone = (len(events) + 1) // 2
            native.connection.answer(messages.encode_gap(account.name, gone, "expired"))
            native.advance(events[gone - 1].offset)
            events = events[gone:]
        if native.feed(events) == len(events):
            native.advance(native.newest)

    @rule(
        who=indexes,
        which=indexes,
        keys=st.lists(st.tuples(indexes, st.sampled_from(KEYS)), min_size=1, max_size=30),
        size=st.sampled_from([0, 500]),
        origin=st.none() | indexes,
        turns=st.booleans(),
    )
    def stall(
        self, who: int, which: int, keys: list[tuple[int, str | None]], size: int, origin: int | None, turns: bool
    ) -> None:
        """A client stops reading, and much comes for one of its subscriptions."""
        account = self.some(who, which)
        if account is None:
            return
        self.block(who)
        self.loop.turn()
        topics = [topic for topic in TOPICS if matches(account.name, topic)]
        for number, key in keys:
            self.publish(topics[number % len(topics)], key, size, origin, True, 1)
            if turns:
                self.loop.turn()

    # What the sockets do.

    @rule(who=indexes)
    def block(self, who: int) -> None:
        """A socket that is full, whichever kind it is."""
        if (client := self.present(who)) is not None:
            client.transport.block()
            client.connection.answer(b'{"op":"pong"}' + b" " * 9000)

    @rule(who=indexes, size=st.sampled_from([1, 30, 200, 2240, 9000, 100_000]))
    def drain(self, who: int, size: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.drain(size)

    @rule(who=indexes)
    def unblock(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.drain(None)

    @rule()
    def turn(self) -> None:
        """At the end of a turn all has left that can: events and gaps."""
        self.loop.turn()
        for client in self.clients:
            client.look()
            if not client.takes_part or client.connection.blocked:
                continue
            for account in client.live.values():
                if account.stands_aside:
                    continue
                assert account.native.queued == account.native.lag == 0, "nothing holds it up"
                if type(client.transport) is SlowPipe:
                    assert len(account.read) + account.missed == len(account.log), "a gap that is held back"
            if not any(account.stands_aside for account in client.live.values()):
                assert not client.connection.lagging

    @rule(how=st.integers(0, 9))
    def sweep(self, how: int) -> None:
        """Seldom: who makes publishers wait is then closed."""
        if how == 0:
            self.context.sweep()

    # What holds.

    @invariant()
    def hold(self) -> None:
        if hasattr(self, "clients"):
            self.check()

    def check_readers(self) -> None:
        """Check that no event was lost that could be sent at once, and that no client was closed for such a one."""
        for client in self.clients:
            ready = not client.connection.blocked and client.takes_part
            for account in client.live.values() if not client.gone else ():
                native = account.native
                # Of a connection that ends it is not known which events are queued.
                may_have_barrier = not client.takes_part or account.may_have_barrier
                self.states.check_subscription(native, may_have_barrier=may_have_barrier)
                lost, can_send = account.count_lost(), account.can_send
                if account.ready and can_send:
                    assert lost == account.lost, "an event was lost that could be sent"
                account.lost, account.ready = lost, can_send
                ready = ready and can_send and native.overflow != "block"
            if client.ready and not client.connection.blocked and client.live:
                waits = any(
                    account.stands_aside or account.native.overflow == "block" for account in client.live.values()
                )
                assert waits or not client.connection.close_pending, "a client that reads is closed as a slow one"
            client.ready = ready
            self.states.check_connection(client.connection)

    def check(self) -> None:
        self.check_readers()
        queued = 0
        waiting = sum(client.connection.parked_publishes for client in self.clients)
        for client in self.clients:
            client.look()
            for account in client.live.values() if not client.gone else ():
                native = account.native
                queued += native.queued
                # Each publisher that waits has one event beyond the bound; or more, after the bound was lowered.
                beyond = waiting + STRAYS + 1 + (max(BOUNDS) if "block" in account.policies else 0)
                most = native.max_queue + (beyond if native.overflow == "block" else 0)
                assert native.queued <= most or client.connection.close_pending
                # A connection with too many strays is to be closed: its events of this turn are dropped.
                if account.policies == {"block"} and self.max_outbox > TIGHT and client.takes_part:
                    assert native.queued <= account.most + account.beyond
                assert native.behind or not native.queued
        assert self.context.queued == queued

    def present(self, who: int) -> Client | None:
        clients = [client for client in self.clients if not client.gone]
        return clients[who % len(clients)] if clients else None

    def some(self, who: int, which: int) -> Account | None:
        client = self.present(who)
        accounts = list(client.live.values()) if client is not None else []
        return accounts[which % len(accounts)] if accounts else None

    def teardown(self) -> None:
        if not hasattr(self, "clients"):
            return
        try:
            self.end()
        finally:
            for client in self.clients:
                client.transport.discard()

    def end(self) -> None:
        """Everybody reads all there is, and has accounted for everything; then all leave, and nothing is left."""
        self.loop.turn()
        self.read_all()
        for client in self.clients:
            for account in client.live.values() if not client.gone else ():
                assert account.native.queued == 0 or account.stands_aside, "it has credit, and nothing goes before it"
        for client in self.clients:
            for account in client.live.values() if not client.gone else ():
                if account.granted is not None:
                    account.granted += 1 << 20
                    account.native.add_credit(1 << 20)
        self.read_all()
        for client in self.clients:
            client.look()
            if client.gone:
                continue
            assert client.unanswered == client.connection.parked_publishes == client.connection.queued_bytes == 0
            assert not client.connection.lagging
            for account in client.live.values():
                account.complete()
        for client in self.clients:
            client.transport.lose()
        self.loop.turn()
        context = self.context
        assert context.connections == context.subscriptions == context.queued == self.hub.filters == 0
        assert context.lagging_connections == context.parked_publishers == 0

    def read_all(self) -> None:
        for _ in range(10_000):
            before = sum(len(client.transport.received) for client in self.clients)
            for client in self.clients:
                client.transport.drain(None)
            self.loop.turn()
            for client in self.clients:
                client.transport.drain(None)
            if before == sum(len(client.transport.received) for client in self.clients):
                break


class TightFlow(Flow):
    """The same with so little memory for a connection that it is the bound in bytes that decides."""

    max_outbox = TIGHT


class ThreadedFlow(Flow):
    """The same with threads that send."""

    threads = 3


@pytest.mark.parametrize("flow", [Flow, TightFlow, ThreadedFlow])
def test_every_event_is_delivered_or_counted_in_a_gap(flow: type[Flow]) -> None:
    gc.collect()
    gc.freeze()
    try:
        case: Any = flow.TestCase
        case.settings = settings(
            max_examples=int(150 * TIMES),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
        )
        case("runTest").runTest()
    finally:
        gc.unfreeze()
