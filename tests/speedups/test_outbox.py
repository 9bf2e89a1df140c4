"""What waits for one client: the queues of its subscriptions, their bounds and policies, and the stream it reads."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker._speedups import Connection, Filter, Subscription
from broker.hub import Hub
from tests.speedups.model import MAX_ANSWERS, Client, Interest, World
from tests.speedups.transports import RoomySocket, SlowPipe, SlowSocket, Turning, UvloopSocket, UvloopTurns
from tests.speedups.turns import Loop
from tests.speedups.wire import CLOSE, THREADS, TIMES, server_frames

TOPICS = ["a", "a.b", "a.c", "a.b.c", "b"]
PATTERNS = [*TOPICS, "a.*", "a.>", ">", "*", "*.b", "a.*.c"]
SIZES = [0, 1, 90, 500, 2230, 2300, 9000, 70_000]
"""Of data, in bytes: around what a small socket takes at once, and above what one batch holds."""
POLICIES = ["drop_oldest", "drop_newest", "close"]

CHANGES = ["cancel", "echo", "overflow", "max_queue"]
ENDS = ["close", "finish", "abort", "fin", "lose"]

BOUNDS = [1, 2, 3, 5, 20]
WINDOWS = [0, 0, 0, 15, 15, 12]
"""Of clients, in bits: half of them did not agree to compression, and one in six to less than the full window."""

indexes = st.integers(0, 7)


@pytest.fixture
def world() -> Iterator[World]:
    world = World(Loop())
    yield world
    world.end()


# The model


class Traffic(RuleBasedStateMachine):
    """Clients that come, go, subscribe, publish, and read as slowly as they like."""

    kinds: Any = (SlowPipe, SlowSocket, RoomySocket)
    max_outbox = 1 << 30
    exact = True
    threads = THREADS

    @initialize(
        first=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(PATTERNS), st.sampled_from(WINDOWS)), max_size=3)
    )
    def begin(self, first: list[tuple[int, str, int]]) -> None:
        self.loop = self.new_loop()
        self.wide = False
        self.world = World(self.loop, max_outbox=self.max_outbox, exact=self.exact, threads=self.threads)
        for kind, topic, window_bits in first:
            self.connect(kind, topic, 2, window_bits)

    def new_loop(self) -> Turning:
        return Loop()

    # Who is there.

    @rule(
        kind=st.integers(0, 2),
        topic=st.sampled_from(PATTERNS),
        max_queue=st.sampled_from(BOUNDS),
        window_bits=st.sampled_from(WINDOWS),
    )
    def connect(self, kind: int, topic: str, max_queue: int, window_bits: int) -> None:
        if len(self.world.clients) < 5:
            client = self.world.connect(self.kinds[kind % len(self.kinds)](self.loop), window_bits)
            self.world.subscribe(client, topic, max_queue, "drop_oldest", True)

    @rule(
        who=indexes,
        topic=st.sampled_from(PATTERNS),
        max_queue=st.sampled_from(BOUNDS),
        overflow=st.sampled_from(POLICIES),
        echo=st.booleans(),
    )
    def subscribe(self, who: int, topic: str, max_queue: int, overflow: str, echo: bool) -> None:
        if (client := self.present(who)) is not None:
            self.world.subscribe(client, topic, max_queue, overflow, echo)

    @rule(
        who=indexes,
        which=indexes,
        max_queue=st.sampled_from(BOUNDS),
        overflow=st.sampled_from(POLICIES[:2]),
        echo=st.booleans(),
    )
    def change(self, who: int, which: int, max_queue: int, overflow: str, echo: bool) -> None:
        if (interest := self.some_interest(who, which)) is not None:
            self.world.subscribe(interest.client, interest.topic, max_queue, overflow, echo)

    @rule(who=indexes, which=indexes)
    def unsubscribe(self, who: int, which: int) -> None:
        if (interest := self.some_interest(who, which)) is not None:
            interest.client.drop(interest)

    @rule(who=indexes)
    def close(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.connection.close(1000, "")

    @rule(who=indexes)
    def finish(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            self.world.finish(client)

    @rule(who=indexes)
    def lose(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.lose()

    @rule(who=indexes, aborts=st.booleans())
    def end(self, who: int, aborts: bool) -> None:
        """The client sends no more and still reads, or the broker ends the connection at once."""
        if (client := self.present(who)) is None:
            return
        if aborts:
            self.world.abort(client)
        else:
            self.world.end_writing(client)

    @rule(who=indexes)
    def vanish(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.vanished = True
            client.transport.vanish()

    # What is said.

    @rule(topic=st.sampled_from(TOPICS), size=st.sampled_from(SIZES), who=st.none() | indexes, fast=st.booleans())
    def publish(self, topic: str, size: int, who: int | None, fast: bool) -> None:
        """By the lane that is asked for, as far as there is a publisher whose lane it is."""
        self.world.publish(topic, size, None if who is None else self.present(who), fast)

    @rule(
        topics=st.lists(st.sampled_from(TOPICS), min_size=1, max_size=3),
        size=st.sampled_from(SIZES),
        count=st.integers(2, 40),
        who=st.none() | indexes,
        fast=st.booleans(),
    )
    def burst(self, topics: list[str], size: int, count: int, who: int | None, fast: bool) -> None:
        """Much in one turn."""
        origin = None if who is None else self.present(who)
        for number in range(count):
            self.world.publish(topics[number % len(topics)], size, origin, fast)

    @rule(how=st.integers(0, 3), count=st.sampled_from([40, 1200, 1700]))
    def publish_widely(self, how: int, count: int) -> None:
        """Seldom, as it takes its time: more topics in one turn than a write has pieces."""
        if how == 0 and not self.wide:
            self.wide = True
            self.world.publish_widely(count)

    @rule(
        who=indexes,
        which=indexes,
        topics=st.lists(st.sampled_from(TOPICS), min_size=1, max_size=3),
        size=st.sampled_from(SIZES),
        how=st.sampled_from(CHANGES + ENDS),
        drains=st.booleans(),
    )
    def interrupt(self, who: int, which: int, topics: list[str], size: int, how: str, drains: bool) -> None:
        """Batches are under way as a subscription or its connection ends or changes, and others follow."""
        if (interest := self.some_interest(who, which)) is None:
            return
        client = interest.client
        for topic in topics:
            self.world.publish(topic, size)
        max_queue, overflow, echo = interest.max_queue, interest.overflow, interest.echo
        if how == "cancel":
            client.drop(interest)
        elif how in ("echo", "overflow", "max_queue"):
            policy = POLICIES[(POLICIES.index(overflow) + 1) % 2]
            self.world.subscribe(
                client,
                interest.topic,
                1 if how == "max_queue" else max_queue,
                policy if how == "overflow" else overflow,
                echo != (how == "echo"),
            )
        elif how == "close":
            client.connection.close(1000, "")
        elif how == "finish":
            self.world.finish(client)
        elif how == "abort":
            self.world.abort(client)
        elif how == "fin":
            self.world.end_writing(client)
        else:
            client.transport.lose()
        self.world.account()
        for _ in range(2):
            for topic in topics:
                self.world.publish(topic, size)
            if drains:
                self.world.context.flush_batches()
                client.transport.drain(None)
                self.world.account()

    @rule(who=indexes, size=st.integers(0, 120))
    def answer(self, who: int, size: int) -> None:
        """Something ahead of events, so that sockets are full at every place of a frame."""
        if (client := self.present(who)) is not None:
            client.connection.answer(b'{"op":"pong"}' + b" " * size)

    # What the sockets do.

    @rule(who=indexes)
    def block(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.block()

    @rule(who=indexes, which=indexes, count=st.integers(0, 12))
    def fall_behind(self, who: int, which: int, count: int) -> None:
        """A socket that is full, and something that waits for it."""
        interest = self.some_interest(who, which)
        if interest is not None and interest.topic in TOPICS and not interest.client.vanished:
            fall_behind(self.world, interest.client, interest.topic)
            for _ in range(count):
                self.world.publish(interest.topic, 40)

    @rule(who=indexes, size=st.sampled_from([1, 2, 3, 30, 200, 2240, 5000, 100_000]))
    def drain(self, who: int, size: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.drain(size)

    @rule(who=indexes)
    def unblock(self, who: int) -> None:
        if (client := self.present(who)) is not None:
            client.transport.drain(None)

    @rule()
    def turn(self) -> None:
        self.world.turn()

    @rule()
    def flush(self) -> None:
        """What the hub does before the audience of a topic changes."""
        self.world.context.flush_batches()

    @invariant()
    def hold(self) -> None:
        """The bounds hold, the counters are right, and so is all that has been read."""
        if hasattr(self, "world"):
            self.world.account()
            for client in self.world.clients:
                client.read()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        transports = [client.transport for client in self.world.clients]
        try:
            self.world.end()
            self.world.forget()
        finally:
            for transport in transports:
                transport.discard()

    def present(self, who: int) -> Client | None:
        clients = [client for client in self.world.clients if not client.gone]
        return clients[who % len(clients)] if clients else None

    def some_interest(self, who: int, which: int) -> Interest | None:
        client = self.present(who)
        interests = list(client.interests.values()) if client is not None else []
        return interests[which % len(interests)] if interests else None


class TightTraffic(Traffic):
    """The same with so little memory for a connection that it is the bound in bytes that decides."""

    max_outbox = 6000
    exact = False


class UvloopTraffic(Traffic):
    """The same on uvloop, whose transports send on their own account too, so that nothing can be foretold."""

    kinds: Any = (UvloopSocket,)
    exact = False

    def new_loop(self) -> Turning:
        self.turns = UvloopTurns()
        return self.turns

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.turns.loop.close()


class ThreadedTraffic(Traffic):
    """The same with threads that send."""

    threads = 3


@pytest.mark.parametrize("traffic", [Traffic, TightTraffic, UvloopTraffic, ThreadedTraffic])
def test_outbox_behaves_like_the_model(traffic: type[Traffic]) -> None:
    # Each example ends with a full collection. What was there before it is left out of that: it would take most of the
    # time.
    gc.collect()
    gc.freeze()
    try:
        case: Any = traffic.TestCase
        case.settings = settings(
            max_examples=int(150 * TIMES),
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # To shrink a failure takes minutes, longer than a test may take: that is left to `make fuzz`.
            phases=(Phase.reuse, Phase.generate, *([Phase.shrink] if TIMES > 1 else [])),
        )
        case("runTest").runTest()
    finally:
        gc.unfreeze()


# The policies, one by one


def fall_behind(world: World, client: Client, topic: str = "a") -> int:
    """Let a client stop reading, so that what comes from now on waits. Returns the number of an event that does not."""
    client.transport.block()
    first = world.publish(topic, 9000)
    world.turn()
    return first


def catch_up(world: World, client: Client) -> list[Any]:
    """Let a client read all there is. Returns its events and gaps."""
    client.transport.drain(None)
    while client.connection.blocked:
        world.turn()
        client.transport.drain(None)
    world.turn()
    client.transport.drain(None)
    return client.stream


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
@pytest.mark.parametrize(
    ("overflow", "read"),
    [("drop_oldest", ["gap 3", 3, 4, 5]), ("drop_newest", [0, 1, 2, "gap 3"])],
)
def test_gap_stands_where_the_dropped_events_would_have_stood(
    world: World, kind: type[SlowPipe], overflow: str, read: list[Any]
) -> None:
    client = world.connect(kind(world.loop))
    interest = world.subscribe(client, "a", 3, overflow)
    first = fall_behind(world, client)
    numbers = [world.publish("a") for _ in range(6)]
    world.turn()
    assert interest.native.queued == 3
    assert interest.native.dropped == 3
    assert world.context.dropped_events[overflow, "overflow"] == 3
    assert catch_up(world, client) == [first, *(numbers[item] if isinstance(item, int) else item for item in read)]
    assert not interest.native.behind


@pytest.mark.parametrize("before", range(9))
def test_queue_keeps_its_order_when_the_ring_grows(world: World, before: int) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 100)
    numbers = []
    for count in (before, 40):
        numbers.append(fall_behind(world, client))
        numbers += [world.publish("a") for _ in range(count)]
        assert catch_up(world, client) == numbers
        client.transport.block()


def test_gap_names_subscription_count_and_reason(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a.*", 1)
    fall_behind(world, client, "a.b")
    for topic in ("a.b", "a.c", "a.d"):
        world.publish(topic)
    catch_up(world, client)
    gap = server_frames(bytes(client.transport.received))[-2][1]
    assert gap == b'{"op":"gap","topic":"a.*","missed":2,"reason":"overflow"}'


def test_drops_before_and_after_a_queued_event_are_separate_gaps(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 2, "drop_newest")
    first = fall_behind(world, client)
    waiting = [world.publish("a") for _ in range(5)][:2]
    # From here on it is the other end of the queue that gives way.
    world.subscribe(client, "a", 2, "drop_oldest")
    last = world.publish("a")
    assert catch_up(world, client) == [first, "gap 1", waiting[1], "gap 3", last]


def test_drops_before_a_dropped_event_are_merged_into_its_gap(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 1, "drop_newest")
    first = fall_behind(world, client)
    waiting, *_ = [world.publish("a") for _ in range(4)]
    world.subscribe(client, "a", 3, "drop_newest")
    for _ in range(2):
        world.publish("a")
    world.subscribe(client, "a", 1, "drop_newest")
    assert catch_up(world, client) == [first, waiting, "gap 5"]


def test_close_policy_closes_the_client_at_the_end_of_the_turn(world: World) -> None:
    client, other = world.connect(SlowPipe(world.loop)), world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 2, "close")
    world.subscribe(other, "a", 2)
    fall_behind(world, client)
    for _ in range(4):
        world.publish("a")
    assert client.connection.close_pending
    taking_part = [not client.gone]
    world.turn()
    assert [*taking_part, not client.gone] == [True, False]
    assert world.context.queued == 0
    client.transport.drain(None)
    world.turn()
    assert server_frames(bytes(client.transport.received))[-1] == (CLOSE, (4000).to_bytes(2, "big") + b"slow_consumer")
    assert len(other.stream) == 5


def test_client_closed_as_slow_gets_no_bye(world: World) -> None:
    """It lost events that no gap will count: 1001 would say that it got them all."""
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 1, "close")
    fall_behind(world, client)
    for _ in range(2):
        world.publish("a")
    client.connection.finish(1001, "going_away")
    client.transport.drain(None)
    world.turn()
    assert server_frames(bytes(client.transport.received))[-1][1].startswith((4000).to_bytes(2, "big"))


@pytest.mark.parametrize(
    ("overflow", "read"),
    [("drop_oldest", ["gap 4", 4, 5]), ("drop_newest", [0, 1, "gap 4"])],
)
def test_change_applies_the_new_bound_to_queued_events(world: World, overflow: str, read: list[Any]) -> None:
    client = world.connect(SlowPipe(world.loop))
    interest = world.subscribe(client, "a", 10)
    first = fall_behind(world, client)
    numbers = [world.publish("a") for _ in range(6)]
    world.subscribe(client, "a", 2, overflow)
    assert (interest.native.max_queue, interest.native.overflow, interest.native.queued) == (2, overflow, 2)
    assert catch_up(world, client) == [first, *(numbers[item] if isinstance(item, int) else item for item in read)]


def test_change_to_close_closes_a_client_over_the_bound(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a", 10)
    fall_behind(world, client)
    for _ in range(3):
        world.publish("a")
    world.subscribe(client, "a", 3, "close")
    assert not client.connection.close_pending
    world.subscribe(client, "a", 2, "close")
    world.turn()
    assert client.gone


def test_max_outbox_applies_the_policy_of_the_incoming_event() -> None:
    world = World(Loop(), max_outbox=3000, exact=False)
    client = world.connect(SlowPipe(world.loop))
    oldest = world.subscribe(client, "a", 100, "drop_oldest").native
    newest = world.subscribe(client, "b", 100, "drop_newest").native
    fall_behind(world, client)
    for _ in range(2):
        world.publish("a", 1000)
    world.publish("b", 500)
    assert (oldest.queued, newest.queued) == (2, 1)
    assert 2600 < client.connection.queued_bytes < 2700
    world.publish("b", 500)
    assert (oldest.queued, newest.queued, newest.dropped) == (2, 1, 1)
    world.publish("a", 1000)
    assert (oldest.queued, oldest.dropped, newest.queued) == (2, 1, 1)
    # One that is too large for all that it may throw out of its own queue goes too, and nothing of others' goes.
    world.publish("a", 2600)
    assert (oldest.queued, oldest.dropped, newest.queued) == (0, 4, 1)
    world.account()
    catch_up(world, client)
    world.end()


def test_unsubscribe_discards_the_queue(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    interest = world.subscribe(client, "a", 3)
    first = fall_behind(world, client)
    for _ in range(5):
        world.publish("a")
    client.drop(interest)
    assert world.context.queued == 0
    assert client.connection.queued_bytes == 0
    assert catch_up(world, client) == [first]


def test_ended_subscription_cannot_be_changed_and_can_end_again(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    native = world.subscribe(client, "a").native
    client.drop(client.interests["a"])
    native.cancel()
    assert native.connection is None
    with pytest.raises(ValueError, match="ended"):
        native.change(max_queue=1, overflow="drop_oldest", echo=True)


def test_failed_subscription_leaves_nothing_behind(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    a = Filter("a")
    with pytest.raises(KeyError):
        Subscription(client.connection, a, max_queue=1, overflow="no such policy")
    with pytest.raises(ValueError, match="open"):
        Subscription(Connection(world.context), a, max_queue=1)
    assert a.subscribers == 0
    assert world.context.subscriptions == 0


# The lane


def test_answers_are_sent_before_events(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    first = fall_behind(world, client)
    second = world.publish("a")
    client.connection.answer(b'{"op":"pong"}')
    assert catch_up(world, client) == [first, second]
    ops = [json.loads(payload)["op"] for _, payload in server_frames(bytes(client.transport.received))]
    assert ops == ["ok", "event", "pong", "event"]


def test_client_that_does_not_read_answers_is_closed(world: World) -> None:
    client = world.connect(SlowPipe(world.loop))
    client.transport.block()
    client.connection.answer(b'{"op":"pong"}')
    world.turn()
    while client.connection.queued_bytes <= MAX_ANSWERS:
        assert not client.connection.close_pending
        client.connection.answer(b'{"op":"pong"}' + b" " * 4000)
    world.turn()
    client.transport.drain(None)
    world.turn()
    assert server_frames(bytes(client.transport.received))[-1] == (CLOSE, (4003).to_bytes(2, "big") + b"not_reading")


def test_answers_of_one_turn_are_bounded(world: World) -> None:
    """One turn may read megabytes of commands from a client that reads no answer: the bound holds before its end."""
    client = world.connect(SlowPipe(world.loop))
    client.transport.block()
    for _ in range(2000):
        client.connection.answer(b'{"op":"pong"}' + b" " * 200)
    assert client.connection.close_pending
    world.account()


# The sockets


def capacity() -> int:
    """How many bytes an empty small socket takes at once."""
    transport = SlowSocket(Loop())
    sock: Any = transport.get_extra_info("socket")
    taken = int(sock.send(b"x" * 100_000))
    transport.discard()
    return taken


def test_partial_write_at_every_byte_of_gaps_and_queued_events() -> None:
    room = capacity()
    ends = []
    for shift in range(1, 400):
        world = World(Loop())
        client = world.connect(SlowSocket(world.loop))
        world.subscribe(client, "a", 3)
        world.subscribe(client, "b.*", 2, "drop_newest")
        fall_behind(world, client)
        for _ in range(5):
            world.publish("a")
            world.publish("b.c")
        client.transport.drain(None)
        # The socket is empty, and the next write begins with as much as to let it end `shift` bytes behind that.
        client.connection.answer(b'{"op":"pong"}'.ljust(room - shift - 4))
        world.turn()
        ends.append(client.connection.blocked)
        world.account()
        catch_up(world, client)
        world.end()
    follows = ends.index(False)
    assert follows > 300, "every byte of two gaps and five events"
    assert not any(ends[follows:])


@pytest.mark.parametrize("count", [1, 3])
def test_partial_write_at_every_byte_of_a_batch(count: int) -> None:
    room = capacity()
    ends = []
    for shift in range(1, 500):
        world = World(Loop())
        client = world.connect(SlowSocket(world.loop))
        for topic in range(count):
            world.subscribe(client, f"t{topic}", 2)
        world.turn()
        client.transport.drain(None)
        client.connection.answer(b'{"op":"pong"}'.ljust(room - shift - 4))
        for number in range(9):
            world.publish(f"t{number % count}")
        world.turn()
        ends.append(client.connection.blocked)
        world.account()
        catch_up(world, client)
        world.end()
    follows = ends.index(False)
    assert follows > 380, "every byte of nine events"
    assert not any(ends[follows:])


def test_batches_beyond_one_write_are_queued(world: World) -> None:
    client = world.connect(SlowSocket(world.loop))
    interests = [world.subscribe(client, f"t{number}") for number in range(200)]
    world.turn()
    client.transport.drain(None)
    numbers = [world.publish(interest.topic, 100) for interest in interests]
    world.turn()
    assert client.connection.blocked
    assert 130 < sum(interest.native.queued for interest in interests) < 200
    assert sorted(catch_up(world, client)) == numbers


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
def test_close_follows_the_whole_queue(world: World, kind: type[SlowPipe]) -> None:
    """Longer than what is written to one connection before the others have their turn."""
    client = world.connect(kind(world.loop))
    world.subscribe(client, "a", 2000)
    world.subscribe(client, "b", echo=False)
    world.turn()
    fall_behind(world, client)
    for _ in range(1500):
        world.publish("a")
    world.finish(client)
    # It is not blocked as it sends the last of them: a batch, and what it is set apart from, come at the same time.
    client.transport.drain(None)
    world.publish("b")
    world.publish("b", 0, client)
    assert len(catch_up(world, client)) == 1502
    assert client.gone


def test_write_error_affects_only_its_connection(world: World) -> None:
    client, other = world.connect(SlowSocket(world.loop)), world.connect(SlowSocket(world.loop))
    for each in (client, other):
        world.subscribe(each, "a", 3)
    client.vanished = True
    client.transport.vanish()
    first = world.publish("a")
    world.turn()
    assert client.gone
    second = world.publish("a")
    world.turn()
    other.transport.drain(None)
    assert other.stream == [first, second]


# The order


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
@pytest.mark.parametrize("resumed", [False, True])
def test_more_specific_subscription_does_not_overtake_queued_events(
    world: World, kind: type[SlowPipe], resumed: bool
) -> None:
    client, other = world.connect(kind(world.loop)), world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a.*")
    first = fall_behind(world, client, "a.b")
    waiting = [world.publish("a.b") for _ in range(3)]
    if resumed:
        # The socket is free, and the turn that sends what waits has not come yet.
        client.transport.drain(None)
        client.connection.resume_writing()
    world.subscribe(client, "a.b")
    world.subscribe(other, "a.b")
    last = world.publish("a.b")
    assert catch_up(world, client) == [first, *waiting, last]
    assert other.stream == [last]


def test_more_specific_subscription_does_not_overtake_a_pending_batch() -> None:
    """A batch for which nothing else waits is sent as it is. Here something does, and the socket has room for both."""
    loop = Loop()
    context = loop.context()
    hub = Hub(context)
    pipe = SlowSocket(loop)
    pipe.attach(Connection(context))
    pipe.subscriptions = [hub.subscribe(pipe.protocol, "a.*", max_queue=9, overflow="drop_oldest", echo=True)]
    hub.audience("a.b").publish("a.b", b"x" * 9000)
    loop.turn()
    hub.audience("a.b").publish("a.b", b"1")
    pipe.drain(None)
    pipe.protocol.resume_writing()
    pipe.subscriptions += [hub.subscribe(pipe.protocol, "a.b", max_queue=9, overflow="drop_oldest", echo=True)]
    hub.audience("a.b").publish("a.b", b"2")
    loop.turn()
    pipe.drain(None)
    assert [payload[:1] for _, payload in server_frames(bytes(pipe.received))] == [b"x", b"1", b"2"]
    pipe.lose()


def test_queues_of_a_connection_are_sent_in_turn(world: World) -> None:
    """So that a busy topic does not hold up a quiet one."""
    client = world.connect(SlowPipe(world.loop))
    world.subscribe(client, "a")
    world.subscribe(client, "b")
    first = fall_behind(world, client)
    busy = [world.publish("a") for _ in range(3)]
    quiet = world.publish("b")
    assert catch_up(world, client) == [first, busy[0], quiet, *busy[1:]]


# What stays


def test_nothing_leaks() -> None:
    def traffic() -> None:
        world = World(Loop())
        kinds = (SlowPipe, 0), (SlowSocket, 0), (SlowPipe, 15), (SlowSocket, 15)
        clients = [world.connect(kind(world.loop), window_bits) for kind, window_bits in kinds]
        for number, client in enumerate(clients):
            world.subscribe(client, "a.*", 3, POLICIES[number % 2], echo=number != 2)
            world.subscribe(client, "a.b", 20)
        for turn in range(3):
            for client in clients[:2]:
                client.transport.block()
            for size in (50, 3000, 70_000):
                for number in range(12):
                    world.publish(("a.b", "a.c")[number % 2], size, clients[2], fast=number % 3 == 0)
                world.turn()
            clients[3].drop(clients[3].interests["a.b"]) if turn == 1 else None
            for client in clients:
                catch_up(world, client)
        for client in clients[:2]:
            fall_behind(world, client, "a.b")
        for _ in range(5):
            world.publish("a.b")
        clients[0].connection.close(1000, "")
        # The socket breaks as it is written what waited; another one as it is written a batch.
        clients[1].transport.drain(None)
        for client in (clients[1], clients[3]):
            client.vanished = True
            client.transport.vanish()
        world.publish("a.b")
        world.end()
        del client, clients
        world.forget()

    for _ in range(10):
        traffic()
    # What is cached grows now and then, what leaks grows every time.
    growths = []
    for _ in range(5):
        before = sys.getallocatedblocks(), malloced()
        for _ in range(8):
            traffic()
        gc.collect()
        growths.append((sys.getallocatedblocks() - before[0], malloced() - before[1]))
    assert min(blocks for blocks, _ in growths) < 8, growths
    assert min(size for _, size in growths) < 8 * 16, growths


class Mallinfo2(ctypes.Structure):
    """What glibc says of its heap (mallinfo(3))."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        ("uordblks", ctypes.c_size_t),
    )


def malloced() -> int:
    """How many bytes are allocated beside those of Python's own allocator."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return int(mallinfo2().uordblks)
