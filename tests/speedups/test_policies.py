"""Credit, the policies `latest`, `block` and `replay`, and events that grow old, one by one.

That they keep the law of the outbox together with everything else is shown by the model in test_flow.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broker import messages
from broker._speedups import Connection, Event, IntakeLimit, LoopContext, Subscription, TokenBucket
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.hub import Hub
from tests.speedups.transports import SlowPipe, SlowSocket
from tests.speedups.turns import Loop
from tests.speedups.wire import CLOSE, TEXT, server_frames

GOING_AWAY = (1001).to_bytes(2, "big") + b"going_away"
SLOW_CONSUMER = (4000).to_bytes(2, "big") + b"slow_consumer"


class Place:
    """A context with a hub and clients; time passes in its sweeps alone."""

    def __init__(self, **limits: Any) -> None:
        self.loop = Loop()
        limits = {"ping_interval": 0, **limits}
        self.context = LoopContext(
            self.loop.as_loop(), Limits(**limits), encode_gap=messages.encode_gap, close_reasons=CLOSE_REASONS
        )
        self.hub = Hub(self.context)
        self.peers: list[Peer] = []

    def client(self, kind: type[SlowPipe] = SlowPipe) -> Peer:
        self.peers.append(Peer(self, kind(self.loop)))
        return self.peers[-1]

    def publish(
        self, topic: str, data: object, key: str | None = None, origin: Peer | None = None, offset: int = 0
    ) -> tuple[int, ...]:
        payload = messages.encode_event(topic, json.dumps(data).encode(), key, offset or None)
        connection = None if origin is None else origin.connection
        encoded = None if key is None else key.encode()
        return self.hub.audience(topic).publish(topic, payload, encoded, connection, offset)

    def turn(self) -> None:
        self.loop.turn()


class Peer:
    """One connection, and what its other end has read."""

    def __init__(self, place: Place, transport: SlowPipe) -> None:
        self.place = place
        self.transport = transport
        self.connection = Connection(place.context, self)
        self.subscriptions: dict[str, Subscription] = {}
        self.commands: list[bytes] = []
        transport.attach(self.connection)

    def subscribe(self, topic: str, max_queue: int = 100, **policy: Any) -> Subscription:
        policy = {"overflow": "drop_oldest", "echo": True, **policy}
        made = self.place.hub.subscribe(self.connection, topic, max_queue=max_queue, **policy)
        self.subscriptions[topic] = made
        return made

    def stop(self) -> None:
        """Read no more: what comes from now on waits."""
        self.transport.block()
        self.connection.answer(b'{"op":"pong"}' + b" " * 20_000)
        self.place.turn()
        assert self.connection.blocked

    def read(self) -> list[Any]:
        """Read all there is: events as their data, gaps as (reason, count), answers as their op, closes as bytes."""
        while True:
            before = len(self.transport.received)
            self.transport.drain(None)
            self.place.turn()
            self.transport.drain(None)
            if len(self.transport.received) == before:
                return self.seen()

    def seen(self) -> list[Any]:
        found: list[Any] = []
        for opcode, payload in server_frames(bytes(self.transport.received)):
            if opcode == CLOSE:
                found.append(payload)
                continue
            message = json.loads(payload)
            if message["op"] == "event":
                found.append(message["data"])
            elif message["op"] == "gap":
                found.append((message["reason"], message["missed"]))
            elif message["op"] != "pong":
                found.append(message["op"])
        return found

    def send(self, **command: Any) -> None:
        self.transport.send(TEXT, json.dumps(command).encode())

    # As the session.

    def message(self, payload: bytes, text: bool) -> None:
        self.commands.append(payload)

    def on_close(self, code: int, reason: str) -> None:
        for subscription in self.subscriptions.values():
            self.place.hub.unsubscribe(subscription)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A place, with the limits of the parameter; at the end all leave, and nothing is left of them."""
    place = Place(**getattr(request, "param", {}))
    yield place
    for peer in place.peers:
        peer.transport.lose()
        peer.transport.discard()
    place.turn()
    context = place.context
    assert (
        context.connections
        == context.subscriptions
        == context.queued
        == context.lagging_connections
        == place.hub.filters
        == 0
    )


IMPATIENT = pytest.mark.parametrize("place", [{"block_timeout": 0.0001}], indirect=True)


# latest


def test_latest_keeps_the_newest_event_of_each_key_at_its_place(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("p", overflow="latest")
    client.stop()
    receipts = [place.publish("p", n, key) for n, key in enumerate("abcabaz")]
    assert receipts == [(1, 1, 0)] * 3 + [(1, 1, 1)] * 3 + [(1, 1, 0)]
    assert subscription.queued == 4
    assert client.read() == [("conflated", 2), 2, ("conflated", 1), 4, 5, 6]
    assert subscription.dropped_by_reason == {"overflow": 0, "conflated": 3, "age": 0}
    assert not subscription.behind


def test_latest_without_keys_keeps_the_newest_event_of_each_topic(place: Place) -> None:
    client = place.client()
    client.subscribe("p.*", overflow="latest")
    client.stop()
    for n, topic in enumerate(["p.a", "p.b", "p.a", "p.b", "p.b"]):
        place.publish(topic, n)
    assert client.read() == [("conflated", 2), 2, ("conflated", 1), 4]


def test_latest_keys_are_separate_for_each_topic(place: Place) -> None:
    client = place.client()
    client.subscribe("p.*", overflow="latest")
    client.stop()
    for n, topic in enumerate(["p.a", "p.b", "p.a"]):
        place.publish(topic, n, "k")
    place.publish("p.a", "no key")
    assert client.read() == [("conflated", 1), 1, 2, "no key"]


def test_latest_delivers_every_event_to_a_client_that_keeps_up(place: Place) -> None:
    ready, apart = place.client(), place.client()
    ready.subscribe("p", overflow="latest")
    apart.subscribe("p", overflow="latest", credit=1000)
    for n in range(20):
        place.publish("p", n, "k")
    assert ready.read() == apart.read() == list(range(20))


def test_latest_drops_the_key_unchanged_for_longest_at_the_bound(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("p", max_queue=2, overflow="latest")
    client.stop()
    for n, key in enumerate("abac"):
        place.publish("p", n, key)
    assert subscription.queued == 2
    assert client.read() == [("overflow", 1), ("conflated", 1), 2, 3]


def test_latest_queue_is_bounded_by_its_keys(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("p", overflow="latest")
    client.stop()
    for n in range(5000):
        place.publish("p", n, f"k{n % 7 if n % 3 else n % 5}")
    assert subscription.queued == 7
    seen = client.read()
    assert sum(item[1] for item in seen if isinstance(item, tuple)) == 4993
    assert [item for item in seen if isinstance(item, int)][-1] == 4999


def test_latest_conflates_the_rest_of_a_partial_write(place: Place) -> None:
    client = place.client(SlowSocket)
    client.subscribe("p", overflow="latest")
    for n in range(40):
        place.publish("p", [n, "x" * 500], "k")
    place.turn()
    assert client.connection.blocked
    events = [item if isinstance(item, tuple) else item[0] for item in client.read()]
    assert events[-1] == 39
    missed = sum(item[1] for item in events if isinstance(item, tuple))
    assert missed > 0
    assert missed + sum(isinstance(item, int) for item in events) == 40


def test_change_to_latest_conflates_queued_events(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("p", max_queue=3, overflow="drop_oldest")
    client.stop()
    for n, key in enumerate("abcbc"):
        place.publish("p", n, key)
    subscription.change(max_queue=3, overflow="latest", echo=True)
    assert subscription.queued == 2
    place.publish("p", 5, "b")
    subscription.change(max_queue=3, overflow="drop_newest", echo=True)
    for n in (6, 7, 8):
        place.publish("p", n, "b")
    assert client.read() == [("overflow", 2), ("conflated", 2), 4, 5, 6, ("overflow", 2)]


# credit


def test_credit_bounds_the_events_sent_until_more_is_added(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", max_queue=3, credit=2)
    receipts = []
    for n in range(7):
        receipts.append(place.publish("a", n))
        place.turn()
    assert client.read() == [0, 1]
    assert receipts == [(1, 0, 0)] * 2 + [(1, 1, 0)] * 3 + [(1, 1, 1)] * 2
    assert (subscription.credit, subscription.queued) == (0, 3)
    subscription.add_credit(1)
    assert client.read() == [0, 1, ("overflow", 2), 4]
    subscription.add_credit(10)
    assert client.read() == [0, 1, ("overflow", 2), 4, 5, 6]
    assert subscription.credit == 8
    subscription.change(max_queue=3, overflow="drop_oldest", echo=True, credit=1)
    place.publish("a", 7)
    place.publish("a", 8)
    assert client.read()[-1] == 7


def test_change_does_not_refund_credit_for_events_it_sends(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", max_queue=9, credit=1)
    place.publish("a", 0)
    place.publish("a", 1)
    # The first one goes out now, before what is queued is brought under the new bound.
    subscription.change(max_queue=9, overflow="drop_newest", echo=True)
    assert subscription.credit == 0
    assert client.read() == [0]
    subscription.add_credit(1)
    assert client.read() == [0, 1]


@pytest.mark.parametrize(
    ("overflow", "read"),
    [
        ("drop_oldest", [("overflow", 3), 4, 5]),
        ("drop_newest", [1, 2, ("overflow", 3)]),
        ("latest", [("conflated", 4), 5]),
    ],
)
def test_exhausted_credit_acts_like_a_full_socket_for_every_policy(
    place: Place, overflow: str, read: list[Any]
) -> None:
    client = place.client()
    subscription = client.subscribe("a", max_queue=2, overflow=overflow, credit=1)
    for n in range(6):
        place.publish("a", n)
        place.turn()
    assert client.read() == [0]
    subscription.add_credit(100)
    assert client.read() == [0, *read]


def test_close_policy_closes_a_client_without_credit(place: Place) -> None:
    client = place.client()
    client.subscribe("a", max_queue=2, overflow="close", credit=0)
    for n in range(3):
        place.publish("a", n)
    assert client.read() == [SLOW_CONSUMER]


def test_subscription_without_credit_does_not_delay_others(place: Place) -> None:
    client = place.client()
    client.subscribe("a", credit=0)
    client.subscribe("b")
    for n in range(3):
        place.publish("a", n)
        place.publish("b", 10 + n)
        place.turn()
    assert client.read() == [10, 11, 12]
    assert client.connection.lagging


def test_credit_is_refunded_for_events_the_socket_did_not_take(place: Place) -> None:
    client = place.client(SlowSocket)
    subscription = client.subscribe("a", credit=10)
    client.stop()
    for n in range(20):
        place.publish("a", [n, "x" * 2000])
    assert [item[0] for item in client.read()] == list(range(10))
    assert subscription.credit == 0
    subscription.add_credit(10)
    assert [item[0] for item in client.read()] == list(range(20))


def test_more_specific_subscription_does_not_overtake_events_without_credit(place: Place) -> None:
    client = place.client()
    wide = client.subscribe("a.*", credit=0)
    place.publish("a.b", 1)
    client.subscribe("a.b")
    client.subscribe("c.d")
    place.publish("a.b", 2)
    place.turn()
    assert client.read() == []
    wide.add_credit(5)
    assert client.read() == [1, 2]
    place.publish("a.b", 3)
    assert client.read() == [1, 2, 3]


def test_order_barrier_does_not_delay_patterns_without_overlap(place: Place) -> None:
    client = place.client()
    wide = client.subscribe("a.*", credit=0)
    other = client.subscribe("c.*", credit=1)
    place.publish("a.b", 1)
    client.subscribe("a.b")
    assert place.publish("a.b", 2) == (1, 1, 0), "it waits, though there is credit for it"
    assert place.publish("c.d", 3) == (1, 0, 0)
    assert client.read() == [3]
    place.publish("c.d", 4)
    wide.add_credit(1)
    assert client.read() == [3, 1, 2]
    other.add_credit(1)
    assert client.read() == [3, 1, 2, 4]


def test_nested_order_barriers_are_released_in_order(place: Place) -> None:
    client = place.client()
    widest, wide = client.subscribe("a.>", credit=0), client.subscribe("a.*", credit=0)
    place.publish("a.b.c", 1)
    place.publish("a.b", 2)
    client.subscribe("a.b")
    client.subscribe("a.b.*")
    assert [place.publish(topic, n)[1] for n, topic in ((3, "a.b"), (4, "a.b.c"), (5, "a.b.x"))] == [1, 1, 1]
    wide.add_credit(1)
    assert client.read() == [2], "what waits may be of `a.b`, for all that its pattern says"
    widest.add_credit(1)
    assert client.read() == [2, 1, 3, 4, 5], "in turn, but in their order for each topic"
    assert not client.connection.lagging


def test_new_subscription_keeps_the_fair_order_of_other_queues(place: Place) -> None:
    client = place.client()
    client.subscribe("a")
    client.subscribe("b")
    client.stop()
    for n in range(3):
        place.publish("a", n)
    client.subscribe("c")
    place.publish("b", "b")
    place.publish("c", "c")
    assert client.read() == [0, "b", "c", 1, 2]


def test_order_barrier_of_one_topic_does_not_delay_other_topics(place: Place) -> None:
    client = place.client()
    client.subscribe("a.*")
    client.subscribe("b")
    client.stop()
    for n in (0, 1):
        place.publish("a.x", n)
    client.subscribe("a.x")
    for n in (2, 3):
        place.publish("a.x", n)
    place.publish("b", "b")
    assert client.read() == [0, "b", 1, 2, 3]


def test_event_over_max_outbox_is_sent_if_the_socket_takes_it() -> None:
    place = Place(max_outbox=1000)
    client, plain = place.client(), place.client()
    client.subscribe("a", credit=5, overflow="close")
    plain.subscribe("a")
    for n in range(3):
        assert place.publish("a", [n, "x" * 2000]) == (2, 0, 0)
    assert [item[0] for item in client.read()] == [item[0] for item in plain.read()] == [0, 1, 2]


@pytest.mark.parametrize("key", ["k", "another"])
def test_latest_drops_no_queued_event_for_an_event_that_does_not_fit(key: str) -> None:
    place = Place(max_outbox=1000)
    client = place.client()
    client.subscribe("a")
    mine = client.subscribe("b", overflow="latest")
    client.stop()
    place.publish("b", 1, "k")
    for _ in range(20):
        place.publish("a", "x")
    assert place.publish("b", [2, "x" * 500], key) == (1, 0, 1)
    assert (mine.queued, mine.dropped) == (1, 1)
    assert [item for item in client.read() if item != "x"] == [1, ("overflow", 1)]
    place.publish("b", 3, "k")
    assert client.read()[-1] == 3


def test_order_barrier_is_released_when_the_event_before_it_is_dropped(place: Place) -> None:
    client = place.client()
    client.subscribe("a.*", max_queue=1, credit=0)
    place.publish("a.b", 1)
    client.subscribe("a.b")
    place.publish("a.b", 2)
    place.turn()
    assert client.seen() == []
    place.publish("a.c", 3)
    place.turn()
    assert client.seen() == [2]


def test_order_barrier_is_released_by_unsubscribing(place: Place) -> None:
    client = place.client()
    client.subscribe("a.*", credit=0)
    place.publish("a.b", 1)
    client.subscribe("a.b")
    place.publish("a.b", 2)
    place.turn()
    place.hub.unsubscribe(client.subscriptions.pop("a.*"))
    place.turn()
    assert client.seen() == [2]


def test_order_barrier_does_not_delay_other_topics(place: Place) -> None:
    client = place.client()
    client.subscribe("a.*", credit=0)
    place.publish("a.b", 1)
    client.subscribe("b.*")
    place.publish("b.c", 2)
    assert client.read() == [2]


def test_credit_cannot_be_added_to_a_subscription_without_credit(place: Place) -> None:
    subscription = place.client().subscribe("a")
    with pytest.raises(ValueError, match="without credit"):
        subscription.add_credit(1)


def test_live_subscription_can_be_changed_to_use_credit(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a")
    place.publish("a", 0)
    subscription.change(max_queue=9, overflow="drop_oldest", echo=True, credit=1)
    for n in (1, 2):
        place.publish("a", n)
    assert client.read() == [0, 1]


def test_final_close_waits_for_the_socket_and_not_for_credit(place: Place) -> None:
    client = place.client()
    client.subscribe("a.*", credit=0)
    client.subscribe("b")
    client.stop()
    place.publish("a.b", 1)
    client.subscribe("a.b")  # which waits for credit along with the other
    place.publish("a.b", 2)
    place.publish("b", 3)
    client.connection.finish(1001, "going_away")
    place.turn()
    assert client.seen() == []
    assert client.read() == [3, GOING_AWAY]


# age


def test_event_over_max_age_is_not_sent(place: Place) -> None:
    place.context.max_age = {"young": 0.02, "old": 3600.0, "any": None}.get
    client = place.client()
    subscription = client.subscribe(">")
    client.stop()
    for n, topic in enumerate(["young", "young", "old", "young", "any"]):
        place.publish(topic, n)
    assert subscription.waiting < 3600
    time.sleep(0.05)  # nothing tells when it has passed: it is the age that is tested
    assert subscription.waiting > 0.02
    assert client.read() == [("age", 2), 2, ("age", 1), 4]
    assert sum(n for (_, reason), n in place.context.dropped_events.items() if reason == "age") == 3
    assert sum(place.context.dropped_events.values()) == 3


def test_full_queue_drops_events_over_max_age_first(place: Place) -> None:
    place.context.max_age = {"young": 0.02, "old": None}.get
    client = place.client()
    client.subscribe("*", max_queue=3)
    client.stop()
    for n in range(2):
        place.publish("young", n)
    place.publish("old", 2)
    time.sleep(0.05)  # as above
    for n in (3, 4):
        place.publish("old", n)
    assert client.read() == [("age", 2), 2, 3, 4]


# block


def publisher(place: Place) -> Peer:
    peer = place.client()
    peer.connection.routes = place.hub.routes
    return peer


def route(place: Place, topic: str) -> None:
    prefix = messages.encode_event(topic, b"0").removesuffix(b',"data":0}')
    place.hub.routes.install(topic, place.hub.audience(topic), prefix)


def test_block_parks_a_publisher_until_its_event_is_queued(place: Place) -> None:
    slow, quick, one, other = place.client(), place.client(), publisher(place), publisher(place)
    subscription = slow.subscribe("a", max_queue=2, overflow="block")
    quick.subscribe("a")
    route(place, "a")
    slow.stop()
    for n in range(4):
        one.send(op="publish", id=n, topic="a", data=n)
    one.send(op="publish", id=4, topic="elsewhere", data=None)
    place.turn()
    # Two find room, the third one waits for it, and is out all the same.
    assert one.seen() == ["ok", "ok"]
    assert quick.seen() == [0, 1, 2]
    assert (subscription.queued, one.connection.parked_publishes) == (3, 1)
    assert one.commands == []
    # Others are not held up, unless they publish there too.
    other.send(op="publish", id=1, topic="b", data=1)
    assert len(other.commands) == 1
    other.send(op="publish", id=2, topic="a", data="other")
    place.turn()
    assert other.seen() == []
    assert slow.read() == [0, 1, 2, "other", 3]
    assert one.seen() == ["ok"] * 4
    assert other.seen() == ["ok"]
    assert len(one.commands) == 1
    assert one.connection.parked_publishes == other.connection.parked_publishes == 0


def test_parked_publishers_are_resumed_in_order(place: Place) -> None:
    slow = place.client()
    subscription = slow.subscribe("a", max_queue=1, overflow="block", credit=0)
    publishers = [publisher(place) for _ in range(4)]
    route(place, "a")
    for n, peer in enumerate(publishers):
        peer.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    answered = []
    for _ in range(4):
        answered.append([peer.seen() == ["ok"] for peer in publishers].count(True))
        subscription.add_credit(1)
        place.turn()
        place.turn()
    assert answered == [1, 2, 3, 4]
    assert slow.read() == [0, 1, 2, 3]


@IMPATIENT
def test_block_timeout_closes_the_subscriber(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    slow.subscribe("a", max_queue=1, overflow="block")
    route(place, "a")
    slow.stop()
    for n in range(3):
        one.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert one.seen() == ["ok"]
    while not slow.connection.close_pending:
        place.context.sweep()
    place.turn()
    assert one.seen() == ["ok", "ok"]
    assert len(one.commands) == 1, "there is no subscriber any more, so it is the session's"
    assert slow.read()[-1] == SLOW_CONSUMER


@IMPATIENT
def test_publishers_parked_on_each_other_end_by_the_timeout(place: Place) -> None:
    peers = [publisher(place), publisher(place)]
    for peer, topic in zip(peers, "ab", strict=True):
        peer.subscribe(topic, max_queue=1, overflow="block")
        route(place, topic)
        peer.stop()
    for topic, peer in zip("ab", reversed(peers), strict=True):
        for n in range(3):
            peer.send(op="publish", id=n, topic=topic, data=n)
    assert [peer.connection.parked_publishes for peer in peers] == [1, 1]
    while not all(peer.connection.close_pending for peer in peers):
        place.context.sweep()
    place.turn()
    assert [peer.read()[-1] for peer in peers] == [SLOW_CONSUMER] * 2


@pytest.mark.parametrize("how", ["unsubscribe", "change", "grow", "close", "lose"])
def test_publisher_resumes_when_the_blocking_subscriber_is_gone(place: Place, how: str) -> None:
    slow, one = place.client(), publisher(place)
    subscription = slow.subscribe("a", max_queue=1, overflow="block")
    route(place, "a")
    slow.stop()
    for n in range(2):
        one.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert one.seen() == ["ok"]
    match how:
        case "unsubscribe":
            place.hub.unsubscribe(slow.subscriptions.pop("a"))
        case "change":
            subscription.change(max_queue=1, overflow="drop_oldest", echo=True)
        case "grow":
            subscription.change(max_queue=2, overflow="block", echo=True)
        case "close":
            slow.connection.close(1000, "")
        case "lose":
            slow.transport.lose()
    place.turn()
    assert one.seen() == ["ok", "ok"]
    one.send(op="ping")
    assert len(one.commands) == 1
    if how == "change":
        assert slow.read() == [("overflow", 1), 1]


def test_event_of_a_parked_publisher_that_disconnects_is_kept(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    subscription = slow.subscribe("a", max_queue=1, overflow="block")
    route(place, "a")
    slow.stop()
    for n in range(3):
        one.send(op="publish", id=n, topic="a", data=n)
    one.transport.lose()
    place.turn()
    assert subscription.queued == 2
    assert slow.read() == [0, 1]


def test_block_queue_is_bounded_for_events_without_a_publisher(place: Place) -> None:
    slow = place.client()
    subscription = slow.subscribe("a", max_queue=2, overflow="block")
    slow.stop()
    for n in range(66):
        place.publish("a", n)
    assert not slow.connection.close_pending
    assert subscription.queued == 66
    place.publish("a", 66)
    place.turn()
    assert slow.read()[-1] == SLOW_CONSUMER


def test_event_without_a_publisher_leaves_the_block_overflow_once_queued(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    subscription = slow.subscribe("a", max_queue=2, overflow="block", credit=0)
    route(place, "a")
    for n in range(12):
        place.publish("a", n)
    subscription.add_credit(9)
    place.turn()
    assert subscription.queued == 3
    one.send(op="publish", id=1, topic="a", data="mine")
    place.turn()
    assert (one.seen(), one.connection.parked_publishes, place.context.parked_publishers) == ([], 1, 1)
    subscription.add_credit(1)
    place.turn()
    assert one.seen() == [], "one of those before it is beyond the bound still"
    subscription.add_credit(1)
    place.turn()
    assert (one.seen(), one.connection.parked_publishes, place.context.parked_publishers) == (["ok"], 0, 0)
    # Nor do they add up to the bound of what nobody waits for.
    for n in range(200):
        place.publish("a", n)
        subscription.add_credit(1)
        place.turn()
    assert not slow.connection.close_pending


def test_disconnected_and_parked_publishers_keep_their_order(place: Place) -> None:
    slow = place.client()
    subscription = slow.subscribe("a", max_queue=1, overflow="block", credit=0)
    publishers = [publisher(place) for _ in range(4)]
    route(place, "a")
    for n, peer in enumerate(publishers):
        peer.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    publishers[1].transport.lose()
    answered = []
    for _ in range(4):
        answered.append([peer.seen() == ["ok"] for peer in publishers])
        subscription.add_credit(1)
        place.turn()
    assert answered == [
        [True, False, False, False],
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    assert slow.read() == [0, 1, 2, 3]


@IMPATIENT
def test_block_timeout_ignores_events_of_disconnected_publishers(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    slow.subscribe("a", max_queue=1, overflow="block", credit=0)
    route(place, "a")
    place.publish("a", 0)
    one.send(op="publish", id=1, topic="a", data=1)
    one.transport.lose()
    for _ in range(20):
        place.context.sweep()
        time.sleep(0.002)  # the sweep has a clock of its own, which moves with this one
    assert not slow.connection.close_pending


def test_dropping_old_events_resumes_a_parked_publisher(place: Place) -> None:
    place.context.max_age = {"a": 0.02}.get
    slow, one = place.client(), publisher(place)
    slow.subscribe("a", max_queue=1, overflow="block", credit=0)
    route(place, "a")
    for n in range(2):
        one.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert one.seen() == ["ok"]
    time.sleep(0.05)  # it is the age that is tested
    place.context.sweep()
    place.turn()
    assert one.seen() == ["ok", "ok"]
    slow.subscriptions["a"].add_credit(5)
    assert slow.read() == [("age", 2)]


def test_publisher_blocked_by_its_own_subscription_resumes_by_reading(place: Place) -> None:
    one = publisher(place)
    one.subscribe("a", max_queue=1, overflow="block")
    route(place, "a")
    one.stop()
    for n in range(3):
        one.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert one.connection.parked_publishes == 1
    # An answer goes ahead of the events of its turn, and comes in the turn in which its event has found room.
    assert one.read() == ["ok", 0, 1, "ok", "ok", 2]


def test_bye_to_a_parked_publisher_follows_its_answer(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    slow.subscribe("a", max_queue=1, overflow="block")
    route(place, "a")
    slow.stop()
    for n in range(2):
        one.send(op="publish", id=n, topic="a", data=n)
    one.send(op="ping")
    one.connection.finish(1001, "going_away")
    place.turn()
    assert one.seen() == ["ok"]
    slow.read()
    assert one.seen() == ["ok", "ok", GOING_AWAY]
    assert len(one.commands) == 1


def test_change_to_block_drops_nothing(place: Place) -> None:
    slow, one = place.client(), publisher(place)
    subscription = slow.subscribe("a", max_queue=5)
    route(place, "a")
    place.publish("a", -1)
    subscription.change(max_queue=1, overflow="block", echo=True)
    slow.stop()
    for n in range(4):
        one.send(op="publish", id=n, topic="a", data=n)
    assert slow.read() == [-1, 0, 1, 2, 3]


# What may be lost


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest", "block"])
def test_loss_gap_is_sent_at_its_place(place: Place, overflow: str) -> None:
    ready, full, dry = place.client(), place.client(), place.client()
    for client in (ready, full):
        client.subscribe("a", overflow=overflow)
    lender = dry.subscribe("a", overflow=overflow, credit=0)
    full.stop()
    place.publish("a", 1, "k")
    for client in (ready, full, dry):
        for _ in range(2):
            client.subscriptions["a"].announce_loss()
    place.publish("a", 2, "l")
    lender.add_credit(5)
    for client in (ready, full, dry):
        assert client.read() == [1, ("lost", None), 2]
        assert client.subscriptions["a"].dropped == 0
    assert not ready.subscriptions["a"].behind or overflow == "block"


def test_loss_gap_is_sent_without_a_later_event(place: Place) -> None:
    client = place.client()
    client.subscribe("a").announce_loss()
    assert client.read() == [("lost", None)]


# replay


def kept(topic: str, *numbers: int) -> list[Event]:
    """Events of a history, each with its number as its offset and in its data."""
    payloads = [(n, messages.encode_event(topic, b"%d" % n, None, n)) for n in numbers]
    return [Event(topic, payload, n, len(b"%d" % n)) for n, payload in payloads]


def test_replay_queues_nothing_and_feeds_missed_events(place: Place) -> None:
    catching_up: list[Subscription] = []
    place.context.catch_up = catching_up.append
    client = place.client()
    subscription = client.subscribe("a", max_queue=3, overflow="replay")
    place.publish("a", 1, offset=1)
    place.turn()
    client.stop()
    for n in range(2, 10):
        assert place.publish("a", n, offset=n) == (1, 1, 0)
    assert (subscription.lag, subscription.cursor, subscription.newest) == (8, 1, 9)
    assert (subscription.queued, client.connection.queued_bytes) == (0, 0)
    assert client.read() == [1]
    assert catching_up == [subscription]
    assert subscription.feed(kept("a", *range(2, 10))) == 3
    # What is published meanwhile comes behind it.
    place.publish("a", 10, offset=10)
    assert (subscription.lag, subscription.queued) == (6, 3)
    assert client.read() == [1, 2, 3, 4]
    assert catching_up == [subscription] * 2
    with pytest.raises(ValueError, match="before"):
        subscription.feed(kept("a", 4))
    subscription.advance(8)
    assert subscription.feed(kept("a", 9, 10)) == 2
    assert client.read() == [1, 2, 3, 4, 9, 10]
    assert (subscription.lag, catching_up) == (0, [subscription] * 3)
    assert (subscription.state, subscription.replaying) == ("queued", True)
    subscription.end_replay()
    place.turn()
    place.publish("a", 11, offset=11)
    assert client.read()[-1] == 11
    assert (subscription.lag, subscription.behind, subscription.dropped) == (0, False, 0)
    with pytest.raises(ValueError, match="not replaying"):
        subscription.feed(kept("a", 12))
    with pytest.raises(ValueError, match="not replaying"):
        subscription.replay(1)


def test_change_from_replay_counts_missed_events_in_a_gap(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", overflow="replay")
    client.stop()
    for n in range(1, 6):
        place.publish("a", n, offset=n)
    subscription.change(max_queue=9, overflow="drop_oldest", echo=True)
    place.publish("a", 6, offset=6)
    assert client.read() == [("overflow", 5), 6]
    assert subscription.dropped == 5


def test_replay_of_a_topic_without_history_drops(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", max_queue=2, overflow="replay")
    client.stop()
    for n in range(5):
        place.publish("a", n)
    assert (subscription.lag, subscription.queued) == (0, 2)
    assert client.read() == [("overflow", 3), 3, 4]


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest", "block", "close"])
def test_recovery_leaves_events_to_history_under_any_policy(place: Place, overflow: str) -> None:
    catching_up: list[Subscription] = []
    place.context.catch_up = catching_up.append
    client = place.client()
    subscription = client.subscribe("a", max_queue=2, overflow=overflow)
    subscription.hold()
    assert (subscription.state, subscription.overflow) == ("replaying", overflow)
    for n in range(5, 9):
        assert place.publish("a", n, offset=n) == (1, 1, 0)
    place.turn()
    assert catching_up == [], "it is not known yet where it begins"
    subscription.replay(2)
    place.turn()
    assert catching_up == [subscription]
    for first in (3, 5, 7):
        assert subscription.feed(kept("a", *range(first, 9))) == 2
        place.turn()
    assert client.read() == [3, 4, 5, 6, 7, 8]
    assert catching_up == [subscription] * 4
    subscription.end_recovery()
    # An event that comes only now, and was fed already, is not sent again.
    assert (subscription.recovering, subscription.replaying) == (False, True)
    place.publish("a", 8, offset=8)
    subscription.end_replay()
    place.turn()
    assert subscription.behind == (overflow == "block")
    place.publish("a", 9, offset=9)
    assert client.read() == [3, 4, 5, 6, 7, 8, 9]


def test_recovery_waits_for_credit_but_its_end_does_not(place: Place) -> None:
    catching_up: list[Subscription] = []
    place.context.catch_up = catching_up.append
    client = place.client()
    subscription = client.subscribe("a", credit=2)
    subscription.hold()
    subscription.replay(0, 3)
    place.turn()
    assert subscription.room == 2
    assert subscription.feed(kept("a", 1, 2, 3)) == 2
    assert client.read() == [1, 2]
    assert (subscription.state, catching_up) == ("no_credit", [subscription])
    subscription.add_credit(1)
    place.turn()
    assert subscription.feed(kept("a", 3)) == 1
    assert client.read() == [1, 2, 3]
    assert (subscription.credit, subscription.state, catching_up) == (0, "replaying", [subscription] * 3)
    subscription.end_replay()
    assert subscription.state == "no_credit"


def test_recovery_of_a_subscription_forgets_what_is_queued(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", max_queue=2)
    client.stop()
    for n in range(1, 5):
        place.publish("a", n, offset=n)
    subscription.hold()
    assert (subscription.queued, place.context.queued, client.connection.queued_bytes) == (0, 0, 0)
    subscription.replay(3, 4)
    assert subscription.feed(kept("a", 4)) == 1
    assert client.read() == [4]


def test_numbering_that_begins_anew_is_fed_from_its_beginning(place: Place) -> None:
    client = place.client()
    subscription = client.subscribe("a", overflow="replay")
    client.stop()
    place.publish("a", 41, offset=41)
    place.publish("a", 1, offset=1)
    assert (subscription.cursor, subscription.newest, subscription.lag) == (0, 1, 1)


def test_connection_does_not_finish_before_its_replay(place: Place) -> None:
    catching_up: list[Subscription] = []
    place.context.catch_up = catching_up.append
    client = place.client()
    subscription = client.subscribe("a")
    subscription.hold()
    subscription.replay(0, 1)
    client.connection.finish(1001, "going_away")
    place.turn()
    assert client.connection.state_name == "finishing"
    subscription.feed(kept("a", 1))
    place.turn()
    subscription.end_replay()
    assert client.read() == [1, (1001).to_bytes(2, "big") + b"going_away"]


# Who is behind


def test_lagging_client_is_reported_once_and_again_when_caught_up(place: Place) -> None:
    told: list[tuple[Connection, bool]] = []
    place.context.on_lagging = lambda connection, behind: told.append((connection, behind))
    client, brief = place.client(), place.client()
    for peer in (client, brief):
        peer.subscribe("a")
        peer.stop()
        place.publish("a", 1)
    brief.read()
    deadline = time.monotonic() + 30
    place.context.sweep()
    assert told == []
    assert place.context.lagging_connections == 1
    while not told and time.monotonic() < deadline:
        place.context.sweep()
    place.context.sweep()
    assert told == [(client.connection, True)]
    client.read()
    place.context.sweep()
    place.context.sweep()
    assert told == [(client.connection, True), (client.connection, False)]
    assert place.context.lagging_connections == 0


def test_client_that_catches_up_between_sweeps_is_not_reported(place: Place) -> None:
    told: list[bool] = []
    place.context.on_lagging = lambda connection, behind: told.append(behind)
    burst, fed = place.client(), place.client()
    burst.subscribe("a")
    lender = fed.subscribe("a", credit=0)
    end = time.monotonic() + 1.3  # that is how long one has to be behind
    burst.stop()
    place.publish("a", 1)
    while time.monotonic() < end:
        place.context.sweep()  # at which they are behind
        burst.read()
        lender.add_credit(1)
        fed.read()
        burst.stop()
        place.publish("a", 1)
        time.sleep(0.01)
    assert place.context.lagging_connections == 2
    assert told == []


# The token bucket


def test_token_bucket_allows_a_burst_and_then_gives_the_wait() -> None:
    token_bucket = TokenBucket(100, 3)
    assert [token_bucket.take() for _ in range(3)] == [0, 0, 0]
    wait = token_bucket.take()
    assert 0 < wait <= 0.01
    time.sleep(wait)  # as it was told
    assert token_bucket.take() == 0
    token_bucket.change(0.001, 1)
    assert (token_bucket.rate, token_bucket.burst) == (0.001, 1)
    assert token_bucket.take() > 100
    with pytest.raises(ValueError, match="positive"):
        token_bucket.change(0, 1)
    with pytest.raises(ValueError, match="positive"):
        TokenBucket(0, 1)


def test_intake_limit_counts_commands_and_bytes() -> None:
    intake = IntakeLimit(0.001, 3, 0, 1)
    assert [intake.take(10**9) for _ in range(3)] == [0, 0, 0], "no limit of bytes"
    assert 900 < intake.take(1) <= 1000
    intake = IntakeLimit(0, 1, 0.001, 100)
    assert [intake.take(60) for _ in range(2)] == [0, 0], "the last one may be larger than what is left"
    assert 20_000 < intake.take(1) <= 21_000
    intake.change(0, 1, 0, 1)
    assert intake.take(10**9) == 0
    for wrong in ((-1, 1, 0, 1), (0, 0.5, 0, 1), (0, 1, -1, 1), (0, 1, 0, 0), (float("nan"), 1, 0, 1)):
        with pytest.raises(ValueError, match="a rate is not negative"):
            IntakeLimit(*wrong)


def test_fast_path_obeys_the_intake_limit(place: Place) -> None:
    peer = place.client()
    intake = IntakeLimit(0.001, 3, 0, 1)
    intake.path, intake.refused = place.hub.routes, 7
    peer.connection.routes = intake
    route(place, "a")
    for n in range(5):
        peer.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert peer.seen() == ["ok", "ok", "ok"]
    assert len(peer.commands) == 2
    assert (place.context.fast_publishes, intake.refused) == (3, 0)


def test_fast_path_obeys_the_token_bucket(place: Place) -> None:
    peer = place.client()
    peer.connection.token_bucket = TokenBucket(0.001, 2, place.hub.routes)
    route(place, "a")
    for n in range(4):
        peer.send(op="publish", id=n, topic="a", data=n)
    place.turn()
    assert peer.seen() == ["ok", "ok"]
    assert len(peer.commands) == 2
    assert place.context.fast_publishes == 2
