"""An audience: who gets an event, once each, and how what one turn brings for it goes out together."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker._speedups import Audience, Connection, Filter, LoopContext, RouteCache, Subscription
from broker.config import Limits
from broker.hub import Hub
from broker.messages import encode_event
from tests.speedups.model import World
from tests.speedups.transports import SlowPipe, SlowSocket
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import TEXT, examples, server_frames

SIZES = st.integers(0, 90_000)


@pytest.fixture
def world() -> Iterator[World]:
    world = World(Loop())
    yield world
    world.end()


# The batch


def test_events_of_a_turn_are_sent_in_one_write(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    for topic in ("a", "b.*", ">"):
        world.subscribe(client, topic)
    world.turn()
    writes = client.transport.writes
    numbers = [world.publish(topic) for topic in ("a", "b.c", "d", "a", "b.c", "e.f") for _ in range(8)]
    assert client.transport.writes == writes
    world.turn()
    assert client.transport.writes == writes + 1
    assert sorted(client.stream) == numbers


def test_batch_size_is_bounded(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    world.turn()
    numbers = [world.publish("a", 9000) for _ in range(16)]
    # Two batches of seven events each are out before the turn has ended.
    assert client.stream == numbers[:14]
    world.turn()
    assert client.stream == numbers


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
@given(sizes=st.lists(st.tuples(st.sampled_from(["a", "b"]), SIZES), max_size=12))
@examples(100)
def test_each_event_is_sent_once_for_any_batch_size(kind: type[SlowPipe], sizes: list[tuple[str, int]]) -> None:
    world = World(Loop())
    clients = [world.connect(kind(world.loop)) for _ in range(3)]
    for client in clients:
        world.subscribe(client, "*", 20)
        client.transport.drain(None)
    numbers = [world.publish(topic, size) for topic, size in sizes]
    world.end()
    assert all(sorted(client.stream) == numbers for client in clients)


def test_audience_flushed_within_a_turn_is_flushed_again_at_its_end(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    first = world.publish("a")
    other = world.connect(SlowPipe(world.loop))
    world.subscribe(other, "a")
    world.subscribe(other, "b")
    second = world.publish("a")
    third = world.publish("b")
    world.turn()
    assert client.stream == [first, second]
    assert other.stream == [second, third]


def test_event_without_subscribers_sends_nothing(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    world.turn()
    writes = client.transport.writes
    world.publish("b")
    world.turn()
    assert client.transport.writes == writes
    assert world.context.published == 1
    assert world.context.delivered == 0


class BrokenPipe(Pipe):
    """A transport that fails when it is written to."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("topics", [["a"], ["a", "b"], ["a", "a"]], ids=["one batch", "two batches", "two events"])
@pytest.mark.parametrize("place", range(3))
def test_failure_of_one_member_does_not_affect_others(topics: list[str], place: int) -> None:
    loop = Loop()
    context = loop.context()
    hub = Hub(context)
    pipes = [BrokenPipe() if i == place else Pipe() for i in range(3)]
    kept = []
    for pipe in pipes:
        connection = Connection(context)
        connection.start(pipe)
        kept += [
            hub.subscribe(connection, topic, max_queue=9, overflow="drop_oldest", echo=True) for topic in set(topics)
        ]
    for topic in topics:
        hub.audience(topic).publish(topic, encode_event(topic, b"1"))
    loop.turn()
    assert [str(fault["exception"]) for fault in loop.faults] == ["broken"]
    for i, pipe in enumerate(pipes):
        assert len(server_frames(pipe.take())) == (0 if i == place else len(topics))
    # Nothing of it is left behind: the next event finds who is still there.
    hub.audience("a").publish("a", encode_event("a", b"2"))
    loop.turn()
    assert [len(server_frames(pipe.take())) for pipe in pipes] == [i != place for i in range(3)]
    assert len(loop.faults) == 1
    for pipe in pipes:
        pipe.lose()


def test_failed_audience_leaves_nothing_behind() -> None:
    context = Loop().context()
    known = Filter("a")
    with pytest.raises(TypeError):
        Audience(context, (known, "b"))  # type: ignore[arg-type]
    connection = Connection(context)
    connection.start(Pipe())
    Subscription(connection, known, max_queue=1).cancel()  # would tell it


def test_the_counters_count_deliveries_and_bytes(world: World) -> None:
    clients = [world.connect(kind(world.loop)) for kind in (SlowPipe, SlowSocket, SlowSocket)]
    for client in clients:
        world.subscribe(client, "a", 2)
    clients[0].transport.block()
    for size in (10, 10, 300, 9000, 10, 10, 10):
        world.publish("a", size)
    world.turn()
    for _ in range(5):
        for client in clients:
            client.transport.drain(None)
        world.turn()
    for client in clients:
        client.transport.drain(None)
    assert world.context.published == 7
    assert world.context.delivered + sum(world.context.dropped_events.values()) == 3 * 7
    assert world.context.bytes_out == sum(len(client.transport.received) for client in clients)


# The members


def test_connection_is_a_member_under_its_most_specific_subscription(world: World) -> None:
    client, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    interests = [world.subscribe(client, topic).native for topic in (">", "a.b", "a.*", "*.b")]
    foreign = world.subscribe(other, "a.>").native
    audience = world.hub.audience("a.b")
    assert [found.topic for found in audience.filters] == ["a.b", "a.*", "a.>", "*.b", ">"]
    assert audience.receivers == 2
    assert set(audience.subscriptions()) == {interests[1], foreign}
    numbers = [world.publish("a.b") for _ in range(3)]
    client.drop(client.interests["a.b"])
    audience = world.hub.audience("a.b")
    assert set(audience.subscriptions()) == {interests[2], foreign}
    numbers += [world.publish("a.b") for _ in range(3)]
    world.turn()
    assert client.stream == other.stream == numbers


@given(
    plan=st.lists(
        st.tuples(st.sets(st.integers(0, 2)), st.booleans(), st.booleans()),
        max_size=8,
    )
)
@examples(150)
def test_members_are_the_subscribed_connections_without_duplicates(
    plan: list[tuple[set[int], bool, bool]],
) -> None:
    """Whatever part of them is behind: those stand at the other end of the array."""
    loop = Loop()
    context = loop.context()
    filters = [Filter(name) for name in ("a.b", "a.*", ">")]
    audience = Audience(context, tuple(filters))
    pipes, expected, behind = [], set(), 0
    for chosen, blocked, _ in plan:
        pipe = SlowPipe(loop)
        pipes.append(pipe)
        connection = Connection(context)
        pipe.attach(connection)
        if blocked:
            connection.pause_writing()
        own = [Subscription(connection, filters[index], max_queue=5) for index in sorted(chosen, reverse=True)]
        if own:
            expected.add(own[-1])
            behind += blocked
        pipe.subscriptions = own
    payload = encode_event("a.b", b"[0]")
    assert audience.receivers == len(expected)
    assert set(audience.subscriptions()) == expected
    assert audience.publish("a.b", payload) == (len(expected), behind, 0)
    loop.turn()
    # Some recover now, and others fall behind.
    for pipe, (_, blocked, changes) in zip(pipes, plan, strict=True):
        if changes:
            (pipe.protocol.resume_writing if blocked else pipe.protocol.pause_writing)()
    loop.turn()
    behind = sum(each.behind for each in expected)
    assert behind == sum(bool(chosen) and blocked != changes for chosen, blocked, changes in plan)
    assert set(audience.subscriptions()) == expected
    assert audience.publish("a.b", payload) == (len(expected), behind, 0)
    loop.turn()
    for pipe, (chosen, blocked, changes) in zip(pipes, plan, strict=True):
        if blocked != changes:
            pipe.protocol.resume_writing()
            loop.turn()
        assert server_frames(bytes(pipe.received)) == [(TEXT, payload)] * 2 * bool(chosen)
        pipe.lose()
    assert context.subscriptions == context.connections == 0


def test_subscriber_added_within_a_turn_gets_later_events_only(world: World) -> None:
    client, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    numbers = [world.publish("a")]
    for topic in ("a", "*", ">"):  # one that joins the audience, and patterns that change which audience it is
        world.subscribe(other, topic)
        numbers.append(world.publish("a"))
    world.turn()
    assert client.stream == numbers
    assert other.stream == numbers[1:]


def test_subscriber_removed_within_a_turn_gets_earlier_events(world: World) -> None:
    client, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    for topic in ("a", "*"):
        world.subscribe(client, topic)
    world.subscribe(other, "a")
    numbers = []
    for topic in ("a", "*"):
        numbers.append(world.publish("a"))
        client.drop(client.interests[topic])
    numbers.append(world.publish("a"))
    world.turn()
    assert client.stream == numbers[:2]
    assert other.stream == numbers


def test_closed_connection_is_removed_from_pending_batches(world: World) -> None:
    clients = [world.connect(SlowPipe(world.loop)) for _ in range(4)]
    for client in clients:
        world.subscribe(client, "a")
        world.subscribe(client, "b")
    first = [world.publish("a"), world.publish("b")]
    clients[0].connection.close(1000, "")
    clients[1].transport.lose()
    clients[2].connection.abort()
    second = [world.publish("a"), world.publish("b")]
    world.turn()
    third = world.publish("a")
    world.turn()
    assert sorted(clients[3].stream) == [*first, *second, third]
    assert sorted(clients[0].stream) == first


def test_audience_survives_its_members_and_filters_survive_audiences(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    a, b = Filter("a"), Filter("b")
    audiences = [Audience(world.context, (a, b)) for _ in range(5)]
    subscription = Subscription(client.connection, a, max_queue=5)
    assert [audience.receivers for audience in audiences] == [1] * 5
    del audiences[1], audiences[2]
    subscription.cancel()
    assert [audience.receivers for audience in audiences] == [0] * 3
    references = sys.getrefcount(a), sys.getrefcount(b)
    audiences.clear()
    assert (sys.getrefcount(a), sys.getrefcount(b)) == (references[0] - 3, references[1] - 3)
    Subscription(client.connection, b, max_queue=5)  # it goes at once: nobody holds it
    assert b.subscribers == 0
    assert world.context.subscriptions == 0


# Who must not see his own


def test_publisher_without_echo_gets_all_other_events_in_order(world: World) -> None:
    publisher, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    interest = world.subscribe(publisher, "a", echo=False)
    world.subscribe(other, "a")
    expected = []
    for origin in (other, publisher, other, other, publisher, publisher, other):
        number = world.publish("a", 10, origin, fast=True)
        if origin is other:
            expected.append(number)
    world.turn()
    assert publisher.stream == expected
    assert len(other.stream) == 7
    assert not interest.native.behind, "set apart for this turn alone"


def test_echo_of_the_most_specific_subscription_applies(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a.*", echo=False)
    world.subscribe(client, "a.b", echo=True)
    seen, unseen = world.publish("a.b", 0, client), world.publish("a.c", 0, client)
    world.turn()
    assert client.stream == [seen]
    assert unseen not in client.stream
    world.subscribe(client, "a.b", echo=False)
    world.publish("a.b", 0, client)
    client.drop(client.interests["a.b"])
    world.subscribe(client, "a.*", echo=True)
    last = world.publish("a.b", 0, client)
    world.turn()
    assert client.stream == [seen, last]


def test_echo_change_applies_to_later_events_only(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", echo=True)
    first = world.publish("a", 0, client)
    world.subscribe(client, "a", echo=False)
    world.publish("a", 0, client)
    world.subscribe(client, "a", echo=True)
    third = world.publish("a", 0, client)
    world.turn()
    assert client.stream == [first, third]


def test_full_queue_of_a_publisher_without_echo_is_sent_before_dropping(world: World) -> None:
    """Nothing is lost while the socket has room, however small the queue and long the turn."""
    publisher, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    world.subscribe(publisher, "a", 2, "close", echo=False)
    world.publish("a", 0, publisher)
    numbers = [world.publish("a", 0, other) for _ in range(20)]
    world.turn()
    assert publisher.stream == numbers


# What is shared and what stays


@pytest.fixture
def readers() -> Iterator[tuple[Loop, LoopContext, list[SlowPipe], Audience]]:
    """Fifty subscribers of one topic; all of them but the first have stopped reading."""
    loop = Loop()
    context = loop.context()
    topic = Filter("a")
    pipes = [SlowPipe(loop) for _ in range(50)]
    for pipe in pipes:
        pipe.attach(Connection(context))
        pipe.subscriptions = [Subscription(pipe.protocol, topic, max_queue=20)]
    for pipe in pipes[1:]:
        pipe.protocol.pause_writing()
    yield loop, context, pipes, Audience(context, (topic,))
    for pipe in pipes:
        pipe.lose()
    assert context.subscriptions == context.connections == context.queued == 0


Readers = tuple[Loop, LoopContext, list[SlowPipe], Audience]


def test_event_queued_for_many_is_stored_once(readers: Readers) -> None:
    loop, context, _, audience = readers
    before = sys.getallocatedblocks()
    for _ in range(10):
        audience.publish("a", encode_event("a", b"[0]"))
    loop.turn()
    assert context.queued == 490
    # An event is an object and its frame; and then there is what a turn of the loop leaves in caches.
    assert sys.getallocatedblocks() - before < 50


@pytest.mark.parametrize("fast", [False, True])
def test_topics_and_keys_are_freed(readers: Readers, fast: bool) -> None:
    loop, _, pipes, audience = readers
    topic, key = "a.topic.of.its.own", b"a key of its own"
    references = sys.getrefcount(topic), sys.getrefcount(key)
    if fast:
        routes = pipes[0].protocol.routes = RouteCache()
        routes.install(topic, audience, b'{"op":"event","topic":"a.topic.of.its.own"')
        pipes[0].send(TEXT, b'{"op":"publish","topic":"a.topic.of.its.own","key":"k","data":[0]}')
    else:
        assert audience.publish(topic, encode_event(topic, b"[0]", key.decode()), key) == (50, 49, 0)
    assert sys.getrefcount(topic) > references[0]
    loop.turn()
    assert pipes[0].received
    for pipe in pipes:
        pipe.lose()
    if fast:
        routes.clear()
    assert (sys.getrefcount(topic), sys.getrefcount(key)) == references


def test_context_with_unused_audiences_is_garbage_collected() -> None:
    loop = Loop()
    context = LoopContext(loop.as_loop(), Limits(), encode_gap=lambda *_: b"")
    audience = Audience(context, (Filter("a"),))
    assert audience.publish("a", b"{}") == (0, 0, 0)
    references = sys.getrefcount(context)
    del audience
    gc.collect()
    assert sys.getrefcount(context) == references - 1
