"""The index of subscriptions: against `broker.topics.matches`, the rule itself; and what it costs and keeps."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from websockets.frames import Frame, Opcode

from broker import messages
from broker._speedups import Audience, Connection, LoopContext, Subscription
from broker.config import Limits
from broker.hub import Hub
from broker.topics import matches, overlap, rank


class Loop:
    """In place of an event loop: `turn` is the end of a turn."""

    def __init__(self) -> None:
        self._soon: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._soon.append(callback)

    def turn(self) -> None:
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()


class Transport:
    """In place of a transport without a socket: takes all, and remembers the events in it."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._written.append(bytes(data))

    def events(self) -> list[bytes]:
        """The `event` messages since the last call."""
        written = b"".join(self._written)
        self._written.clear()
        found = []
        at = 0
        while at < len(written):
            size = written[at + 1]
            assert size < 126  # a frame of the short form (RFC 6455, section 5.2), as all are here
            found.append(written[at + 2 : at + 2 + size])
            at += 2 + size
        return [payload for payload in found if payload.startswith(b'{"op":"event"')]

    def set_write_buffer_limits(self, high: int) -> None: ...
    def is_closing(self) -> bool:
        return False

    def set_protocol(self, protocol: object) -> None: ...

    def get_extra_info(self, name: str) -> None:
        return None

    def abort(self) -> None: ...


class Harness:
    """A hub with connections that may publish through the fast path, and what the node does for the slow one."""

    def __init__(self, clients: int) -> None:
        self.loop = Loop()
        self.context = LoopContext(self.loop, Limits(), encode_gap=messages.encode_gap)  # type: ignore[arg-type]
        self.context.command_time = 3600.0  # a machine with other things to do is not to change what comes when
        self.hub = Hub(self.context)
        self.transports = [Transport() for _ in range(clients)]
        self.connections = [self._connection(transport) for transport in self.transports]
        self.subscriptions: list[Subscription] = []
        """As sessions do, it holds them: a subscription that nobody holds ends."""

    def subscribe(self, client: int, topic: str, *, echo: bool = True) -> Subscription:
        found = self.hub.subscribe(self.connections[client], topic, max_queue=100, overflow="close", echo=echo)
        self.subscriptions.append(found)
        return found

    def publish(self, topic: str, data: bytes, origin: Connection | None = None) -> tuple[int, int, int]:
        """What a node does about an event."""
        audience = self.hub.audience(topic)
        self.hub.routes.install(topic, audience, messages.encode_event(topic, b"0").removesuffix(b',"data":0}'))
        return audience.publish(topic, messages.encode_event(topic, data), None, origin)

    def send(self, client: int, topic: str, data: bytes) -> None:
        """What comes from a client that publishes."""
        command = b'{"op":"publish","topic":"%s","data":%s}' % (topic.encode(), data)
        self.connections[client].feed(Frame(Opcode.TEXT, command).serialize(mask=True))

    def events(self, client: int) -> list[bytes]:
        return self.transports[client].events()

    def _connection(self, transport: Transport) -> Connection:
        connection = Connection(self.context)
        connection.session = SlowLane(self, connection)
        connection.routes = self.hub.routes
        connection.start(transport)  # type: ignore[arg-type]
        return connection


class SlowLane:
    """In place of a session, for publishing alone."""

    def __init__(self, harness: Harness, connection: Connection) -> None:
        self.harness = harness
        self.connection = connection

    def message(self, payload: bytes, text: bool) -> None:
        command = messages.decode(payload, Limits().max_depth)
        assert isinstance(command, messages.Publish)
        self.harness.publish(command.topic, bytes(command.data), self.connection)

    def on_close(self, code: int, reason: str) -> None: ...


CLIENTS = 3
TOKENS = st.sampled_from(["a", "b", "ü"])
TOPICS = st.builds(
    lambda reserved, tokens: reserved + ".".join(tokens),
    st.sampled_from(["", "", "", "$"]),
    st.lists(TOKENS, min_size=1, max_size=4),
)
PATTERNS = st.builds(
    lambda reserved, tokens, rest: ".".join([*([reserved] if reserved else []), *tokens, *([">"] if rest else [])]),
    st.sampled_from(["", "", "", "$a"]),
    st.lists(TOKENS | st.just("*"), max_size=4),
    st.booleans(),
).filter(bool)


class HubMachine(RuleBasedStateMachine):
    """Subscribes, unsubscribes and publishes in any order, beside a plain list of subscriptions."""

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness(CLIENTS)
        self.hub = self.harness.hub
        self.subscriptions: dict[tuple[int, str], Subscription] = {}
        self.known: set[str] = set()
        """Topics that were published to since one of their filters came or went: they may have a route."""
        self.expected: list[list[bytes]] = [[] for _ in range(CLIENTS)]
        self.published = 0

    @rule(client=st.integers(0, CLIENTS - 1), topic=TOPICS | PATTERNS, echo=st.booleans())
    def subscribe(self, client: int, topic: str, echo: bool) -> None:
        if (client, topic) in self.subscriptions:
            return
        is_new = topic not in self.filters()
        self.subscriptions[client, topic] = self.harness.subscribe(client, topic, echo=echo)
        if is_new:
            self.check_withdrawn(topic)

    @precondition(lambda self: self.subscriptions)
    @rule(data=st.data())
    def unsubscribe(self, data: st.DataObject) -> None:
        _, topic = key = data.draw(st.sampled_from(list(self.subscriptions)))
        if self.subscriptions[key].behind:
            # Unsubscribing forgets what is queued: after an event of its own that it does not want, that is the rest of
            # the turn.
            self.end_of_turn()
        self.hub.unsubscribe(self.subscriptions.pop(key))
        if topic not in self.filters():
            self.check_withdrawn(topic)

    @rule(topic=TOPICS)
    def find(self, topic: str) -> None:
        audience = self.hub.audience(topic)
        found = [one.topic for one in audience.filters]
        assert found == sorted((name for name in self.filters() if matches(name, topic)), key=rank)
        assert len(found) == len(set(found))
        assert set(audience.subscriptions()) == set(self.members(topic).values())
        assert audience.receivers == len(self.members(topic))
        assert self.hub.audience(topic) is audience

    @rule(client=st.integers(0, CLIENTS - 1), topic=TOPICS)
    def publish(self, client: int, topic: str) -> None:
        """By the fast or the slow path."""
        self.published += 1
        data = str(self.published).encode()
        self.harness.send(client, topic, data)
        self.known.add(topic)
        assert topic in self.hub.routes
        for member, subscription in self.members(topic).items():
            if member != client or subscription.echo:
                self.expected[member].append(messages.encode_event(topic, data))

    @rule()
    def end_of_turn(self) -> None:
        self.harness.loop.turn()
        for client, expected in enumerate(self.expected):
            # Across topics there is no order, but of each topic there is.
            assert by_topic(self.harness.events(client)) == by_topic(expected)
            expected.clear()

    @invariant()
    def counted(self) -> None:
        assert self.hub.filters == len(self.filters())

    def teardown(self) -> None:
        self.end_of_turn()
        while self.subscriptions:
            self.hub.unsubscribe(self.subscriptions.popitem()[1])
        assert_nothing_left(self.hub)
        assert self.harness.context.subscriptions == 0

    def filters(self) -> set[str]:
        return {topic for _, topic in self.subscriptions}

    def check_withdrawn(self, pattern: str) -> None:
        """A filter came or went: the topics that it matches have another audience now."""
        stale = {topic for topic in self.known if matches(pattern, topic)}
        assert not [topic for topic in stale if topic in self.hub.routes]
        self.known -= stale

    def members(self, topic: str) -> dict[int, Subscription]:
        """Who is to get an event: each connection under its most specific subscription."""
        found: dict[int, Subscription] = {}
        for (client, name), subscription in sorted(self.subscriptions.items(), key=lambda item: rank(item[0][1])):
            if matches(name, topic):
                found.setdefault(client, subscription)
        return found


def by_topic(events: list[bytes]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for event in events:
        decoded = messages.decode_server(event)
        assert isinstance(decoded, messages.EventMessage)
        found.setdefault(decoded.topic, []).append(event)
    return found


def assert_nothing_left(hub: Hub) -> None:
    assert hub.filters == 0
    assert hub._tree.is_unused
    hub.routes.clear()
    assert len(hub._audiences) == 0


TestHub = HubMachine.TestCase
TestHub.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def harness() -> Harness:
    return Harness(2)


@pytest.fixture
def hub(harness: Harness) -> Hub:
    return harness.hub


def test_subscriptions_of_a_pattern_are_those_that_overlap_with_it(harness: Harness, hub: Hub) -> None:
    topics = ("a.b", "a.*", "*.b", "a.>", ">", "a.c.d", "b", "$sys.a")
    for topic in topics:
        harness.subscribe(0, topic)
    for pattern in ("a.*", "*.*", ">", "a.b.>", "$sys.>", "x.*"):
        found = [subscription.filter.topic for subscription in hub.subscriptions(pattern)]
        assert sorted(found) == sorted(topic for topic in topics if overlap(topic, pattern))


def test_subscriptions_of_a_topic_are_those_that_deliver_it(harness: Harness, hub: Hub) -> None:
    for place, topic in ((0, "a.b"), (0, ">"), (1, "a.*"), (1, "b")):
        harness.subscribe(place, topic)
    assert {subscription.filter.topic for subscription in hub.subscriptions("a.b")} == {"a.b", "a.*"}


# Routes


def test_change_of_an_exact_filter_withdraws_only_the_route_of_its_topic(harness: Harness, hub: Hub) -> None:
    for topic in ("a", "b"):
        harness.publish(topic, b"1")
    subscription = harness.subscribe(0, "a")
    assert "a" not in hub.routes
    assert "b" in hub.routes
    harness.publish("a", b"2")
    assert "a" in hub.routes
    hub.unsubscribe(subscription)
    assert "a" not in hub.routes
    assert "b" in hub.routes


def test_change_of_a_pattern_withdraws_only_the_routes_that_it_matches(harness: Harness, hub: Hub) -> None:
    for topic in ("a", "b.c", "b.c.d"):
        harness.publish(topic, b"1")
    subscription = harness.subscribe(0, "b.*")
    assert [topic in hub.routes for topic in ("a", "b.c", "b.c.d")] == [True, False, True]
    harness.publish("b.c", b"1")
    hub.unsubscribe(subscription)
    assert [topic in hub.routes for topic in ("a", "b.c", "b.c.d")] == [True, False, True]


def test_second_subscriber_of_a_filter_keeps_the_routes_and_gets_the_events(harness: Harness, hub: Hub) -> None:
    harness.subscribe(0, "a")
    harness.publish("a", b"1")
    second = harness.subscribe(1, "a")
    assert "a" in hub.routes
    harness.send(0, "a", b"2")
    assert harness.context.fast_publishes == 1
    hub.unsubscribe(second)
    harness.send(0, "a", b"3")
    assert harness.context.fast_publishes == 2
    harness.loop.turn()
    data = [b'{"op":"event","topic":"a","data":%d}' % n for n in (1, 2, 3)]
    assert harness.events(0) == data
    assert harness.events(1) == data[1:2]


def test_events_published_before_a_subscription_do_not_reach_it(harness: Harness) -> None:
    harness.subscribe(0, "a.>")
    harness.publish("a.b", b"1")
    harness.subscribe(1, "a.b")
    harness.subscribe(0, "a.*")
    harness.publish("a.b", b"2")
    harness.loop.turn()
    data = [b'{"op":"event","topic":"a.b","data":%d}' % n for n in (1, 2)]
    assert harness.events(0) == data
    assert harness.events(1) == data[1:]


@pytest.mark.parametrize("topic", ["a.b", "a.*"])
def test_order_is_kept_when_a_change_splits_a_long_batch(harness: Harness, topic: str) -> None:
    harness.subscribe(0, ">")
    harness.publish("a.b", b"0")
    subscription = harness.subscribe(1, topic)
    expected = 1
    for last in (3_000, 3_001, 6_000):  # a batch holds about 1,700 of them
        for n in range(expected, last):
            harness.publish("a.b", b"%d" % n)
        expected = last
        if last == 3_001:
            harness.hub.unsubscribe(subscription)
    harness.loop.turn()
    assert harness.events(0) == [b'{"op":"event","topic":"a.b","data":%d}' % n for n in range(6_000)]


# What it costs


def test_cost_of_a_publish_depends_on_its_matches_only() -> None:
    few, many = Harness(100), Harness(100)
    wanted = ["7.42.*", "7.>", "*.42.x"]
    for harness in (few, many):
        for name in wanted:
            for client in range(10):
                harness.subscribe(client, name)
    patterns = [f"{a}.{b}.*" for a, b in product(range(100), range(100)) if f"{a}.{b}.*" not in wanted]
    for place, pattern in enumerate(patterns):
        for client in range(10):
            many.subscribe((place + client) % 100, pattern)
    assert many.hub.filters == 10_002
    assert many.context.subscriptions == 100_020
    for harness in (few, many):
        assert [found.topic for found in harness.hub.audience("7.42.x").filters] == wanted
        assert harness.hub.audience("7.42.x").receivers == 10
    assert steps(many.hub.audience, "7.42.x") == steps(few.hub.audience, "7.42.x")
    # One more subscriber of another pattern changes nothing either.
    before = many.hub.audience("7.42.x")
    many.subscribe(99, "1.1.*")
    assert many.hub.audience("7.42.x") is before


def test_cost_of_a_publish_does_not_depend_on_exact_filters() -> None:
    few, many = Harness(1), Harness(1)
    few.subscribe(0, "7.42.x")
    for n in range(10_000):
        many.subscribe(0, f"7.{n}.x")
    assert many.hub.audience("7.42.x").receivers == 1
    assert steps(many.hub.audience, "7.42.x") == steps(few.hub.audience, "7.42.x")


# What it keeps


def test_published_topics_leave_nothing_behind() -> None:
    harness = Harness(1)
    everything = harness.subscribe(0, ">")
    some = harness.subscribe(0, "topic.1.>")

    def publish(first: int) -> None:
        for n in range(first, first + 30_000):
            harness.publish(f"topic.{n % 10}.{n}", b"1")
            if n % 100 == 0:
                harness.loop.turn()
        harness.loop.turn()
        assert len(harness.events(0)) == 30_000

    def blocks() -> int:
        harness.hub.routes.clear()
        gc.collect()
        return sys.getallocatedblocks()

    publish(0)
    assert len(harness.hub.routes) <= 2 * harness.hub.routes.limit
    assert harness.hub.filters == 2
    assert len(harness.hub._audiences) == 2
    before = blocks()
    publish(30_000)
    # What did not come back from 30,000 topics is less than one object for ten of them.
    assert blocks() - before < 3_000
    harness.hub.unsubscribe(everything)
    harness.hub.unsubscribe(some)
    assert_nothing_left(harness.hub)


def test_ended_subscriptions_leave_nothing_behind(harness: Harness, hub: Hub) -> None:
    for n in range(10_000):
        subscription = harness.subscribe(0, f"a.{n}.*" if n % 2 else f"a.{n}")
        harness.publish(f"a.{n}.x" if n % 2 else f"a.{n}", b"1")
        hub.unsubscribe(subscription)
    assert_nothing_left(hub)


def test_audience_is_freed_with_its_last_route(harness: Harness, hub: Hub) -> None:
    subscription = harness.subscribe(0, "a")
    harness.publish("a", b"1")
    harness.loop.turn()
    assert len(hub._audiences) == 1
    hub.unsubscribe(subscription)
    assert len(hub._audiences) == 0


def steps(function: Callable[[str], Audience], topic: str) -> int:
    """How many instructions of Python a call carries out: what it costs, on any machine."""
    counted: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        counted[event] += 1
        return trace

    before = sys.gettrace()
    gc.collect()  # what other tests left behind is not to be collected, and its weak references called back, meanwhile
    gc.disable()
    sys.settrace(trace)
    try:
        function(topic)
    finally:
        sys.settrace(before)
        gc.enable()
    assert counted["opcode"] > 10
    return counted["opcode"]
