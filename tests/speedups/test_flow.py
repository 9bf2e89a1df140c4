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
from broker._speedups import Connection, LoopContext, Subscription
from broker.config import OVERFLOWS
from broker.hub import UNLIMITED, Hub
from broker.topics import is_pattern, matches, overlap, rank
from tests.speedups.transports import SlowPipe, SlowSocket, frames_in
from tests.speedups.turns import Loop
from tests.speedups.wire import CLOSE, TEXT, TIMES

TOPICS = ["a", "a.b", "a.c", "b"]
NAMES = [*TOPICS, "a.*", "a.>", ">", "*", "*.b"]
KEYS = [None, "k", "l", "ü"]
SIZES = [0, 40, 500, 2300, 9000]
BOUNDS = [1, 2, 3, 8]
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
    def stands_aside(self) -> bool:
        """Whether it may wait for what waits under an older subscription, or for credit."""
        older = []
        for account in self.client.live.values():
            if account is self:
                break
            older.append(account)
        return self.native.credit == 0 or any(
            is_pattern(account.name) and account.native.queued and overlap(account.name, self.name) for account in older
        )

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
            assert set(self.told) <= {"age", "expired"}, "every event"
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
        self.sent: list[Account] = []
        """When it left: the subscriptions that nothing but the socket could hold up."""
        self.unanswered = 0
        self._newest: dict[str, int] = {}
        self._parsed = 0
        transport.attach(self.connection)

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


class Flow(RuleBasedStateMachine):
    """Clients that publish, subscribe, stop reading, give credit, and change their mind."""

    max_outbox = 1 << 30

    @initialize(
        first=st.lists(st.tuples(indexes, st.sampled_from(NAMES), policies, st.sampled_from(BOUNDS)), min_size=1),
        count=st.integers(1, 4),
    )
    def begin(self, first: list[tuple[int, str, str, int]], count: int) -> None:
        self.loop = Loop()
        self.context = LoopContext(
            self.loop.as_loop(),
            encode_gap=messages.encode_gap,
            max_outbox=self.max_outbox,
            ping_interval=0,
            block_timeout=0.0001,
            buffer_size=4096,
        )
        self.context.max_age = {"a.c": 0.004, "b": 3600.0}.get
        self.context.catch_up = self.catch_up
        self.hub = Hub(self.context)
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
        if name in client.live:
            account = client.live[name]
            if credit is not None:
                # What was sent before its credit is counted may still be on its way.
                account.before_credit, account.granted = len(account.log), credit
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

    @rule(who=indexes, how=st.integers(0, 9))
    def leave(self, who: int, how: int) -> None:
        """Seldom, or there would be nobody left to look at."""
        client = self.present(who)
        if client is None or how > 1:
            return
        if how:
            client.transport.lose()
        else:
            client.finished = True
            client.connection.finish(1001, "going_away")

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
        payload = messages.encode_event(topic, data, key)
        receivers = 0
        for client in self.clients:
            if client.gone or (account := client.best(topic)) is None:
                continue
            if client is origin and not account.echo:
                continue
            receivers += 1
            account.log.append(Published(number, topic, key, payload, origin))
            client.owner[number] = account
        if fast and origin is not None and not origin.connection.close_pending:
            prefix = messages.encode_event(topic, b"0").removesuffix(b',"data":0}')
            self.hub.routes.install(topic, self.hub.audience(topic), prefix)
            origin.connection.routes = self.hub.routes
            origin.unanswered += 1
            name = b"" if key is None else b',"key":"%s"' % key.encode()
            origin.transport.send(
                TEXT, b'{"op":"publish","id":0,"topic":"%s"%s,"data":%s}' % (topic.encode(), name, data)
            )
        else:
            connection = None if origin is None else origin.connection
            encoded = None if key is None else key.encode()
            receipt = self.hub.audience(topic).publish(topic, payload, encoded, connection)
            assert receipt[0] == receivers

    def catch_up(self, native: Subscription) -> None:
        """Feed from what was published, as a node with history does; now and then some of it is not kept any more."""
        assert native.connection is not None
        (account,) = [
            account for client in self.clients for account in client.live.values() if account.native is native
        ]
        self.forgotten += 1
        if self.forgotten % 5 == 0:
            gone = (native.lag + 1) // 2
            native.connection.answer(messages.encode_gap(account.name, gone, "expired"))
            native.skip(gone)
        while native.lag:
            event = account.log[-native.lag]
            if not native.feed(event.topic, event.payload):
                break

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
        self.loop.turn()

    @rule(how=st.integers(0, 9))
    def sweep(self, how: int) -> None:
        """Seldom: who makes publishers wait is then closed."""
        if how == 0:
            self.context.sweep()

    # What holds.

    @invariant()
    def hold(self) -> None:
        if not hasattr(self, "clients"):
            return
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
                if account.policies == {"block"} and self.max_outbox > 6000 and not client.connection.close_pending:
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
            assert client.unanswered == client.connection.parked_publishes == client.connection.outbox == 0
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

    max_outbox = 6000


@pytest.mark.parametrize("flow", [Flow, TightFlow])
def test_every_event_is_delivered_or_counted_in_a_gap(flow: type[Flow]) -> None:
    gc.collect()
    gc.freeze()
    try:
        case: Any = flow.TestCase
        case.settings = settings(
            max_examples=int(200 * TIMES),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
        )
        case("runTest").runTest()
    finally:
        gc.unfreeze()
